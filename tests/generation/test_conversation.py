"""A conversation remembers what one text would have said, at the size of one state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.errors import SettingsError
from cottention.generation import Conversation, generate_text, read_text
from tests import tiny

_GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}


def _talk(attention_type: str = "cosine", **settings: Any) -> Conversation:
    return Conversation(tiny.gpt(attention_type, dtype=torch.float32, **settings), tiny.bpe_tokenizer())


@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_turns_give_what_the_whole_text_gives(attention_type: str):
    talk = _talk(attention_type, n_positions=200)
    said = ""
    for turn in ("We the people", " of the Union", ""):
        result = talk.reply(turn, **_GREEDY)
        expected = generate_text(talk.model, talk.tokenizer, said + turn, **_GREEDY)
        assert result.texts == expected.texts
        said += turn + result.texts[0]
        assert talk.text == said
    assert talk.num_tokens == len(talk.tokenizer.encode(said))


def test_a_state_has_one_size_and_asking_leaves_it_alone():
    talk = _talk()
    talk.read("We the people of the United States")
    before, size = talk.state, talk.state_bytes
    first = talk.ask(" in order", **_GREEDY).texts
    assert talk.state is before
    assert talk.ask(" in order", **_GREEDY).texts == first
    talk.reply(" to form", **_GREEDY)
    assert talk.state_bytes == size > 0


def test_a_turn_that_fails_is_not_remembered():
    talk = _talk()
    talk.reply("We", **_GREEDY)
    before = talk.state, talk.text

    def leave(_piece: str) -> None:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        talk.reply(" the people", stream=leave, **_GREEDY)
    with pytest.raises(SettingsError, match="temperature"):
        talk.reply(" the people", temperature=-1)
    assert (talk.state, talk.text) == before


def test_it_goes_on_from_a_state_and_forgets_back_to_it():
    plain = _talk()
    book = read_text(plain.model, plain.tokenizer, "We the people")
    talk = Conversation(plain.model, plain.tokenizer, state=book)
    expected = generate_text(plain.model, plain.tokenizer, " of", state=book, **_GREEDY).texts
    assert talk.reply(" of", **_GREEDY).texts == expected
    talk.reset()
    assert talk.state is book
    assert talk.text == ""
    assert talk.reply(" of", **_GREEDY).texts == expected


def test_a_softmax_model_says_when_its_positions_are_used_up():
    talk = _talk("softmax", n_positions=16)
    talk.read("We the people of the United States in order to form a more perfect Union")
    with pytest.raises(SettingsError, match="softmax model has 16 positions"):
        talk.reply(" now", **_GREEDY)
