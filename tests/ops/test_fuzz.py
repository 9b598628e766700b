"""Random calls of every shape, stride, mask and dtype: each implementation against naive in float64, gradients too.

`make test` tries some hundred fixed calls, `make test-slow` thousands of new ones; a failure prints the call that shows
it, shrunk. The native library is tried in every instruction set that this processor has.

    COTTENTION_NATIVE_ISA=avx2 python -m pytest tests/ops/test_fuzz.py
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cottention.ops import IMPLEMENTATIONS, CosineState, cosine_attention
from cottention.ops.native import is_available
from cottention.ops.native.binding import instruction_set, instruction_sets, use_instruction_set


def _variants() -> list[tuple[str, str | None]]:
    """Every implementation but the oracle, the native one in each instruction set, or in that of the environment."""
    sets: list[str | None] = [None]
    if is_available():
        sets = [instruction_set()] if os.environ.get("COTTENTION_NATIVE_ISA") else [*instruction_sets()]
    return [
        (name, each) for name in IMPLEMENTATIONS if name != "naive" for each in (sets if name == "native" else [None])
    ]


VARIANTS = pytest.mark.parametrize(("implementation", "isa"), _variants(), ids=lambda each: each or "")

# Largest error of a tensor, as a share of its own largest entry.
# float32: what the project promises; a rounding is 2^-24, and a tenth of the promise is what is found.
# bfloat16 and float16: the sums are float32, so all that shows is the rounding of the result, 2^-8 and 2^-11 at most.
# Where products are taken in bfloat16 (AVX512-BF16) the score, the value and the state they meet in are rounded too;
# of a long sum these mostly cancel, of a single term they add up to four.
_PROMISED = 1e-5
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_OF_THE_RESULT, _OF_BFLOAT16_PRODUCTS = 1.1, 4.0


def _products_are_rounded(dtype: torch.dtype, isa: str | None) -> bool:
    return isa == "avx512bf16" and dtype == torch.bfloat16


def tolerance(dtype: torch.dtype, isa: str | None) -> float:
    """The share for a call in this dtype, by the native library's instruction set where it is the library."""
    if dtype == torch.float32:
        return _PROMISED
    return _ROUNDING[dtype] * (_OF_BFLOAT16_PRODUCTS if _products_are_rounded(dtype, isa) else _OF_THE_RESULT)


_LAYOUTS = ("plain", "heads first", "fused", "every other", "offset", "expanded batch", "expanded heads", "shuffled")


@dataclass
class Call:
    """One call of the operation. Small, so that hypothesis can print and shrink it: tensors come from the seed."""

    B: int
    T: int
    S: int | None
    H: int
    K: int
    V: int
    causal: bool
    mask: str | None
    lengths: list[int] | None
    with_state: bool
    final_state: bool
    norm_const: str | None
    dtype: torch.dtype
    chunk_size: int | None
    layouts: list[str]
    scale: float
    seed: int
    garbage: bool
    num_threads: int
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.lengths is not None:
            self.B, self.T = 1, sum(self.lengths)

    @property
    def num_keys(self) -> int:
        return self.T if self.S is None else self.S

    @property
    def num_sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


_SIZES = st.one_of(
    st.integers(1, 80), st.sampled_from([16, 32, 48, 64, 80, 128]), st.sampled_from([1, 2, 3, 15, 17, 63, 65])
)
_LARGE_SIZES = st.sampled_from([96, 100, 127, 128, 160, 192, 255, 256, 257, 511, 512])
_LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257]))


@st.composite
def calls(draw: st.DrawFn, *, largest: int = 80) -> Call:
    """Any call that the operation takes; sizes up to `largest`, and rarely large ones with little else."""
    causal = draw(st.booleans())
    kind = draw(st.sampled_from(["rows", "rows", "packed", "rows" if causal else "cross"]))
    large = largest > 80 and draw(st.integers(0, 5)) == 0
    T = draw(st.integers(0, 140) if large else _LENGTHS)
    packed = kind == "packed"
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    return Call(
        B=draw(st.integers(1, 3)),
        T=T,
        S=draw(_LENGTHS) if kind == "cross" else None,
        H=draw(st.integers(1, 3)),
        K=draw(_LARGE_SIZES if large else _SIZES),
        V=draw(_LARGE_SIZES if large else _SIZES),
        causal=causal,
        mask=None if packed else draw(st.sampled_from([None, "right", "left", "holes", "int", "empty row"])),
        lengths=draw(st.lists(st.integers(0, 130), min_size=1, max_size=5)) if packed else None,
        with_state=causal and draw(st.booleans()),
        final_state=causal and draw(st.booleans()),
        norm_const=draw(st.sampled_from([None, "[H]", "[1, H, 1, 1]", "float32"])),
        dtype=dtype,
        chunk_size=draw(st.sampled_from([None, None, 16, 64, 7, 1000])),
        layouts=[draw(st.sampled_from(_LAYOUTS)) for _ in range(4)],
        scale=draw(st.sampled_from([1.0, 1.0, 2.0**-8, 2.0**8] if dtype != torch.float16 else [1.0])),
        seed=draw(st.integers(0, 2**31 - 1)),
        garbage=draw(st.booleans()),
        num_threads=draw(st.sampled_from([1, 2, 3])),
    )


