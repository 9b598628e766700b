"""CottentionPreTrainedModel: initialisation, loading that hides nothing, and argument checks for both model families.

transformers warns and goes on when a checkpoint lacks weights; here a model that would be partly random is an error,
because a softmax checkpoint opened as cosine differs in nothing but its missing norm_const. Only a task's new head may
be missing.

    class CottentionGPTPreTrainedModel(CottentionPreTrainedModel): ...
"""

from __future__ import annotations

import errno
import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from cottention import seals
from cottention.errors import CheckpointError, CottentionError
from cottention.layers.decay import Decay
from cottention.layers.options import GateProjection, refuse_torchscript
from cottention.layers.rotary import packed_positions
from cottention.layers.short_conv import ShortConv
from cottention.models.configuration import is_ours
from cottention.models.directory import check_weights
from cottention.models.shards import join_shards
from cottention.ops import IMPLEMENTATIONS

# A checkpoint saved without a pooler (masked LM) may start a task that has one; stock BERT allows it too.
_MAY_BE_NEW = re.compile(r"(^|\.)pooler\.")
_GIVEN = "the given state dict"
_OPTIONAL_PART = re.compile(r"\.(attn|self)\.([qkv]_conv|output_norm|gate_proj|decay|beta_proj)\.")


class CottentionPreTrainedModel(PreTrainedModel):
    """Base of all our models."""

    supports_gradient_checkpointing = True
    # What packed texts need to know of a class (`models/packing.py`): how it reads positions that are not told apart
    # from those of a padded text, and whether its output has a row for each text.
    gaps_begin_texts = False
    gives_a_row_per_text = False
    # Ranks that share the sequence, of which the model is then given a slice: see `cottention.distributed`.
    process_group: Any = None
    _keep_in_fp32_modules_strict: Any = None

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        config.check_layers()
        if config.attention_type == "cosine":
            # sigmoid(m) is an exponent of the length: bfloat16's 8 bits of it would move the divisor by a percent. What
            # the decay of a token is a percent off, that of a hundred is by a factor.
            self._keep_in_fp32_modules_strict = {"norm_const", *(() if config.decay == "none" else ("decay",))}
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved model, as in transformers.

        Raises:
            CheckpointError: the files are damaged, differ from the seal that they were saved with, hold the other
                attention type or another shape, or lack weights of the model itself; one line each.
        """
        source = pretrained_model_name_or_path or _GIVEN
        directory = Path(pretrained_model_name_or_path or "") / kwargs.get("subfolder", "")
        if pretrained_model_name_or_path and (directory / "config.json").is_file():
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                config = cast(Any, cls.config_class).from_pretrained(config or directory)
            check_weights(directory, config)
            if (directory / seals.SHARDS).is_dir():  # a run's checkpoint, written by processes that held parts
                kwargs |= {"config": config, "state_dict": join_shards(directory / seals.SHARDS)}
                pretrained_model_name_or_path = None
        with _held_load_report() as release:
            try:
                loaded: Any = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    output_loading_info=True,
                    # Shapes are compared below, where the error can name the weight.
                    ignore_mismatched_sizes=True,
                    **kwargs,
                )
            except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
                reason = _what_is_wrong(error)
                if reason is None:
                    raise
                raise CheckpointError(f"{source} {reason}") from error
            model, info = loaded
            _check_loaded(model, info, source, ignore_mismatched_sizes)
            release()
        if source is not _GIVEN:
            seals.check_model(directory)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *, seal: bool = True, **kwargs: Any) -> None:
        """Save, as in transformers, with a seal by which damage to config and weights is found when they are opened.

        Args:
            save_directory: made when missing.
            seal: write it; without, the directory opens unchecked.
            **kwargs: of transformers.
        """
        super().save_pretrained(save_directory, **kwargs)  # the config takes an earlier seal away
        if seal and kwargs.get("is_main_process", True) and Path(save_directory).is_dir():
            seals.seal(Path(save_directory), seals.model_files(Path(save_directory), tokenizer=False))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Have `save_pretrained` copy the file of a class of yours; ours are imported from the package instead."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The name that runs; "eager" is transformers' word for a model's own attention."""
        attention_type = self.config.attention_type
        names = ("eager", "sdpa") if attention_type == "softmax" else ("eager",)
        if attn_implementation in (None, *names):
            return attn_implementation or "eager"
        runs = (
            "torch's scaled_dot_product_attention" if attention_type == "softmax" else "what set_implementation chooses"
        )
        raise CottentionError(
            f"attn_implementation must be {' or '.join(map(repr, names))} for attention_type={attention_type!r}, "
            f"which runs {runs}; got {attn_implementation!r}"
        )

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "keeps_default_init", False):
            assert isinstance(module, nn.Linear)
            module.reset_parameters()
            return
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (ShortConv, Decay)):
            module.reset_parameters(std, init.copy_)
        elif isinstance(module, GateProjection):
            module.reset_parameters(std)
        norm_const = module._parameters.get("norm_const")
        if norm_const is not None:
            nn.init.constant_(norm_const, self.config.norm_const_init)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks of a module first."""
        refuse_torchscript(self)

    def set_implementation(self, implementation: str) -> None:
        """Choose the form of cosine attention that runs in every layer.

        Args:
            implementation: "auto" or a name in `cottention.ops.IMPLEMENTATIONS`. It is not saved with the model.

        Raises:
            CottentionError: there is no such form.
        """
        known = ["auto", *IMPLEMENTATIONS]
        if implementation not in known:
            raise CottentionError(f"implementation must be one of {', '.join(known)}; got {implementation!r}")
        for module in self.modules():
            if isinstance(getattr(module, "implementation", None), str):
                module.implementation = implementation  # type: ignore[assignment]


def activation(name: str) -> nn.Module:
    """The activation of this name; GPT-J's "gelu_new" as torch's fused form of the same formula."""
    return nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]


def attention_maps(
    config: PreTrainedConfig, output_attentions: bool | str | None, cu_seqlens: Tensor | None
) -> list[Tensor] | None:
    """An empty list for the layers' maps when they are asked for, by argument or config; else None.

    Args:
        config: of the model, which may ask for maps of every call.
        output_attentions: whether they are asked for; "packed": of packed texts too.
        cu_seqlens: boundaries of packed texts.

    Raises:
        ValueError: the texts are packed and maps of packed texts were not asked for, or it is another word.
    """
    asked = config.output_attentions if output_attentions is None else output_attentions
    if isinstance(asked, str) and asked != "packed":
        raise ValueError(f"output_attentions must be True, False or 'packed'; got {asked!r}")
    if not asked:
        return None
    if cu_seqlens is not None and asked != "packed":
        raise ValueError(
            "output_attentions and cu_seqlens exclude each other: give texts as padded rows, or "
            "output_attentions='packed' for maps that are zero between texts; got both"
        )
    return []


def check_inputs(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    past_length: int = 0,
    *,
    packs_past: bool = False,
) -> None:
    """Check what both families take.

    Args:
        input_ids: `[B, T]`.
        inputs_embeds: `[B, T, D]`.
        attention_mask: `[B, T]` or `[B, past_length + T]`.
        cu_seqlens: `[N+1]`.
        past_length: columns in the cache.
        packs_past: whether a filled cache may hold packed texts.

    Raises:
        ValueError: arguments contradict each other.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds; got {got}")
    tokens = inputs_embeds if input_ids is None else input_ids
    assert tokens is not None
    B, T = tokens.shape[:2]
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other: packed texts hold no padding; got both")
        if past_length and not packs_past:
            raise ValueError("cu_seqlens and a filled past_key_values exclude each other; got both")
    if attention_mask is not None and tuple(attention_mask.shape) not in ((B, T), (B, past_length + T)):
        expected = f"[B, T] = {[B, T]}" + (f" or {[B, past_length + T]} with the past" if past_length else "")
        raise ValueError(f"attention_mask must have shape {expected}; got {list(attention_mask.shape)}")


