"""One seed of a fine-tuning on labels of one's own: the trainer of GLUE with other batches and scores.

trainer = LabelTrainer(model, tokenizer, task=LabelTask(title="train.csv", kind="classes", names=names), ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

from cottention.data.label_batches import LabelCollator
from cottention.evaluation.labels import label_scores, tag_scores
from cottention.generation.labelling import split_tokens
from cottention.training.finetune_trainer import FinetuneTrainer
from cottention.training.processes import to_device

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class LabelTask:
    """What is learned."""

    title: str
    """As in the log."""
    kind: str
    """ "classes", "number", "several" or "words"."""
    names: tuple[str, ...]
    """Of the labels, in the order of the outputs."""


class LabelTrainer(FinetuneTrainer):
    """Learns the labels of a `LabelTask`."""

    fields: ClassVar[tuple[str, ...]] = (*FinetuneTrainer.fields, "starts")
    task: LabelTask

    def make_collator(self, **options: Any) -> LabelCollator:
        """What joins rows to batches."""
        return LabelCollator(kind=self.task.kind, **options)

    def measured(self, rows: Dataset) -> dict[str, Any]:
        """Scores of a split, see `LabelScores`."""
        task = self.task
        if task.kind == "words":
            labels = [np.asarray(tags) for tags in rows["label"]]
            return tag_scores(task.names, list(self._tags(rows)), labels).as_dict()
        labels = np.asarray(rows["label"])
        return label_scores(task.kind, task.names, self.logits_of(rows), labels).as_dict()

    @torch.inference_mode()
    def _tags(self, rows: Dataset) -> Iterator[np.ndarray]:
        """The tag of each word, row by row; of one that was cut off the first, which may be right or wrong."""
        model = self.model
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(rows), _BATCH):
                picked = rows.select(range(start, min(start + _BATCH, len(rows)))).remove_columns("label").to_list()
                batch = to_device(self.collator(picked), model.device)
                with torch.autocast(**self.autocast):
                    outputs = split_tokens(model, batch, picked)
                for row, logits in zip(picked, outputs, strict=True):
                    if not logits.isfinite().all():
                        self.stop_at("output", self.state.global_step)
                    starts = np.asarray(row["starts"], dtype=np.int64)
                    best = logits.argmax(-1).numpy()
                    yield np.where(starts >= 0, best[starts], 0)
        finally:
            model.train(was_training)
