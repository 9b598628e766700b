"""Predict hidden tokens (masked-language modelling), on windows that may become longer towards the end of the run.

objective = Masked(recipe)
objective.examples(opened).collator([row])["labels"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.collators import MaskedLMCollator
from cottention.data.packing import pack_mlm_windows
from cottention.data.pair_examples import PairExamples
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX
from cottention.generation.loading import Kind
from cottention.logging import get_logger
from cottention.models import CottentionBertConfig, CottentionBertForMaskedLM, CottentionBertForPreTraining
from cottention.training.held_out import HeldOut
from cottention.training.objectives.base import OpenedText, PreparedText, PretrainingObjective, Stream, spread
from cottention.training.stream import ExampleStream, FallingShares, PassCollator, PhasedStream

logger = get_logger(__name__)


class Masked(PretrainingObjective):
    """A BERT's objective on windows."""

    what = "windows"
    laid_out_by_steps = ("long_sequence_length", "mlm_probability_start")

    @property
    def model_kind(self) -> Kind:
        """One that fills in words, and tells sentences apart where it has the head."""
        return "next-sentence" if self.recipe.model.next_sentence_head else "masked-lm"

    def random_labels(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As many targets as the recipe hides at its end."""
        hidden = torch.rand(input_ids.shape, device=input_ids.device) < self.recipe.data.mlm_probability
        return {"labels": input_ids.masked_fill(~hidden, IGNORE_INDEX)}

    @property
    def leaves_parameters_unused(self) -> bool:
        """A next-sentence head gets no gradient from masked tokens."""
        return self.recipe.model.next_sentence_head

    def new_model(self, fields: Mapping[str, Any]) -> PreTrainedModel:
        """A BERT with the heads that the recipe wants."""
        has_both = self.recipe.model.next_sentence_head
        model_class = CottentionBertForPreTraining if has_both else CottentionBertForMaskedLM
        return model_class(CottentionBertConfig(**fields))

    def examples(self, opened: OpenedText) -> PreparedText:
        """Windows of one length, or of two."""
        length, long_length = self.recipe.data.sequence_length, self.recipe.data.long_sequence_length
        windows = _windows(opened.train, opened.tokenizer, length, tail="drop")
        long = None if long_length is None else _windows(opened.train, opened.tokenizer, long_length, tail="drop")
        held_out = _windows(opened.held_out, opened.tokenizer, length, tail="pad")
        return self._prepared(opened.tokenizer, windows, long, held_out)

    def stream(self, text: PreparedText) -> Stream:
        """The short windows, and then the long ones; with its share of hidden tokens each, where that changes."""
        stream, data = self._windows_in_order(text), self.recipe.data
        if data.mlm_probability_start is None:
            return stream
        return FallingShares(
            stream,
            first=data.mlm_probability_start,
            last=data.mlm_probability,
            examples_per_step=self.recipe.training.global_batch_size,
        )

    def _windows_in_order(self, text: PreparedText) -> ExampleStream | PhasedStream:
        training = self.recipe.training
        if text.long is None:
            return ExampleStream(
                text.train, num_examples=training.max_steps * training.global_batch_size, seed=training.seed
            )
        num_long = self.recipe.num_long_steps * training.global_batch_size
        num_short = training.max_steps * training.global_batch_size - num_long
        return PhasedStream(
            [
                ExampleStream(text.train, num_examples=num_short, seed=training.seed),
                ExampleStream(text.long, num_examples=num_long, seed=training.seed),
            ]
        )

    def collator(self, text: PreparedText) -> Any:
        """One pass of short windows, several of long ones."""
        return text.collator if text.long is None else PassCollator(text.collator, [1, self.recipe.data.long_ratio])

    def epochs_after(self, step: int, text: PreparedText) -> float:
        """How often so many steps have read the text, at both lengths."""
        if text.long is None:
            return super().epochs_after(step, text)
        num_long = max(0, step - (self.recipe.training.max_steps - self.recipe.num_long_steps))
        epochs = (step - num_long) / len(text.train) + num_long / len(text.long)
        return epochs * self.recipe.training.global_batch_size

    def new_collator(self, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Any:
        """Hides tokens of windows."""
        data = self.recipe.data
        return MaskedLMCollator(tokenizer, data.mlm_probability, seed, whole_words=data.whole_word_masking)

    def _prepared(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Dataset | PairExamples,
        long: Dataset | PairExamples | None,
        held_out: Dataset | PairExamples,
    ) -> PreparedText:
        data, training = self.recipe.data, self.recipe.training
        length = data.sequence_length
        logger.info("%d %s of %d tokens to train on, %d held out", len(examples), self.what, length, len(held_out))
        if long is not None:
            logger.info("%d longer %s for the last part of the run", len(long), self.what)
        if tokenizer.mask_token_id is None:
            raise SettingsError(f"a BERT needs a tokenizer with a mask token; {data.tokenizer!r} has none")
        measure = HeldOut(
            spread(held_out, data.eval_tokens // length),
            collator=self.new_collator(tokenizer, seed=training.seed + 1),
            arch="bert",
            batch_size=training.micro_batch_size,
            targets_per_byte=None,
        )
        return PreparedText(
            objective=type(self),
            tokenizer=tokenizer,
            train=examples,
            long=long,
            collator=self.new_collator(tokenizer, seed=training.seed),
            held_out=measure,
        )


def _windows(tokens: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, *, tail: str) -> Dataset:
    special: Any = tokenizer  # its ids are made at run time, which a type checker reads as anything at all
    return pack_mlm_windows(
        tokens,
        length,
        cls_token_id=special.cls_token_id,
        sep_token_id=special.sep_token_id,
        pad_token_id=special.pad_token_id,
        tail=tail,
    )