def _numbers(call: Call, *shape: int) -> Tensor:
    """Numbers that every dtype holds exactly; some sign of both, none huge."""
    x = torch.randn(*shape, generator=call.generator, dtype=torch.float64).clamp(-4, 4)
    return x.to(torch.bfloat16).to(torch.float64)


def _vectors(call: Call, *shape: int) -> Tensor:
    """Queries or keys, of norms near call.scale: no token's gradient, which goes with 1 / norm, hides the others'."""
    x = torch.randn(*shape, generator=call.generator, dtype=torch.float64)
    x = torch.nn.functional.normalize(x, dim=-1, eps=1e-30)  # of one number, the norm may be anything
    x = x * (0.5 + torch.rand(*shape[:-1], 1, generator=call.generator, dtype=torch.float64)) * call.scale
    return x.to(torch.bfloat16).to(torch.float64)


def _laid_out(x: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    """The same numbers in other strides; expanding keeps those of the first row or head."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":
        return torch.stack([x, x * 0 + math.nan, x], dim=2).unbind(2)[0]
    if layout == "every other":
        return torch.stack([x, x * 0 + math.nan], dim=-1).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.nn.functional.pad(x, (3, 2, 1, 0, 2, 1), value=math.nan)[:, 2:-1, 1:, 3:-2]
    if layout == "expanded batch" and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "expanded heads":
        return x[:, :, :1].expand(x.shape)
    if layout == "shuffled":
        order = torch.randperm(4, generator=generator).tolist()
        return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
    return x


def _mask(call: Call) -> Tensor | None:
    if call.mask is None:
        return None
    B, S = call.B, call.num_keys
    place, length = torch.arange(S)[None], torch.randint(0, S + 1, (B, 1), generator=call.generator)
    if call.mask == "right":
        return place < length
    if call.mask == "left":
        return place >= S - length
    mask = torch.rand(B, S, generator=call.generator) < 0.6
    if call.mask == "empty row":
        mask[0] = False
    return mask.int() if call.mask == "int" else mask


@dataclass
class Arguments:
    """The tensors of a call, in its dtype and strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_const: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    state: CosineState | None
    grad: Tensor
    grad_kv: Tensor


def make_arguments(call: Call) -> Arguments:
    """Draw the tensors of a call; with garbage, padded places hold NaN, which must not be seen."""
    B, T, S, H, K, V, N = call.B, call.T, call.num_keys, call.H, call.K, call.V, call.num_sequences
    mask = _mask(call)
    qkv = [_vectors(call, B, T, H, K), _vectors(call, B, S, H, K), _numbers(call, B, S, H, V)]
    if call.garbage and mask is not None:
        hidden = ~mask.bool()[..., None, None]
        qkv = [x.masked_fill(hidden, math.nan) if x.shape[1] == S else x for x in qkv]
    expands = {"expanded batch", "expanded heads"} & set(call.layouts)
    if expands and call.garbage:  # the row that is repeated would carry its NaN to where the mask says real
        qkv = [x.nan_to_num(number) for x, number in zip(qkv, (call.scale / math.sqrt(K),) * 2 + (0.5,), strict=True)]
    q, k, v, grad = (
        _laid_out(x.to(call.dtype), layout, call.generator)
        for x, layout in zip([*qkv, _numbers(call, B, T, H, V)], call.layouts, strict=True)
    )
    m = None if call.norm_const is None else _numbers(call, H).to(call.dtype)
    if m is not None and call.norm_const == "[1, H, 1, 1]":
        m = m[None, :, None, None]
    if m is not None and call.norm_const == "float32":
        m = m.float()
    state = None
    if call.with_state:
        seen = torch.randint(0, 5, (N,), generator=call.generator)
        state = CosineState(_numbers(call, N, H, K, V).float(), seen)
    boundaries = None if call.lengths is None else torch.tensor([0, *call.lengths]).cumsum(0).to(torch.int32)
    return Arguments(q, k, v, m, mask, boundaries, state, grad, _numbers(call, N, H, K, V))


def attend(call: Call, given: Arguments, implementation: str) -> dict[str, Tensor]:
    """Everything that comes out: o, the state, and the gradient of every input."""
    state = given.state
    leaves = {"dq": given.q, "dk": given.k, "dv": given.v}
    if given.norm_const is not None:
        leaves["dnorm_const"] = given.norm_const
    if state is not None:
        leaves["dkv"] = state.kv
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}  # the same memory, strides and all
    options: dict[str, Any] = {} if implementation == "naive" else {"chunk_size": call.chunk_size}
    o, final = cosine_attention(
        leaves["dq"],
        leaves["dk"],
        leaves["dv"],
        leaves.get("dnorm_const"),
        causal=call.causal,
        attention_mask=given.attention_mask,
        cu_seqlens=given.cu_seqlens,
        initial_state=None if state is None else CosineState(leaves["dkv"], state.seen),
        output_final_state=call.final_state,
        implementation=implementation,
        **options,
    )
    outputs, upstream, found = [o], [given.grad.to(o.dtype)], {"o": o}
    if final is not None:
        outputs.append(final.kv)
        upstream.append(given.grad_kv.to(final.kv.dtype))
        found |= {"final kv": final.kv, "final seen": final.seen}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: x.detach() for name, x in found.items()}


