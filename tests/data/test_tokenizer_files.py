"""Tokenizers of strangers: panics of the library, allocations without bound and ids without embeddings are one line."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cottention.convert.tokenizers import read_tokenizer
from cottention.data import load_tokenizer
from cottention.data.tokenizer_files import check_ids, damage_told_as
from cottention.errors import CheckpointError, DataError
from tests import tiny

BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


HOSTILE: dict[str, dict[str, Any]] = {
    "a Unigram without pieces": {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
    "a Unigram whose unknown piece is missing": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}},
    "a WordPiece without [UNK]": {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        }
    },
    "a WordLevel without [UNK]": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    "a BPE without its unknown token": {"model": {**BPE, "unk_token": "[UNK]"}},
    "a charsmap that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a charsmap shorter than it says": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(b"\xff" * 4 + b"\0" * 4).decode(),
        }
    },
    "a template of an unknown token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a pattern that never ends": split("(a*)*$"),
    "a pattern that is none": split("("),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a stride longer than the text": {
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    },
    "padding without end": {
        "padding": {
            "strategy": {"Fixed": 1_000_000_000},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
    "padding to a multiple without end": {
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": 1_000_000_000,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
    "replacements that grow": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}},
    "a model of another type": {"model": []},
    "nothing": {"model": None},
}


def write(directory: Path, **parts: Any) -> Path:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], **empty, "model": BPE, **parts}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_one_line_and_silent(name: str, tmp_path: Path, capfd) -> None:
    write(tmp_path, **HOSTILE[name])
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        assert str(caught.value).startswith(f"cannot read a tokenizer from {path}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"describes no tokenizer|cannot encode every text"):
        read_tokenizer(tmp_path, "gpt", vocab_size=100)
    assert capfd.readouterr() == ("", ""), "the library prints its panics"


def test_what_else_is_written_while_a_tokenizer_opens_is_seen(tmp_path: Path, capfd) -> None:

    def fail(error: BaseException) -> None:
        with damage_told_as("x"):
            os.write(2, b"a warning of a library\n")
            raise error

    with damage_told_as("x"):
        os.write(2, b"a warning of a library\n")
    with pytest.raises(CheckpointError, match="x: broken"):
        fail(OSError("broken"))
    assert capfd.readouterr().err == "a warning of a library\n" * 2
    for bug in (ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(bug)):
            fail(bug)


def test_code_that_a_tokenizer_names_is_not_asked_about(tmp_path: Path, monkeypatch) -> None:
    """transformers would ask on the terminal, and wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tiny.bpe_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    assert len(load_tokenizer(tmp_path)) == 290


def test_an_id_without_an_embedding_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, model={**BPE, "vocab": {"a": 0, "b": 1000}}))
    with pytest.raises(CheckpointError, match="has a tokenizer with the id 1000 but 100 embeddings"):
        check_ids(tokenizer, 100, "x")
    check_ids(tiny.bpe_tokenizer(), 290, "x")
