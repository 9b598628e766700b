"""The tokenizer built from text files is the published one, token by token, and broken files are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertTokenizer

from cottention.convert import convert_official
from cottention.convert.tokenizers import read_tokenizer
from cottention.errors import CheckpointError
from tests.convert.helpers import change_json

SENTENCES = [
    "The People of the United States, in Order to form a more perfect Union.",
    "naïve café 東京 🙂  two  spaces\tand\n\nlines ",
    "don't can't I'll 1234567890 [MASK] x<|endoftext|>y",
    "",
]
Published = Callable[[str], Path]


@pytest.mark.parametrize("cased", [True, False])
def test_a_bert_vocabulary_alone_is_enough(shared_dir: Path, tmp_path: Path, cased: bool) -> None:
    vocabulary = shared_dir / f"data/tokenizers/bert-base-{'cased' if cased else 'uncased'}/vocab.txt"
    shutil.copy(vocabulary, tmp_path)
    tokenizer, files = read_tokenizer(tmp_path, "bert", vocab_size=30522)
    assert tokenizer is not None
    assert files == ("vocab.txt",)
    # Whether text is lowercased is told by the vocabulary itself.
    expected = BertTokenizer(str(vocabulary), do_lower_case=not cased)
    for sentence in SENTENCES:
        assert dict(tokenizer(sentence)) == dict(expected(sentence))
    pair = tokenizer("The People", "of the Union")
    assert pair["token_type_ids"] == [0] * 4 + [1] * 4


def test_gpt_j_from_its_parts_is_gpt_j(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data/tokenizers/gpt-j-6B"
    expected = AutoTokenizer.from_pretrained(source)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    built, files = read_tokenizer(tmp_path, "gpt", vocab_size=50400)
    assert files[:2] == ("vocab.json", "merges.txt")
    shutil.copy(source / "tokenizer.json", tmp_path)
    read, files = read_tokenizer(tmp_path, "gpt", vocab_size=50400)
    assert files[0] == "tokenizer.json"
    for tokenizer in (built, read):
        assert tokenizer is not None
        assert len(tokenizer) == len(expected) == 50400
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (50256, 50256, "left")
        for sentence in SENTENCES:
            ids = expected(sentence)["input_ids"]
            assert tokenizer(sentence)["input_ids"] == ids
            assert tokenizer.decode(ids) == sentence
        assert tokenizer.get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("name", ["bert", "gpt_rot8"])
def test_a_converted_tokenizer_reads_as_the_one_it_was_made_from(
    published: Published, tmp_path: Path, name: str
) -> None:
    source = published(name)
    convert_official(source, tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    vocabulary: dict[str, int]
    if name == "bert":
        vocabulary = {token: i for i, token in enumerate((source / "vocab.txt").read_text().splitlines())}
    else:
        added = json.loads((source / "added_tokens.json").read_text())
        vocabulary = {**json.loads((source / "vocab.json").read_text()), **added}
    assert tokenizer.get_vocab() == vocabulary
    longest = 64 if name == "bert" else int(1e30)
    config = json.loads((source / "config.json").read_text())
    assert tokenizer.model_max_length == config.get("max_position_embeddings", longest)


def refusal(directory: Path, architecture: Any, vocab_size: int = 200) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(directory, architecture, vocab_size=vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(directory), "DIR")


def test_broken_tokenizer_files_are_one_line(published: Published) -> None:
    source = published("gpt_rot8")
    assert refusal(source, "gpt", 199) == "DIR has a tokenizer of 200 tokens but 199 embeddings"

    change_json(source / "tokenizer_config.json", added_tokens_decoder=...)
    change_json(source / "added_tokens.json", **{"<|endoftext|>": 150})
    assert refusal(source, "gpt") == (
        "DIR: tokenizer files disagree about the ids of <|endoftext|> (199, recorded 150)"
    )
    merges = (source / "merges.txt").read_text()
    (source / "merges.txt").write_text(f"{merges}a b c\n")
    assert refusal(source, "gpt") == "DIR/merges.txt: a merge has two parts; got 'a b c'"
    (source / "merges.txt").write_text(f"{merges}東 京\n")
    assert refusal(source, "gpt").startswith("DIR has vocab.json and merges.txt that make no tokenizer: ")
    (source / "merges.txt").write_bytes(b"\xff\xfe")
    assert refusal(source, "gpt").startswith("DIR/merges.txt cannot be read as text")
    (source / "merges.txt").unlink()
    assert refusal(source, "gpt") == "DIR has vocab.json but no merges.txt"
    (source / "merges.txt").write_text(merges)
    change_json(source / "vocab.json", a="many")
    assert refusal(source, "gpt").startswith("DIR has vocab.json and merges.txt that make no tokenizer: ")
    (source / "vocab.json").write_text("[]")
    assert refusal(source, "gpt") == "DIR/vocab.json must hold a JSON object; got list"
    (source / "tokenizer.json").write_text("{}")
    assert refusal(source, "gpt").startswith("DIR/tokenizer.json describes no tokenizer")
    (source / "special_tokens_map.json").write_text("{")
    assert refusal(source, "gpt").startswith("DIR/special_tokens_map.json cannot be read as JSON")


@pytest.mark.parametrize("content", ["", "a\nb\n"])
def test_a_vocabulary_that_lacks_special_tokens(published: Published, content: str) -> None:
    source = published("bert")
    (source / "vocab.txt").write_text(content)
    assert "tokenizer files disagree about the ids of [PAD]" in refusal(source, "bert")


def test_other_line_separators_in_a_vocabulary_are_tokens(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a\u2028b", "\x85", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer, _ = read_tokenizer(tmp_path, "bert", vocab_size=8)
    assert tokenizer is not None
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(8))


def test_no_files_are_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path, "bert", vocab_size=8) == (None, ())
