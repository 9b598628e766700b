"""Bad arguments raise one line that names the argument, the rule and the value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.ops import CosineState, cosine_attention, cosine_attention_step

_KV = torch.zeros(2, 3, 4, 5)
_SEEN = torch.zeros(2, dtype=torch.int64)


def _tensors(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": torch.ones(2, 6, 3, 4),
        "k": torch.ones(2, 6, 3, 4),
        "v": torch.ones(2, 6, 3, 5),
        "norm_const": torch.zeros(3),
        "causal": True,
    }
    return arguments | changes


_PACKED = {"q": torch.ones(1, 6, 3, 4), "k": torch.ones(1, 6, 3, 4), "v": torch.ones(1, 6, 3, 5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor; got list"),
        ({"q": torch.ones(2, 6, 4)}, ValueError, r"q must have shape \[B, T, H, K\]; got \[2, 6, 4\]"),
        ({"k": torch.ones(2, 6, 3, 8)}, ValueError, "k must have the head dim of q, K=4; got 8"),
        (
            {"k": torch.ones(2, 7, 3, 4), "v": torch.ones(2, 7, 3, 5)},
            ValueError,
            "as many tokens as q when causal=True",
        ),
        ({"v": torch.ones(2, 5, 3, 5)}, ValueError, "v must have as many tokens as k, T=6; got 5"),
        ({"v": torch.ones(1, 6, 3, 5)}, ValueError, "the same batch size; got 2, 2 and 1"),
        ({"k": torch.ones(2, 6, 1, 4)}, ValueError, "the same number of heads; got 3, 1 and 3"),
        ({"q": torch.ones(2, 6, 3, 4, dtype=torch.int64)}, TypeError, "q must be float64, .*; got int64"),
        ({"v": torch.ones(2, 6, 3, 5).half()}, TypeError, "v must have the dtype of q, float32; got float16"),
        ({"k": torch.ones(2, 6, 3, 4, device="meta")}, ValueError, "k must be on the device of q, cpu; got meta"),
        ({"norm_const": torch.zeros(4)}, ValueError, r"norm_const must have shape .* H=3; got \[4\]"),
        ({"norm_const": 0.5}, TypeError, "norm_const must be a tensor or None; got float"),
        ({"norm_const": torch.zeros(3, dtype=torch.int32)}, TypeError, "norm_const must be floating point; got int32"),
        ({"causal": 1}, TypeError, "causal must be True or False; got 1"),
        ({"attention_mask": torch.ones(2, 7)}, ValueError, r"attention_mask must have shape .*\[2, 6\]; got \[2, 7\]"),
        ({"attention_mask": torch.ones(2, 6)}, TypeError, "attention_mask must be bool or int, 1 = real; got float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens needs a batch of one packed row, B=1; got B=2"),
        ({**_PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens must be int32; got float32"),
        ({**_PACKED, "cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens must start at 0; got 1"),
        ({**_PACKED, "cu_seqlens": torch.tensor([0, 5])}, ValueError, "end at the number of tokens, T=6; got 5"),
        ({**_PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "must not decrease; got 4 before 3"),
        ({**_PACKED, "cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"must have shape \[N\+1\]; got \[1, 2\]"),
        (
            {**_PACKED, "cu_seqlens": torch.tensor([0, 6]), "attention_mask": torch.ones(1, 6, dtype=torch.bool)},
            ValueError,
            "attention_mask and cu_seqlens exclude each other",
        ),
        ({"causal": False, "output_final_state": True}, ValueError, "output_final_state needs causal=True"),
        ({"causal": False, "initial_state": CosineState(_KV, _SEEN)}, ValueError, "initial_state needs causal=True"),
        ({"initial_state": _KV}, TypeError, "initial_state must be a CosineState"),
        ({"initial_state": CosineState(_KV[:1], _SEEN)}, ValueError, r"kv must have shape .*\[2, 3, 4, 5\]; got"),
        (
            {"initial_state": CosineState(_KV.double(), _SEEN)},
            TypeError,
            "must be float32 for float32 inputs; got float64",
        ),
        ({"initial_state": CosineState(_KV, _SEEN[:1])}, ValueError, r"seen must have shape .*\[2\]; got \[1\]"),
        ({"initial_state": CosineState(_KV, _SEEN.int())}, TypeError, "seen must be int64; got int32"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an int; got 1.5"),
        ({"implementation": "chunked"}, ValueError, "chunk, native; got 'chunked'; did you mean 'chunk'?"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        cosine_attention(**_tensors(**changes))
    assert "\n" not in str(caught.value)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="atention_mask"):
        cosine_attention(**_tensors(atention_mask=torch.ones(2, 6)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": torch.ones(2, 2, 3, 4), "k": torch.ones(2, 2, 3, 4), "v": torch.ones(2, 2, 3, 5)},
            ValueError,
            "one token",
        ),
        ({"q": torch.ones(3, 4)}, ValueError, r"q must have shape \[B, H, K\] or \[B, 1, H, K\]"),
        ({"attention_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"\[B\] or \[B, 1\]"),
        ({"state": CosineState(_KV[:1], _SEEN[:1])}, ValueError, "state.kv must have shape"),
    ],
)
def test_bad_step_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.ones(2, 3, 4),
        "k": torch.ones(2, 3, 4),
        "v": torch.ones(2, 3, 5),
        "norm_const": torch.zeros(3),
        "state": None,
    }
    with pytest.raises(error, match=message):
        cosine_attention_step(**(arguments | changes))


def test_a_published_norm_const_is_taken_as_it_is() -> None:
    arguments = _tensors(norm_const=torch.tensor([0.1, 0.5, 2.0]))
    flat, _ = cosine_attention(**arguments)
    published, _ = cosine_attention(**(arguments | {"norm_const": arguments["norm_const"].view(1, 3, 1, 1)}))
    assert torch.equal(flat, published)


def test_an_integer_mask_is_taken_as_it_is() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    from_int, _ = cosine_attention(**_tensors(attention_mask=mask))
    from_bool, _ = cosine_attention(**_tensors(attention_mask=mask.bool()))
    assert torch.equal(from_int, from_bool)
