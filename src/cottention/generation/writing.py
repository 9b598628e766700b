"""Chooses new tokens with transformers' `generate`, at constant memory where the model allows it.

`generate` keeps every token of a call. A cosine or hybrid model needs none but the last, so it is called for some
hundred tokens at a time: what stays between two calls is the state, the last token, and which tokens occurred at all
(for the repetition penalty). A softmax model, and a search with beams, is one call.

    cache = write_tokens(model, reading, watcher, max_new_tokens=128, temperature=0.8, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cottention.errors import CheckpointError
from cottention.generation.reading import Reading
from cottention.generation.stream import LONGEST_CHARACTER, TextWatcher
from cottention.models.versions import cache_of

_TOKENS_A_CALL = 512


def write_tokens(
    model: PreTrainedModel,
    reading: Reading,
    watcher: TextWatcher,
    *,
    max_new_tokens: int,
    repetition_penalty: float,
    end_ids: set[int],
    **sampling: Any,
) -> Any:
    """Let `watcher` see new tokens until it has seen enough; return the cache.

    Args:
        model: a CottentionGPTForCausalLM.
        reading: the texts to continue.
        watcher: told of every token, and asked which rows are finished.
        max_new_tokens: per text, at most.
        repetition_penalty: above 1, tokens that occurred become less likely.
        end_ids: tokens that end a row.
        **sampling: do_sample and its settings, for transformers' GenerationConfig.
    """
    ids, mask, cache = reading.input_ids, reading.attention_mask, reading.cache
    penalty = RepetitionPenalty(repetition_penalty, reading.occurred)
    a_call = _TOKENS_A_CALL if model.config.keeps_states else max_new_tokens
    for start in range(0, max_new_tokens, a_call):
        watcher.begin_call(ids.shape[1])
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]  # bound by GenerationMixin at run time
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=_config(min(a_call, max_new_tokens - start), end_ids, **sampling),
            logits_processor=LogitsProcessorList([_RefuseNaN(), penalty]),
            stopping_criteria=StoppingCriteriaList([watcher]),
        )
        cache = cache_of(output)
        if watcher.all_finished or start + a_call >= max_new_tokens:
            break
        penalty.note(output.sequences)
        ids = output.sequences[:, -1:]
        mask = torch.ones_like(ids)
        cache.restart_columns()
    return cache


def search_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    watcher: TextWatcher,
    *,
    num_beams: int,
    max_new_tokens: int,
    repetition_penalty: float,
    end_ids: set[int],
    stop_strings: Sequence[str],
) -> Any:
    """Show `watcher` each row's likeliest continuation among those that a search with beams finds; return the cache.

    Args:
        model: see `write_tokens`, as for all arguments not listed here.
        tokenizer: decodes the ends of the beams.
        reading: see there.
        watcher: sees the tokens when the search is over.
        num_beams: continuations of each text that are followed.
        max_new_tokens: see there.
        repetition_penalty: see there.
        end_ids: see there.
        stop_strings: texts that end a beam.
    """
    cache, prompt_length = reading.cache, reading.input_ids.shape[1]
    if cache is not None:
        cache.batch_repeat_interleave(num_beams)
    penalty = RepetitionPenalty(repetition_penalty, reading.occurred.repeat_interleave(num_beams, dim=0))
    criteria = [_BeamStops(tokenizer, prompt_length, stop_strings)] if stop_strings else []
    output: Any = model.generate(  # pyright: ignore[reportCallIssue]
        reading.input_ids,
        attention_mask=reading.attention_mask,
        past_key_values=cache,
        generation_config=_config(max_new_tokens, end_ids, num_beams=num_beams, do_sample=False),
        logits_processor=LogitsProcessorList([_RefuseNaN(), penalty]),
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    watcher.begin_call(prompt_length)
    watcher(output.sequences, output.sequences)
    return cache_of(output)


def _config(max_new_tokens: int, end_ids: set[int], **settings: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=0,  # written behind a finished row, where nobody reads it
        return_dict_in_generate=True,
        **settings,
    )


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that occurred less likely, as transformers' own does, of a text that is not all in `input_ids`.

    Args:
        penalty: divides positive scores and multiplies negative ones; 1 changes nothing.
        occurred: [B, vocabulary] bool, tokens of the text before.
    """

    def __init__(self, penalty: float, occurred: Tensor) -> None:
        self._penalty = penalty
        self._occurred = occurred

    def note(self, input_ids: Tensor) -> None:
        """Take these tokens for occurred from now on."""
        self._occurred = self._occurred.scatter(1, input_ids, True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores of the next tokens."""
        if self._penalty == 1:
            return scores
        occurred = self._occurred.scatter(1, input_ids, True)
        return torch.where(occurred, torch.where(scores < 0, scores * self._penalty, scores / self._penalty), scores)


class _RefuseNaN(LogitsProcessor):
    """Stops at logits that are no numbers: the first of them would win, and sampling fails deep inside torch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        if scores.isnan().any() or scores.isposinf().any():
            raise CheckpointError("the model's logits are not finite; its weights are damaged or its training diverged")
        return scores


class _BeamStops(StoppingCriteria):
    """Ends beams at a stop string. Beams change places, so each is looked at anew, the end of it that may hold one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, stop_strings: Sequence[str]) -> None:
        self._tokenizer, self._prompt_length, self._stop_strings = tokenizer, prompt_length, stop_strings
        longest = max(len(stop.encode()) for stop in stop_strings)  # in tokens too, none of which is less than a byte
        self._num_last = longest + LONGEST_CHARACTER

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: object) -> torch.BoolTensor:
        ends = input_ids[:, self._prompt_length :][:, -self._num_last :].tolist()
        texts = [str(self._tokenizer.decode(end, skip_special_tokens=True)) for end in ends]
        found = [any(stop in text for stop in self._stop_strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)  # pyright: ignore[reportReturnType]
