"""Pieces of text, put together, are the text; stop strings end it cleanly; nothing is held back longer than needed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cottention.generation.stream import RowText
from tests import tiny

token_lists = st.lists(st.integers(0, 289), max_size=20)


def ids_of(text: str) -> list[int]:
    return tiny.bpe_tokenizer()(text)["input_ids"]


def whole_of(ids: list[int]) -> str:
    return str(tiny.bpe_tokenizer().decode(ids, skip_special_tokens=True))


def run(ids: list[int], **settings: Any) -> tuple[RowText, list[str]]:
    """The row after these tokens, and the piece that each of them, and the end, settled."""
    row = RowText(settings.pop("tokenizer", tiny.bpe_tokenizer()), **{"end_ids": set(), **settings})
    return row, [*map(row.add, ids), row.finish()]


@settings(deadline=None, max_examples=200)
@given(token_lists, st.text(max_size=4))
def test_pieces_put_together_are_the_text_whatever_the_tokens(ids, prompt):
    # Any tokens: most lists are cut characters and bytes that are no text at all.
    row, pieces = run(ids, after=ids_of(prompt))
    assert "".join(pieces) == row.text == whole_of(ids)
    assert list(row.token_ids) == ids
    assert row.reason == "length"


def test_a_character_comes_when_its_last_byte_does():
    text = "é東🙂."
    ids = ids_of(text)
    assert len(ids) > 5
    row, pieces = run(ids)
    assert [piece for piece in pieces if piece] == ["é", "東", "🙂", "."]
    assert pieces[-1] == ""


def test_a_character_that_is_never_completed_shows_at_the_end():
    ids = ids_of("a🙂")[:-1]
    row, pieces = run(ids)
    assert pieces[0] == "a"
    assert pieces[1:-1] == [""] * (len(ids) - 1)
    assert set(pieces[-1]) == {"\ufffd"}
    assert row.text == whole_of(ids)


def test_special_tokens_are_not_text_but_an_end_ends():
    row, pieces = run([*ids_of("a"), 0, *ids_of("b")])
    assert (row.text, row.reason) == ("ab", "length")
    row, pieces = run([*ids_of("a"), 0, *ids_of("b")], end_ids={0})
    assert (row.text, row.reason, row.finished) == ("a", "end", True)
    assert list(row.token_ids) == ids_of("a")
    assert pieces[2:] == ["", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("The people STOP the", ["STOP"], "The people "),
        ("STOP", ["STOP"], ""),
        ("The people STO", ["STOP"], "The people STO"),
        ("The people", ["STOP"], "The people"),
        ("aXbXYc", ["XY", "c"], "aXb"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("a 東京 b", ["京"], "a 東"),
        ("aab", ["ab", "aab"], ""),
        ("anything", [""], "anything"),
        ("anything", [], "anything"),
    ],
)
def test_a_stop_string_ends_the_text_before_itself(text, stops, expected):
    row, pieces = run(ids_of(text), stop_strings=stops)
    assert "".join(pieces) == row.text == expected
    assert row.reason == ("stop" if expected != text else "length")
    assert not row.finish()


def test_what_might_become_a_stop_is_held_back_and_nothing_else():
    row = RowText(tiny.bpe_tokenizer(), end_ids=set(), stop_strings=["eop"])
    (t,) = ids_of("t")
    e, o, p, x = (ids_of(letter)[0] for letter in "eopx")
    assert [row.add(token) for token in (t, e, o, x, e, o, o)] == ["t", "", "", "eox", "", "", "eoo"]
    assert [row.add(token) for token in (e, e, o)] == ["", "e", ""]
    assert row.add(p) == ""
    assert (row.text, row.reason) == ("teoxeooe", "stop")


@settings(deadline=None, max_examples=300)
@given(st.text("ab東", max_size=12), st.lists(st.text("ab東", min_size=1, max_size=3), max_size=3))
def test_stops_by_brute_force(text, stops):
    ids = ids_of(text)
    row, pieces = run(ids, stop_strings=stops)
    assert "".join(pieces) == row.text
    # The tokens are characters or parts of them, so the stop that is complete first decides.
    complete = [text[:end] for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    if not complete:
        assert (row.text, row.reason) == (text, "length")
    else:
        first = min(complete[0].find(stop) for stop in stops if stop in complete[0])
        assert (row.text, row.reason) == (text[:first], "stop")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words whose space is written only between two of them, as SentencePiece's tokenizers have it."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁to", "▁the", "▁people", "s", "▁"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_space_between_prompt_and_text_is_kept():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([1, 2]) == "to the"
    assert tokenizer.decode([2]) == "the"
    row, pieces = run([2, 3, 4], tokenizer=tokenizer, after=[1])
    assert pieces == [" the", " people", "s", ""]
    row, pieces = run([2, 3, 4], tokenizer=tokenizer)
    assert row.text == "the peoples"
