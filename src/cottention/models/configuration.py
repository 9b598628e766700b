"""What both configs share: the attention fields, and checks that refuse a bad value in one line.

Config modules import no torch of their own, so a command can check settings before anything heavy is loaded.

    class CottentionGPTConfig(CottentionConfig): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from cottention.errors import CheckpointError, SettingsError, did_you_mean
from cottention.models.auto import REMOTE_MODULE, auto_map, remote_module
from cottention.models.directory import check_config_file, own_fields
from cottention.models.layer_types import (
    BERT_LAYER_TYPES,
    LAYER_TYPES,
    check_layer_types,
    is_uniform,
    uniform,
)
from cottention.seals import MANIFEST

ATTENTION_TYPES = tuple(LAYER_TYPES)
# The values of options of `cottention.layers`, which cannot be asked here without loading torch.
OUTPUT_GATES = ("sigmoid", "silu")
DECAYS = ("none", "fixed", "learned", "data")
DIVISORS = ("key", "query", "none")
WIDEST_CONV = 64
DTYPES = ("float64", "float32", "float16", "bfloat16")
# A config may come from a stranger, and what it names is built before weights are read.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 1024
MOST_LABELS = 1 << 20
# Names that transformers knows too; "gelu_new" (GPT-J's) is gelu's tanh form.
ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "relu",
    "relu2",
    "silu",
    "swish",
    "mish",
)


class CottentionConfig(PreTrainedConfig):
    """Fields that make a stock config ours.

    Args:
        attention_type: "cosine", or "softmax" for the twin. Of a mix of layers it says whether any is cosine.
        norm_const_init: start of every head's learned exponent, before its sigmoid.
        original_init: keep torch.nn.Linear's default initialisation where the original code did: GPT's q, k, v and out
            projections, BERT's q, k and v. For comparison with its curves.
        short_conv: tokens that a depthwise convolution and SiLU of queries, keys and values see, up to 64: in a GPT the
            last ones, in a BERT the ones around; None or 0: no convolution.
        output_norm: whether each head's output is divided by its root mean square.
        output_gate: "sigmoid" (open at the start) or "silu" of a projection of the tokens, times the output; None: no
            gate.
        decay: "none", or what cosine attention keeps of its state from token to token: "fixed", "learned" or, from a
            projection of each token, "data"; half-lives start from 8 tokens to the longest text. In a BERT it weighs
            tokens by their distance. Softmax layers have none, nor erase and divisor.
        erase: whether a token overwrites what the state holds at its key (the delta rule); a GPT's only.
        divisor: "key" divides each value by a power of the tokens up to it, as published; "query" the output by that of
            the tokens up to the query; "none" divides by nothing, and there is no norm_const.

    Attributes:
        layer_types: transformers' name for each layer's attention, written to config.json: "linear_attention" is
            cosine attention, "full_attention" softmax, "sliding_attention" softmax over a window. It may be given, as a
            mix that makes a hybrid; otherwise it follows from `attention_type`.
        auto_map: which of our classes each Auto class opens, for processes that never imported cottention. It comes
            from the class, whatever a file says, and is written to config.json with the module that it names.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "mlm_loss",
        "nsp_loss",
    ]

    known_layer_types: ClassVar[tuple[str, ...]] = BERT_LAYER_TYPES
    # Left out at their defaults, so that a config without them is what it was: saved states know it by a hash.
    later_options: ClassVar[tuple[str, ...]] = (
        "short_conv",
        "output_norm",
        "output_gate",
        "decay",
        "erase",
        "divisor",
    )

    attention_type: str = "cosine"
    norm_const_init: float = 0.5
    original_init: bool = False
    short_conv: int | None = None
    output_norm: bool = False
    output_gate: str | None = None
    decay: str = "none"
    erase: bool = False
    divisor: str = "key"

    def __post_init__(self, **kwargs: Any) -> None:
        given, layer_types = kwargs.pop("auto_map", None), kwargs.pop("layer_types", None)
        # transformers makes a table of so many labels, and takes any attribute of torch for a type.
        if kwargs.get("num_labels") is not None:
            check_size("num_labels", kwargs["num_labels"], maximum=MOST_LABELS)
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            if isinstance(dtype, str):
                check_choice("dtype", dtype, DTYPES)
        super().__post_init__(**kwargs)
        self.auto_map: dict[str, str] = auto_map(type(self).__module__) or given or {}
        check_choice("attention_type", self.attention_type, ATTENTION_TYPES)
        check_number("norm_const_init", self.norm_const_init)
        for name in ("original_init", "output_norm", "erase"):
            check_bool(name, getattr(self, name))
        if self.short_conv is not None:
            check_size("short_conv", self.short_conv, minimum=0, maximum=WIDEST_CONV)
        if self.output_gate is not None:
            check_choice("output_gate", self.output_gate, OUTPUT_GATES)
        check_choice("decay", self.decay, DECAYS)
        check_choice("divisor", self.divisor, DIVISORS)
        if layer_types is not None:
            check_size("num_hidden_layers", self.num_hidden_layers, maximum=MOST_LAYERS)
            self.layer_types = layer_types

    @property
    def layer_types(self) -> list[str]:
        """The attention of each layer, by transformers' names: a mix that was given, else by `attention_type`.

        accelerate asks it whether a sequence may be cut between processes, DynamicCache which layers it needs.
        """
        mixed = self.__dict__.get("_layer_types")
        if mixed is not None:
            return list(mixed)
        # transformers asks before the settings are checked, a stranger's among them: no list of a billion names.
        count = self.num_hidden_layers
        if self.attention_type not in ATTENTION_TYPES or not isinstance(count, int) or count > MOST_LAYERS:
            raise AttributeError("layer_types: attention_type and num_hidden_layers must be valid first")
        return uniform(self.attention_type, count)

    @layer_types.setter
    def layer_types(self, given: Any) -> None:
        self._check_layer_types(given)
        mixed = list(given)
        if mixed == uniform(self.attention_type, self.num_hidden_layers):
            self.__dict__.pop("_layer_types", None)
        else:
            self.__dict__["_layer_types"] = mixed

    @property
    def keeps_states(self) -> bool:
        """Whether some layer keeps other than keys and values alone, so that a GPT decodes from a `CosineCache`."""
        return bool(self.short_conv) or set(self.layer_types) != {LAYER_TYPES["softmax"]}

    @property
    def keeps_every_key(self) -> bool:
        """Whether some layer keeps every key, so that what decoding holds grows with the text."""
        return LAYER_TYPES["softmax"] in self.layer_types

    def check_layers(self) -> None:
        """Check once more that the layers fit the other settings, which may have been edited since.

        Raises:
            SettingsError: they do not.
        """
        self._check_layer_types(self.layer_types)

    def _check_layer_types(self, given: Any) -> None:
        window = getattr(self, "sliding_window", None)
        check_layer_types(given, self.attention_type, self.num_hidden_layers, window, known=self.known_layer_types)

    @property
    def attention_options(self) -> dict[str, Any]:
        """The optional parts of every attention layer, as `WithOptions.add_options` takes them."""
        return {name: getattr(self, name) for name in ("short_conv", "output_norm", "output_gate")}

    @property
    def memory_options(self) -> dict[str, Any]:
        """Those that cosine attention alone has, as `WithOptions.add_memory_options` takes them."""
        options = {name: getattr(self, name) for name in ("decay", "erase", "divisor")}
        return {**options, "longest_half_life": self.max_position_embeddings}

    def to_dict(self) -> dict[str, Any]:
        """The settings; `auto_map` is none."""
        settings = super().to_dict()
        settings.pop("auto_map", None)
        for name in self.later_options:
            if settings.get(name) == getattr(type(self), name):
                settings.pop(name, None)
        mixed = settings.pop("_layer_types", None)
        return settings if mixed is None else {**settings, "layer_types": mixed}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        written = super().to_diff_dict()
        written["layer_types"] = self.layer_types
        return {**written, "auto_map": dict(self.auto_map)} if self.auto_map else written

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the config; beside a config.json, the module that its `auto_map` names too."""
        super().to_json_file(json_file_path, use_diff=use_diff)
        path = Path(json_file_path)
        if path.name == CONFIG_NAME:
            path.with_name(MANIFEST).unlink(missing_ok=True)  # which is about the config that was there before
        if path.name == CONFIG_NAME and auto_map(type(self).__module__):
            path.with_name(f"{REMOTE_MODULE}.py").write_text(remote_module(type(self).__module__), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Have `save_pretrained` copy the file of a class of yours; ours are imported from the package instead."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    def least_parameters(self) -> int:
        """Numbers that every model of these sizes has at the least: its embedding, and matrices of every block."""
        width = self.hidden_size
        inner = self.intermediate_size or 4 * width
        block = 2 * (width * width + width * inner) + 3 * width * (self.short_conv or 0)
        return self.vocab_size * width + self.num_hidden_layers * block

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of what a config.json holds, which may come from a stranger; see `models/directory.py`.

        Raises:
            CheckpointError: it asks for something that our models do not have.
        """
        fields = own_fields(config_dict, kwargs.get("name_or_path") or cls.model_type)
        if is_uniform(fields.get("layer_types")):
            # They followed from settings that may have been edited since; the weights tell whether those are right.
            del fields["layer_types"]
        # What is checked together has to come together: transformers sets the caller's words one by one, afterwards.
        together = ("attention_type", "layer_types", "sliding_window")
        fields |= {name: kwargs.pop(name) for name in together if name in kwargs and hasattr(cls, name)}
        return super().from_dict(fields, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; another model's config is an error here, where transformers warns and uses defaults.

        Raises:
            CheckpointError: the config is damaged or belongs to another model type.
        """
        directory = Path(pretrained_model_name_or_path) / kwargs.get("subfolder", "")
        if directory.is_dir():
            check_config_file(directory)
        try:
            config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if "valid JSON" not in str(error):
                raise
            raise CheckpointError(
                f"config.json of {pretrained_model_name_or_path} must be valid JSON; it is not"
            ) from error
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            hint = ""
            if found in ("bert", "gptj"):
                hint = "; `cottention convert` turns a published (official) or a stock one (softmax) into ours"
            raise CheckpointError(
                f"{pretrained_model_name_or_path} must hold a model of type {cls.model_type!r}; got {found!r}{hint}"
            )
        return config_dict, unused


def is_ours(cls: type) -> bool:
    """Whether a class is this package's own, rather than a subclass elsewhere."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_size(name: str, value: Any, minimum: int = 1, maximum: int = LARGEST_SIZE) -> None:
    """Refuse anything but an int within these bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < minimum:
        raise SettingsError(f"{name} must be at least {minimum}; got {value}")
    if value > maximum:
        raise SettingsError(f"{name} must be at most {maximum}; got {value}")


def check_bool(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_number(name: str, value: Any, *, minimum: float = float("-inf"), maximum: float = float("inf")) -> None:
    """Refuse anything but a number within these bounds; NaN is within none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not minimum <= value <= maximum:
        raise SettingsError(f"{name} must be from {minimum:g} to {maximum:g}; got {value}")


def check_rotary(rotary_dim: Any, head_dim: int) -> None:
    """Refuse a number of dims that no head can turn; None is the whole head."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if not isinstance(rotary_dim, int) or isinstance(rotary_dim, bool):
        raise TypeError(f"rotary_dim must be an int or None; got {rotary_dim!r}")
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise SettingsError(f"rotary_dim must be even, from 2 to the head dim {head_dim}; got {rotary_dim}")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the closest one as a suggestion."""
    names = list(known)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {value!r}")
    if value not in names:
        raise SettingsError(f"{name} must be one of {', '.join(names)}; got {value!r}{did_you_mean(value, names)}")


def check_divides(divisor: str, divisor_value: int, whole: str, whole_value: int) -> None:
    """Refuse a number of heads that does not divide the width."""
    if whole_value % divisor_value:
        raise SettingsError(f"{divisor} must divide {whole}; got {divisor_value} and {whole_value}")


def check_token_id(name: str, value: Any, vocab_size: int) -> None:
    """Refuse a token id outside the vocabulary; None and lists of ids are fine."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is None:
            continue
        if not isinstance(one, int) or isinstance(one, bool):
            raise TypeError(f"{name} must be an int or None; got {one!r}")
        if not 0 <= one < vocab_size:
            raise SettingsError(f"{name} must be from 0 to vocab_size - 1 = {vocab_size - 1}; got {one}")


def check_vocabulary(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        SettingsError: they do not belong together.
    """
    num_tokens, num_embeddings = len(tokenizer), config.vocab_size
    if num_tokens > num_embeddings:
        raise SettingsError(
            f"tokenizer and model do not belong together: {num_tokens} tokens but {num_embeddings} embeddings"
        )
