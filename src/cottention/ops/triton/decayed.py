"""Forward and backward with log_decay, as sequences of launches: the linear form, whose states forget.

Causal attention is one walk over each segment. Bidirectional attention is two, forwards and then backwards without
the diagonal, which add up in float32. What erases (beta) is in `erase`.

A_t, the sum of W_ij (q_hat_i . k_hat_j) (do_i . v'_j) over all i >= t > j, is the gradient of log_decay_t. With S_0 the
state before the first token, and dS_0 its gradient:

    A_1 = <dS_0, S_0>        A_{t+1} = A_t - (q_hat_t . dq_hat_t - v'_t . dv'_t)

The two products are those of DQ and DV. What they share, the pairs inside a chunk, DQ alone computes, in both senses,
so that its rounding cancels, and none of it stays in the sum behind a strong decay.

    o, kv, seen, states = run_gated(q, k, v, m, mask, cu_seqlens, kv0, seen0, log_decay, None, True, 0, 512)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops.dispatch import num_saved
from cottention.ops.triton.config import on_device
from cottention.ops.triton.gradients import Gradients
from cottention.ops.triton.launch import Call, Segments

_OUTPUT, _GRADIENTS = (0, 1), (1, 3)  # roles: the first, and how many


@on_device
def run_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    log_decay: Tensor,
    beta: None,
    causal: bool,
    chunk_size: int,
    segment_tokens: int,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for; causal alone), and the states before segments."""
    assert beta is None, "the kernels that erase are others"
    given = (q, k, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens)
    call = Call(*given, causal=causal, log_decay=log_decay)
    final, saved = call.new_states(call.num_sequences) if output_final_state else None, None
    o = torch.empty((*q.shape[:3], call.V), dtype=q.dtype if causal else torch.float32, device=q.device)
    if final is not None and (not causal or o.numel() == 0):
        final.zero_() if kv is None else final.copy_(kv)
    if o.numel():
        segments, reached = call.cut(call.T), final if causal else None
        for opposite in _walks(call):
            before = _states_met(call, segments, None, kv, reached, reverse=opposite)
            if not (opposite or segments.is_single):
                saved = before
            call.linear(
                _OUTPUT, segments, outputs=(o, None, None, None, None), states=before,
                reached=reached if segments.is_single else None, opposite=opposite,
            )  # fmt: skip
    if saved is None:  # of the shape that tracing takes it to have
        saved = q.new_empty(0, dtype=torch.float32)
        if segment_tokens > 0:
            saved = call.new_states(num_saved(q, cu_seqlens, segment_tokens))
    if final is None:
        return o.to(q.dtype), q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.int64), saved
    return o.to(q.dtype), final, call.reached_seen(), saved


@on_device
def run_gated_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    log_decay: Tensor,
    beta: None,
    saved: Tensor,
    causal: bool,
    chunk_size: int,
    segment_tokens: int,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, norm_const, kv, log_decay and beta; empty where there is no such input."""
    assert beta is None, "the kernels that erase are others"
    given = (q, k, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens)
    call = Call(*given, causal=causal, log_decay=log_decay)
    nothing = q.new_empty(0, dtype=torch.float32)
    dkv = nothing if kv is None else call.new_states(call.num_sequences)
    if q.numel() == 0:
        if kv is not None:
            dkv.zero_() if dfinal is None else dkv.copy_(dfinal)
        zeros = (None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given[:4])
        dq, dk, dv, dm = (nothing if x is None else x for x in zeros)
        return dq, dk, dv, dm, dkv, torch.zeros(log_decay.shape, dtype=log_decay.dtype, device=q.device), nothing
    segments, dreached = call.cut(call.T), None if kv is None else dkv
    gradients = Gradients(call, segments.count, call.config.backward, num_walks=len(_walks(call)))
    flows = _new_flows(call)
    for opposite in _walks(call):
        if opposite or segments.is_single:
            before = _states_met(call, segments, None, kv, None, reverse=opposite)
        else:
            before = saved
        after = _states_met(call, segments, do, dfinal if causal else None, dreached, reverse=not opposite)
        call.linear(
            _GRADIENTS, segments, do=do, outputs=gradients.outputs(int(opposite)), states=before, dstates=after,
            reached=dreached if segments.is_single else None, norms=gradients.norms, flow=flows[int(opposite)],
            opposite=opposite,
        )  # fmt: skip
    first = None if kv is None else (kv * dkv).sum((2, 3))  # [N, H]
    return *gradients.finished(), dkv, _log_decay_gradient(call, flows, first), nothing


def _walks(call: Call) -> tuple[bool, ...]:
    """Whether each walk is the opposite one."""
    return (False,) if call.causal else (False, True)


def _states_met(
    call: Call, segments: Segments, do: Tensor | None, rim: Tensor | None, reached: Tensor | None, *, reverse: bool
) -> Tensor | None:
    """The states that a walk meets at its segments (with do: gradients of states); None: zero.

    `rim` are those at the first rim of each sequence, `[N, H, K, V]`. `reached` is given those at the other rim, except
    where segments are sequences, and the walk itself gives them.
    """
    rim = None if rim is None else rim.contiguous()
    if segments.is_single:
        return rim
    states, decays = call.new_states(segments.count), call.q.new_empty((segments.count, call.H), dtype=torch.float32)
    call.sum_states(states, segments, do, decays=decays, reverse=reverse)
    call.scan(states, segments, rim, reached, decays=decays, reverse=reverse)
    return states


def _num_tiles(call: Call) -> tuple[int, int]:
    """Tiles of K and of V in backward."""
    tile = call.shapes(call.config.backward, backward=True)["BZ"]
    return -(-call.K // tile), -(-call.V // tile)


def _new_flows(call: Call) -> Tensor:
    """Room for q_hat . dq_hat of each walk, tile of K and token, and for v' . dv' of each tile of V after them."""
    shape = (len(_walks(call)), sum(_num_tiles(call)), call.B, call.T, call.H)
    return call.q.new_empty(shape, dtype=torch.float32)


def _log_decay_gradient(call: Call, flows: Tensor, first: Tensor | None) -> Tensor:
    """A_t `[B, T, H]`, from the flows and A_1 of each sequence `[N, H]` (None: zero)."""
    assert call.log_decay is not None
    num_k, _ = _num_tiles(call)
    out = flows[:, :num_k].sum(1) - flows[:, num_k:].sum(1)  # [walks, B, T, H]
    # backwards, keys come after the queries that they are to
    out = out[0] if call.causal else out[0] - out[1]
    before = -pad(out, (0, 0, 1, 0)).cumsum(1)[:, :-1]  # [B, T, H]
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.to(torch.int64)
        tokens = torch.arange(call.T, device=out.device)
        sequence = torch.bucketize(tokens, bounds[1:], right=True).clamp(max=call.num_sequences - 1)  # [T]
        before = before - before[:, bounds[sequence]]
        first = None if first is None else first[sequence][None]
    elif first is not None:
        first = first[:, None]
    gradient = before if first is None else before + first
    if call.real_q is not None:
        gradient = gradient.masked_fill(call.real_q[..., None] == 0, 0)
    return gradient.to(call.log_decay.dtype)
