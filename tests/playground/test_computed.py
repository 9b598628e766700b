"""What the playground's page shows: numbers of heads, maps, masks, neighbours; no browser needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.errors import CheckpointError, DataError, SettingsError
from cottention.generation import Conversation
from cottention.playground import inside, texts
from cottention.playground.opened import OpenedModel, open_models, stream_pieces
from tests import tiny

_PLUS: dict[str, Any] = {"decay": "data", "erase": True, "divisor": "none", "short_conv": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[OpenedModel]:
    root = tmp_path_factory.mktemp("models")
    tiny.save(root / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    tiny.save(root / "plus", tiny.gpt(dtype=torch.float32, **_PLUS), tiny.bpe_tokenizer())
    tiny.save(root / "bert", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
    return open_models([str(root / name) for name in ("gpt", "plus", "bert")], device="cpu")


def test_each_directory_opens_as_what_it_is(models: list[OpenedModel], tmp_path: Path):
    assert [each.is_gpt for each in models] == [True, True, False]
    assert not models[2].has_next_sentence
    assert models[1].description.startswith("GPT, ")
    size = sum(x.numel() for x in models[2].model.parameters())
    assert models[2].description == f"BERT, {size:,} parameters, cosine attention"
    with pytest.raises(CheckpointError, match="nowhere"):
        open_models([str(tmp_path / "nowhere")], device="cpu")


def test_heads_are_described_by_what_they_have(models: list[OpenedModel]):
    published, plus = (inside.head_rows(x.model, x.tokenizer, "We the people") for x in models[:2])
    config = models[0].model.config
    assert len(published) == len(plus) == config.n_layer * config.n_head
    gpt: Any = models[0].model
    m = gpt.transformer.h[0].attn.norm_const.flatten()[1]
    assert published[1] == [0, 1, "cosine", f"{m.sigmoid().item():.2f}", "", ""]
    assert all(row[3] == "" and float(row[4]) > 0 and 0 <= float(row[5]) <= 1 for row in plus)


def test_a_map_is_drawn_and_what_has_none_is_said(models: list[OpenedModel]):
    gpt, plus = models[:2]
    figure = inside.map_picture(gpt.model, gpt.tokenizer, "We the people", layer=1, head=0)
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None
    assert drawn.shape[0] == len(gpt.tokenizer.encode("We the people"))
    with pytest.raises(SettingsError, match="erase"):
        inside.map_picture(plus.model, plus.tokenizer, "We", layer=0, head=0)
    with pytest.raises(SettingsError, match="layers 0 to"):
        inside.map_picture(gpt.model, gpt.tokenizer, "We", layer=99, head=0)
    with pytest.raises(SettingsError, match="empty"):
        inside.map_picture(gpt.model, gpt.tokenizer, "", layer=0, head=0)


def test_a_token_that_is_clicked_is_hidden_and_filled(models: list[OpenedModel]):
    bert = models[2]
    tokens = texts.tokens_of(bert, "people of the union")
    masked = texts.with_mask(bert, "people of the union", len(tokens) - 1)
    assert masked.count("[MASK]") == 1
    (candidates,) = texts.fill(bert, masked, 3)
    assert len(candidates) == 3
    assert all(0 < probability < 1 for probability in candidates.values())
    with pytest.raises(SettingsError, match="there is none at 99"):
        texts.with_mask(bert, "people", 99)
    with pytest.raises(SettingsError):
        texts.fill(bert, "no mask", 3)


def test_a_line_is_nearest_to_itself(models: list[OpenedModel]):
    rows = texts.nearest(models[2], "of the union", "the people\n\nof the union\npeople")
    assert rows[0] == ["1.000", "of the union"]
    assert len(rows) == 3
    with pytest.raises(SettingsError, match="at least one line"):
        texts.nearest(models[2], "people", " \n")


def test_a_file_that_is_no_text_is_told(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        texts.text_of_file(str(tmp_path / "a.txt"))


def test_pieces_come_as_written_and_leaving_ends_the_writing(models: list[OpenedModel]):
    gpt = models[0]
    talk = Conversation(gpt.model, gpt.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    *pieces, result = stream_pieces(gpt, lambda hear: talk.ask("We", stream=hear, **options))
    assert not isinstance(result, str)
    assert "".join(map(str, pieces)) == result.texts[0]
    heard: list[str] = []

    def endless(hear: Any) -> Any:
        return talk.ask("We", stream=lambda piece: (heard.append(piece), hear(piece)), max_new_tokens=50_000)

    stream = stream_pieces(gpt, endless)
    next(stream)
    stream.close()
    assert len(heard) < 1000
    assert not gpt.lock.locked()


def test_a_mistake_comes_out_of_the_stream(models: list[OpenedModel]):
    talk = Conversation(models[0].model, models[0].tokenizer)
    with pytest.raises(SettingsError, match="temperature"):
        list(stream_pieces(models[0], lambda hear: talk.ask("We", stream=hear, temperature=-1)))
