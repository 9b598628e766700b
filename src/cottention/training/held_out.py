"""Loss on text that is not trained on, exact however the windows fall into batches.

held_out = HeldOut(windows, collator=collator, arch="gpt", batch_size=16, targets_per_byte=0.31)
held_out.measure(model, autocast={"device_type": "cpu", "enabled": False})  # {"val_loss": 3.2, ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cottention.files import IGNORE_INDEX
from cottention.training.parallel import Parallel
from cottention.training.processes import Processes

_SUMS = (
    *("nats", "right", "targets"),
    *("hidden_nats", "hidden_right", "hidden"),
    *("kept_right", "kept"),
    *("nsp_nats", "nsp_right", "texts"),
)


class HeldOut:
    """A fixed set of windows and how to measure a model on it."""

    def __init__(
        self, windows: Any, *, collator: Any, arch: str, batch_size: int, targets_per_byte: float | None
    ) -> None:
        """Describe the set.

        Args:
            windows: dataset of windows, or sentence pairs.
            collator: as for training, but for BERT with a masking that is the same at every measurement.
            arch: "gpt" or "bert".
            batch_size: windows per pass.
            targets_per_byte: tokens that the held-out text has per byte, to report nats per byte; None leaves it out.
        """
        self._windows = windows
        self._collator = collator
        self._arch = arch
        self._batch_size = batch_size
        self._targets_per_byte = targets_per_byte

    def measure(
        self, model: PreTrainedModel, autocast: Mapping[str, Any], processes: Processes | None = None
    ) -> dict[str, float]:
        """Measure the loss, and the perplexity per token.

        For a GPT val_nats_per_byte. For a BERT val_mlm_loss and val_accuracy over all targets, and apart from each
        other those that cannot be read off the input (val_mlm_accuracy, val_hidden_loss) and the tenth that is left in
        place, where copying is right (val_kept_accuracy). For sentence pairs val_nsp_loss and val_nsp_accuracy;
        val_loss is then the sum of both losses, as in training, and val_ppl that of the tokens.

        Args:
            model: left in the mode it came in.
            autocast: arguments of torch.autocast.
            processes: several that share the work, and perhaps windows or weights.
        """
        training = model.training
        model.eval()
        reader, num_readers = (processes.reader, processes.num_readers) if processes else (0, 1)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64)
        starts = range(0, len(self._windows), self._batch_size)
        own = starts[reader::num_readers]
        parallel = processes.parallel if processes else Parallel()
        # Weights in parts are gathered by all at once, to be trained on afterwards: who has a batch less than others
        # goes through one for nothing, and tensors are none of inference.
        idle = len(starts[::num_readers]) - len(own) if parallel.is_sharded else 0
        with torch.no_grad() if parallel.is_sharded else torch.inference_mode(), torch.autocast(**autocast):
            for start in own:
                sums += self._measure_batch(model, start, parallel)
            for _ in range(idle):
                self._measure_batch(model, starts[0], parallel)
        model.train(training)
        if processes is not None:
            sums = processes.reduce(sums.to(processes.device)).cpu()
        return self._figures(dict(zip(_SUMS, sums.tolist(), strict=True)))

    def _measure_batch(self, model: PreTrainedModel, start: int, parallel: Parallel) -> Tensor:
        stop = min(start + self._batch_size, len(self._windows))
        batch = self._collator([self._windows[index] for index in range(start, stop)])
        batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        part = parallel.slice_of(model, batch)
        if self._arch == "bert":
            found = _bert_sums(model(**part, sparse_prediction=True), part)
        else:
            nats = model(**part).loss.double() * count_targets(batch, self._arch)
            found = {"nats": nats, "targets": count_targets(part, self._arch)}
        # One copy from the device for all of them.
        return torch.stack([torch.as_tensor(found.get(name, 0.0)).double().to(model.device) for name in _SUMS]).cpu()

    def _figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = _share(sums, "nats", "targets")
        measured = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
        if self._targets_per_byte is not None:
            measured["val_nats_per_byte"] = loss * self._targets_per_byte
        if self._arch == "bert":
            measured["val_accuracy"] = _share(sums, "right", "targets")
            measured["val_mlm_loss"] = loss
            measured["val_mlm_accuracy"] = _share(sums, "hidden_right", "hidden")
            measured["val_hidden_loss"] = _share(sums, "hidden_nats", "hidden")
            measured["val_kept_accuracy"] = _share(sums, "kept_right", "kept")
        if sums["texts"]:
            measured["val_nsp_loss"] = _share(sums, "nsp_nats", "texts")
            measured["val_nsp_accuracy"] = _share(sums, "nsp_right", "texts")
            measured["val_loss"] = loss + measured["val_nsp_loss"]
        return measured


def _share(sums: Mapping[str, float], part: str, whole: str) -> float:
    return sums[part] / max(1.0, sums[whole])


def _bert_sums(outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the targets of a batch; `outputs` has the scores of those alone."""
    is_target = batch["labels"] != IGNORE_INDEX
    targets, shown = batch["labels"][is_target], batch["input_ids"][is_target]
    logits = outputs.prediction_logits if "prediction_logits" in outputs else outputs.logits
    nats, right = _nats(logits, targets), logits.argmax(-1) == targets
    hidden = shown != targets
    sums = {
        "nats": nats.sum(),
        "right": right.sum(),
        "targets": is_target.sum(),
        "hidden_nats": nats[hidden].sum(),
        "hidden_right": right[hidden].sum(),
        "hidden": hidden.sum(),
        "kept_right": right[~hidden].sum(),
        "kept": (~hidden).sum(),
    }
    if "next_sentence_label" not in batch:
        return sums
    scores, answers = outputs.seq_relationship_logits, batch["next_sentence_label"]
    return {
        **sums,
        "nsp_nats": _nats(scores, answers).sum(),
        "nsp_right": (scores.argmax(-1) == answers).sum(),
        "texts": torch.ones_like(answers).sum(),
    }


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits, targets, reduction="none").double()


def count_targets(batch: Mapping[str, Any], arch: str) -> Tensor:
    """Number of tokens that a batch asks the model to predict, as a 0-d tensor."""
    if "shift_labels" in batch:
        return (batch["shift_labels"] != IGNORE_INDEX).sum()
    # A GPT's labels are shifted inside: what stands first in a row is nobody's target.
    labels = batch["labels"][..., 1:] if arch == "gpt" else batch["labels"]
    return (labels != IGNORE_INDEX).sum()
