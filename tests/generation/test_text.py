"""generate_text writes what a plain loop over logits writes, alone and in batches, at constant memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from cottention.benchmarks.memory import MALLOC_ENVIRONMENT
from cottention.errors import CheckpointError, CottentionError, DataError
from cottention.generation import GenerationResult, generate_text
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES

PROMPTS = ["The people", "A naïve café in 東", "O", "to the people of the United States: "]


def ids_of(text: str) -> list[int]:
    return tiny.bpe_tokenizer()(text)["input_ids"] or [0]


def decoded(ids: list[int]) -> str:
    return str(tiny.bpe_tokenizer().decode(ids, skip_special_tokens=True))


def write(model: Any, prompts: Any = PROMPTS[0], **settings: Any) -> GenerationResult:
    return generate_text(model, tiny.bpe_tokenizer(), prompts, **{"max_new_tokens": 20, "temperature": 0, **settings})


def next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """In float32, as `generate` works."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def by_hand(model: Any, prompt: str, choose: Any, num_tokens: int = 20) -> list[int]:
    """New tokens, one forward over everything for each, up to the end token."""
    ids, new = ids_of(prompt), []
    for _ in range(num_tokens):
        token = int(choose(next_logits(model, ids + new), ids + new))
        if token == 0:
            break
        new.append(token)
    return new


def likeliest(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
    return logits.argmax()


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.gpt(request.param)


@pytest.fixture(scope="module")
def cosine() -> Any:
    return tiny.gpt()


@pytest.fixture(scope="module")
def ending() -> Any:
    """A model that often ends its text."""
    model = tiny.gpt()
    with torch.no_grad():
        model.lm_head.bias[0] += 3.0
    return model


@pytest.mark.parametrize("prompt", [*PROMPTS, ""])
def test_greedy_text_is_the_argmax_of_every_step(model: Any, prompt: str) -> None:
    result = write(model, prompt)
    new = by_hand(model, prompt, likeliest)
    (row,) = result.rows
    assert row.text == decoded(new)
    assert (row.prompt, row.num_prompt_tokens, row.num_new_tokens) == (prompt, len(ids_of(prompt)), len(new))
    assert result.texts == [row.text]
    assert result.num_new_tokens == len(new)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 4},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 7},
    ],
)
def test_samples_are_drawn_from_the_distribution_that_was_asked_for(cosine: Any, settings: dict[str, Any]) -> None:
    def draw(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        logits = logits / settings["temperature"]
        if "top_k" in settings:
            logits = logits.masked_fill(logits < logits.topk(settings["top_k"]).values[-1], -torch.inf)
        order = logits.argsort()  # ascending: the unlikely ones that together have less than 1 - top_p are left out
        dropped = logits[order].softmax(-1).cumsum(-1) <= 1 - settings["top_p"]
        logits = logits.index_fill(0, order[dropped], -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1)

    texts = []
    for seed in range(4):
        torch.manual_seed(seed)
        expected = decoded(by_hand(cosine, PROMPTS[0], draw))
        texts.append(write(cosine, seed=seed, **settings).texts[0])
        assert texts[-1] == expected
    assert len(set(texts)) > 1


def test_a_seed_decides_and_the_global_random_state_is_left_alone(cosine: Any) -> None:
    settings = {"temperature": 1.0, "prompts": PROMPTS}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = write(cosine, seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert write(cosine, seed=1, **settings).texts == first.texts
    assert write(cosine, seed=2, **settings).texts != first.texts


def test_a_repetition_penalty_makes_what_occurred_less_likely(cosine: Any) -> None:
    def penalised(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        seen = torch.tensor(sorted(set(ids)))
        values = logits[seen]
        return logits.index_copy(0, seen, torch.where(values < 0, values * 1.7, values / 1.7)).argmax()

    # In a batch too: padding is no token that occurred.
    expected = [decoded(by_hand(cosine, prompt, penalised)) for prompt in PROMPTS]
    assert write(cosine, PROMPTS, repetition_penalty=1.7).texts == expected
    assert expected != write(cosine, PROMPTS).texts


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "repetition_penalty": 1.3}, {"stop_strings": ["e"]}])
def test_a_text_is_the_same_however_many_calls_it_takes(
    ending: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 60, "seed": 2, **settings}
    expected = write(ending, PROMPTS, **settings)
    assert len({row.num_new_tokens for row in expected.rows}) > 1
    for tokens_a_call in (1, 7, 59, 60):
        monkeypatch.setattr("cottention.generation.writing._TOKENS_A_CALL", tokens_a_call)
        assert write(ending, PROMPTS, **settings).rows == expected.rows


