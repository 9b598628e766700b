"""What the page of a BERT computes: masks, pairs, neighbours. Plain values in, plain values out.

fill(opened, "The [MASK] of the Union", top_k=5)       # [{"people": 0.4, ...}]
"""

from __future__ import annotations

from pathlib import Path

from cottention.errors import DataError, SettingsError
from cottention.generation import embed_sentences, fill_mask, score_next_sentences
from cottention.generation.encoding import encode
from cottention.playground.opened import OpenedModel


def text_of_file(path: str) -> str:
    """What an uploaded file holds.

    Raises:
        DataError: it is not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{Path(path).name} is not UTF-8 text") from None


def tokens_of(opened: OpenedModel, text: str) -> list[str]:
    """The tokens of a text as they are written, special ones left out: what a visitor clicks on."""
    token_ids = encode(opened.tokenizer, text, "the text", add_special_tokens=False).tolist()
    return [str(opened.tokenizer.decode([token])) for token in token_ids]


def with_mask(opened: OpenedModel, text: str, index: int) -> str:
    """The text with one of its tokens hidden.

    Raises:
        SettingsError: the tokenizer has no mask, or the text no such token.
    """
    tokenizer = opened.tokenizer
    token_ids = encode(tokenizer, text, "the text", add_special_tokens=False).tolist()
    if tokenizer.mask_token_id is None:
        raise SettingsError("this model's tokenizer has no mask token")
    if not 0 <= index < len(token_ids):
        raise SettingsError(f"the text has {len(token_ids)} tokens; there is none at {index}")
    token_ids[index] = tokenizer.mask_token_id
    return str(tokenizer.decode(token_ids))


def fill(opened: OpenedModel, text: str, top_k: int) -> list[dict[str, float]]:
    """The likeliest tokens of each mask with their probabilities."""
    with opened.lock:
        filled = fill_mask(opened.model, opened.tokenizer, text, top_k)[0]
    return [{each.token: each.probability for each in mask} for mask in filled.masks]


def follows(opened: OpenedModel, first: str, second: str) -> dict[str, float]:
    """How likely the second sentence follows the first."""
    if not first.strip() or not second.strip():
        raise SettingsError("two sentences are needed")
    with opened.lock:
        probability = score_next_sentences(opened.model, opened.tokenizer, [(first, second)])[0]
    return {"follows": probability, "does not": 1 - probability}


def nearest(opened: OpenedModel, query: str, texts: str) -> list[list[str]]:
    """The lines of a text by the cosine of their vectors with the query's, nearest first: [cosine, line]."""
    lines = [line for line in texts.splitlines() if line.strip()]
    if not query.strip() or not lines:
        raise SettingsError("a query and at least one line to search are needed")
    with opened.lock:
        vectors = embed_sentences(opened.model, opened.tokenizer, [query, *lines], normalize=True)
    cosines = (vectors[1:] @ vectors[0]).tolist()
    return [[f"{cosine:.3f}", line] for cosine, line in sorted(zip(cosines, lines, strict=True), reverse=True)]
