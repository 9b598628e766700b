"""The native kernels inside PyTorch: operators, torch.compile, threads, forks, the decode step, and what is refused."""

from __future__ import annotations

import ctypes
import multiprocessing
from typing import Any

import pytest
import torch

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.native import binding
from cottention.ops.native.call import Call, layout_difference
from cottention.ops.plain import plain_step
from tests.ops.helpers import make_case

_needs_library = pytest.mark.skipif(not binding.is_available(), reason="the native kernels were not built")


@_needs_library
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("asks_states", [False, True])
def test_causal_operator_passes_opcheck(packed: bool, asks_states: bool) -> None:
    lengths = [9, 0, 11] if packed else None
    case = make_case(T=20, K=3, V=2, lengths=lengths, with_state=asks_states, mask=None if packed else "holes")
    case = case.to(torch.float32)
    state = case.initial_state or (None, None)
    q, k, v, m = (x.requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None)
    arguments = ("native", q, k, v, m, case.attention_mask, case.cu_seqlens, *state, asks_states, 0, -1)
    torch.library.opcheck(torch.ops.cottention.causal.default, arguments)


@_needs_library
def test_bidirectional_operator_passes_opcheck() -> None:
    case = make_case(T=20, K=3, V=2, causal=False, mask="holes").to(torch.float32)
    q, k, v, m = (x.requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None)
    arguments = ("native", q, k, v, m, case.attention_mask, None, 0, -1)
    torch.library.opcheck(torch.ops.cottention.bidirectional.default, arguments)


@_needs_library
def test_step_operators_pass_opcheck() -> None:
    case = make_case(T=1, K=3, V=2, with_state=True).to(torch.float32)
    assert case.initial_state is not None
    arguments = ("native", case.q, case.k, case.v, case.norm_const, None, *case.initial_state)
    torch.library.opcheck(torch.ops.cottention.step.default, arguments)
    torch.library.opcheck(torch.ops.cottention.step_.default, arguments)


def _compiled_equals_eager(backend: str) -> None:
    case = make_case(T=70, mask="holes").to(torch.float32)
    cu_seqlens = torch.tensor([0, 30, 30, 100, 140], dtype=torch.int32)

    def everything(q, k, v, m, mask):
        options: dict[str, Any] = {"implementation": "native"}
        o, state = cosine_attention(q, k, v, m, causal=True, attention_mask=mask, output_final_state=True, **options)
        more, _ = cosine_attention(q, k, v, m, causal=True, initial_state=state, **options)
        both, _ = cosine_attention(q, k, v, m, causal=False, attention_mask=mask, **options)
        q1, k1, v1 = (x.flatten(0, 1)[None] for x in (q, k, v))
        packed, _ = cosine_attention(q1, k1, v1, m, causal=True, cu_seqlens=cu_seqlens, **options)
        return o, more, both, packed

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend=backend)):
        torch.compiler.reset()
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None]
        q, k, v, m = leaves
        outputs = function(q, k, v, m, case.attention_mask)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


@_needs_library
def test_compiles_without_a_graph_break() -> None:
    _compiled_equals_eager("aot_eager")


@_needs_library
@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    _compiled_equals_eager("inductor")


@_needs_library
def test_auto_takes_native_on_the_cpu_and_chunk_for_float64(caplog: pytest.LogCaptureFixture) -> None:
    case = make_case(T=40)
    with caplog.at_level("INFO", logger="cottention"):
        for dtype, name in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float64, "chunk")):
            x = case.to(dtype)
            found, _ = cosine_attention(x.q, x.k, x.v, x.norm_const, causal=True)
            expected, _ = cosine_attention(x.q, x.k, x.v, x.norm_const, causal=True, implementation=name)
            assert torch.equal(found, expected), dtype


@_needs_library
def test_what_has_no_kernels_is_refused() -> None:
    case = make_case(T=4)
    with pytest.raises(TypeError, match=r"'native' takes float32, bfloat16 or float16.*got float64"):
        cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True, implementation="native")
    q, k, v = (x.float().to("meta") for x in (case.q, case.k, case.v))
    with pytest.raises(ValueError, match="'native' needs tensors on the CPU; got meta"):
        cosine_attention(q, k, v, None, causal=True, implementation="native")
    with pytest.raises(ValueError, match=r"name must be one of generic.*on this machine; got 'sse9'"):
        binding.use_instruction_set("sse9")


def test_without_the_library_native_raises_and_auto_uses_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_library", None)
    monkeypatch.setattr(binding, "_reason", f"not built; {binding._REMEDY}")
    case = make_case(T=40).to(torch.float32)
    given = (case.q, case.k, case.v, case.norm_const)
    with pytest.raises(RuntimeError, match=r"'native' cannot run: not built; install a C\+\+17 compiler"):
        cosine_attention(*given, causal=True, implementation="native")
    found, state = cosine_attention(*given, causal=True, output_final_state=True)
    expected, _ = cosine_attention(*given, causal=True, implementation="chunk")
    assert torch.equal(found, expected)
    q, k, v = (x[:, 0] for x in given[:3])
    cosine_attention_step(q, k, v, case.norm_const, state)