def likeliest_of_all(model: Any, prompt: str, num_tokens: int) -> list[int]:
    """The likeliest continuation of exactly this length, by looking at the best 6 of every step: beams, by hand."""
    beams = [(0.0, ids_of(prompt))]
    for _ in range(num_tokens):
        longer = []
        for score, ids in beams:
            for token, nats in enumerate((-next_logits(model, ids).log_softmax(-1)).tolist()):
                longer.append((score + nats, [*ids, token]))
        beams = sorted(longer)[:6]
    return beams[0][1][len(ids_of(prompt)) :]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_beams_find_what_a_search_by_hand_finds(attention_type: str) -> None:
    model = tiny.gpt(attention_type, std=0.08)
    with torch.no_grad():
        model.lm_head.bias[0] = -1e3  # never ends
    prompts = ["The people", "A", "to the people of the United States: "]
    expected = [decoded(likeliest_of_all(model, prompt, 5)) for prompt in prompts]
    for chunk in (3, 1000):
        assert write(model, prompts, num_beams=6, max_new_tokens=5, prefill_chunk=chunk).texts == expected
    assert expected != write(model, prompts, max_new_tokens=5).texts


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_batch_of_beams_is_each_prompt_alone(attention_type: str) -> None:
    model = tiny.gpt(attention_type)
    with torch.no_grad():
        model.lm_head.bias[0] += 2.0
    settings: dict[str, Any] = {"num_beams": 4, "repetition_penalty": 1.4, "max_new_tokens": 15}
    result = write(model, PROMPTS, **settings)
    assert result.texts == [write(model, prompt, **settings).texts[0] for prompt in PROMPTS]
    assert {row.finish_reason for row in result.rows} == {"end", "length"}


