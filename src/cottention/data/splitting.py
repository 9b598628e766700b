"""Text to sentences: cleaning by paragraph, then the library sentencex.

A piece of text is taken apart at blank lines. The lines of a paragraph are joined where they are hard-wrapped (as books
are) and stand for themselves where one is too long for that (as in Wikipedia). White space becomes single spaces. What
is no running text is left out and counted: headings (short, no mark at the end), lists (several lines, no mark at the
end), and sentences without a letter. sentencex (Wikimedia's, rules for some 300 languages, in Rust) finds the
sentences; it keeps a quotation whole, so a long one is split once more from behind its opening mark.

It imports neither datasets nor torch: worker processes start with it alone.

    sentences, counts = sentences_of("Dr. Smith left. He came back.", "en")
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

import pyarrow as pa
from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from cottention.errors import SettingsError, did_you_mean

SPLITTER = f"sentencex {metadata.version('sentencex')}"
"""What decides the sentences, beside this file."""

OWN_RULES = (
    "am, ar, bg, bn, ca, da, de, el, en, es, fi, fr, gu, hi, hy, it, ja, kk, kn, ml, mr, my, nl, pa, pl, pt, ru, sk, "
    "ta, te, uk"
)
"""Languages that sentencex has rules for; for others it takes those of a related one."""

MIN_SENTENCES = 2
"""A document of fewer has no pair to give."""

SENTENCES = pa.schema([("document", pa.int64()), ("sentences", pa.list_(pa.string()))])

_TWO_LETTERS = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss
    st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
_ISO_639_1 = frozenset(_TWO_LETTERS.split())
_LONGER_CODE = re.compile(r"[a-z]{3}")  # of ISO 639-3, which has eight thousand
_COUNTS: tuple[str, ...] = (
    "bytes",
    "documents",
    "documents_kept",
    "documents_dropped_empty",
    "documents_dropped_no_sentence",
    "documents_dropped_too_short",
    "paragraphs_dropped_heading",
    "paragraphs_dropped_list",
    "sentences_kept",
    "sentences_dropped_no_letter",
    "sentences_dropped_too_short_document",
)
_WRAPPED_WIDTH = 120  # characters: longer lines were not broken to fit a page
_HEADING_WORDS = 10
_LONG_QUOTATION = 200  # characters
_OPENING = ('"', "“", "„", "«")
_CLOSING = "\"'”’»)]*_"  # may follow the mark that ends a sentence; * and _ are emphasis in plain text
_END_MARKS = tuple(".!?…:;,—-。！？")


def check_language(language: str) -> None:
    """Refuse what is no language's code; sentencex would take it for English.

    Raises:
        SettingsError: with the languages that have rules.
    """
    code = language.partition("-")[0]
    if code not in _ISO_639_1 and not _LONGER_CODE.fullmatch(code):
        raise SettingsError(
            f"language must be the code of a language; got {language!r}{did_you_mean(language, _ISO_639_1)}; "
            f"there are rules for {OWN_RULES}, and for others those of a related one"
        )


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one that begins and ends with a paragraph."""

    document: int
    text: str
    begins: bool
    """It is the document's first."""
    ends: bool
    """It is the document's last."""


def pieces_of(rows: Iterable[tuple[str, bool]], first_document: int = 0) -> Iterator[Piece]:
    """Cut rows of text anew, so that the parts of a long document meet between paragraphs.

    Args:
        rows: text and whether it ends a document; of a few hundred thousand characters at most.
        first_document: the number of the first document.
    """
    document, held, begins = first_document, "", True
    for text, ends in rows:
        text = held + text
        # Where there is no blank line for that long, a line must do, and where there is none, the end of the row.
        cut = len(text) if ends else next((at for at in map(text.rfind, ("\n\n", "\n")) if at > 0), len(text))
        yield Piece(document, text[:cut], begins, ends)
        held, begins = text[cut:], ends
        document += ends
    if held:
        yield Piece(document, held, begins, True)


