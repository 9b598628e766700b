"""Recipes: every choice of one pretraining run, as frozen dataclasses.

A recipe has five sections, model, data, optimizer, training, parallelism (`training/recipe_sections.py`). The defaults
are those of the published runs of GPT 300M and BERT base; `recipes/*.yaml` and flags change them
(`training/recipe_files.py`). No torch here: `--help` is quick.

    recipe = GPTRecipe(training=GPTTrainingSettings(max_steps=200, global_batch_size=8, micro_batch_size=8))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cottention.errors import SettingsError
from cottention.models.layer_types import check_carries
from cottention.training.recipe_sections import (
    BertDataSettings,
    BertModelSettings,
    BertTrainingSettings,
    GPTDataSettings,
    GPTModelSettings,
    GPTTrainingSettings,
    OptimizerSettings,
    ParallelismSettings,
    TrainingSettings,
)


@dataclass(frozen=True, kw_only=True)
class GPTRecipe:
    """Pretrains a GPT: next-token prediction on packed windows, or on windows of documents."""

    arch: ClassVar[Literal["gpt", "bert"]] = "gpt"

    model: GPTModelSettings = field(default_factory=GPTModelSettings)
    """Shape, kind of attention, initialisation."""
    data: GPTDataSettings = field(default_factory=GPTDataSettings)
    """Where the text comes from, how it is cut."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule."""
    training: GPTTrainingSettings = field(default_factory=GPTTrainingSettings)
    """How long, in what portions, what is written when."""
    parallelism: ParallelismSettings = field(default_factory=ParallelismSettings)
    """What several processes share out among them."""

    def __post_init__(self) -> None:
        if not self.data.carry_state:
            return
        if self.training.minutes is not None:
            raise SettingsError("data.carry_state excludes training.minutes: its lanes are cut by steps; got both")
        if self.model.attention_type != "cosine":
            raise SettingsError(
                "data.carry_state needs model.attention_type: cosine, whose state has a constant size; "
                f"got {self.model.attention_type}"
            )
        if (mixed := self.model.mixed_layer_types) is not None:
            check_carries(mixed)
        # A block that is computed twice would start the second time from the state that it ended with, and a graph of
        # fixed shapes would be compiled anew for each number of documents in a step.
        for name in ("gradient_checkpointing", "compile"):
            if getattr(self.training, name):
                raise SettingsError(f"data.carry_state excludes training.{name}; got both")
        for name in ("shard", "sequence"):
            if getattr(self.parallelism, name) > 1:
                raise SettingsError(
                    f"data.carry_state excludes parallelism.{name}: each process keeps states; got both"
                )
        if self.num_lanes % self.training.global_batch_size:
            raise SettingsError(
                "data.carry_lanes must be a multiple of training.global_batch_size, whose windows take turns; "
                f"got {self.num_lanes} and {self.training.global_batch_size}"
            )
        if self.num_afresh_steps >= self.training.max_steps:
            raise SettingsError(
                "data.carry_after must be less than training.max_steps; "
                f"got {self.data.carry_after:g} and {self.training.max_steps}"
            )

    @property
    def objective(self) -> str:
        """The way of training, by its name in `training/objectives/`."""
        return "carried" if self.data.carry_state else "causal"

    @property
    def passes_at_most(self) -> int:
        """Passes that a micro batch is cut into where its examples are longest."""
        return 1

    @property
    def num_lanes(self) -> int:
        """Stretches of the corpus that are read side by side where states are carried."""
        return self.data.carry_lanes or self.training.global_batch_size

    @property
    def num_afresh_steps(self) -> int:
        """Steps before the first that carries states, whichever way they were given."""
        return _num_steps(self.data.carry_after, self.training)

    @property
    def num_warmup_steps(self) -> int:
        """Warmup in steps, whichever way it was given."""
        return _num_steps(self.optimizer.warmup_steps, self.training)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads; in documents, the most that fit."""
        return self.training.global_batch_size * self.data.sequence_length

    def tokens_after(self, step: int) -> int:
        """Tokens that so many optimizer steps read; in documents, the most that fit."""
        return step * self.tokens_per_step

    def config_fields(self) -> dict[str, Any]:
        """The model section as `CottentionGPTConfig` takes it."""
        settings = self.model
        return {
            "attention_type": settings.attention_type,
            "vocab_size": settings.vocab_size,
            "n_positions": self.data.sequence_length,
            "n_embd": settings.n_embd,
            "n_layer": settings.n_layer,
            "n_head": settings.n_head,
            "n_inner": settings.n_inner,
            "rotary_dim": None if settings.position_embedding_type == "none" else settings.rotary_dim,
            "position_embedding_type": settings.position_embedding_type,
            "layer_types": settings.mixed_layer_types,
            "sliding_window": settings.sliding_window,
            "resid_pdrop": settings.dropout,
            "embd_pdrop": settings.dropout,
            "original_init": settings.original_init,
            "short_conv": settings.short_conv,
            "output_norm": settings.output_norm,
            "output_gate": settings.output_gate,
            **({} if settings.attention_type == "softmax" else _memory_options(settings)),
        }


@dataclass(frozen=True, kw_only=True)
class BertRecipe:
    """Pretrains a BERT: prediction of masked tokens and, on sentence pairs, of the next sentence."""

    arch: ClassVar[Literal["gpt", "bert"]] = "bert"

    model: BertModelSettings = field(default_factory=BertModelSettings)
    """Shape, kind of attention, initialisation."""
    data: BertDataSettings = field(default_factory=BertDataSettings)
    """Where the text comes from, how it is cut, how much of it is masked."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW and its schedule."""
    training: BertTrainingSettings = field(default_factory=BertTrainingSettings)
    """How long, in what portions, what is written when."""
    parallelism: ParallelismSettings = field(default_factory=ParallelismSettings)
    """What several processes share out among them."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "long_sequence_length"):
            length = getattr(self.data, name)
            if self.model.position_embedding_type == "rotary" or length is None:
                continue
            if length > self.model.max_position_embeddings:
                raise SettingsError(
                    f"data.{name} must not exceed model.max_position_embeddings; "
                    f"got {length} and {self.model.max_position_embeddings}"
                )
        if self.data.long_sequence_length is not None and self.training.minutes is not None:
            raise SettingsError("data.long_sequence_length excludes training.minutes: its part is of steps; got both")
        if self.data.next_sentence and not self.model.next_sentence_head:
            raise SettingsError("data.next_sentence needs model.next_sentence_head: true; got false")
        if self.parallelism.sequence > 1 and self.data.next_sentence and self.training.unpadded:
            raise SettingsError(
                "parallelism.sequence with data.next_sentence needs training.unpadded: false, for the first tokens of "
                f"packed pairs lie in different slices; got {self.parallelism.sequence} and true"
            )
        if self.training.micro_batch_size % self.data.long_ratio:
            raise SettingsError(
                "training.micro_batch_size must be a multiple of data.long_sequence_length / data.sequence_length = "
                f"{self.data.long_ratio}; got {self.training.micro_batch_size}"
            )

    @property
    def objective(self) -> str:
        """The way of training, by its name in `training/objectives/`."""
        return "pairs" if self.data.next_sentence else "masked"

    @property
    def passes_at_most(self) -> int:
        """Passes that a micro batch is cut into where its examples are longest."""
        return self.data.long_ratio

    @property
    def num_long_steps(self) -> int:
        """Steps at the end of the run that read long windows."""
        if self.data.long_sequence_length is None:
            return 0
        return round(self.data.long_fraction * self.training.max_steps)

    @property
    def num_warmup_steps(self) -> int:
        """Warmup in steps, whichever way it was given."""
        return _num_steps(self.optimizer.warmup_steps, self.training)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads, before windows become longer; of pairs, the most that fit."""
        return self.training.global_batch_size * self.data.sequence_length

    def tokens_after(self, step: int) -> int:
        """Tokens that so many optimizer steps read; of pairs, the most that fit."""
        num_long = max(0, step - (self.training.max_steps - self.num_long_steps))
        return self.tokens_per_step * (step + num_long * (self.data.long_ratio - 1))

    def config_fields(self) -> dict[str, Any]:
        """The model section as `CottentionBertConfig` takes it."""
        settings = self.model
        return {
            "attention_type": settings.attention_type,
            "vocab_size": settings.vocab_size,
            "hidden_size": settings.hidden_size,
            "num_hidden_layers": settings.num_hidden_layers,
            "num_attention_heads": settings.num_attention_heads,
            "intermediate_size": settings.intermediate_size,
            "max_position_embeddings": settings.max_position_embeddings,
            "layer_types": settings.layer_types,
            "position_embedding_type": settings.position_embedding_type,
            "rotary_dim": settings.rotary_dim,
            "norm_first": settings.norm_first,
            "hidden_dropout_prob": settings.dropout,
            "attention_probs_dropout_prob": settings.dropout,
            "original_init": settings.original_init,
            "short_conv": settings.short_conv,
            "output_norm": settings.output_norm,
            "output_gate": settings.output_gate,
            "decay": settings.decay,
            "divisor": settings.divisor,
            "sparse_prediction": settings.sparse_prediction,
        }


Recipe = GPTRecipe | BertRecipe
RECIPE_CLASSES: dict[str, type[GPTRecipe | BertRecipe]] = {"gpt": GPTRecipe, "bert": BertRecipe}


def _memory_options(settings: GPTModelSettings) -> dict[str, Any]:
    """What cosine layers alone have; the config of a softmax twin, one flag away, does not name it."""
    return {"decay": settings.decay, "erase": settings.erase, "divisor": settings.divisor}


def _num_steps(given: float, training: TrainingSettings) -> int:
    """Steps, or a number below 1: a fraction of the run."""
    return round(given * training.max_steps) if given < 1 else round(given)
