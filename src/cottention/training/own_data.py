"""Where a fine-tuning's own rows come from and what of them is text and label. No torch here: `--help` is quick.

rows = OwnData(data="train.csv", text_column="review", label_column=("stars",))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cottention.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """All choices about the rows."""

    data: str
    """Rows to train on: .csv, .tsv, .jsonl, .parquet, or lines of a word and its tag (.conll, .bio, .iob)."""
    dev: str | None = None
    """Rows to measure on; null: a share of the others."""
    text_column: str | None = None
    """Column of the text; of word tags that of the words' lists. Null: text, or tokens."""
    text_pair_column: str | None = None
    """Column of the second text, for pairs."""
    label_column: tuple[str, ...] = ()
    """Column of the label; several: columns of 0 and 1, each a label of its own. None: label, or tags; to learn
    similarity from pairs alone, none."""
    label_type: Literal["auto", "classes", "number", "several", "words"] = "auto"
    """One of some classes, a number, several labels to a text, a tag to each word; auto tells by the column."""
    label_separator: str | None = None
    """What stands between the labels of one cell."""
    dev_share: float = 0.1
    """Share of the rows that is held out to measure on where dev names none."""
    license: str | None = None
    """Of the weights, as the Hub spells it ("mit"), for the model's card; null: none is claimed."""

    def __post_init__(self) -> None:
        if not 0 < self.dev_share < 1:
            raise SettingsError(f"dev_share must lie between 0 and 1; got {self.dev_share}")
        if self.label_separator == "":
            raise SettingsError("label_separator must be a sign or more; got ''")
        if self.label_separator is not None and self.label_type not in ("auto", "several"):
            raise SettingsError(f"label_separator goes with --label-type several; got {self.label_type}")
        if self.label_separator is not None and len(self.label_column) > 1:
            raise SettingsError("label_separator goes with one --label-column; got several")

    @property
    def of_words(self) -> bool:
        """Whether each word has a tag."""
        from cottention.data.word_files import is_tagged_file

        return self.label_type == "words" or (self.label_type == "auto" and is_tagged_file(self.data))

    @property
    def texts(self) -> list[str]:
        """The columns of text."""
        first = self.text_column or ("tokens" if self.of_words else "text")
        return [first] if self.text_pair_column is None else [first, self.text_pair_column]

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels."""
        return self.label_column or (("tags",) if self.of_words else ("label",))

    def check_files(self, *, needs_labels: bool = True) -> None:
        """Look at the files' first rows, before anything heavy is loaded.

        Args:
            needs_labels: whether there must be a column of labels where none was named.

        Raises:
            SettingsError: the choices do not go together.
            DataError: a file is not there, empty, of no known kind, or lacks a column.
        """
        from cottention.data.tables import check_table, first_row
        from cottention.data.word_files import is_tagged_file, read_words

        if self.of_words and self.text_pair_column is not None:
            raise SettingsError("a tag to each word goes with one text, not with --text-pair-column")
        if self.of_words and len(self.label_column) > 1:
            raise SettingsError(f"a tag to each word needs one --label-column; got {len(self.label_column)}")
        for name, path in (("--data", self.data), ("--dev", self.dev)):
            if path is None:
                continue
            check_table(path, what=name)
            if self.of_words:
                next(read_words(path, words=self.texts[0], tags=self.labels[0]), None)
            elif is_tagged_file(path):
                raise SettingsError(f"{path} holds a tag to each word, not {self.label_type}")
            else:
                first_row(path, texts=self.texts, values=self.labels if needs_labels else self.label_column)

    def as_dict(self) -> dict[str, Any]:
        """The choices in plain types, for YAML; dev_share only where it decides something."""
        content = {**dataclasses.asdict(self), "label_column": list(self.label_column)}
        if self.dev is not None:
            del content["dev_share"]
        return content
