"""Continues texts with a GPT: greedy, sampled or searched with beams, one prompt or a batch, streamed or whole.

transformers' `generate` chooses the tokens. Around it: the prompt is read in chunks, so that a cosine model takes a
prompt of any length in constant memory, or goes on from a state that was read before; a batch is padded on the left;
and what came out is measured.

    result = generate_text(model, tokenizer, "My fellow Americans", stream=lambda piece: print(piece, end=""))
    print(result.tokens_per_s, result.state_bytes)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import SettingsError
from cottention.generation.encoding import encode
from cottention.generation.reading import ReadState, read_rows, state_bytes
from cottention.generation.saved_state import check_state_support
from cottention.generation.stream import RowText, TextWatcher
from cottention.generation.writing import search_tokens, write_tokens
from cottention.models.configuration import check_vocabulary


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """What one prompt became."""

    prompt: str
    """As given."""
    text: str
    """What follows the prompt, without end token and stop string."""
    finish_reason: str
    """"end" (the model ended the text), "stop" (a stop string came) or "length" (max_new_tokens are done)."""
    num_prompt_tokens: int
    """Tokens read."""
    num_new_tokens: int
    """Tokens in the text."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The texts of a batch, and what they cost."""

    rows: tuple[GeneratedText, ...]
    """One per prompt, in the order given."""
    prefill_s: float
    """Seconds for reading the prompts."""
    decode_s: float
    """Seconds for writing the new tokens."""
    state_bytes: int
    """Memory that the model carried from token to token at the end, all rows together."""

    @property
    def texts(self) -> list[str]:
        """The new texts alone."""
        return [row.text for row in self.rows]

    @property
    def num_new_tokens(self) -> int:
        """New tokens, all rows together."""
        return sum(row.num_new_tokens for row in self.rows)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of writing, all rows together."""
        return self.num_new_tokens / self.decode_s if self.decode_s > 0 else 0.0


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    stream: Callable[[str], None] | None = None,
    prefill_chunk: int = 2048,
    state: ReadState | None = None,
) -> GenerationResult:
    """Continue one prompt or several.

    Args:
        model: a CottentionGPTForCausalLM.
        tokenizer: the model's own.
        prompts: a text, or several to be continued together; an empty one starts a new text, or goes on from `state`.
        max_new_tokens: tokens to write at most, for each prompt.
        temperature: 0 always takes the likeliest token; 1 samples from the model as it is; between them, more careful.
        top_k: sample among the k likeliest tokens; None among all.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: above 1, tokens that occurred already become less likely.
        num_beams: above 1, search for the likeliest text with so many candidates; needs temperature 0.
        seed: decides the samples; the global random state is left alone.
        stop_strings: end a text before any of these.
        stream: called with each new piece of text at once; with a single prompt, and not with beams.
        prefill_chunk: prompt tokens read at a time.
        state: of a text that was read before (`read_text`, `load_state`), which every prompt goes on from.

    Returns:
        The texts in the order of the prompts, with speed and memory.

    Raises:
        SettingsError: a setting makes no sense, a softmax model has too few positions for prompt and new tokens, or
            the tokenizer is not the model's.
        DataError: a prompt is no text.
        CheckpointError: the model computes NaN, which no token can be chosen by.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(
        texts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        seed=seed,
        stream=stream,
        prefill_chunk=prefill_chunk,
    )
    check_vocabulary(tokenizer, model.config)
    if state is not None:
        check_state_support(model)
    prompt_ids = [_prompt_ids(tokenizer, text, state) for text in texts]
    _check_length(model, max(map(len, prompt_ids)), max_new_tokens)
    stop_strings = [stop for stop in stop_strings if stop]
    end_ids = _end_ids(model, tokenizer)
    written: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
        "end_ids": end_ids,
    }
    started = time.perf_counter()
    with torch.inference_mode(), _seeded(seed, model.device):
        reading = read_rows(model, prompt_ids, chunk=prefill_chunk, start=state)
        watcher = TextWatcher(
            tokenizer,
            tails=reading.tails,
            end_ids=end_ids,
            stop_strings=stop_strings,
            on_text=None if stream is None else lambda _row, piece: stream(piece),
        )
        read = time.perf_counter()
        if num_beams > 1:
            cache = search_tokens(
                model, tokenizer, reading, watcher, num_beams=num_beams, stop_strings=stop_strings, **written
            )
        else:
            sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p} if temperature > 0 else {}
            cache = write_tokens(model, reading, watcher, do_sample=temperature > 0, **sampling, **written)
        rows = watcher.finish()
    return GenerationResult(
        rows=tuple(map(_row_result, texts, prompt_ids, rows)),
        prefill_s=read - started,
        decode_s=time.perf_counter() - read,
        state_bytes=state_bytes(cache),
    )


