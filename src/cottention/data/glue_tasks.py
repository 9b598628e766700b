"""The nine tasks of GLUE and its diagnostic set: what their files look like, what is asked of a model.

task = glue_task("mnli")
task.classes, task.dev_splits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cottention.errors import SettingsError, did_you_mean

_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """What one task's files look like, and what is asked of a model."""

    name: str
    """As on the command line and on the Hub."""
    title: str
    """As in tables."""
    folders: tuple[str, ...]
    """Names of its folder, in lower case without - and _."""
    first: tuple[str, ...]
    """Names that the first text's column has, in files and on the Hub."""
    second: tuple[str, ...] = ()
    """The same of the second text; none where there is one text."""
    label: tuple[str, ...] = ("label",)
    """The same of the label."""
    classes: tuple[str, ...] = _BINARY
    """Names of the classes in the files, by their number on the Hub; none for a regression."""
    without_header: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Columns of files without a first line of names, by their number."""
    dev_splits: tuple[str, ...] = ("dev",)
    """Labelled splits to measure on; the first decides which epoch is the best."""
    test_splits: tuple[str, ...] = ("test",)
    """Splits for the GLUE server."""

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one per class, or one number."""
        return len(self.classes) or 1

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores."""
        return not self.classes


_PAIR: dict[str, Any] = {"first": ("sentence1",), "second": ("sentence2",)}
_PREMISE: dict[str, Any] = {"first": ("sentence1", "premise"), "second": ("sentence2", "hypothesis")}
_NLI_CLASSES = ("entailment", "neutral", "contradiction")
_TASKS = (
    GlueTask(
        name="cola",
        title="CoLA",
        folders=("cola",),
        first=("sentence",),
        without_header={4: ("source", "label", "mark", "sentence")},
    ),
    GlueTask(
        name="sst2",
        title="SST-2",
        folders=("sst2",),
        first=("sentence",),
        without_header={2: ("sentence", "label")},
    ),
    GlueTask(
        name="mrpc",
        title="MRPC",
        folders=("mrpc",),
        first=("#1 String", "sentence1"),
        second=("#2 String", "sentence2"),
        label=("Quality", "label"),
    ),
    GlueTask(
        name="qqp",
        title="QQP",
        folders=("qqp",),
        first=("question1",),
        second=("question2",),
        label=("is_duplicate", "label"),
        without_header={3: ("question1", "question2", "is_duplicate")},
    ),
    GlueTask(name="stsb", title="STS-B", folders=("stsb",), label=("score", "label"), classes=(), **_PAIR),
    GlueTask(
        name="mnli",
        title="MNLI",
        folders=("mnli",),
        label=("gold_label", "label"),
        classes=_NLI_CLASSES,
        dev_splits=("dev_matched", "dev_mismatched"),
        test_splits=("test_matched", "test_mismatched"),
        **_PREMISE,
    ),
    GlueTask(
        name="qnli", title="QNLI", folders=("qnli",), first=("question",), second=("sentence",), classes=_ENTAILMENT
    ),
    GlueTask(name="rte", title="RTE", folders=("rte",), classes=_ENTAILMENT, **_PAIR),
    GlueTask(name="wnli", title="WNLI", folders=("wnli",), **_PAIR),
)
GLUE_TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}
"""The nine tasks by name."""
DIAGNOSTIC = GlueTask(
    name="ax",
    title="AX",
    folders=("ax", "diagnostic"),
    classes=_NLI_CLASSES,
    dev_splits=(),
    test_splits=("test",),
    **_PREMISE,
)
"""The diagnostic set: a test for models of MNLI."""


def glue_task(name: str) -> GlueTask:
    """Return the task of this name.

    Raises:
        SettingsError: there is none.
    """
    if name not in GLUE_TASKS:
        known = ", ".join(GLUE_TASKS)
        raise SettingsError(f"task must be one of {known}; got {name!r}{did_you_mean(name, GLUE_TASKS)}")
    return GLUE_TASKS[name]
