"""Whole models through torch.export: any batch and length, and a decode step that takes a cache and gives one back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from cottention.models import CottentionBertForPreTraining, CottentionGPTForCausalLM
from cottention.models.cache import CosineCache
from tests.models.helpers import bert_config, gpt_config, randomised, some_tokens

_BATCH, _LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=4096)


def _padded(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, : T // 3] = 0
    mask[-1, T - T // 4 :] = 0
    return {"input_ids": some_tokens(B, T), "attention_mask": mask}


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_a_model_is_exported_for_any_batch_and_length(family: str) -> None:
    if family == "bert":
        model = CottentionBertForPreTraining(bert_config())
    else:
        model = CottentionGPTForCausalLM(gpt_config(use_cache=False))
    model = randomised(model).float()
    length = Dim("length", min=2, max=64) if family == "bert" else _LENGTH  # its learned positions
    shapes = {name: {0: _BATCH, 1: length} for name in _padded(1, 1)}
    program = torch.export.export(model, (), _padded(2, 7), dynamic_shapes=shapes).module()
    for B, T in ((1, 2), (3, 64), *([(2, 200)] if family == "gpt" else [])):
        inputs = _padded(B, T)
        for found, expected in zip(program(**inputs).values(), model(**inputs).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_bert_is_exported_in_strict_mode() -> None:
    model = randomised(CottentionBertForPreTraining(bert_config())).float()
    program = torch.export.export(model, (), _padded(2, 7), strict=True).module()
    inputs = _padded(2, 7)
    for found, expected in zip(program(**inputs).values(), model(**inputs).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _gpt() -> tuple[Any, str]:
    model = randomised(CottentionGPTForCausalLM(gpt_config())).float()
    return model, "cache" if "cache" in model(some_tokens(1, 1)) else "past_key_values"


@pytest.mark.parametrize(
    "num_tokens", [pytest.param(1, id="one token"), pytest.param(None, id="any number", marks=pytest.mark.slow)]
)
def test_a_decode_step_with_its_cache_is_exported(num_tokens: int | None) -> None:
    model, name = _gpt()
    L, batch = model.config.n_layer, {0: _BATCH}
    tokens = batch if num_tokens else {0: _BATCH, 1: _LENGTH}
    shapes = {"input_ids": tokens, name: [[batch] * L, [batch] * L, [batch]], "use_cache": None}
    with torch.no_grad():
        cache = model(some_tokens(2, 5), use_cache=True)[name]
    example = {"input_ids": some_tokens(2, num_tokens or 3), name: cache, "use_cache": True}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (), example, dynamic_shapes=shapes), file)
    file.seek(0)
    step = torch.export.load(file).module()
    ids = some_tokens(3, 80)
    with torch.no_grad():
        whole = model(ids).logits
        cache, at = model(ids[:, :4], use_cache=True)[name], 4
        for taken in [num_tokens] * 3 if num_tokens else [2, 70, 4]:
            out = step(input_ids=ids[:, at : at + taken], **{name: cache}, use_cache=True)
            torch.testing.assert_close(out.logits, whole[:, at : at + taken], rtol=1e-4, atol=1e-4)
            cache, at = out[name], at + taken
        assert isinstance(cache, CosineCache)
        more = model(ids[:, at:], use_cache=True, **{name: cache})  # and the model goes on from there
    if at < 80:
        torch.testing.assert_close(more.logits, whole[:, at:], rtol=1e-4, atol=1e-4)


def test_a_cache_is_a_tree_of_tensors() -> None:
    model, name = _gpt()
    empty = CosineCache(2)
    assert pytree.tree_flatten(empty)[0] == []
    cache = model(some_tokens(2, 5), use_cache=True)[name]
    leaves, structure = pytree.tree_flatten(cache)
    assert len(leaves) == 2 * 2 + 1
    assert pytree.tree_unflatten(leaves, structure) is cache
    copied = pytree.tree_map(lambda x: x.clone(), cache)
    assert copied is not cache
    assert copied.get_seq_length() == 5
    for found, expected in zip(pytree.tree_leaves(copied), leaves, strict=True):
        assert torch.equal(found, expected)
    ids = some_tokens(2, 3, seed=1)
    expected = model(ids, use_cache=True, **{name: copy.deepcopy(cache)}).logits
    assert torch.equal(model(ids, use_cache=True, **{name: copied}).logits, expected)
    assert structure == pytree.tree_flatten(copied)[1]
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)).num_leaves == 5