def test_a_stop_string_ends_a_beam(cosine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(cosine, num_beams=3, max_new_tokens=30)
    stop = whole.texts[0][6:8]
    num_steps: list[int] = []
    hook = cosine.lm_head.register_forward_hook(lambda *_: num_steps.append(1))
    (row,) = write(cosine, num_beams=3, max_new_tokens=30, stop_strings=[stop, "no such text"]).rows
    hook.remove()
    assert row.finish_reason == "stop"
    assert stop not in row.text
    assert len(num_steps) < 30


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_batch_writes_what_each_prompt_gets_alone(attention_type: str) -> None:
    model = tiny.gpt(attention_type)
    result = write(model, [*PROMPTS, ""])
    assert result.texts == [write(model, prompt).texts[0] for prompt in [*PROMPTS, ""]]
    assert [row.prompt for row in result.rows] == [*PROMPTS, ""]


def test_rows_of_a_batch_end_each_in_its_own_time(ending: Any) -> None:
    prompts = [*PROMPTS, "x", "The", "States"]
    result = write(ending, prompts, max_new_tokens=30)
    reasons = {row.finish_reason for row in result.rows}
    assert reasons == {"end", "length"}
    for row in result.rows:
        new = by_hand(ending, row.prompt, likeliest, 30)
        assert (row.text, row.num_new_tokens) == (decoded(new), len(new))
        assert (row.finish_reason == "length") == (len(new) == 30)


def test_a_prompt_may_end_with_any_token(cosine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers takes a prompt that ends with its padding token for padded on the wrong side, and warns.
    monkeypatch.setattr(transformers.generation.utils.logger, "warning", pytest.fail)
    for prompt in ["a<|endoftext|>", "<|endoftext|>", "!", '"', "#"]:
        new = by_hand(cosine, prompt, likeliest)
        assert write(cosine, prompt).texts == [decoded(new)]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("stops", [(), ("e",), ("東", "th")])
def test_streamed_pieces_are_the_text(temperature: float, stops: tuple[str, ...]) -> None:
    model = tiny.gpt()
    for seed in range(3):
        pieces: list[str] = []
        settings = {"max_new_tokens": 40, "temperature": temperature, "seed": seed, "stop_strings": stops}
        (row,) = write(model, stream=pieces.append, **settings).rows
        assert "".join(pieces) == row.text
        assert all(pieces)
        assert row == write(model, **settings).rows[0]


def test_pieces_come_while_the_text_is_written(cosine: Any) -> None:
    class EnoughError(Exception):
        pass

    pieces: list[str] = []

    def stop_after_three(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise EnoughError

    with pytest.raises(EnoughError):
        write(cosine, max_new_tokens=10**9, stream=stop_after_three)


def test_a_stop_string_ends_a_text_before_itself_and_ends_the_work(cosine: Any) -> None:
    whole = write(cosine, max_new_tokens=60)
    text = whole.texts[0]
    stop = text[20:23]
    (row,) = write(cosine, stop_strings=[stop], max_new_tokens=60).rows
    assert (row.text, row.finish_reason) == (text[: text.find(stop)], "stop")
    assert row.num_new_tokens < 60
    # The prompt does not count.
    assert write(cosine, "The people", stop_strings=["people"]).texts == write(cosine, "The people").texts


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 1000])
def test_a_prompt_is_read_in_chunks_with_the_same_result(chunk: int) -> None:
    prompts = ["the people " * 9, *PROMPTS]
    for attention_type in ATTENTION_TYPES:
        model = tiny.gpt(attention_type)
        expected = write(model, prompts).texts
        lengths: list[int] = []

        def note(_module: Any, args: Any, kwargs: Any, lengths: list[int] = lengths) -> None:
            lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

        hook = model.transformer.register_forward_pre_hook(note, with_kwargs=True)
        assert write(model, prompts, prefill_chunk=chunk).texts == expected
        hook.remove()
        assert max(lengths) <= chunk
        assert len(lengths) > 20


def test_the_state_has_one_size(cosine: Any) -> None:
    sizes = {
        write(cosine, "the people " * repeats, max_new_tokens=length).state_bytes
        for repeats, length in [(1, 1), (1, 200), (50, 2), (50, 100)]
    }
    # 2 layers x (2 heads x 16 x 16 float64 numbers and one count)
    assert sizes == {2 * (2 * 16 * 16 * 8 + 8)}
    assert write(cosine, PROMPTS).state_bytes == 4 * sizes.pop()
    softmax = tiny.gpt("softmax")
    short, long = (write(softmax, max_new_tokens=length).state_bytes for length in (2, 20))
    assert long > short > 0


def test_a_cosine_model_reads_and_writes_past_its_positions() -> None:
    model = tiny.gpt(n_positions=8)
    prompt = "The people of the United States"
    assert write(model, prompt).texts == [decoded(by_hand(model, prompt, likeliest))]


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ("x" * 64, 1, "the prompt has 64 tokens; this softmax model has 64 positions"),
        (
            "xx",
            63,
            "max_new_tokens must be at most 62 behind a prompt of 2 tokens, because this softmax model has 64 p",
        ),
    ],
)
def test_a_softmax_model_without_positions_refuses_before_it_reads(
    prompt: str, max_new_tokens: int, message: str
) -> None:
    model = tiny.gpt("softmax")
    with pytest.raises(CottentionError) as caught:
        write(model, prompt, max_new_tokens=max_new_tokens)
    assert str(caught.value).startswith(message)
    assert write(model, "The people", max_new_tokens=62).num_new_tokens == 62


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts must hold at least one text; got none"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more; got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more; got inf"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0; got 0.0"),
        ({"num_beams": 0}, "num_beams must be at least 1; got 0"),
        (
            {"num_beams": 2, "temperature": 0.8},
            "num_beams searches for the likeliest text, which needs temperature 0; got 0.8",
        ),
        (
            {"num_beams": 2, "stream": print},
            "stream needs num_beams 1, as a search ends all at once; got 2",
        ),
        ({"seed": -1}, "seed must be from 0 to 2**63 - 1; got -1"),
        ({"seed": 2**63}, f"seed must be from 0 to 2**63 - 1; got {2**63}"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1; got 0"),
        ({"prompts": PROMPTS, "stream": print}, "stream takes one prompt; got 4"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(cosine: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError) as caught:
        write(cosine, **settings)
    assert str(caught.value) == message


def test_a_prompt_that_is_no_text_is_one_line(cosine: Any) -> None:
    with pytest.raises(DataError, match=r"^the prompt is not valid Unicode text \(character 1\)$"):
        write(cosine, "a\udcff")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CottentionError, match="do not belong together: 290 tokens but 100 embeddings"):
        write(tiny.gpt(vocab_size=100))


def test_tokens_without_a_name_are_no_text() -> None:
    # Embeddings are often padded to a round number.
    model = tiny.gpt(vocab_size=300)
    with torch.no_grad():
        model.lm_head.bias[295] += 1e3
    (row,) = write(model, max_new_tokens=3).rows
    assert (row.text, row.num_new_tokens, row.finish_reason) == ("", 3, "length")


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny.bpe_tokenizer().backend_tokenizer)
    with pytest.raises(CottentionError, match="an empty prompt needs a tokenizer with an end-of-text token"):
        generate_text(tiny.gpt(eos_token_id=None), bare, "")


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_one_line(temperature: float, value: float) -> None:
    model = tiny.gpt()
    with torch.no_grad():
        model.lm_head.bias[7] = value
    with pytest.raises(CheckpointError, match="the model's logits are not finite"):
        write(model, temperature=temperature)


