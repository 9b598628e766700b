"""The parts of a distillation: what is recorded of a model, how the text is split, which rows are learnt from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from cottention.convert.distil_layers import attention_sublayers, record
from cottention.convert.distil_report import DistillationReport, Scores
from cottention.convert.distil_scores import _Unexplained
from cottention.convert.distil_text import scoring_batches, split_off_end, training_batches
from cottention.convert.distil_train import unexplained
from cottention.data import pack_mlm_windows, pack_windows
from cottention.errors import DataError
from tests import tiny
from tests.models.helpers import some_tokens


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_recorded_calls_give_the_recorded_outputs_again(kind: str, attention_type: str) -> None:
    model: Any = getattr(tiny, kind)(attention_type)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    calls, hidden_states = record(model, {"input_ids": some_tokens(2, 9, 60), "attention_mask": mask})
    assert len(calls) == 2
    assert len(hidden_states) == 3
    for sublayer, call in zip(attention_sublayers(model), calls, strict=True):
        assert torch.equal(sublayer(*call.args, **call.kwargs), call.output)
        assert not sublayer.core._forward_hooks
    # The output is what the layer adds to its input, before anything else.
    if kind == "bert":
        layer = model.bert.encoder.layer[0].attention
        assert torch.equal(
            layer.output.LayerNorm(calls[0].output + hidden_states[0]), layer(hidden_states[0], mask, None, None)
        )
    else:
        block = model.transformer.h[0]
        feed_forward = block.mlp(block.ln_1(hidden_states[0]))
        torch.testing.assert_close(calls[0].output + feed_forward + hidden_states[0], hidden_states[1])


def test_parameters_of_a_sublayer_are_its_projections_and_norm_const() -> None:
    for model, num in ((tiny.bert(), 9), (tiny.bert("softmax"), 8), (tiny.gpt(), 5), (tiny.gpt("softmax"), 4)):
        assert len(attention_sublayers(model)[0].parameters()) == num


def test_a_table_says_what_its_errors_mean() -> None:
    nothing: dict[str, Any] = {field.name: 0 for field in fields(DistillationReport)}
    source, before = Scores(loss=1.5), Scores(loss=1.6, attention_errors=(0.5, 0.7), hidden_error=2.0)
    table = DistillationReport(**nothing | {"source": source, "before": before, "after": None}).table()
    assert table[3].split() == ["attention", "output", "error", "-", "0.600"]
    assert table[0] == "  errors: 0 equals the source, 1 is what the best constant does"


def test_unexplained_is_0_for_a_copy_and_1_for_the_mean() -> None:
    truth = torch.randn(3, 5, 4, dtype=torch.float64) + 7
    noise = torch.randn_like(truth)
    mean = truth.mean((0, 1)).expand_as(truth)
    assert unexplained(truth, truth) == 0
    assert unexplained(mean, truth).item() == pytest.approx(1)
    # The one that is scored, over batches, is the one that is trained.
    total = _Unexplained()
    for got, row in zip(truth + noise, truth, strict=True):
        total.add(got, row)
    assert total.share() == pytest.approx(unexplained(truth + noise, truth).item())


def test_unexplained_has_the_gradient_of_a_scaled_square() -> None:
    truth = torch.randn(2, 3, 4, dtype=torch.float64)
    got = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unexplained(x, truth), got)


def corpus_of(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "ends_document": [True] * len(texts)})


@pytest.mark.parametrize("texts", [("word " * 300,), ("word " * 30,) * 10, ("a " * 100, "b " * 100, "c " * 3)])
def test_the_end_is_kept_and_nothing_is_lost_or_read_twice(texts: tuple[str, ...]) -> None:
    before, after = split_off_end(corpus_of(*texts))
    words = " ".join(texts).split()
    assert [word for row in (*before["text"], *after["text"]) for word in row.split()] == words
    share = sum(map(len, after["text"])) / sum(map(len, texts))
    assert 0.08 < share < 0.12
    assert before["ends_document"][-1]


@pytest.mark.parametrize("texts", [("字" * 30_000,), ("字" * 20_000, "文" * 10_000), ("word " * 4000 + "字" * 20_000,)])
def test_text_without_spaces_keeps_a_tenth_too(texts: tuple[str, ...]) -> None:
    before, after = split_off_end(corpus_of(*texts))
    assert "".join([*before["text"], *after["text"]]).replace(" ", "") == "".join(texts).replace(" ", "")
    assert sum(map(len, after["text"])) / sum(map(len, texts)) == pytest.approx(0.1, abs=0.01)


def test_a_text_of_one_word_cannot_be_split() -> None:
    with pytest.raises(DataError, match="must hold enough words to keep some for the scores; got 9 characters"):
        split_off_end(corpus_of("wordwords"))


def tokens_of(num: int) -> Dataset:
    ids = [np.arange(10, 10 + num, dtype=np.int32)]
    return Dataset.from_dict({"input_ids": ids, "num_bytes": [num], "num_words": [num], "ends_document": [True]})


def bert_windows(num_tokens: int, window: int, tail: str = "drop") -> Dataset:
    return pack_mlm_windows(tokens_of(num_tokens), window, cls_token_id=2, sep_token_id=3, pad_token_id=0, tail=tail)


def test_bert_rows_have_many_lengths_and_are_whole_texts_at_each() -> None:
    batches = list(training_batches(bert_windows(640, 34), "bert", batch_size=4, steps=60, seed=0))
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert min(lengths) == 16
    assert max(lengths) == 34
    assert len(set(lengths)) > 10
    for batch in batches:
        input_ids = batch["input_ids"]
        assert set(batch) == {"input_ids"}
        assert input_ids[:, 0].eq(2).all()
        assert input_ids[:, -1].eq(3).all()
        assert input_ids[:, 1:-1].diff().eq(1).all()
        assert abs(input_ids.numel() - 4 * 34) < input_ids.shape[1]


def test_gpt_rows_are_whole_windows_each_once_before_any_again() -> None:
    windows = pack_windows(tokens_of(640), 32, 1)
    batches = list(training_batches(windows, "gpt", batch_size=5, steps=8, seed=0))
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (40, 32)
    firsts = rows[:, 0].tolist()
    assert sorted(firsts[:20]) == sorted(firsts[20:]) == sorted(windows[:20]["input_ids"][:, 0].tolist())
    assert firsts[:20] != firsts[20:]
    again = training_batches(windows, "gpt", batch_size=5, steps=8, seed=0)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))


def test_scored_rows_come_in_order_with_their_padding_masked() -> None:
    windows = bert_windows(70, 34, tail="pad")
    (whole, _), (last, real) = scoring_batches(windows, 2)
    assert "attention_mask" not in whole
    assert torch.equal(last["attention_mask"].bool(), real)
    assert real.sum() == 70 - 64 + 2