@dataclass(frozen=True, kw_only=True)
class SplitTask:
    """Turns pieces into rows of sentences, here or in another process; a piece without any gives no row."""

    language: str
    """See `sentences_of`."""
    rows: str
    """"documents" for running text, "sentences" for one sentence on each line."""
    min_sentences: int
    """Documents with fewer are left out, unless they are of several pieces."""

    def __call__(self, pieces: Iterable[Piece]) -> tuple[pa.Table, Counter[str]]:
        """Return the rows (columns document, sentences), and what was kept and dropped."""
        counts = Counter(dict.fromkeys(_COUNTS, 0))
        documents: list[int] = []
        found: list[list[str]] = []
        for piece in pieces:
            is_text = self.rows == "documents"
            sentences, dropped = sentences_of(piece.text, self.language) if is_text else lines_of(piece.text)
            counts.update(dropped)
            counts.update(documents=int(piece.begins), bytes=len(piece.text.encode()))
            if piece.begins and piece.ends and len(sentences) < self.min_sentences:
                counts["documents_dropped_too_short" if sentences else "documents_dropped_no_sentence"] += 1
                counts["sentences_dropped_too_short_document"] += len(sentences)
                continue
            counts.update(documents_kept=int(piece.begins), sentences_kept=len(sentences))
            if sentences:
                documents.append(piece.document)
                found.append(sentences)
        columns = [pa.array(documents, pa.int64()), pa.array(found, pa.list_(pa.string()))]
        return pa.table(columns, schema=SENTENCES), counts


def sentences_of(text: str, language: str) -> tuple[list[str], Counter[str]]:
    """Find the sentences of running text.

    Args:
        text: paragraphs between blank lines.
        language: a code of two or three letters; for one that it does not know sentencex takes a related one.

    Returns:
        Sentences without white space around them, and counts of what was left out.
    """
    counts: Counter[str] = Counter()
    sentences: list[str] = []
    for paragraph, is_wrapped in _paragraphs(text):
        if not _ends_with_a_mark(paragraph):
            if len(paragraph.split(" ", _HEADING_WORDS)) <= _HEADING_WORDS or paragraph[0] == paragraph[-1] == "=":
                counts["paragraphs_dropped_heading"] += 1
                continue
            if is_wrapped:
                counts["paragraphs_dropped_list"] += 1
                continue
        sentences += _with_letters(_split(paragraph, language), counts)
    return sentences, counts


def lines_of(text: str) -> tuple[list[str], Counter[str]]:
    """As `sentences_of`, for text with one sentence on each line: none is split, joined or taken for a heading."""
    counts: Counter[str] = Counter()
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return _with_letters(filter(None, lines), counts), counts


def _with_letters(sentences: Iterable[str], counts: Counter[str]) -> list[str]:
    kept = []
    for sentence in sentences:
        if any(map(str.isalpha, sentence)):
            kept.append(sentence)
        else:
            counts["sentences_dropped_no_letter"] += 1
    return kept


def _split(paragraph: str, language: str) -> Iterator[str]:
    found: list[str] = []
    for sentence in segment(language, paragraph):
        # A closing quote or an underscore of emphasis behind the last mark comes alone; it belongs to what it closes.
        if found and not sentence.strip(_CLOSING + " "):
            found[-1] += sentence
        else:
            found.append(sentence)
    for sentence in map(str.strip, found):
        if len(sentence) > _LONG_QUOTATION and sentence.startswith(_OPENING):
            first, *others = segment(language, sentence[1:])
            yield sentence[0] + first.strip()
            yield from map(str.strip, others)
        else:
            yield sentence


def _paragraphs(text: str) -> Iterator[tuple[str, bool]]:
    """Yield paragraphs on one line each, and whether several short lines were joined to make it."""
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        line = " ".join(line.split())
        if line:
            lines.append(line)
        elif lines:
            if max(map(len, lines)) > _WRAPPED_WIDTH:
                yield from ((line, False) for line in lines)
            else:
                yield " ".join(lines), len(lines) > 1
            lines = []


def _ends_with_a_mark(paragraph: str) -> bool:
    return paragraph.rstrip(_CLOSING).endswith(_END_MARKS)
