"""What a distillation did: the same scores of the softmax source and of the cosine model, before and after it.

report.after.loss, report.table()
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How one model does on the held-out text."""

    loss: float | None
    """Nats per masked token of a BERT, per token of a GPT; None without a trained head, as after a bare BertModel."""
    accuracy: float | None = None
    """Share of the masked tokens whose first guess is right; BERT only."""
    perplexity: float | None = None
    """Exponential of the loss; GPT only."""
    attention_errors: tuple[float, ...] | None = None
    """Per layer, the squared error of the attention sublayer's output on the source's own inputs, over that output's
    variance: 0 is the source, 1 what the best constant does. None for the source."""
    hidden_error: float | None = None
    """The same for the last hidden state of the model as a whole."""
    similarity: float | None = None
    """Mean cosine between the mean-pooled last hidden states of source and model, one per window."""

    @property
    def attention_error(self) -> float | None:
        """Mean over the layers."""
        return None if self.attention_errors is None else sum(self.attention_errors) / len(self.attention_errors)


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """Settings of a distillation and what came of it."""

    steps: int
    """Updates that taught each layer's attention on the source's inputs."""
    end_to_end_steps: int
    """Updates that taught the model as a whole, afterwards."""
    window: int
    """Tokens of a row."""
    batch_size: int
    """Whole rows' worth of tokens in an update."""
    learning_rate: float
    """Highest rate of the first kind of update."""
    end_to_end_learning_rate: float
    """Highest rate of the second kind."""
    seed: int
    """Of the order of the text and of the masked tokens."""
    num_trained: int
    """Parameters that were trained, as numbers; 0 without updates."""
    num_train_windows: int
    """Rows of text to learn from."""
    num_held_out_windows: int
    """Rows of text behind the scores; none of it was learnt from."""
    source: Scores
    """The softmax source."""
    before: Scores
    """The cosine model as its weights were copied."""
    after: Scores | None
    """The cosine model as it was written; None without updates."""

    def table(self) -> list[str]:
        """The scores as aligned lines, a model in each column."""
        columns = {"source": self.source, "copied": self.before, "distilled": self.after}
        models = {name: scores for name, scores in columns.items() if scores is not None}
        rows = {
            "loss (nats per token)": [scores.loss for scores in models.values()],
            "accuracy on masked tokens": [scores.accuracy for scores in models.values()],
            "perplexity": [scores.perplexity for scores in models.values()],
            "attention output error": [scores.attention_error for scores in models.values()],
            "last hidden state error": [scores.hidden_error for scores in models.values()],
            "embedding similarity": [scores.similarity for scores in models.values()],
        }
        head = f"  {'on held-out text':<27}" + "".join(f"{name:>11}" for name in models)
        lines = [
            f"  {name:<27}" + "".join(f"{_shown(value):>11}" for value in values)
            for name, values in rows.items()
            if any(value is not None for value in values)
        ]
        return ["  errors: 0 equals the source, 1 is what the best constant does", head, *lines]


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10000 else f"{value:.3g}"