def check_length(length: int, limit: int, name: str) -> None:
    """Refuse a text that the model has no positions for.

    Raises:
        CottentionError: it is too long.
    """
    if length > limit:
        raise CottentionError(f"the text must have at most {limit} tokens ({name} of this model); got {length}")


def longest_text(cu_seqlens: Tensor | None, position_ids: Tensor | None, length: int) -> int:
    """Positions that these inputs need; `length` when neither packing nor positions are given."""
    if torch.compiler.is_compiling():
        return length if cu_seqlens is None and position_ids is None else 0
    if position_ids is not None:
        return int(position_ids.max()) + 1 if position_ids.numel() else 0
    if cu_seqlens is not None:
        return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return length


def default_positions(num_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """0 .. T-1, padding counted as the original does; restarting where a packed text begins."""
    if cu_seqlens is not None:
        return packed_positions(cu_seqlens, num_tokens)
    return torch.arange(num_tokens, device=device)[None]


def wants_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    """Whether a forward returns an object rather than a tuple."""
    return bool(config.return_dict if return_dict is None else return_dict)


@contextmanager
def _held_load_report() -> Iterator[Any]:
    """Hold back transformers' report on loaded weights; the yielded function lets it through once all is well."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    def release() -> None:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hold)
    try:
        yield release
    finally:
        logger.removeFilter(hold)


def _check_loaded(model: PreTrainedModel, info: dict[str, Any], source: Any, may_mismatch: bool) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    asked = model.config.attention_type
    parts = [key for key in unexpected if _OPTIONAL_PART.search(key)]
    if parts:
        raise CheckpointError(f"{source} holds {parts[0]}, an option of attention that its config does not have on")
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    norm_consts = {f"{prefix}{key}" for key, _ in model.base_model.named_parameters() if key.endswith("norm_const")}
    strange = [key for key in unexpected if key.endswith("norm_const")]
    absent = sorted(norm_consts & set(missing))
    if len(set(model.config.layer_types)) > 1 and (strange or 0 < len(absent) < len(norm_consts)):
        key, there = (strange[0], "holds") if strange else (absent[0], "lacks")
        raise CheckpointError(f"{source} {there} {key}: its cosine layers are others than those of layer_types")
    if strange:
        raise CheckpointError(
            f"{source} holds cosine attention (it has norm_const weights); got attention_type={asked!r}"
        )
    if any(key.endswith("position_embeddings.weight") for key in unexpected):
        raise CheckpointError(f"{source} holds learned positions; got position_embedding_type='rotary'")
    lost = [key for key in missing if key.startswith(prefix) and not _MAY_BE_NEW.search(key)]
    needed = {f"{prefix}{key}" for key, _ in model.base_model.named_parameters() if not _MAY_BE_NEW.search(key)}
    if needed <= set(lost):
        raise CheckpointError(f"{source} must hold the weights of {type(model).__name__}; it holds none of them")
    if norm_consts and norm_consts <= set(lost):
        raise CheckpointError(f"{source} holds softmax attention (it has no norm_const); got attention_type={asked!r}")
    if info["mismatched_keys"] and not may_mismatch:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(f"{key} in {source} must have shape {list(expected)}, by its config; got {list(found)}")
    if lost:
        raise CheckpointError(f"{source} must hold every weight of the model; {len(lost)} are missing, first {lost[0]}")


def _what_is_wrong(error: Exception) -> str | None:
    """How a loading error is said in a few words; None when it says nothing about the files."""
    first_line = (str(error).splitlines() or ["it ends too early"])[0]
    if isinstance(error, pickle.UnpicklingError):
        return "must hold plain tensors; its pytorch_model.bin is damaged or would run code, so it was not loaded"
    if isinstance(error, RuntimeError):
        return f"holds damaged weights: {first_line}" if "PytorchStreamReader" in first_line else None
    if isinstance(error, OSError):
        if "no file named" in first_line:
            return "must hold model.safetensors; there is no such file"
        # What torch.load makes of a cut zip file.
        return "holds damaged weights: pytorch_model.bin cannot be read" if error.errno == errno.EINVAL else None
    return f"holds damaged weights: {first_line}"
