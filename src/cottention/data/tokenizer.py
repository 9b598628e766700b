"""Tokenizers: trained on a corpus, or opened from a folder, a file or a hub name. Always a PreTrainedTokenizerFast.

`train_tokenizer` makes byte-level BPE for GPT (any text, losslessly) or cased WordPiece for BERT. The BPE pre-tokenizer
lets a space lead words, numbers of up to three digits and punctuation, so that none of them costs a token for its
space; on the default corpus it needs 1-2 % fewer tokens than GPT-2's rule. The same corpus gives the same tokenizer on
every machine. `save_pretrained` writes it, AutoTokenizer and `load_tokenizer` read it.

    tokenizer = train_tokenizer(load_corpus("books/"), kind="bpe", vocab_size=4096)
    tokenizer = load_tokenizer("runs/quickstart-gpt")
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cottention.bars import progress
from cottention.data.tokenization import check_has_text
from cottention.data.tokenizer_files import damage_told_as, open_tokenizer
from cottention.errors import DataError, SettingsError, did_you_mean, why_offline
from cottention.files import one_line
from cottention.logging import get_logger

END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""Special tokens of WordPiece, in the order of their ids."""

_BPE_PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)| ?\p{L}[\p{L}\p{M}]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BERT_ALPHABET = 1000  # rarer characters become [UNK], else a large corpus fills the vocabulary with single characters
_CONTINUES = "##"
_ROWS_PER_BATCH = 64
_HUB_TIMEOUT_S = 5.0
_HUB_FILES = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json"]

logger = get_logger(__name__)


def train_tokenizer(dataset: Dataset, *, kind: str = "bpe", vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the column "text".

    Args:
        dataset: rows with text; read in batches.
        kind: "bpe" (byte-level; "<|endoftext|>" is id 0 and serves as beginning, end and padding; pads go left, as
            generation wants them) or "wordpiece" (cased, BERT's special tokens as ids 0 to 4).
        vocab_size: number of tokens; a small corpus may give fewer, which is logged.

    Returns:
        The tokenizer; the same rows give the same one.

    Raises:
        SettingsError: unknown kind, or a vocabulary too small for the alphabet.
        DataError: there is no text.
    """
    if kind not in ("bpe", "wordpiece"):
        raise SettingsError(f"a tokenizer's kind must be bpe or wordpiece; got {kind!r}")
    check_has_text(dataset)
    tokenizer = _train_bpe(dataset, vocab_size) if kind == "bpe" else _train_wordpiece(dataset, vocab_size)
    if len(tokenizer) < vocab_size:
        logger.warning("the corpus is small: the vocabulary has %d tokens instead of %d", len(tokenizer), vocab_size)
    return tokenizer


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Open a tokenizer.

    Args:
        path_or_name: a model or tokenizer directory; a directory with nothing but vocab.txt (WordPiece) or
            vocab.json + merges.txt (BPE; also encoder.json + vocab.bpe); a tokenizer.json; or a name on the hub, which
            is asked once, without retries, when the name is not in the local cache.

    Raises:
        DataError: there is no such thing, or it is damaged; one line.
    """
    name = os.fspath(path_or_name)
    if not name:
        raise DataError("no tokenizer was named: the name is empty")
    what = f"cannot read a tokenizer from {path_or_name}"
    with damage_told_as(what, DataError):
        path = Path(name).expanduser()
        path = path if path.exists() else _from_hub(name)
    return open_tokenizer(path, lambda: _open(path), what, DataError)


def _train_bpe(dataset: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise SettingsError(f"vocab_size of byte-level BPE must be at least {len(alphabet) + 1}; got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BPE_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer.train_from_iterator(_texts(dataset), trainer)
    return _wrap_bpe(tokenizer)


def _train_wordpiece(dataset: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    # The trainer keeps its characters in a randomly seeded hash map: its order decides between equally rare ones, and
    # numbers the "##x" pieces, where it breaks ties between merges. So the alphabet is chosen here, and a first pass
    # without merges finds which of it continues words; given sorted, their numbers are fixed.
    alphabet = _commonest_characters(dataset)
    characters = set(_wordpiece_vocab(dataset, list(BERT_TOKENS.values()), alphabet, 1))
    continuing = sorted(piece for piece in characters if piece.startswith(_CONTINUES) and len(piece) == 3)
    if vocab_size < len(characters):
        raise SettingsError(
            f"vocab_size must be at least {len(characters)}, the characters of this corpus; got {vocab_size}"
        )
    vocab = _wordpiece_vocab(dataset, [*BERT_TOKENS.values(), *continuing], alphabet, vocab_size)
    return _wrap_wordpiece(vocab, lowercase=False)


def _commonest_characters(dataset: Dataset) -> list[str]:
    """The characters that become tokens, commonest first, equally common ones in the order of their code points."""
    counts: Counter[str] = Counter()
    for texts in _texts(dataset):
        for text in texts:
            counts.update(text)
    # The normalizer drops or replaces some; character by character, as it does without stripping accents.
    normalizer = _bert_normalizer(lowercase=False)
    kept = [character for character in counts if normalizer.normalize_str(character).strip() == character]
    return sorted(kept, key=lambda character: (-counts[character], character))[:_BERT_ALPHABET]


def _wordpiece_vocab(dataset: Dataset, first: list[str], alphabet: list[str], vocab_size: int) -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=BERT_TOKENS["unk"]))
    tokenizer.normalizer = _bert_normalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=first,
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(dataset), trainer)
    return tokenizer.get_vocab()


def _texts(dataset: Dataset) -> Iterator[list[str]]:
    """Yield lists of texts below a bar that shows itself only when it takes seconds."""
    rows = dataset.select_columns("text")
    with progress("Training the tokenizer", "row", total=len(rows), delay=3, leave=False) as bar:
        for batch in rows.iter(batch_size=_ROWS_PER_BATCH):
            texts = batch["text"]  # pyright: ignore[reportArgumentType, reportCallIssue]  # a dict of columns
            yield texts
            bar.update(len(texts))


def _wrap_bpe(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _wrap_wordpiece(vocab: dict[str, int], *, lowercase: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token=BERT_TOKENS["unk"], continuing_subword_prefix=_CONTINUES)  # pyright: ignore
    )
    tokenizer.normalizer = _bert_normalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    sep, cls = BERT_TOKENS["sep"], BERT_TOKENS["cls"]
    tokenizer.post_processor = processors.BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in BERT_TOKENS.items()},
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _bert_normalizer(*, lowercase: bool) -> normalizers.Normalizer:
    return normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)


