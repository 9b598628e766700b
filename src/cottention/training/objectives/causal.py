"""Predict the next token: of packed windows of the joined text, or of random windows of documents.

objective = Causal(recipe)
objective.examples(opened).train[0]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cottention.data.collators import CausalCollator
from cottention.data.documents import DocumentWindows, collate_documents
from cottention.data.packing import pack_windows, packing_report
from cottention.data.tokenization import arrow_batches
from cottention.generation.loading import Kind
from cottention.logging import get_logger
from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM
from cottention.training.held_out import HeldOut
from cottention.training.objectives.base import OpenedText, PreparedText, PretrainingObjective, spread

logger = get_logger(__name__)


class Causal(PretrainingObjective):
    """A GPT's objective."""

    reads_token_corpora = True

    @property
    def model_kind(self) -> Kind:
        """One that writes text."""
        return "causal-lm"

    def random_labels(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Every token is a target."""
        return {"labels": input_ids}

    def new_model(self, fields: Mapping[str, Any]) -> PreTrainedModel:
        """A GPT with a language-modelling head."""
        model = CottentionGPTForCausalLM(CottentionGPTConfig(**fields))
        model.fused_loss = self.recipe.training.fused_loss
        return model

    def examples(self, opened: OpenedText) -> PreparedText:
        """Windows of documents, or packed ones."""
        if self.recipe.data.mode == "document":
            return self._documents(opened)
        windows, held_out, targets_per_byte = self.packed(opened)
        collator = CausalCollator(reset_at_documents=self.recipe.data.reset_at_documents)
        measure = HeldOut(
            spread(held_out, self.most_held_out),
            collator=collator,
            arch="gpt",
            batch_size=self.recipe.training.micro_batch_size,
            targets_per_byte=targets_per_byte,
        )
        return self._prepared(opened, windows, collator, measure)

    def packed(self, opened: OpenedText) -> tuple[Dataset, Dataset, float]:
        """Full windows, held-out windows, the last one padded, and the targets that held-out text has per byte."""
        eos, length = _eos_of(opened), self.recipe.data.sequence_length
        windows = pack_windows(opened.train, length, eos)
        held_out = pack_windows(opened.held_out, length, eos, tail="pad")
        report = packing_report(opened.held_out, held_out)
        _log("windows of", length, windows, held_out)
        # The very first token, an end-of-text, has nothing before it. Each document's own is a target, but no byte.
        return windows, held_out, (report.num_tokens - 1) / report.num_bytes

    def _documents(self, opened: OpenedText) -> PreparedText:
        eos, length, seed = _eos_of(opened), self.recipe.data.sequence_length, self.recipe.training.seed
        documents = DocumentWindows(opened.train, length, eos, seed=seed)
        held_out = DocumentWindows(opened.held_out, length, eos, seed=seed + 1)
        _log("documents, at most", length, documents, held_out)
        measure = HeldOut(
            spread(held_out, self.most_held_out),
            collator=collate_documents,
            arch="gpt",
            batch_size=self.recipe.training.micro_batch_size,
            targets_per_byte=held_out.num_tokens / _num_bytes(opened.held_out),
        )
        return self._prepared(opened, documents, collate_documents, measure)

    @property
    def most_held_out(self) -> int:
        """Windows that an evaluation reads, at most."""
        return max(1, self.recipe.data.eval_tokens // self.recipe.data.sequence_length)

    def _prepared(
        self, opened: OpenedText, examples: Dataset | DocumentWindows, collator: Any, held_out: Any
    ) -> PreparedText:
        return PreparedText(
            objective=type(self),
            tokenizer=opened.tokenizer,
            train=examples,
            long=None,
            collator=collator,
            held_out=held_out,
        )


def _log(what: str, length: int, examples: Any, held_out: Any) -> None:
    logger.info("%d %s %d tokens to train on, %d held out", len(examples), what, length, len(held_out))


def _eos_of(opened: OpenedText) -> Any:
    special: Any = opened.tokenizer  # its ids are made at run time, which a type checker reads as anything at all
    return special.eos_token_id


def _num_bytes(tokens: Dataset) -> int:
    return sum(int(table["num_bytes"].to_numpy().sum()) for table in arrow_batches(tokens.select_columns("num_bytes")))
