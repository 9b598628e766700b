"""Builds a published checkpoint's tokenizer from its text files: vocab.txt, vocab.json + merges.txt, or tokenizer.json.

The published tokenizer.pt is a pickled object and is never opened. Whatever is built must give every token the id that
the files record, since the embedding rows follow those ids.

    tokenizer, files = read_tokenizer(directory, "bert", vocab_size=28996)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cottention.convert.configs import Architecture
from cottention.convert.weights import listed
from cottention.data.tokenizer_files import check_files, check_ids, damage_told_as, try_encoding
from cottention.errors import CheckpointError
from cottention.files import one_line
from cottention.json_files import LARGEST_TABLE, read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Text files that describe a tokenizer."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(
    directory: Path, architecture: Architecture, *, vocab_size: int
) -> tuple[PreTrainedTokenizerBase | None, tuple[str, ...]]:
    """Build the tokenizer and name the files it was built from; None and no files where there are none.

    Raises:
        CheckpointError: a file is damaged, an id disagrees between files, or there are more tokens than embeddings.
    """
    settings = _Settings(directory)
    if (directory / "tokenizer.json").is_file():
        tokenizer, files = _from_tokenizer_json(directory, settings), ("tokenizer.json",)
    elif architecture == "bert" and (directory / "vocab.txt").is_file():
        tokenizer, files = _from_vocab_txt(directory / "vocab.txt", settings), ("vocab.txt",)
    elif architecture == "gpt" and (directory / "vocab.json").is_file():
        tokenizer, files = _from_vocab_json(directory, settings), ("vocab.json", "merges.txt")
    else:
        return None, ()

    _add_recorded_tokens(tokenizer, settings, directory)
    check_ids(tokenizer, vocab_size, directory)
    with damage_told_as(f"{directory} has a tokenizer that cannot encode every text"):
        try_encoding(tokenizer)
    if architecture == "gpt":
        # The published GPT pads with its end-of-text token. Generation continues the right end, so pads go left.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, (*files, *settings.files)


class _Settings:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json as one; any of them may be missing."""

    def __init__(self, directory: Path) -> None:
        self.files: list[str] = []
        self.config = self._read(directory / "tokenizer_config.json")
        special = {**self.config, **self._read(directory / "special_tokens_map.json")}
        self.special_tokens = {
            name: _content(special[name]) for name in _SPECIAL_TOKENS if isinstance(special.get(name), (str, dict))
        }
        self.added = self._read(directory / "added_tokens.json")

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        self.files.append(path.name)
        return read_json_object(path, limit=LARGEST_TABLE)

    def option(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def recorded_tokens(self) -> dict[int, AddedToken]:
        """Tokens that the settings give an id of their own, by id."""
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            return {
                int(token_id): AddedToken(_content(entry), **{flag: bool(entry.get(flag, False)) for flag in flags})
                for token_id, entry in decoder.items()
                if token_id.isdecimal() and len(token_id) < 10 and isinstance(entry, dict)
            }
        special = set(self.special_tokens.values())
        return {
            token_id: AddedToken(content, special=content in special, normalized=content not in special)
            for content, token_id in self.added.items()
            if isinstance(token_id, int)
        }


def _from_tokenizer_json(directory: Path, settings: _Settings) -> PreTrainedTokenizerBase:
    path = directory / "tokenizer.json"
    what = f"{path} describes no tokenizer"
    with damage_told_as(what):
        check_files(path, what)
        return PreTrainedTokenizerFast(tokenizer_file=str(path), **settings.special_tokens)


def _from_vocab_txt(path: Path, settings: _Settings) -> PreTrainedTokenizerBase:
    vocab = {token: index for index, token in enumerate(_lines(path))}
    # Without a recorded setting: a vocabulary that holds capitals was made from text in its own case.
    has_capitals = any(token != token.lower() for token in vocab if not token.startswith("["))
    with damage_told_as(f"{path} makes no tokenizer"):
        return BertTokenizer(
            vocab=vocab,
            do_lower_case=settings.option("do_lower_case", not has_capitals),
            tokenize_chinese_chars=settings.option("tokenize_chinese_chars", True),
            strip_accents=settings.config.get("strip_accents"),
            **settings.special_tokens,
        )


def _from_vocab_json(directory: Path, settings: _Settings) -> PreTrainedTokenizerBase:
    vocab = read_json_object(directory / "vocab.json", limit=LARGEST_TABLE)
    merges_path = directory / "merges.txt"
    if not merges_path.is_file():
        raise CheckpointError(f"{directory} has vocab.json but no merges.txt")
    rows = [line for line in _lines(merges_path) if line and not line.startswith("#version")]
    merges = [tuple(row.split(" ")) for row in rows]
    if broken := [row for row, merge in zip(rows, merges, strict=True) if len(merge) != 2]:
        raise CheckpointError(f"{merges_path}: a merge has two parts; got {broken[0]!r}")
    special_tokens = {
        **{name: _END_OF_TEXT for name in ("bos_token", "eos_token", "unk_token") if _END_OF_TEXT in vocab},
        **settings.special_tokens,
    }
    with damage_told_as(f"{directory} has vocab.json and merges.txt that make no tokenizer"):
        return GPT2Tokenizer(
            vocab=vocab,
            merges=merges,  # pyright: ignore[reportArgumentType]  # pairs work, and unlike strings are not ambiguous
            add_prefix_space=settings.option("add_prefix_space", False),
            **special_tokens,
        )


def _lines(path: Path) -> list[str]:
    # Split at "\n" alone: vocabularies hold other line separators as tokens.
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {one_line(error)}") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _add_recorded_tokens(tokenizer: PreTrainedTokenizerBase, settings: _Settings, directory: Path) -> None:
    recorded = settings.recorded_tokens()
    # New tokens get the next free id, so they must come in the order of the recorded ones.
    tokenizer.add_tokens([recorded[token_id] for token_id in sorted(recorded)])
    wrong = [
        f"{token.content} ({tokenizer.convert_tokens_to_ids(token.content)}, recorded {token_id})"
        for token_id, token in sorted(recorded.items())
        if tokenizer.convert_tokens_to_ids(token.content) != token_id
    ]
    if wrong:
        raise CheckpointError(f"{directory}: tokenizer files disagree about the ids of {listed(wrong)}")


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content"))
