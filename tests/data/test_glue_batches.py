"""Rows to batches: the tokens of a pair, what is cut and counted, packed batches that give what padded ones give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from cottention.data.glue_batches import GlueCollator, encode_glue, packs_best
from cottention.errors import SettingsError
from cottention.models import CottentionBertForSequenceClassification
from tests import tiny
from tests.models.helpers import bert_config, randomised

TOKENIZER: Any = tiny.wordpiece_tokenizer()
CLS, SEP, PAD = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.pad_token_id
PAIRS = Dataset.from_dict(
    {
        "index": ["0", "1", "2"],
        "first": ["the people", "Union", "order"],
        "second": ["of the United States", "", "a more perfect Union"],
        "label": [1, 0, 1],
    }
)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_pair_is_cls_first_sep_second_sep() -> None:
    encoded = encode_glue(PAIRS, TOKENIZER, max_length=64)
    assert encoded.num_cut == 0
    assert encoded.rows["label"] == [1, 0, 1]
    for row, pair in zip(encoded.rows.to_list(), PAIRS.to_list(), strict=True):
        first, second = ids(pair["first"]), ids(pair["second"])
        assert row["input_ids"] == [CLS, *first, SEP, *second, SEP]
        assert row["num_first"] == len(first) + 2


def test_one_text_is_cls_text_sep() -> None:
    rows = Dataset.from_dict({"first": ["the people"], "second": [""]})
    encoded = encode_glue(rows, TOKENIZER, max_length=64).rows
    assert encoded.column_names == ["input_ids", "num_first", "was_cut"]
    assert encoded[0]["input_ids"] == [CLS, *ids("the people"), SEP]
    assert encoded[0]["num_first"] == len(encoded[0]["input_ids"])


def test_long_rows_are_cut_where_they_are_longest_and_counted() -> None:
    before = TOKENIZER.backend_tokenizer.to_str()
    encoded = encode_glue(PAIRS, TOKENIZER, max_length=8)
    whole = encode_glue(PAIRS, TOKENIZER, max_length=64).rows
    assert encoded.num_cut == sum(len(row) > 8 for row in whole["input_ids"]) > 0
    assert max(map(len, encoded.rows["input_ids"])) == 8
    assert all(row[-1] == SEP for row in encoded.rows["input_ids"])
    # The limit does not stay in the tokenizer, which is saved with the model.
    assert TOKENIZER.backend_tokenizer.to_str() == before


def test_a_padded_batch() -> None:
    rows = encode_glue(PAIRS, TOKENIZER, max_length=64).rows.to_list()
    batch = GlueCollator(pad_token_id=PAD, packed=False)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    for i, row in enumerate(rows):
        length, num_first = len(row["input_ids"]), row["num_first"]
        padding = longest - length
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [PAD] * padding
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * padding
        assert batch["token_type_ids"][i].tolist() == [0] * num_first + [1] * (length - num_first) + [0] * padding
    assert batch["labels"].dtype == torch.int64
    scores = [{**row, "label": 2.5} for row in rows]
    assert GlueCollator(pad_token_id=PAD, packed=True)(scores)["labels"].tolist() == [2.5] * 3
    assert "token_type_ids" not in GlueCollator(pad_token_id=PAD, packed=True, num_token_types=1)(rows)


@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_packed_batches_give_the_same_loss_and_gradients(attention_type: str) -> None:
    rows = encode_glue(PAIRS, TOKENIZER, max_length=64).rows.to_list()
    model: Any = randomised(
        CottentionBertForSequenceClassification(bert_config(attention_type, vocab_size=len(TOKENIZER), num_labels=2))
    )
    results = []
    for packed in (True, False):
        model.zero_grad()
        out = model(**GlueCollator(pad_token_id=PAD, packed=packed)(rows))
        out.loss.backward()
        results.append((out.logits, out.loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_mistakes_are_one_line() -> None:
    with pytest.raises(SettingsError, match="max_length must be at least 5; got 4"):
        encode_glue(PAIRS, TOKENIZER, max_length=4)
    with pytest.raises(SettingsError, match=r"the tokenizer must have \[CLS\] and \[SEP\]"):
        encode_glue(PAIRS, tiny.bpe_tokenizer(), max_length=8)


def test_softmax_is_padded_on_a_gpu_alone() -> None:
    kinds = [(kind, device) for kind in ("cosine", "softmax") for device in ("cpu", "cuda")]
    assert [packs_best(kind, torch.device(device)) for kind, device in kinds] == [True, True, True, False]
