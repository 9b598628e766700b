"""Tokenizers: trained ones are lossless or cased, and the same everywhere; stored ones open, damaged ones are named."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cottention.data import load_tokenizer, tokenizer, train_tokenizer
from cottention.errors import CottentionError, DataError, SettingsError
from tests.data.helpers import ordinary_user, refusal, write
from tests.subprocesses import run_python

PROSE = [
    "Fellow-Citizens of the Senate and House of Representatives:",
    "I embrace with great satisfaction the opportunity which now presents itself, in 1790, of 12,345 votes.",
    "It's the people's will; we'll see what they've done (and what they haven't).",
    "Grüße aus Köln, señor Núñez — 世界 🎉",
] * 3
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "h", "##i"]


def dataset_of(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def refused(name: str | Path) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(name)
    return refusal(error)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_tokenizer(dataset_of(*PROSE), kind="bpe", vocab_size=400)


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    return train_tokenizer(dataset_of(*PROSE), kind="wordpiece", vocab_size=150)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("aé 's1\n\t<|>.世🎉\u0301\r\0"))
def test_bpe_gives_any_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= token < len(bpe) for token in ids)


def test_bpe_knows_every_byte_and_has_no_unknown(bpe):
    alone = train_tokenizer(dataset_of("a"), vocab_size=257)
    assert len(alone) == 257
    everything = "".join(map(chr, [*range(0x800), 0xFFFD, 0x1F389]))
    assert alone.decode(alone.encode(everything)) == everything
    assert bpe.unk_token is None


def test_bpe_has_one_special_token_with_id_zero(bpe):
    assert bpe.encode("<|endoftext|>") == [0]
    assert (bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id) == (0, 0, 0)
    assert bpe.all_special_tokens == ["<|endoftext|>"]
    assert bpe.encode("a") == bpe.encode("a", add_special_tokens=False)
    padded = bpe(["a longer text", "a"], padding=True)["attention_mask"]
    assert padded[1][0] == 0  # left, as generation wants it
    assert padded[1][-1] == 1


def test_a_space_leads_words_numbers_and_punctuation():
    tokenizer = train_tokenizer(dataset_of("a word 123 (x) 123123 123" * 50), vocab_size=300)
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("a word 123 (x)")]
    assert tokens == ["a", " word", " 123", " (", "x", ")"]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("123123")] == ["123", "123"]


def test_wordpiece_has_the_special_tokens_of_bert_first(wordpiece):
    expected = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert wordpiece.convert_ids_to_tokens(list(range(5))) == expected
    named = [wordpiece.pad_token, wordpiece.unk_token, wordpiece.cls_token, wordpiece.sep_token, wordpiece.mask_token]
    assert named == expected
    assert sorted(wordpiece.all_special_ids) == list(range(5))
    assert wordpiece.padding_side == "right"


def test_wordpiece_wraps_texts_and_pairs(wordpiece):
    one, two = (wordpiece.encode(text, add_special_tokens=False) for text in ("the Senate", "will see"))
    assert wordpiece.encode("the Senate") == [2, *one, 3]
    pair = wordpiece("the Senate", "will see")
    assert pair["input_ids"] == [2, *one, 3, *two, 3]
    assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)


def test_wordpiece_is_cased_and_keeps_accents(wordpiece):
    assert wordpiece.encode("Senate") != wordpiece.encode("senate")
    assert (
        wordpiece.decode(wordpiece.encode("Grüße aus Köln, señor"), skip_special_tokens=True) == "Grüße aus Köln, señor"
    )
    assert wordpiece.unk_token_id in wordpiece.encode("Ω")


def test_wordpiece_ids_are_dense(wordpiece):
    assert sorted(wordpiece.get_vocab().values()) == list(range(len(wordpiece)))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_vocabulary_is_as_large_as_asked_or_says_why_not(kind, caplog):
    with caplog.at_level(logging.WARNING, "cottention"):
        vocab_size = {"bpe": 300, "wordpiece": 150}[kind]
        assert len(train_tokenizer(dataset_of(*PROSE), kind=kind, vocab_size=vocab_size)) == vocab_size
        assert not caplog.records
        most = len(train_tokenizer(dataset_of("one two"), kind=kind, vocab_size=5000))
    assert most < 300
    assert f"{most} tokens instead of 5000" in caplog.text


@pytest.mark.parametrize(
    ("kind", "vocab_size", "expected"),
    [
        ("bpe", 256, "at least 257; got 256"),
        ("bpe", 0, "at least 257; got 0"),
        ("wordpiece", 9, "at least 10, the characters of this corpus; got 9"),
        ("unigram", 300, "must be bpe or wordpiece; got 'unigram'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(kind, vocab_size, expected):
    with pytest.raises(SettingsError) as error:
        train_tokenizer(dataset_of("abc"), kind=kind, vocab_size=vocab_size)  # [...5], a, ##b, ##c, b, c
    assert expected in refusal(error)


def test_the_smallest_vocabulary_is_the_characters():
    assert len(train_tokenizer(dataset_of("abc"), kind="wordpiece", vocab_size=10)) == 10


def mixed_texts() -> list[str]:
    """Text with thousands of characters, most of them equally rare: what is kept must not be left to chance."""
    chance = random.Random(0)
    letters = [chr(code) for code in (*range(0x3B1, 0x3C9), *range(0xAC00, 0xAC00 + 2500))]
    signs = [chr(0x4E00 + number) for number in range(1500)]
    return [
        "".join(chance.choices(letters, k=6)) + " " + "".join(chance.choices(signs, k=2)) + " " + chance.choice(PROSE)
        for _ in range(400)
    ]


def trained_hash(kind: str) -> str:
    trained = train_tokenizer(dataset_of(*mixed_texts()), kind=kind, vocab_size=2500)
    return hashlib.sha256(trained.backend_tokenizer.to_str().encode()).hexdigest()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_text_gives_the_same_tokenizer(kind):
    assert len({trained_hash(kind) for _ in range(5)}) == 1


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer_in_another_process():
    ran = run_python(
        """
        import os
        os.environ["RAYON_NUM_THREADS"] = "1"
        from tests.data.test_tokenizer import trained_hash
        print(trained_hash("bpe"), trained_hash("wordpiece"))
        """
    )
    assert ran.stdout.split() == [trained_hash("bpe"), trained_hash("wordpiece")]


def test_the_commonest_thousand_characters_become_tokens(monkeypatch):
    monkeypatch.setattr(tokenizer, "_BERT_ALPHABET", 3)
    trained = train_tokenizer(dataset_of("cc bb bb aa aa zz\x00\u200b dd dd dd"), kind="wordpiece", vocab_size=100)
    kept = {token.removeprefix("##") for token in trained.get_vocab() if "[" not in token}
    assert kept == {"a", "b", "d", "aa", "bb", "dd"}  # of c and z, as rare as each other and rarer than these, none


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_saved_tokenizer_opens_as_it_was(tmp_path, kind, request):
    trained = request.getfixturevalue(kind)
    trained.save_pretrained(tmp_path)
    for opened in (load_tokenizer(tmp_path), load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert [opened.encode(text) for text in PROSE] == [trained.encode(text) for text in PROSE]
        assert opened.special_tokens_map == trained.special_tokens_map
        assert opened.padding_side == trained.padding_side
        assert opened.get_vocab() == trained.get_vocab()
    (tmp_path / "tokenizer_config.json").unlink()
    for alone in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert [alone.encode(text) for text in PROSE] == [trained.encode(text) for text in PROSE]
        assert alone.special_tokens_map == trained.special_tokens_map
        assert alone.padding_side == trained.padding_side


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("words", "lowercase"), [(VOCAB, True), ([*VOCAB, "Hello"], False)])
def test_a_vocabulary_alone_opens_as_wordpiece(tmp_path, words, lowercase, line_end):
    write(tmp_path / "vocab.txt", line_end.join(words) + line_end)
    opened = load_tokenizer(tmp_path)
    assert opened.encode("hello worlds hi") == [2, 5, 6, 7, 8, 9, 3]
    assert opened.tokenize("Hello wörld") == (["hello", "world"] if lowercase else ["Hello", "[UNK]"])
    assert len(opened) == len(words)
    assert opened.mask_token_id == 4


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges_open_as_bpe(tmp_path, bpe, names):
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    write(tmp_path / names[0], json.dumps(model["vocab"]))
    write(tmp_path / names[1], "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    opened = load_tokenizer(tmp_path)
    assert opened.eos_token_id == opened.pad_token_id == 0
    assert len(opened) == len(bpe)
    for text in PROSE:
        assert opened.decode(opened.encode(text)) == text


def test_no_token_is_added_to_a_vocabulary_that_lacks_end_of_text(tmp_path):
    write(tmp_path / "vocab.json", '{"a": 0, "b": 1, "ab": 2}')
    write(tmp_path / "merges.txt", "#version: 0.2\na b\n")
    opened = load_tokenizer(tmp_path)
    assert opened.encode("abba") == [2, 1, 0]
    assert opened.eos_token_id is None
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("folder", "num_tokens", "tokens"),
    [
        ("bert-base-cased", 28996, ["Hello", "W", "##ö", "##rl", "##d", "12"]),
        ("bert-base-uncased", 30522, ["hello", "world", "12"]),
        ("gpt2", 50257, ["Hello", "ĠW", "Ã¶r", "ld", "Ġ12"]),
        ("gpt-j-6B", 50400, ["Hello", "ĠW", "Ã¶r", "ld", "Ġ12"]),
    ],
)
def test_the_tokenizers_of_bert_and_gpt_open(shared_dir, folder, num_tokens, tokens):
    path = shared_dir / "data" / "tokenizers" / folder
    if not path.is_dir():
        pytest.skip(f"needs the tokenizer in {path}")
    opened = load_tokenizer(path)
    assert len(opened) == num_tokens
    assert opened.tokenize("Hello Wörld 12") == tokens
    if folder.startswith("bert"):
        special = [opened.pad_token_id, opened.unk_token_id, opened.cls_token_id, opened.sep_token_id]
        assert special == [0, 100, 101, 102]
        assert opened.mask_token_id == 103
        assert opened.encode("12")[0] == 101
    else:
        assert opened.eos_token_id == 50256
        assert all(opened.decode(opened.encode(text)) == text for text in PROSE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ["name is empty"]),
        ("nowhere/to/be", ["no such tokenizer: nowhere/to/be"]),
        ("./gpt", ["no such tokenizer", "did you mean 'gpt2'"]),
        ("gpt3.json", ["no such tokenizer"]),
        ("no-such-name", ["no folder no-such-name here", "hub"]),
        ("two words", ["no folder two words here", "no hub name"]),
        ("~nobody-of-this-name/x", ["cannot read a tokenizer from ~nobody-of-this-name/x"]),
        ("x" * 5000, ["too long"]),
        ("gpt2", ["no tokenizer in gpt2", "tokenizer.json", "vocab.txt", "merges.txt"]),
        ("notes.txt", ["notes.txt is no tokenizer"]),
    ],
)
def test_what_is_no_tokenizer_is_said_in_one_line(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    write(tmp_path / "notes.txt", "notes")
    message = refused(name)
    assert [part for part in expected if part not in message] == [], message


def test_a_folder_that_may_not_be_read_is_one_line(public_path):
    folder = write(public_path / "mine" / "vocab.txt", "\n".join(VOCAB)).parent
    folder.chmod(0)
    with ordinary_user():
        assert "ermission denied" in refused(folder)
        assert "ermission denied" in refused(folder / "deeper")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": "{"}, ["tokenizer.json is damaged"]),
        ({"tokenizer.json": ""}, ["tokenizer.json is damaged"]),
        ({"tokenizer.json": "[1]"}, ["a JSON object expected; got [1]"]),
        ({"tokenizer.json": "{}"}, ["cannot read a tokenizer"]),
        ({"tokenizer.json": b"\xff\xfe"}, ["tokenizer.json is damaged", "utf-8"]),
        ({"tokenizer_config.json": "null"}, ["tokenizer_config.json is damaged", "got null"]),
        ({"tokenizer_config.json": "{"}, ["tokenizer_config.json is damaged"]),
        ({"tokenizer_config.json": '{"tokenizer_class": 3}'}, ["cannot read a tokenizer"]),
        ({"vocab.txt": "a\nb"}, ["vocab.txt is not a BERT vocabulary", "[PAD]", "[MASK]"]),
        ({"vocab.txt": b"\xff"}, ["cannot read a tokenizer", "utf-8"]),
        ({"vocab.txt": ""}, ["vocab.txt is not a BERT vocabulary"]),
        ({"vocab.json": "{", "merges.txt": ""}, ["cannot read a tokenizer"]),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b\n"}, ["cannot read a tokenizer", "b"]),
        ({"vocab.json": '{"a": 0}'}, ["no tokenizer in"]),
    ],
)
def test_a_damaged_tokenizer_is_said_in_one_line(tmp_path, files, expected):
    for name, content in files.items():
        write(tmp_path / name, content)
    message = refused(tmp_path)
    assert [part for part in expected if part not in message] == [], message
    if "tokenizer.json" in files:
        assert "tokenizer.json" in refused(tmp_path / "tokenizer.json")


def _damage(content: bytes, chance: random.Random) -> bytes:
    """Cut it, change bytes, or change one value."""
    kind = chance.randrange(3)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(3):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    values = json.loads(content)
    values[chance.choice(list(values))] = chance.choice([None, 1, "x", [], {}, [1], {"a": 1}, True])
    return json.dumps(values).encode()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_no_damage_at_random_ends_in_a_traceback(tmp_path, wordpiece, name):
    chance = random.Random(0)
    wordpiece.save_pretrained(tmp_path / "whole")
    content = (tmp_path / "whole" / name).read_bytes()
    outcomes = []
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / name).write_bytes(_damage(content, chance))
        try:
            load_tokenizer(folder)
        except CottentionError as error:
            outcomes.append(str(error))
    assert len(outcomes) > 20
    assert [message for message in outcomes if "\n" in message] == []
