"""A GPT's examples by the mode of its recipe: packed windows, packed windows read in lanes, or windows of documents.

examples = gpt_examples(recipe, tokens, held_out_tokens, tokenizer)
gpt_stream(recipe, examples.train)[0]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.collators import CausalCollator
from cottention.data.documents import DocumentWindows, collate_documents
from cottention.data.packing import pack_windows, packing_report
from cottention.data.tokenization import arrow_batches
from cottention.training.held_out import HeldOut
from cottention.training.held_out_carried import CarriedHeldOut
from cottention.training.lanes import LaneStream, collate_lanes
from cottention.training.recipe import GPTRecipe
from cottention.training.stream import ExampleStream


class GPTExamples(NamedTuple):
    """What a GPT reads."""

    train: Dataset | DocumentWindows
    """To train on."""
    collator: Any
    """Turns examples of the stream into a batch."""
    held_out: HeldOut | CarriedHeldOut
    """Measures a model on the held-out text, data.eval_tokens at most."""
    num_held_out: int
    """Windows or documents in it."""


def gpt_examples(
    recipe: GPTRecipe, train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase
) -> GPTExamples:
    """Cut tokens as the recipe says.

    Args:
        recipe: all choices.
        train: tokens to train on, as `tokenize_documents` gives them.
        validation: held-out tokens.
        tokenizer: gives the end-of-text token.

    Raises:
        DataError: the text is too short for its windows.
        SettingsError: the tokenizer has no end-of-text token.
    """
    special: Any = tokenizer  # its ids are made at run time, which a type checker reads as anything at all
    eos: int | None = special.eos_token_id
    data, seed, batch_size = recipe.data, recipe.training.seed, recipe.training.micro_batch_size
    most = max(1, data.eval_tokens // data.sequence_length)
    if data.mode == "document":
        documents = DocumentWindows(train, data.sequence_length, eos, seed=seed)
        held_out = DocumentWindows(validation, data.sequence_length, eos, seed=seed + 1)
        measure = HeldOut(
            spread(held_out, most),
            collator=collate_documents,
            arch="gpt",
            batch_size=batch_size,
            targets_per_byte=held_out.num_tokens / _num_bytes(validation),
        )
        return GPTExamples(documents, collate_documents, measure, len(held_out))
    windows = pack_windows(train, data.sequence_length, eos)
    held_out = pack_windows(validation, data.sequence_length, eos, tail="pad")
    report = packing_report(validation, held_out)
    # The very first token, an end-of-text, has nothing before it. Each document's own is a target, but no byte.
    targets_per_byte = (report.num_tokens - 1) / report.num_bytes
    if data.carry_state:
        carried = CarriedHeldOut(
            held_out,
            num_lanes=batch_size,
            max_windows=most,
            targets_per_byte=targets_per_byte,
            limit=data.carry_tokens,
        )
        return GPTExamples(windows, collate_lanes, carried, len(held_out))
    collator = CausalCollator(reset_at_documents=data.reset_at_documents)
    measure = HeldOut(
        spread(held_out, most),
        collator=collator,
        arch="gpt",
        batch_size=batch_size,
        targets_per_byte=targets_per_byte,
    )
    return GPTExamples(windows, collator, measure, len(held_out))


def gpt_stream(recipe: GPTRecipe, examples: Dataset | DocumentWindows) -> ExampleStream | LaneStream:
    """All examples of a run, in their order."""
    training = recipe.training
    if recipe.data.carry_state:
        return LaneStream(
            examples,
            num_lanes=recipe.num_lanes,
            step_size=training.global_batch_size,
            num_steps=training.max_steps,
            seed=training.seed,
            afresh_steps=recipe.num_afresh_steps,
        )
    return ExampleStream(examples, num_examples=training.max_steps * training.global_batch_size, seed=training.seed)


def spread(examples: Any, most: int) -> Any:
    """At most so many examples, evenly spread over all."""
    if len(examples) <= max(1, most):
        return examples
    rows = np.linspace(0, len(examples) - 1, max(1, most)).round().astype(int)
    return examples.select(rows) if isinstance(examples, Dataset) else examples.restricted(rows)


def _num_bytes(tokens: Dataset) -> int:
    return sum(int(table["num_bytes"].to_numpy().sum()) for table in arrow_batches(tokens.select_columns("num_bytes")))