def _open(path: Path) -> PreTrainedTokenizerBase:
    if path.is_file():
        if path.suffix != ".json":
            raise DataError(f"{path} is no tokenizer; expected a folder, a tokenizer.json or a hub name")
        return _with_special_tokens(Tokenizer.from_file(str(path)))
    names = {entry.name for entry in path.iterdir()}
    if "tokenizer.json" in names:
        return _from_tokenizer_json(path, names)
    if "vocab.txt" in names:
        return _from_vocab_txt(path / "vocab.txt")
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if {vocab, merges} <= names:
            return _from_vocab_and_merges(path / vocab, path / merges)
    if "tokenizer_config.json" in names:
        return _from_config(path)
    raise DataError(f"no tokenizer in {path}; expected tokenizer.json, vocab.txt, or vocab.json with merges.txt")


def _from_tokenizer_json(path: Path, names: set[str]) -> PreTrainedTokenizerBase:
    if "tokenizer_config.json" in names:
        return _from_config(path)
    return _with_special_tokens(Tokenizer.from_file(str(path / "tokenizer.json")))


def _from_config(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _from_vocab_txt(path: Path) -> PreTrainedTokenizerFast:
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    missing = [token for token in BERT_TOKENS.values() if token not in tokens]
    if missing:
        raise DataError(f"{path} is not a BERT vocabulary: it lacks {', '.join(missing)}")
    # Nothing else in such a folder says whether text is to be lowercased; a lowercased vocabulary has no capitals.
    lowercase = not any(token != token.lower() for token in tokens if not token.startswith("["))
    return _wrap_wordpiece({token: index for index, token in enumerate(tokens)}, lowercase=lowercase)


def _from_vocab_and_merges(vocab: Path, merges: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that comes alone: which tokens are special is told by their usual names."""
    vocab = tokenizer.get_vocab()
    if END_OF_TEXT in vocab:
        return _wrap_bpe(tokenizer)
    special = {f"{name}_token": token for name, token in BERT_TOKENS.items() if token in vocab}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _from_hub(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".json":
        folder = path.parent
        near = did_you_mean(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""
        raise DataError(f"no such tokenizer: {name}{near}")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=_HUB_TIMEOUT_S))
    except LocalEntryNotFoundError as error:
        raise DataError(
            f"no folder {name} here, and as a hub name it is neither in the local cache nor can the hub be reached"
            f"{why_offline()}"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise DataError(f"no folder {name} here, and the hub answers {status} to this name") from error
    except (HFValidationError, OSError) as error:
        raise DataError(f"no folder {name} here, and it is no hub name: {one_line(error)}") from error