_PEAK = """
import sys, torch
from cottention.benchmarks.memory import _start_high_water_mark, _status_bytes
from cottention.generation import generate_text
from tests import tiny

model, tokenizer = tiny.gpt(dtype=torch.float32, vocab_size=290), tiny.bpe_tokenizer()
with torch.no_grad():
    model.lm_head.bias[0] = -1e3  # never ends
prompt_length, max_new_tokens = map(int, sys.argv[1:])
generate_text(model, tokenizer, "x" * 3000, max_new_tokens=10)
before = _start_high_water_mark()
result = generate_text(model, tokenizer, "x" * prompt_length, max_new_tokens=max_new_tokens)
assert result.num_new_tokens == max_new_tokens
print(_status_bytes("VmHWM") - before)
"""


def peak_bytes(prompt_length: int, max_new_tokens: int) -> int:
    environment = {**os.environ, **MALLOC_ENVIRONMENT, "PYTHONPATH": "."}
    command = [sys.executable, "-c", _PEAK, str(prompt_length), str(max_new_tokens)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_prompt_and_text() -> None:
    if not os.path.exists("/proc/self/clear_refs"):  # noqa: PTH110
        pytest.skip("needs the high-water mark of Linux")
    short = peak_bytes(10_000, 200)
    assert peak_bytes(10_000, 2500) - short < 1_000_000
    # What is left of a prompt is itself: its tokens as the tokenizer, lists and tensors hold them.
    assert peak_bytes(70_000, 200) - short < 60_000 * 250
