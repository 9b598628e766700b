"""Text to sentences: what is joined, what is split, what is left out and counted."""

from __future__ import annotations

import pytest

from cottention.data.building import build_sentences
from cottention.data.splitting import Piece, SplitTask, check_language, lines_of, pieces_of, sentences_of
from cottention.errors import SettingsError

SPLIT = SplitTask(language="en", rows="documents", min_sentences=2)
WRAPPED = (
    'Dr. Smith went to Washington\n   on the 5th of Jan. 1920. He said:  "Go\thome."\nThen he left\nfor St. Louis.'
)


def test_wrapped_lines_are_joined_and_abbreviations_end_no_sentence():
    sentences, counts = sentences_of(WRAPPED, "en")
    assert sentences == [
        "Dr. Smith went to Washington on the 5th of Jan. 1920.",
        'He said: "Go home."',
        "Then he left for St. Louis.",
    ]
    assert not counts


def test_long_lines_are_paragraphs_of_their_own():
    long = (
        "The second paragraph is one line of a web page, which nobody wrapped to fit the width of a printed page, so "
        "it ends where it ends."
    )
    sentences, counts = sentences_of(f"Early history\n{long}\nNo end here but a new line\n\nA last one.", "en")
    assert sentences == [long, "A last one."]
    assert counts == {"paragraphs_dropped_heading": 2}


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("CHAPTER I", "paragraphs_dropped_heading"),
        (" = = An article of many words that ends in its own sign = = ", "paragraphs_dropped_heading"),
        ("An old apple\nA ripe pear\nThree or four figs\nOne dozen of plums", "paragraphs_dropped_list"),
        ("* * *.", "sentences_dropped_no_letter"),
        ("1918!", "sentences_dropped_no_letter"),
    ],
)
def test_what_is_no_running_text_is_counted(text, dropped):
    sentences, counts = sentences_of(f"Here it is.\n\n{text}\n\nThere it was.", "en")
    assert sentences == ["Here it is.", "There it was."]
    assert counts == {dropped: 1}


@pytest.mark.parametrize(
    "text", ["One morning he said,", "Yes!", "“Never (they say).”", "The following:", "_Go!_", "彼は来た。"]
)
def test_short_paragraphs_that_end_in_a_mark_are_text(text):
    assert sentences_of(text, "en") == ([text], {})


def test_a_long_quotation_is_split_inside_and_a_short_one_is_not():
    short = '"You see. You do not observe," he said.'
    long = '"' + " ".join(f"That is sentence number {n} of what he said." for n in range(8)) + '"'
    assert sentences_of(short, "en")[0] == [short]
    sentences, _ = sentences_of(long, "en")
    assert len(sentences) == 8
    assert " ".join(sentences) == long


def test_sentences_hold_all_of_the_text(shared_dir):
    book = (shared_dir / "data/lm/books/emma.txt").read_text(encoding="utf-8")
    prose = [part for part in book.split("\n\n") if part.rstrip().endswith((".", '."', "!", "?"))]
    sentences, counts = sentences_of("\n\n".join(prose), "en")
    assert len(sentences) > 2500
    assert set(counts) <= {"sentences_dropped_no_letter"}
    assert counts.total() < 10
    lost = len("".join("".join(prose).split())) - len("".join("".join(sentences).split()))
    assert 0 <= lost < 100


def test_lines_of_are_sentences_as_they_come():
    sentences, counts = lines_of("usually , he would . then not\n\n  no   end \n123\nlast .")
    assert sentences == ["usually , he would . then not", "no end", "last ."]
    assert counts == {"sentences_dropped_no_letter": 1}


def test_long_documents_are_cut_between_paragraphs():
    rows = [("First one.\n\nSecond ", False), ("goes on.\n\nThird", False), (" here.", True), ("Other.", True)]
    pieces = list(pieces_of(rows))
    assert pieces == [
        Piece(0, "First one.", True, False),
        Piece(0, "\n\nSecond goes on.", False, False),
        Piece(0, "\n\nThird here.", False, True),
        Piece(1, "Other.", True, True),
    ]
    without_blank_lines = list(pieces_of([("a b\nc", False), (" d e", False), (" f", True)], first_document=3))
    assert [piece.text for piece in without_blank_lines] == ["a b", "\nc d e", " f"]
    assert {piece.document for piece in without_blank_lines} == {3}


def test_counts_add_up():
    texts = ["One. Two. Three.", "Only one.", "HEADING", "A. B.", "He came. He saw."]
    table, counts = SPLIT(pieces_of((text, True) for text in texts))
    assert table.to_pylist() == [
        {"document": 0, "sentences": ["One.", "Two.", "Three."]},
        {"document": 4, "sentences": ["He came.", "He saw."]},
    ]
    assert (
        counts["documents"]
        == 5
        == counts["documents_kept"] + sum(counts[f"documents_dropped_{why}"] for why in ("too_short", "no_sentence"))
    )
    assert counts["sentences_kept"] == 5
    assert counts["bytes"] == sum(map(len, texts))


def test_a_long_document_is_kept_whatever_its_last_part_holds():
    pieces = [Piece(7, "One. Two.", True, False), Piece(7, "Three.", False, False), Piece(7, "4", False, True)]
    table, counts = SPLIT(pieces)
    assert table["document"].to_pylist() == [7, 7]
    assert table["sentences"].to_pylist() == [["One.", "Two."], ["Three."]]
    assert (counts["documents"], counts["documents_kept"]) == (1, 1)


@pytest.mark.parametrize("language", ["en", "de", "zh", "zh-hant", "gsw", "eo", "sr-latn"])
def test_codes_of_languages_are_taken(language):
    assert sentences_of("One. Two.", language)[0]
    check_language(language)


@pytest.mark.parametrize("language", ["xx", "english", "EN", "", "e", "en_US", "1"])
def test_what_is_no_language_is_refused_with_those_that_have_rules(tmp_path, language):
    (tmp_path / "a.txt").write_text("One sentence. Another one.")
    with pytest.raises(SettingsError, match="language must be the code of a language; got") as error:
        build_sentences(tmp_path / "a.txt", tmp_path / "o", language=language)
    assert "there are rules for am, ar, bg" in str(error.value)
    assert not (tmp_path / "o").exists()
