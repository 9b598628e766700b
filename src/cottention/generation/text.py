"""Continues texts with a GPT: greedy or sampled, one prompt or a batch, streamed or whole.

transformers' `generate` chooses the tokens. Around it: the prompt is read in chunks, so that a cosine model takes a
prompt of any length in constant memory; a batch is padded on the left; and what came out is measured.

    result = generate_text(model, tokenizer, "My fellow Americans", stream=lambda piece: print(piece, end=""))
    print(result.tokens_per_s, result.state_bytes)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from cottention.errors import CheckpointError, SettingsError
from cottention.generation.encoding import encode
from cottention.generation.stream import RowText, TextWatcher
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
    seed: int = 0,
    stop_strings: Sequence[str] = (),
    stream: Callable[[str], None] | None = None,
    prefill_chunk: int = 2048,
) -> GenerationResult:
    """Continue one prompt or several.

    Args:
        model: a CottentionGPTForCausalLM.
        tokenizer: the model's own.
        prompts: a text, or several to be continued together; an empty one starts a new text.
        max_new_tokens: tokens to write at most, for each prompt.
        temperature: 0 always takes the likeliest token; 1 samples from the model as it is; between them, more careful.
        top_k: sample among the k likeliest tokens; None among all.
        top_p: sample among the likeliest tokens that together have this probability.
        repetition_penalty: above 1, tokens that occurred already become less likely.
        seed: decides the samples; the global random state is left alone.
        stop_strings: end a text before any of these.
        stream: called with each new piece of text at once; with a single prompt only.
        prefill_chunk: prompt tokens read at a time.

    Returns:
        The texts in the order of the prompts, with speed and memory.

    Raises:
        SettingsError: a setting makes no sense, a softmax model has too few positions for prompt and new tokens, or
            the tokenizer is not the model's.
        DataError: a prompt is no text.
        CheckpointError: the model computes NaN, which no token can be chosen by.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check(texts, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stream, prefill_chunk)
    check_vocabulary(tokenizer, model.config)
    prompt_ids = [_prompt_ids(tokenizer, text) for text in texts]
    _check_length(model, max(map(len, prompt_ids)), max_new_tokens)
    input_ids, attention_mask = _left_padded(prompt_ids, model.device)

    end_ids = _end_ids(model, tokenizer)
    watcher = TextWatcher(
        tokenizer,
        prompt_ids=prompt_ids,
        prompt_length=input_ids.shape[1],
        end_ids=end_ids,
        stop_strings=stop_strings,
        on_text=None if stream is None else lambda _row, piece: stream(piece),
    )
    sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=0,  # written behind a finished row, where nobody reads it
        return_dict_in_generate=True,
        **sampling,
    )
    started = time.perf_counter()
    with torch.inference_mode(), _seeded(seed, model.device):
        cache = prefill(model, input_ids[:, :-1], attention_mask[:, :-1], chunk=prefill_chunk)
        read = time.perf_counter()
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]  # bound by GenerationMixin at run time
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([_RefuseNaN()]),
            stopping_criteria=StoppingCriteriaList([watcher]),
        )
        rows = watcher.finish()
    return GenerationResult(
        rows=tuple(map(_row_result, texts, prompt_ids, rows)),
        prefill_s=read - started,
        decode_s=time.perf_counter() - read,
        state_bytes=state_bytes(output.past_key_values),
    )


def prefill(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, chunk: int) -> Any:
    """Read tokens chunk by chunk into a cache; the memory for activations is that of one chunk.

    Args:
        model: a CottentionGPTForCausalLM.
        input_ids: [B, T]; T may be 0.
        attention_mask: [B, T], 1 = real.
        chunk: tokens read at a time.

    Returns:
        The cache for `generate`; None when there was nothing to read.
    """
    # The same positions that `generate` counts: pads have none, so a padded prompt is read as if it stood alone.
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    for start in range(0, input_ids.shape[1], chunk):
        end = min(start + chunk, input_ids.shape[1])
        output = model.base_model(  # without the head: nobody asks for these tokens' logits
            input_ids[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
    return cache


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds."""
    layers = getattr(cache, "layers", None) or ()
    return sum(_bytes_in(value) for layer in layers for value in vars(layer).values())


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_in, value)) if isinstance(value, (tuple, list)) else 0


class _RefuseNaN(LogitsProcessor):
    """Stops at logits that are no numbers: the first of them would win, and sampling fails deep inside torch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        if scores.isnan().any() or scores.isposinf().any():
            raise CheckpointError("the model's logits are not finite; its weights are damaged or its training diverged")
        return scores


def _row_result(prompt: str, prompt_ids: list[int], row: RowText) -> GeneratedText:
    return GeneratedText(
        prompt=prompt,
        text=row.text,
        finish_reason=row.reason,
        num_prompt_tokens=len(prompt_ids),
        num_new_tokens=len(row.token_ids),
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    token_ids = encode(tokenizer, text, "the prompt")
    if token_ids:
        return token_ids
    # Every training document follows an end-of-text, so that token is where a new text begins.
    start: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise SettingsError("an empty prompt needs a tokenizer with an end-of-text token; this one has none")
    return [start]


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Fill up on the left; each row with its own first token, which the repetition penalty has counted anyway."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, attention_mask


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
    if model.config.attention_type != "softmax":
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
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    repetition_penalty: float,
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
        (0 <= seed < 2**63, f"seed must be from 0 to 2**63 - 1; got {seed}"),
        (prefill_chunk >= 1, f"prefill_chunk must be at least 1; got {prefill_chunk}"),
        (stream is None or len(texts) == 1, f"stream takes one prompt; got {len(texts)}"),
    )
    for holds, complaint in rules:
        if not holds:
            raise SettingsError(complaint)