def in_float64(given: Arguments) -> Arguments:
    """The same numbers, for naive."""

    def exact(x: Tensor) -> Tensor:
        return x.detach().double().contiguous()

    return Arguments(
        exact(given.q),
        exact(given.k),
        exact(given.v),
        None if given.norm_const is None else exact(given.norm_const),
        given.attention_mask,
        given.cu_seqlens,
        None if given.state is None else CosineState(exact(given.state.kv), given.state.seen),
        exact(given.grad),
        given.grad_kv,
    )


def scale_of(name: str, call: Call, given: Arguments, truth: dict[str, Tensor]) -> float:
    """What an error is measured by: the tensor's largest entry, or what that would be if its terms did not cancel."""
    largest = float(truth[name].abs().max()) if truth[name].numel() else 0.0
    if name in ("o", "dv"):
        # The product of two unit vectors is rounded at their size, however small it is itself: 1 / sqrt(K) is usual. Of
        # a single term, divided by the largest count to the largest power, that is all there is.
        return max(largest, 1 / math.sqrt(call.K) / (1 if call.norm_const is None else call.num_keys + 5))
    if name in ("dq", "dk"):
        # Only the part across the vector is left of a gradient: nothing with K = 1, little with K = 2. What was there
        # before is a sum over tokens and V, of both signs; here at its size for one token, that is at its smallest.
        width = math.sqrt(call.V * (max(call.T, call.num_keys) if call.K <= 2 else 1))
        return max(largest, width / call.scale / math.sqrt(call.K))
    if name == "dnorm_const" and given.v.numel():
        # A sum over all tokens of (dv . v) log(c) p (1 - p), which may cancel: at least the 2-norm of its terms.
        padded = given.v.double().nan_to_num(0.0)
        terms = (truth["dv"] * padded).sum(-1) * math.log(2 + call.num_keys + 5) / 4
        return max(largest, float(terms.norm()))
    return max(largest, 1e-30)


def check(call: Call, implementation: str, isa: str | None) -> None:
    """Compare one call with naive in float64, and see that its arguments were left as they were."""
    given = make_arguments(call)
    before = [x.clone() for x in (given.q, given.k, given.v)]
    truth = attend(call, in_float64(given), "naive")
    found = attend(call, given, implementation)
    assert found.keys() == truth.keys()
    for x, copy in zip((given.q, given.k, given.v), before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0)), "an argument was written into"
    for name, expected in truth.items():
        actual = found[name]
        assert actual.shape == expected.shape, name
        if name == "final seen":
            assert torch.equal(actual, expected)
            continue
        assert torch.isfinite(actual).all(), f"{name} is not finite"
        is_single = actual.dtype == torch.float32 and name in ("final kv", "dkv", "dnorm_const")
        assert actual.dtype == (torch.float32 if is_single else call.dtype), name
        if not expected.numel():
            continue
        error = float((actual.double() - expected).abs().max())
        allowed = tolerance(call.dtype, isa) * scale_of(name, call, given, truth)
        assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


# Fixed calls, the same in every run: a red test is a change of the code, not of luck.
_QUICK = settings(
    deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow], database=None
)
_LONG = settings(_QUICK, derandomize=False, max_examples=2000, print_blob=True)


@contextmanager
def _running_as(isa: str | None, num_threads: int) -> Iterator[None]:
    """With this instruction set of the native library, if any, and this number of threads."""
    threads_before, isa_before = torch.get_num_threads(), instruction_set() if isa else None
    torch.set_num_threads(num_threads)
    if isa:
        use_instruction_set(isa)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if isa_before:
            use_instruction_set(isa_before)


def _skip_what_does_not_run_here(implementation: str) -> None:
    one = torch.ones(1, 1, 1, 1)
    try:
        cosine_attention(one, one, one, None, causal=True, implementation=implementation)
    except (RuntimeError, ValueError) as reason:
        pytest.skip(" ".join(str(reason).split()))


@VARIANTS
@given(call=calls())
@_QUICK
def test_any_call_equals_naive_in_float64(implementation: str, isa: str | None, call: Call) -> None:
    _skip_what_does_not_run_here(implementation)
    with _running_as(isa, call.num_threads):
        check(call, implementation, isa)


@pytest.mark.slow
@VARIANTS
@given(call=calls(largest=512))
@_LONG
def test_thousands_of_calls_equal_naive_in_float64(implementation: str, isa: str | None, call: Call) -> None:
    _skip_what_does_not_run_here(implementation)
    with _running_as(isa, call.num_threads):
        check(call, implementation, isa)
