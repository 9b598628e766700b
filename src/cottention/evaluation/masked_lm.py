"""Held-out accuracy of a BERT on masked tokens, beside the best guess that ignores the text.

Documents are packed into windows `[CLS] ... [SEP]`, the last one padded, so that no text is left out; 15 % of the
tokens are targets, chosen by the seed and the text alone: every model is asked the same. The baseline answers always
with the token that is most frequent among these very targets, the best that a constant answer can do.

    result = evaluate_masked_lm(model, tokenizer, load_corpus("held_out.txt"), window=128)
    result.accuracy, result.baseline_accuracy
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.bars import progress
from cottention.data.collators import IGNORED, MaskedLMCollator
from cottention.data.packing import pack_mlm_windows
from cottention.errors import DataError, SettingsError
from cottention.evaluation.inputs import as_tokens
from cottention.evaluation.ngram import UnigramModel
from cottention.models.configuration import check_vocabulary


@dataclass(frozen=True, kw_only=True)
class MaskedLMResult:
    """How well a model fills masked tokens."""

    accuracy: float
    """Share of the targets where the model's first choice is right."""
    hidden_accuracy: float
    """The same of the targets that the input does not show: a tenth stays in place, where copying is right."""
    nats_per_token: float
    """Mean cross-entropy over the targets."""
    baseline_accuracy: float
    """Share of the targets that are the most frequent one."""
    baseline_token: str
    """That token."""
    baseline_nats_per_token: float
    """Entropy of the targets: the cross-entropy of a model that knows their frequencies and nothing else."""
    hidden_nats_per_token: float
    """Mean cross-entropy over the targets that the input does not show; 0 where it shows all."""
    num_targets: int
    """Tokens that were to be predicted."""
    num_windows: int
    """Rows that they are in."""
    unigram_nats_per_token: float | None = None
    """Cross-entropy of a counting model's frequencies over the same hidden targets; None where none was given."""

    def to_dict(self) -> dict[str, float | int | str]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate_masked_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset | Sequence[str],
    *,
    window: int,
    batch_size: int = 16,
    mlm_probability: float = 0.15,
    seed: int = 0,
    unigram: UnigramModel | None = None,
    show_progress: bool = False,
) -> MaskedLMResult:
    """Score masked-token prediction on held-out text.

    Args:
        model: a model with a masked-language-modelling head.
        tokenizer: its tokenizer, with BERT's special tokens.
        documents: a corpus of `load_corpus`, what `tokenize_documents` made of one, or a list of texts.
        window: tokens per row, [CLS] and [SEP] included; at most the model's positions.
        batch_size: rows per forward pass; decides speed and memory, not the result.
        mlm_probability: share of the tokens that are targets.
        seed: of the masking.
        unigram: word frequencies, of the text that the model was trained on, say, to score beside it.
        show_progress: show a bar on stderr.

    Raises:
        SettingsError: the window is too long for the model, the tokenizer is not a BERT's, or a number makes no sense.
        DataError: there is no text, or nothing in it that could be masked.
    """
    limit = model.config.longest_text
    if limit is not None and window > limit:
        raise SettingsError(f"the model has {limit} positions; got a window of {window}")
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {batch_size}")
    check_vocabulary(tokenizer, model.config)
    collator = MaskedLMCollator(tokenizer, mlm_probability, seed)
    windows = _windows(documents, tokenizer, window)
    nats, hidden_nats, num_right, num_hidden, num_hidden_right = 0.0, 0.0, 0, 0, 0
    frequencies, hidden_frequencies = (np.zeros(len(tokenizer), dtype=np.int64) for _ in range(2))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), progress("Scoring", "window", total=len(windows), on=show_progress) as bar:
            for start in range(0, len(windows), batch_size):
                rows = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
                labels, batch_nats, right, hidden = _score_batch(model, collator(rows))
                nats += batch_nats.sum()
                hidden_nats += batch_nats[hidden].sum()
                num_right += int(right.sum())
                num_hidden += int(hidden.sum())
                num_hidden_right += int(right[hidden].sum())
                frequencies += np.bincount(labels, minlength=len(frequencies))
                hidden_frequencies += np.bincount(labels[hidden], minlength=len(frequencies))
                bar.update(len(rows))
    finally:
        model.train(was_training)
    num_targets = int(frequencies.sum())
    if not num_targets:
        raise DataError("the text has no token to mask: all of it is unknown to the tokenizer")
    shares = frequencies[frequencies > 0] / num_targets
    return MaskedLMResult(
        accuracy=num_right / num_targets,
        hidden_accuracy=num_hidden_right / max(1, num_hidden),
        nats_per_token=float(nats / num_targets),
        hidden_nats_per_token=float(hidden_nats / max(1, num_hidden)),
        baseline_accuracy=float(frequencies.max() / num_targets),
        baseline_token=str(tokenizer.convert_ids_to_tokens(int(frequencies.argmax()))),
        baseline_nats_per_token=float(-(shares * np.log(shares)).sum()),
        num_targets=num_targets,
        num_windows=len(windows),
        unigram_nats_per_token=None if unigram is None else _nats_of(unigram, hidden_frequencies),
    )


def _nats_of(unigram: UnigramModel, frequencies: np.ndarray) -> float:
    """Cross-entropy of the model's frequencies over tokens that occur so often."""
    return float(-(frequencies @ unigram.log_probs[: len(frequencies)]) / max(1, frequencies.sum()))


def _windows(documents: Dataset | Sequence[str], tokenizer: PreTrainedTokenizerBase, window: int) -> Dataset:
    tokens = as_tokens(documents, tokenizer)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    return pack_mlm_windows(tokens, window, tail="pad", **special)


def _score_batch(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Targets, the nats of each, whether it is guessed, and whether the input does not show it."""
    labels = batch.pop("labels").to(model.device)
    outputs = model(**{name: value.to(model.device) for name, value in batch.items()})
    # A pretraining model names them after the task, a plain one does not.
    logits = outputs["prediction_logits"] if "prediction_logits" in outputs else outputs["logits"]
    is_target = labels != IGNORED
    targets, chosen = labels[is_target], logits[is_target]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    losses = F.cross_entropy(chosen, targets, reduction="none")
    right, hidden = chosen.argmax(-1) == targets, batch["input_ids"].to(model.device)[is_target] != targets
    return targets.cpu().numpy(), losses.double().cpu().numpy(), right.cpu().numpy(), hidden.cpu().numpy()
