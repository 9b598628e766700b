"""torch.export writes decay and erase as one loop over the tokens, in plain operators, for any batch and length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cottention.ops import CosineState, cosine_attention
from tests.ops.helpers import make_case
from tests.ops.test_export import _BATCH, _TOKENS, _exported


class _Gated(nn.Module):
    def __init__(self, kind: str, implementation: str) -> None:
        super().__init__()
        self._kind, self._implementation = kind, implementation

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"attention_mask": mask, "implementation": self._implementation}
        if self._kind == "bidirectional":
            return (cosine_attention(q, k, v, m, causal=False, log_decay=others[0], **options)[0],)
        log_decay, beta, kv, seen = others
        options |= {"log_decay": log_decay, "beta": beta, "initial_state": CosineState(kv, seen)}
        o, state = cosine_attention(q, k, v, m, causal=True, output_final_state=True, **options)
        assert state is not None
        return o, *state


def _inputs(kind: str, B: int, T: int) -> tuple[Tensor, ...]:
    causal = kind != "bidirectional"
    case = make_case(B=B, T=T, causal=causal, mask="holes", with_state=causal, log_decay=-0.5, beta=causal)
    case = case.to(torch.float32)
    others = (case.beta, *case.initial_state) if case.initial_state is not None else ()
    return (case.q, case.k, case.v, case.norm_const, case.attention_mask, case.log_decay, *others)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["erasing", "bidirectional"])
@pytest.mark.slow
def test_an_exported_call_with_gates_takes_any_batch_and_length(kind: str) -> None:
    states = () if kind == "bidirectional" else (_TOKENS, {0: _BATCH}, {0: _BATCH})
    shapes = (*(_TOKENS,) * 3, None, _TOKENS, (_TOKENS, *states))
    program = _exported(_Gated(kind, "auto"), _inputs(kind, B=2, T=7), shapes)
    truth = _Gated(kind, "naive")
    for B, T in ((1, 2), (3, 65)):
        inputs = _inputs(kind, B, T)
        for found, expected in zip(program(*inputs), truth(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_texts_with_gates_are_refused_by_onnx_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1, 8)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    options: dict[str, Any] = {"log_decay": torch.zeros(1, 4, 1), "implementation": "chunk"}
    with pytest.raises(RuntimeError, match="ONNX has no form of packed texts with decay or erase: export a call") as e:
        cosine_attention(q, q, q, None, causal=True, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), **options)
    assert "\n" not in str(e.value)
