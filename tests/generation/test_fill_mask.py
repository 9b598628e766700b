"""fill_mask gives what the model's own logits say, for every mask, whatever else is in the batch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cottention.errors import CottentionError, DataError
from cottention.generation import FilledText, fill_mask
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES

TEXTS = [
    "The [MASK] of the United States",
    "[MASK]",
    "form [MASK] [MASK] people, for[MASK] the",
    "The people of the United States for the people of the [MASK]",
]
CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.bert(request.param)


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny.bert()


def fill(model: Any, texts: Any, top_k: int = 5, **settings: Any) -> list[FilledText]:
    return fill_mask(model, tiny.wordpiece_tokenizer(), texts, top_k, **settings)


def by_hand(model: Any, text: str) -> list[torch.Tensor]:
    """Probabilities at each mask, the text alone in a forward of the whole model."""
    pieces = [tiny.wordpiece_tokenizer()(part, add_special_tokens=False)["input_ids"] for part in text.split("[MASK]")]
    ids = [CLS, *pieces[0]]
    places = []
    for piece in pieces[1:]:
        places.append(len(ids))
        ids += [MASK, *piece]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, SEP]])).logits[0]
    return [logits[place].softmax(-1) for place in places]


@pytest.mark.parametrize("top_k", [1, 5, 60])
def test_candidates_are_the_likeliest_tokens_of_every_mask(model: Any, top_k: int) -> None:
    names = tiny.wordpiece_tokenizer().convert_ids_to_tokens(list(range(60)))
    for filled, text in zip(fill(model, TEXTS, top_k), TEXTS, strict=True):
        assert filled.text == text
        expected = by_hand(model, text)
        assert len(filled.masks) == text.count("[MASK]") == len(expected)
        for candidates, probabilities in zip(filled.masks, expected, strict=True):
            best = probabilities.topk(top_k)
            assert [candidate.token_id for candidate in candidates] == best.indices.tolist()
            assert [candidate.token for candidate in candidates] == [names[i] for i in best.indices.tolist()]
            assert [candidate.probability for candidate in candidates] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_neighbours_in_a_batch_change_nothing(model: Any, batch_size: int) -> None:
    alone = [fill(model, text)[0] for text in TEXTS]
    for got, expected in zip(fill(model, TEXTS, batch_size=batch_size), alone, strict=True):
        assert got.best_text == expected.best_text
        for candidates, others in zip(got.masks, expected.masks, strict=True):
            assert [c.token_id for c in candidates] == [c.token_id for c in others]
            assert [c.probability for c in candidates] == pytest.approx([c.probability for c in others], rel=1e-5)


def forced(tokens: list[str], tokenizer: Any = None, **settings: Any) -> Any:
    """A model whose mask predictions are these tokens, in turn, whatever the text."""
    model = tiny.bert(**settings)
    ids: Any = (tokenizer or tiny.wordpiece_tokenizer()).convert_tokens_to_ids(tokens)

    def answer(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(ids[: len(hidden)]), model.config.vocab_size).double() * 50

    model.cls.predictions.forward = answer
    return model


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("The  [MASK] of\tthem", ["State"], "The  State of\tthem"),
        ("The [MASK] [MASK].", ["p", "##eo"], "The peo."),
        ("Un[MASK]ed", ["for"], "Unfored"),
        ("[MASK], The", ["##eo"], "eo, The"),
        ("[MASK]", ["[UNK]"], "[UNK]"),
    ],
)
def test_the_best_text_is_the_text_as_written_with_its_masks_filled(
    text: str, tokens: list[str], expected: str
) -> None:
    assert fill(forced(tokens), text)[0].best_text == expected


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """BPE whose tokens bring their own space, as RoBERTa's."""
    backend = tiny.bpe_tokenizer().backend_tokenizer
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.add_special_tokens(["<mask>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", pad_token="<|endoftext|>")


@pytest.mark.parametrize(
    ("text", "token", "expected"),
    [
        ("The <mask> of", "Ġpeople", "The people of"),
        ("The<mask> of", "Ġpeople", "The people of"),
        ("The <mask>", "or", "The or"),
        ("<mask> of", "é", "é of"),
    ],
)
def test_byte_level_tokens_are_written_as_text(text: str, token: str, expected: str) -> None:
    tokenizer = byte_level_tokenizer()
    token_id = tokenizer(token.replace("Ġ", " "))["input_ids"][0]
    model = forced([tokenizer.convert_ids_to_tokens([token_id])[0]], tokenizer, vocab_size=len(tokenizer))
    assert fill_mask(model, tokenizer, text)[0].best_text == expected


def test_embeddings_without_a_token_are_named_by_their_number() -> None:
    model = tiny.bert(vocab_size=64)
    with torch.no_grad():
        model.cls.predictions.bias[62] += 1e3
    (filled,) = fill(model, "The [MASK]")
    assert filled.masks[0][0].token == "[62]"
    assert filled.best_text == "The [62]"


def test_the_result_is_json(bert: Any) -> None:
    (filled,) = fill(bert, TEXTS[0], 2)
    content = json.loads(json.dumps(filled.to_dict()))
    assert content["text"] == TEXTS[0]
    assert content["best_text"] == filled.best_text
    assert [set(candidate) for candidate in content["masks"][0]] == [{"token", "token_id", "probability"}] * 2


def test_no_texts_are_no_results(bert: Any) -> None:
    assert fill(bert, []) == []


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("The people", {}, "the text has no [MASK] to fill; got 'The people'"),
        (["[MASK]", "The people"], {}, "text 2 has no [MASK] to fill; got 'The people'"),
        ("", {}, "the text has no [MASK] to fill; got ''"),
        ("x" * 50, {}, f"the text has no [MASK] to fill; got '{'x' * 40}...'"),
        ("[MASK] " + "a " * 62, {}, "the text has 65 tokens; this model has 64 positions"),
        ("[MASK]", {"top_k": 0}, "top_k must be from 1 to the vocabulary's 60; got 0"),
        ("[MASK]", {"top_k": 61}, "top_k must be from 1 to the vocabulary's 60; got 61"),
        ("[MASK]", {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_filled_is_one_line(bert: Any, texts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError) as caught:
        fill(bert, texts, **settings)
    assert str(caught.value) == message


def test_a_text_that_is_none_is_one_line(bert: Any) -> None:
    with pytest.raises(DataError, match=r"^text 2 is not valid Unicode text \(character 6\)$"):
        fill(bert, ["[MASK]", "[MASK]\udcff"])


def test_a_text_of_exactly_the_positions_is_read(bert: Any) -> None:
    assert len(fill(bert, "[MASK] " + "a " * 61)[0].masks) == 1


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CottentionError, match="do not belong together: 60 tokens but 50 embeddings"):
        fill(tiny.bert(vocab_size=50), "[MASK]")
    with pytest.raises(CottentionError, match="this model's tokenizer has no mask token"):
        fill_mask(tiny.bert(vocab_size=300), tiny.bpe_tokenizer(), "[MASK]")
