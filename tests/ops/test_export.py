"""torch.export writes the operation in plain operators, for any batch and length, whatever implementation is named."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.native import is_available
from tests.ops.helpers import Case, make_case

_BATCH, _LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=8192)
_TOKENS = {0: _BATCH, 1: _LENGTH}
_NAMED = ["naive", "chunk", *(["native"] if is_available() else [])]


class _Attention(nn.Module):
    def __init__(self, kind: str, implementation: str) -> None:
        super().__init__()
        self._kind, self._implementation = kind, implementation

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"implementation": self._implementation}
        if self._kind == "bidirectional":
            return (cosine_attention(q, k, v, m, causal=False, attention_mask=others[0], **options)[0],)
        if self._kind == "causal":
            return (cosine_attention(q, k, v, m, causal=True, attention_mask=others[0], **options)[0],)
        if self._kind == "packed":
            return (cosine_attention(q, k, v, m, causal=True, cu_seqlens=others[0], **options)[0],)
        state = CosineState(*others)
        o, state = cosine_attention(q, k, v, m, causal=True, initial_state=state, output_final_state=True, **options)
        assert state is not None
        return o, *state


class _Step(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor, kv: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        o, state = cosine_attention_step(q, k, v, m, CosineState(kv, seen))
        return o, *state


def _exported(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> nn.Module:
    """The program as it comes out of a file."""
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    assert "cottention" not in str(program.graph)  # it runs where there is no cottention
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def _case(kind: str, B: int, T: int) -> Case:
    if kind == "packed":
        return make_case(lengths=[T - 2, 0, 2]).to(torch.float32)
    options = {"mask": None if kind == "state" else "holes", "with_state": kind == "state"}
    return make_case(B=B, T=T, causal=kind != "bidirectional", **options).to(torch.float32)


def _inputs(kind: str, case: Case) -> tuple[Tensor, ...]:
    others = {"packed": (case.cu_seqlens,), "state": case.initial_state}.get(kind, (case.attention_mask,))
    return (case.q, case.k, case.v, case.norm_const, *others)  # type: ignore[return-value, misc]


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        *((kind, "auto") for kind in ("bidirectional", "packed", "state")),
        pytest.param("causal", "auto", marks=pytest.mark.slow),  # a whole GPT is exported in tests/models
        *(pytest.param("state", name, marks=pytest.mark.slow) for name in _NAMED),
        *(pytest.param("bidirectional", name, marks=pytest.mark.slow) for name in _NAMED),
    ],
)
def test_an_exported_call_takes_any_batch_and_length(kind: str, implementation: str) -> None:
    others = {"packed": (None,), "state": ({0: _BATCH}, {0: _BATCH})}.get(kind, (_TOKENS,))
    tokens = {1: _LENGTH} if kind == "packed" else _TOKENS
    example = _inputs(kind, _case(kind, B=2, T=7))
    program = _exported(_Attention(kind, implementation), example, (*(tokens,) * 3, None, others))
    truth = _Attention(kind, "naive")
    for B, T in ((1, 2), (2, 64), (3, 65), (1, 300)):
        inputs = _inputs(kind, _case(kind, B, T))
        for found, expected in zip(program(*inputs), truth(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_step_takes_any_batch() -> None:
    def inputs(B: int) -> tuple[Tensor, ...]:
        case = make_case(B=B, T=1, with_state=True).to(torch.float32)
        return (*(x[:, 0] for x in (case.q, case.k, case.v)), case.norm_const, *case.initial_state)  # type: ignore[misc, return-value]

    batch = {0: _BATCH}
    program = _exported(_Step(), inputs(2), (batch, batch, batch, None, batch, batch))
    for B in (1, 5):
        for found, expected in zip(program(*inputs(B)), _Step()(*inputs(B)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_torchscript_exporter_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1, 8)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch._C, "_is_tracing", lambda: True)
    with pytest.raises(RuntimeError, match=r"needs torch.onnx.export\(..., dynamo=True\)"):
        cosine_attention(q, q, q, None, causal=True)