def _row_result(prompt: str, prompt_ids: np.ndarray, row: RowText) -> GeneratedText:
    return GeneratedText(
        prompt=prompt,
        text=row.text,
        finish_reason=row.reason,
        num_prompt_tokens=len(prompt_ids),
        num_new_tokens=len(row.token_ids),
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, state: ReadState | None) -> np.ndarray:
    token_ids = encode(tokenizer, text, "the prompt", add_special_tokens=state is None)
    if len(token_ids) or state is not None:
        return token_ids
    # Every training document follows an end-of-text, so that token is where a new text begins.
    start: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise SettingsError("an empty prompt needs a tokenizer with an end-of-text token; this one has none")
    return np.array([start], dtype=np.int32)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    own: Any = tokenizer.eos_token_id
    ids = {own, *configured} if isinstance(configured, (list, tuple)) else {own, configured}
    return {token for token in ids if token is not None}


@contextmanager
def _seeded(seed: int, device: torch.device):
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_length(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> None:
    if model.config.keeps_states:
        return
    num_positions = model.config.n_positions
    if num_prompt_tokens >= num_positions:
        raise SettingsError(
            f"the prompt has {num_prompt_tokens} tokens; this softmax model has {num_positions} positions"
        )
    if num_prompt_tokens + max_new_tokens > num_positions:
        raise SettingsError(
            f"max_new_tokens must be at most {num_positions - num_prompt_tokens} behind a prompt of "
            f"{num_prompt_tokens} tokens, because this softmax model has {num_positions} positions; "
            f"got {max_new_tokens}"
        )


def _check(
    texts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
    num_beams: int,
    seed: int,
    stream: object,
    prefill_chunk: int,
) -> None:
    rules = (
        (len(texts) >= 1, "prompts must hold at least one text; got none"),
        (max_new_tokens >= 1, f"max_new_tokens must be at least 1; got {max_new_tokens}"),
        (0 <= temperature < float("inf"), f"temperature must be 0 or more; got {temperature}"),
        (top_k is None or top_k >= 1, f"top_k must be at least 1; got {top_k}"),
        (0 < top_p <= 1, f"top_p must be above 0 and at most 1; got {top_p}"),
        (0 < repetition_penalty < float("inf"), f"repetition_penalty must be above 0; got {repetition_penalty}"),
        (num_beams >= 1, f"num_beams must be at least 1; got {num_beams}"),
        (
            num_beams <= 1 or temperature == 0,
            f"num_beams searches for the likeliest text, which needs temperature 0; got {temperature}",
        ),
        (0 <= seed < 2**63, f"seed must be from 0 to 2**63 - 1; got {seed}"),
        (prefill_chunk >= 1, f"prefill_chunk must be at least 1; got {prefill_chunk}"),
        (stream is None or len(texts) == 1, f"stream takes one prompt; got {len(texts)}"),
        (stream is None or num_beams == 1, f"stream needs num_beams 1, as a search ends all at once; got {num_beams}"),
    )
    for holds, complaint in rules:
        if not holds:
            raise SettingsError(complaint)
