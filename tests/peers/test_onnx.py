"""ONNX Runtime on our models, exported by the default call with free batch and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cottention import models
from tests.models.helpers import bert_config, gpt_config, randomised, some_tokens

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporter itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_HEADS = sorted(
    name
    for name in models.__all__
    if name.startswith(("CottentionBert", "CottentionGPT")) and not name.endswith(("Config", "PreTrainedModel"))
)
_FREE = {0: "batch", 1: "length"}


def _session(model: Any, inputs: dict[str, Any], shapes: dict[str, Any], folder: Path) -> Any:
    path = folder / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return onnxruntime.InferenceSession(str(path))


def _assert_same(found: Any, expected: Tensor) -> None:
    assert (torch.tensor(found) - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def _padded(B: int, T: int) -> dict[str, Tensor]:
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, : T // 3] = 0
    mask[-1, T - T // 4 :] = 0
    return {"input_ids": some_tokens(B, T), "attention_mask": mask}


def _choices(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`[B, 2, T]`, for multiple choice."""
    return {name: torch.stack([x, x.flip(0)], 1) for name, x in inputs.items()}


@pytest.mark.parametrize("name", _HEADS)
def test_a_head_equals_itself_in_onnx_runtime_at_other_shapes(name: str, tmp_path: Path) -> None:
    config = bert_config() if "Bert" in name else gpt_config(use_cache=False, pad_token_id=0)
    model = randomised(getattr(models, name)(config)).float()
    is_choice = "MultipleChoice" in name
    given = _choices if is_choice else dict
    free = {0: "batch", 2: "length"} if is_choice else _FREE
    session = _session(model, given(_padded(2, 7)), dict.fromkeys(("input_ids", "attention_mask"), free), tmp_path)
    for B, T in ((1, 3), (5, 17), (2, 64), *([(2, 200)] if "GPT" in name else [])):
        inputs = given(_padded(B, T))
        with torch.no_grad():
            expected = [x for x in model(**inputs, return_dict=False) if isinstance(x, Tensor)]
        found = session.run(None, {key: x.numpy() for key, x in inputs.items()})
        for each, truth in zip(found, expected, strict=True):
            _assert_same(each, truth)


_GATES: dict[str, dict[str, Any]] = {
    "decay": {"decay": "data"},
    "erase": {"erase": True},
    "both": {"decay": "learned", "erase": True, "short_conv": 3, "output_norm": True, "output_gate": "silu"},
}


@pytest.mark.parametrize("gates", [*_GATES.values(), None], ids=[*_GATES, "bidirectional"])
def test_decay_and_erase_equal_themselves_in_onnx_runtime_at_other_shapes(
    gates: dict[str, Any] | None, tmp_path: Path
) -> None:
    """As a model comes, whose weights want gradients."""
    if gates is None:
        model = randomised(models.CottentionBertForMaskedLM(bert_config(decay="data"))).float()
    else:
        model = randomised(models.CottentionGPTForCausalLM(gpt_config(use_cache=False, **gates))).float()
    session = _session(model, _padded(2, 7), dict.fromkeys(("input_ids", "attention_mask"), _FREE), tmp_path)
    for B, T in ((1, 3), (5, 17), (2, 64), *([] if gates is None else [(2, 200)])):
        inputs = _padded(B, T)
        with torch.no_grad():
            expected = model(**inputs).logits
        (found,) = session.run(None, {key: x.numpy() for key, x in inputs.items()})
        _assert_same(found, expected)


@pytest.mark.parametrize("gates", [{}, {"decay": "data", "erase": True}], ids=["plain", "gated"])
def test_a_decode_step_with_its_state_runs_in_onnx_runtime(gates: dict[str, Any], tmp_path: Path) -> None:
    model = randomised(models.CottentionGPTForCausalLM(gpt_config(**gates))).float()
    with torch.no_grad():
        out = model(some_tokens(2, 5), use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"
    L, batch = model.config.n_layer, {0: "batch"}
    inputs = {"input_ids": some_tokens(2, 1), name: out[name], "use_cache": True}
    shapes = {"input_ids": batch, name: [[batch] * L, [batch] * L, [batch]], "use_cache": None}
    session = _session(model, inputs, shapes, tmp_path)
    ids = some_tokens(3, 12)
    with torch.no_grad():
        whole = model(ids).logits
        tensors = pytree.tree_leaves(model(ids[:, :4], use_cache=True)[name])
    state = [x.numpy() for x in tensors]
    names = [each.name for each in session.get_inputs()]
    for at in range(4, 12):
        logits, *state = session.run(None, dict(zip(names, [ids[:, at : at + 1].numpy(), *state], strict=True)))
        _assert_same(logits, whole[:, at : at + 1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_torchscript_exporter_takes_softmax_and_refuses_cosine_in_one_line(tmp_path: Path) -> None:
    inputs = tuple(_padded(2, 7).values())
    model = randomised(models.CottentionBertModel(bert_config("softmax"))).float()
    torch.onnx.export(model, inputs, tmp_path / "softmax.onnx", dynamo=False)
    model = randomised(models.CottentionBertModel(bert_config())).float()
    with pytest.raises(RuntimeError, match=r"needs torch.onnx.export\(..., dynamo=True\)"):
        torch.onnx.export(model, inputs, tmp_path / "cosine.onnx", dynamo=False)
