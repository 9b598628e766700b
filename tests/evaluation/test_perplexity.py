"""Perplexity is what a plain loop over tokens finds, whatever the windows, the batches and the pieces of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPTJConfig, GPTJForCausalLM

from cottention.errors import CottentionError, DataError
from cottention.evaluation import PerplexityResult, TextScore, evaluate_perplexity
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES, randomised

TEXTS = [*tiny.TEXTS, "To the people.", "x"]


def ids_of(text: str) -> list[int]:
    return [0, *tiny.bpe_tokenizer()(text)["input_ids"], 0]


def by_hand(model: Any, history_start: Callable[[int], int], texts: list[str] = TEXTS) -> float:
    """Mean nats per token, one forward for each: target j of a document is predicted from history_start(j) on."""
    nats = []
    for text in texts:
        ids = ids_of(text)
        for j, target in enumerate(ids[1:]):
            with torch.no_grad():
                logits = model(torch.tensor([ids[history_start(j) : j + 1]]), use_cache=False).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[target].item())
    return sum(nats) / len(nats)


def score(model: Any, texts: Any = TEXTS, **settings: Any) -> PerplexityResult:
    return evaluate_perplexity(model, tiny.bpe_tokenizer(), texts, **settings)


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.gpt(request.param)


@pytest.fixture(scope="module")
def cosine() -> Any:
    return tiny.gpt()


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(model: Any) -> None:
    result = score(model, context=64)
    expected = by_hand(model, lambda j: 0)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-12)
    assert result.num_documents == len(TEXTS)
    assert result.num_tokens == sum(len(ids_of(text)) - 1 for text in TEXTS)
    assert result.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.num_words == sum(len(text.split()) for text in TEXTS)
    assert result.nats_per_byte == pytest.approx(expected * result.num_tokens / result.num_bytes, rel=1e-12)
    words = expected * result.num_tokens / result.num_words
    assert result.word_perplexity == pytest.approx(math.exp(words), rel=1e-11)


@pytest.mark.parametrize("context", [1, 7, 48, 49])
def test_a_window_sees_nothing_before_itself(model: Any, context: int) -> None:
    expected = by_hand(model, lambda j: j // context * context)
    assert score(model, context=context).nats_per_token == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 3), (10, 5), (7, 6), (7, 7)])
def test_overlapping_windows_give_every_token_its_history(model: Any, context: int, stride: int) -> None:
    expected = by_hand(model, lambda j: max(0, math.ceil((j - context + 1) / stride)) * stride)
    result = score(model, context=context, stride=stride)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-12)
    assert result.num_tokens == score(model, context=context).num_tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("context", [1, 3, 16, 48, 1000])
def test_a_carried_state_is_one_long_forward(cosine: Any, context: int, batch_size: int) -> None:
    expected = by_hand(cosine, lambda j: 0)
    result = score(cosine, context=context, batch_size=batch_size, carry_state=True)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-12)
    assert result.num_tokens == score(cosine, context=64).num_tokens


def nats_by_hand(model: Any, text: str, start: Callable[[int], int]) -> list[tuple[int, float]]:
    """Position and nats of each target, one forward for each; the window of target j begins at start(j)."""
    ids, found = ids_of(text), []
    for j, target in enumerate(ids[1:]):
        with torch.no_grad():
            logits = model(torch.tensor([ids[start(j) : j + 1]]), use_cache=False).logits[0, -1]
        found.append((j - start(j), -logits.log_softmax(-1)[target].item()))
    return found


def test_a_hybrid_carries_what_its_window_holds_and_no_more() -> None:
    layers: dict[str, Any] = {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 3}
    hybrid = tiny.gpt(**layers)
    whole = score(hybrid, context=1000).nats_per_token
    assert score(hybrid, context=7, carry_state=True).nats_per_token == pytest.approx(whole, rel=1e-9)
    hybrid = tiny.gpt(layer_types=["linear_attention", "full_attention"])
    with pytest.raises(CottentionError, match=r"^carry_state needs layers whose state has one size; got a hybrid with"):
        score(hybrid, context=7, carry_state=True)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"context": 150}, lambda j: j // 150 * 150),
        ({"context": 100, "stride": 30}, lambda j: max(0, math.ceil((j - 99) / 30)) * 30),
        ({"context": 7, "carry_state": True}, lambda j: 0),
    ],
    ids=["windows", "overlapping", "carried"],
)
def test_the_score_by_position_is_that_of_the_tokens_there(cosine: Any, settings: Any, start: Any) -> None:
    texts = ["the people of the United States " * 30, TEXTS[1], "the " * 70]
    expected: dict[tuple[int, int], list[float]] = {}
    for text in texts:
        for position, nats in nats_by_hand(cosine, text, start):
            first = 0 if position < 64 else 1 << (position.bit_length() - 1)
            expected.setdefault((first, max(63, 2 * first - 1)), []).append(nats)
    result = score(cosine, texts, **settings)
    found = {(bucket.first, bucket.last): bucket for bucket in result.by_position}
    assert list(found) == sorted(expected)
    assert len(found) > 1
    for place, nats in expected.items():
        assert found[place].num_tokens == len(nats)
        assert found[place].nats == pytest.approx(sum(nats), rel=1e-11)
    assert sum(bucket.nats for bucket in result.by_position) == pytest.approx(result.nats, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"carry_state": True}])
def test_rows_of_one_document_are_one_document(cosine: Any, settings: dict[str, Any]) -> None:
    rows = {"text": ["The people", " of the", " Union.", "Order!", "To the", " people"]}
    split = Dataset.from_dict({**rows, "ends_document": [False, False, True, True, False, True]})
    whole = ["The people of the Union.", "Order!", "To the people"]
    result = score(cosine, split, context=4, **settings)
    expected = score(cosine, whole, context=4, **settings)
    assert result.nats == pytest.approx(expected.nats, rel=1e-12)
    assert (result.num_documents, result.num_tokens) == (3, expected.num_tokens)
    # A corpus may be cut off inside a document: that one has no end to predict.
    open_end = score(cosine, split.select(range(5)), context=4, **settings)
    assert (open_end.num_documents, open_end.num_tokens) == (2, expected.num_tokens - len(ids_of(" people")) + 1)
    ids = ids_of("To the")[:-1]
    rest = expected.nats - score(cosine, whole[2:], context=4, **settings).nats
    logits = cosine(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    nats = -logits[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    assert open_end.nats == pytest.approx(rest + nats, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"stride": 4}])
def test_the_batch_size_does_not_change_the_result(model: Any, settings: dict[str, Any]) -> None:
    results = [score(model, context=9, batch_size=batch_size, **settings).nats for batch_size in (1, 3, 100)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-12)


def test_windows_are_sorted_by_length_a_part_at_a_time(cosine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score(cosine, context=5).nats
    monkeypatch.setattr("cottention.evaluation.windows._BATCHES_SORTED", 2)
    assert score(cosine, context=5, batch_size=2).nats == pytest.approx(expected, rel=1e-12)


def test_a_pass_holds_no_more_than_the_context(cosine: Any) -> None:
    lengths: list[int] = []
    hook = cosine.transformer.wte.register_forward_hook(lambda _module, _inputs, out: lengths.append(out.shape[1]))
    score(cosine, ["the people " * 50], context=16, carry_state=True)
    hook.remove()
    assert max(lengths) == 16
    assert len(lengths) > 5


@pytest.mark.parametrize("settings", [{}, {"carry_state": True}])
def test_a_long_window_never_has_all_its_logits_at_once(
    cosine: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    expected = score(cosine, context=64)
    monkeypatch.setattr("cottention.evaluation.perplexity._LOGIT_ROWS", 3)
    rows: list[int] = []
    hook = cosine.lm_head.register_forward_hook(lambda _module, _inputs, logits: rows.append(len(logits)))
    assert score(cosine, context=64, **settings).nats == pytest.approx(expected.nats, rel=1e-12)
    hook.remove()
    assert max(rows) == 3
    assert sum(rows) == expected.num_tokens


def test_any_causal_model_is_scored() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 290,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "rotary_dim": 4,
        "n_positions": 64,
    }
    model = randomised(GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0)))
    # The stock model's attention works in float32.
    assert score(model, context=64).nats_per_token == pytest.approx(by_hand(model, lambda j: 0), rel=1e-7)
    with pytest.raises(CottentionError, match="reads at most its 64 positions"):
        score(model, context=65)
    with pytest.raises(CottentionError, match="carry_state needs a cosine model"):
        score(model, context=64, carry_state=True)


def test_a_half_precision_model_is_scored_in_full_precision() -> None:
    model = tiny.gpt(dtype=torch.bfloat16)
    ids = ids_of(TEXTS[0])
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    assert logits.dtype == torch.bfloat16
    expected = -logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    assert score(model, TEXTS[:1], context=64).nats == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(cosine: Any) -> None:
    expected = score(cosine, context=64).nats
    model = tiny.gpt(resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert score(model, context=64).nats == pytest.approx(expected, rel=1e-12)
    assert model.training
    score(model.eval(), context=64)
    assert not model.training


def test_text_that_spells_end_of_text_ends_nothing(cosine: Any) -> None:
    text = "one<|endoftext|>two"
    result = score(cosine, [text], context=64)
    assert result.num_documents == 1
    assert result.num_tokens > len(tiny.bpe_tokenizer()("one")["input_ids"] * 2) + 2
    assert result.num_bytes == len(text)


def test_a_tokenised_corpus_and_a_dataset_of_texts_score_like_a_list(cosine: Any) -> None:
    from cottention.data import tokenize_documents

    expected = score(cosine, context=16)
    dataset = Dataset.from_dict({"text": TEXTS})
    assert score(cosine, dataset, context=16) == expected
    assert score(cosine, tokenize_documents(dataset, tiny.bpe_tokenizer()), context=16) == expected


def test_the_result_is_plain_numbers(cosine: Any) -> None:
    figures = score(cosine, context=16, stride=4).to_dict()
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nats_per_token"]))
    assert {name: figures[name] for name in ("context", "stride", "carry_state", "num_documents")} == {
        "context": 16,
        "stride": 4,
        "carry_state": False,
        "num_documents": len(TEXTS),
    }
    by_position = figures.pop("by_position")
    assert [(bucket["first"], bucket["last"]) for bucket in by_position] == [(0, 63)]
    assert by_position[0]["perplexity"] == pytest.approx(figures["perplexity"])
    assert all(type(value) in (int, float, bool) for value in [*figures.values(), *by_position[0].values()])


def test_a_model_beyond_floats_has_infinite_perplexity() -> None:
    assert TextScore(nats=1e6, num_tokens=10, num_bytes=10).perplexity == math.inf
    assert TextScore(nats=812.5, num_tokens=250, num_bytes=1000).perplexity == pytest.approx(math.exp(3.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"context": 8, "batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"context": 8, "stride": 0}, "stride must be from 1 to the context of 8; got 0"),
        ({"context": 8, "stride": 9}, "stride must be from 1 to the context of 8; got 9"),
        (
            {"context": 8, "stride": 4, "carry_state": True},
            "carry_state and stride exclude each other; got a stride of 4",
        ),
    ],
)
def test_a_number_that_makes_no_sense_is_one_line(cosine: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError) as caught:
        score(cosine, **settings)
    assert str(caught.value) == message


def test_a_softmax_model_reads_no_further_than_its_positions() -> None:
    softmax = tiny.gpt("softmax")
    score(softmax, context=64)
    with pytest.raises(CottentionError) as caught:
        score(softmax, context=65)
    assert str(caught.value) == "a softmax model reads at most its 64 positions; got a context of 65"
    with pytest.raises(CottentionError) as caught:
        score(softmax, context=8, carry_state=True)
    assert str(caught.value) == "carry_state needs a cosine model, whose state has one size; got softmax"


def test_a_cosine_model_reads_windows_beyond_its_positions() -> None:
    model = tiny.gpt(n_positions=8)
    expected = by_hand(model, lambda j: 0)
    assert score(model, context=64).nats_per_token == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("texts", [[], [""], ["", ""], Dataset.from_dict({"text": [""]})])
@pytest.mark.parametrize("settings", [{}, {"carry_state": True}])
def test_no_text_is_one_line(cosine: Any, texts: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^there is no text to score$"):
        score(cosine, texts, context=8, **settings)


def test_empty_texts_among_others_are_left_out(cosine: Any) -> None:
    assert score(cosine, ["", TEXTS[0], ""], context=8) == score(cosine, TEXTS[:1], context=8)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CottentionError) as caught:
        score(tiny.gpt(vocab_size=100), context=8)
    assert str(caught.value) == "tokenizer and model do not belong together: 290 tokens but 100 embeddings"
    # Padded embeddings are common, and harm nothing.
    score(tiny.gpt(vocab_size=300), context=8)
    with pytest.raises(CottentionError, match=r"the tokenizer has no end-of-text token"):
        evaluate_perplexity(tiny.gpt(), tiny.wordpiece_tokenizer(), TEXTS, context=8)


def test_a_long_text_is_one_long_forward_in_float32() -> None:
    model = tiny.gpt(dtype=torch.float32, n_layer=3)
    text = " ".join(np.random.default_rng(0).choice(TEXTS[0].split(), 5_000))
    ids = ids_of(text)
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0]
        nats = sum(
            torch.nn.functional.cross_entropy(model.lm_head(part), target, reduction="sum").item()
            for part, target in zip(hidden.split(4096), torch.tensor(ids[1:]).split(4096), strict=True)
        )
    for context in (300, 4096):
        assert score(model, [text], context=context, carry_state=True).nats == pytest.approx(nats, rel=1e-6)