@_needs_library
def test_a_library_with_another_layout_is_told_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    library = binding.loaded_library()
    assert layout_difference(library) == ""
    names = [name for name, *_ in Call._fields_]
    i = names.index("seen")
    exchanged = [*names[:i], "kv", "seen", *names[i + 2 :]]
    for fields, told in (
        (exchanged, f"'seen {8 * i}' where 'kv {8 * i}' is expected"),
        (names[:-1], f"'{names[-1]} {8 * len(names) - 8}' where 'size {8 * len(names) - 8}' is expected"),
        ([*names, "more"], f"'size {8 * len(names)}' where 'more {8 * len(names)}' is expected"),
    ):
        other = type("Other", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in fields]})
        assert layout_difference(library, other) == told
    monkeypatch.setattr(binding, "layout_difference", lambda library: layout_difference(library, other))
    loaded, reason = binding._load()
    assert loaded is None
    assert "lays out its arguments otherwise than this version, 'size" in reason
    with pytest.raises(AttributeError):
        setattr(Call(), "misspelled", 1)  # noqa: B010 (no type checker sees it)


@_needs_library
def test_boundaries_that_tracing_could_not_see_are_checked() -> None:
    case = make_case(B=1, T=10).to(torch.float32)
    for bad in ([0, 4, 9], [1, 10], [0, 7, 5, 10]):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            torch.ops.cottention.causal(
                "native", case.q, case.k, case.v, None, None, torch.tensor(bad), None, None, False, 0, -1
            )


def _attend_in_child(queue: multiprocessing.Queue, q: torch.Tensor) -> None:
    o, _ = cosine_attention(q, q, q, None, causal=True, implementation="native")
    queue.put(o[0, ::100, 0, 0].tolist())  # a few numbers: torch's own operators may hang here when they are large


@_needs_library
def test_a_forked_child_computes_after_its_parent_used_threads() -> None:
    q = torch.randn(2, 600, 8, 32)
    torch.set_num_threads(2)
    try:
        expected, _ = cosine_attention(q, q, q, None, causal=True, implementation="native")
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_attend_in_child, args=(queue, q))
        child.start()
        found = queue.get(timeout=60)
        child.join(timeout=60)
    finally:
        torch.set_num_threads(1)
    assert child.exitcode == 0
    assert found == pytest.approx(expected[0, ::100, 0, 0].tolist(), rel=1e-4)


@_needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (7, 100), (1, 5)])
def test_step_equals_the_equations(dtype: torch.dtype, K: int, V: int) -> None:
    case = make_case(B=3, T=1, H=4, K=K, V=V, with_state=True).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for isa in binding.instruction_sets():
        binding.use_instruction_set(isa)
        for norm_const in (case.norm_const, None):
            for state in (case.initial_state, None):
                for mask in (None, torch.tensor([1, 0, 1])):
                    q, k, v = (x[:, 0] for x in (case.q, case.k, case.v))
                    found, new = cosine_attention_step(q, k, v, norm_const, state, attention_mask=mask)
                    expected, truth = plain_step(q, k, v, norm_const, state, mask)
                    assert found.dtype == dtype
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
                    torch.testing.assert_close(new.kv, truth.kv, rtol=1e-5, atol=1e-5)
                    assert torch.equal(new.seen, truth.seen)


@_needs_library
def test_step_takes_any_strides() -> None:
    case = make_case(B=3, T=1, H=4, K=8, V=8, with_state=True).to(torch.float32)
    expected, truth = cosine_attention_step(case.q, case.k, case.v, case.norm_const, case.initial_state)
    q, k, v = torch.stack([case.q, case.k, case.v], dim=3).unbind(3)
    assert case.initial_state is not None
    kv = case.initial_state.kv.transpose(2, 3).contiguous().transpose(2, 3)
    found, new = cosine_attention_step(q, k, v, case.norm_const, CosineState(kv, case.initial_state.seen))
    assert torch.equal(found, expected)
    assert torch.equal(new.kv, truth.kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_in_place_writes_over_its_state_and_only_then(dtype: torch.dtype) -> None:
    case = make_case(B=2, T=1, with_state=True).to(dtype)
    state = case.initial_state
    assert state is not None
    before = CosineState(state.kv.clone(), state.seen.clone())
    given = (case.q, case.k, case.v, case.norm_const)
    expected, truth = cosine_attention_step(*given, state)
    assert torch.equal(state.kv, before.kv)
    found, new = cosine_attention_step(*given, state, in_place=True)
    assert new.kv is state.kv
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state.kv, truth.kv)
    assert torch.equal(state.seen, truth.seen)
    with pytest.raises(ValueError, match="in_place needs a state to write over and no gradient; got state=None"):
        cosine_attention_step(*given, None, in_place=True)
    case.q.requires_grad_()
    with pytest.raises(ValueError, match=r"in_place .*; got inputs that require a gradient"):
        cosine_attention_step(*given, state, in_place=True)


@_needs_library
def test_step_keeps_its_gradient() -> None:
    case = make_case(B=2, T=1, with_state=True).to(torch.float32)
    q, k, v = leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    o, state = cosine_attention_step(q, k, v, case.norm_const, case.initial_state)
    gradients = torch.autograd.grad(o.sum() + state.kv.sum(), leaves)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
