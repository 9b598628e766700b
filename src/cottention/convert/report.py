"""What a conversion read, what it left out and why: written beside the weights and printed by the command.

report.to_dict(), report.summary()
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cottention.convert.configs import Architecture, AttentionType
from cottention.convert.distil_report import DistillationReport

REPORT_NAME = "conversion.json"
"""File name of the report in the converted directory."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One thing that was not taken over."""

    name: str
    """A file, a tensor or a config field."""
    reason: str
    """Why, in a few words."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What happened to one checkpoint."""

    source: str
    """The directory or Hub name, as given."""
    commit: str | None
    """The Hub's commit; None for a directory."""
    destination: str
    """The directory that was written."""
    architecture: Architecture
    """bert or gpt."""
    attention_type: AttentionType
    """Of the result."""
    model_class: str
    """Our class that opens the result."""
    dtype: str
    """Type of the embedding, and so of most weights; each tensor keeps its own."""
    num_tensors: int
    """Tensors written; tied ones count once."""
    num_parameters: int
    """Numbers in them."""
    tokenizer: str | None
    """Class of the tokenizer; None where its files are missing."""
    files_read: tuple[str, ...]
    """Files of the source that the result was made from."""
    left_out: tuple[LeftOut, ...]
    """Everything else in the source."""
    notes: tuple[str, ...]
    """What a user should know before using the result."""
    training_step: int | None = None
    """Optimiser updates done, as config.pt of a published checkpoint says."""
    new: tuple[str, ...] = ()
    """Tensors that the source does not hold and that were made, norm_const of a softmax source among them."""
    distillation: DistillationReport | None = None
    """What the result was taught, and how it compares with its source."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)

    def summary(self) -> str:
        """The report for reading, a few lines."""
        step = f", after {self.training_step:,} updates" if self.training_step is not None else ""
        size = f"{self.num_parameters:,} parameters in {self.num_tensors} tensors"
        lines = [f"{self.destination}: {self.attention_type} {self.model_class}, {size}, {self.dtype}{step}"]
        lines.append(f"  read      {', '.join(self.files_read)}")
        names_by_reason: dict[str, list[str]] = {}
        for item in self.left_out:
            names_by_reason.setdefault(item.reason, []).append(item.name)
        lines += [f"  left out  {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
        lines += [f"  note      {note}" for note in self.notes]
        if self.distillation is not None:
            lines += ["", *self.distillation.table()]
        return "\n".join(lines)
