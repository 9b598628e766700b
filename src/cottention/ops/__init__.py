"""Cosine attention on tensors: validate once, choose an implementation, call it. Needs torch and jaxtyping alone.

from cottention import cosine_attention
o, _ = cosine_attention(q, k, v, norm_const, causal=True)       # q, k: [B, T, H, K], v: [B, T, H, V]
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cottention.logging import get_logger, log_once
from cottention.ops import chunk, triton
from cottention.ops.autocast import as_autocast_would
from cottention.ops.dispatch import attend
from cottention.ops.naive import naive_cosine_attention
from cottention.ops.native import kernels as native
from cottention.ops.native.binding import suits_native
from cottention.ops.plain import plain_cosine_attention
from cottention.ops.state import CosineState
from cottention.ops.step import cosine_attention_step
from cottention.ops.triton.erase import attend_erasing
from cottention.ops.triton.erase import why_not as why_not_erase
from cottention.ops.validation import check_arguments

__all__ = ["IMPLEMENTATIONS", "CosineState", "cosine_attention", "cosine_attention_step"]

# Every implementation that can be asked for by name; all take checked arguments and give the same numbers.
IMPLEMENTATIONS = {
    "naive": naive_cosine_attention,
    "chunk": partial(attend, "chunk", chunk.cut),
    "native": partial(attend, "native", native.cut),
    "triton": partial(attend, "triton", triton.cut),
}

_logger = get_logger(__name__)


def cosine_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S H V"],
    norm_const: Float[Tensor, " H"] | Float[Tensor, "1 H 1 1"] | None,
    *,
    causal: bool,
    attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    initial_state: CosineState | None = None,
    output_final_state: bool = False,
    log_decay: Float[Tensor, "B T H"] | None = None,
    beta: Float[Tensor, "B T H"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
    process_group: Any = None,
) -> tuple[Float[Tensor, "B T H V"], CosineState | None]:
    """Cosine attention in O(T) time and memory.

        causal:         o_t = sum_{j <= t} (q_hat_t . k_hat_j) v_j / max(c_j ** sigmoid(m), 1)
        bidirectional:  o_t = sum_j        (q_hat_t . k_hat_j) v_j / max(n ** sigmoid(m), 1)

    With log_decay or beta, a = exp(log_decay), v' = v / max(c ** sigmoid(m), 1) (the count does not decay):

        log_decay:      S_t = a_t S_{t-1} + k_hat_t v'_t^T                                        o_t = S_t^T q_hat_t
        beta:           S_t = a_t (I - beta_t k_hat_t k_hat_t^T) S_{t-1} + beta_t k_hat_t v'_t^T   (the delta rule)
        bidirectional:  o_t = sum_j exp(-|G_t - G_j|) (q_hat_t . k_hat_j) v'_j,  G the running sum of log_decay

    q_hat and k_hat are q and k divided by their L2 norm, c_j counts the real tokens up to j, n all real tokens of
    the sequence. There is no softmax, no 1/sqrt(K) and no dropout. States and sums are float32 (float64 for float64
    inputs). Under autocast q, k and v are taken in the autocast dtype, as scaled_dot_product_attention takes them
    (float64 stays).

    Differentiable in q, k, v, norm_const, initial_state.kv, log_decay and beta, any number of times, in forward mode
    and under torch.func. Beyond first gradients every implementation but "naive" is computed by autograd over a chunked
    form in plain operators: in O(T) memory, which holds some multiple of what a first gradient needs.

    Args:
        q: queries `[B, T, H, K]`; float64, float32, bfloat16 or float16; any strides.
        k: keys `[B, S, H, K]` in q's dtype. S = T, or any length with causal=False (cross-attention).
        v: values `[B, S, H, V]` in q's dtype.
        norm_const: m, one learned number per head before the sigmoid, `[H]` or `[1, H, 1, 1]` (as published), any float
            dtype; None divides by nothing.
        causal: each token sees itself and the past (GPT), or all real tokens (BERT).
        attention_mask: `[B, S]` bool or int, 1 = real; padding anywhere. Padded keys add nothing and are not counted.
            With S = T padded queries give exactly 0; in cross-attention (S != T) it speaks of the keys alone.
        cu_seqlens: int32 `[N+1]`, boundaries of N sequences packed into one row (B = 1), from 0 to T; each is
            computed as if alone. Excludes attention_mask.
        initial_state: `CosineState(kv, seen)` of each of the B (or N) sequences; causal only. None: nothing seen yet.
        output_final_state: also return the state after the last token; causal only.
        log_decay: `[B, T, H]` float32 (any strides; an expanded `[H]` does), at most 0: the logarithm of what each head
            keeps of its state at each token. Padded tokens neither forget nor write. None: everything is kept.
        beta: `[B, T, H]`, how far the state is overwritten in the direction of k_hat: from 0, not at all, over 1,
            wholly, to 2, beyond which states grow; not checked. Causal only. None: nothing is erased.
        chunk_size: tokens per tile of the chunked form, any; None chooses. It changes speed and memory, not results.
        implementation: "auto", or a name of `cottention.ops.IMPLEMENTATIONS`, which runs or raises, never falls back.
            torch.export and torch.onnx.export write plain operators in its place ("naive" as it is), with log_decay or
            beta in a loop over the tokens (with cu_seqlens too the operator stays): an exported program runs where
            there is no cottention, for any batch and length.
        process_group: ranks (a ProcessGroup, or a DeviceMesh of one dimension) that share the sequence: each gives the
            tokens of its slice, one behind the other in the order of the ranks, of any lengths. What is no token's own
            is the same on every rank: cu_seqlens (boundaries of the whole row) and initial_state. The final state is
            that of the whole sequence, on every rank. Gradients of norm_const and initial_state are each rank's part:
            their sum over ranks is the whole. All ranks call, and go backward, together. See `ops/sharded.py`.
    Returns:
        Output `[B, T, H, V]` in q's dtype, and the final state, or None unless asked for.
    Raises:
        ValueError: shapes, devices or lengths disagree, a rule above is broken, or the implementation is unknown.
        TypeError: dtypes are mixed, or of the wrong kind.
    Source: arXiv 2409.18747, section 3. Differs: nothing; the divisor stands at the key, as published weights need.
    """
    q, k, v = as_autocast_would(q, k, v)
    norm_const = check_arguments(
        q,
        k,
        v,
        norm_const,
        causal=causal,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
        log_decay=log_decay,
        beta=beta,
        is_slice=process_group is not None,
    )
    is_gated = log_decay is not None or beta is not None
    name = choose_implementation(implementation, q, v, is_gated=is_gated, erases=beta is not None)
    options: dict[str, Any] = {} if name == "naive" else {"chunk_size": chunk_size}
    if is_gated:
        options |= {"log_decay": log_decay, "beta": beta}
    run = IMPLEMENTATIONS[name]
    if name == "triton" and beta is not None:
        run = attend_erasing
    if name != "naive" and _is_exporting():
        run = _written_out(run, is_gated=is_gated, is_packed=cu_seqlens is not None)
    if process_group is not None:
        run = _sharded(run, chunk_size if name != "naive" else None, process_group)
        options = {"log_decay": log_decay, "beta": beta}
    return run(
        q,
        k,
        v,
        norm_const,
        causal=causal,
        attention_mask=None if attention_mask is None else attention_mask.to(torch.bool),
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        **options,
    )


def _sharded(run: Callable[..., Any], chunk_size: int | None, process_group: Any) -> Callable[..., Any]:
    """An implementation for slices of a sequence."""
    from cottention.ops.sharded import attend_sharded  # torch.distributed, for those who ask for it

    own = run if chunk_size is None else partial(run, chunk_size=chunk_size)
    return partial(attend_sharded, own, process_group=process_group)


def _is_exporting() -> bool:
    """Whether this call is being written into a program that is to run without cottention.

    Raises:
        RuntimeError: by an exporter that would write the lengths of the example for all lengths.
    """
    if torch.onnx.is_in_onnx_export() and torch._C._is_tracing():
        raise RuntimeError(
            "cosine attention needs torch.onnx.export(..., dynamo=True): the TorchScript exporter keeps no free lengths"
        )
    return torch.compiler.is_exporting()


def _written_out(run: Callable[..., Any], *, is_gated: bool, is_packed: bool) -> Callable[..., Any]:
    """What is written into an exported program in the place of `run`.

    Raises:
        RuntimeError: ONNX has no form of it.
    """
    if not is_gated:
        return plain_cosine_attention
    if not is_packed:
        from cottention.ops.scanned import scanned_cosine_attention  # what torch has for loops takes a second

        return scanned_cosine_attention
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError("ONNX has no form of packed texts with decay or erase: export a call without cu_seqlens")
    return run


def choose_implementation(
    implementation: str, q: Tensor, v: Tensor, *, is_gated: bool = False, erases: bool = False
) -> str:
    """The name of the implementation that runs for such tensors; one that was asked for by name is never replaced.

    Raises:
        ValueError: there is no implementation of that name, or it cannot erase here.
    """
    if implementation == "auto":
        if erases and q.is_cuda:
            name = "triton" if why_not_erase(q.device, q.dtype, q.shape[3]) is None else "chunk"
        elif is_gated and q.is_cuda and torch.compiler.is_exporting():
            name = "chunk"
        elif q.is_cuda:
            name = "triton" if triton.why_not(q.device, q.dtype, q.shape[3], v.shape[3]) is None else "chunk"
        else:
            name = "native" if suits_native(q) else "chunk"
        if not torch.compiler.is_compiling():
            log_once(_logger, "cosine attention runs as %r", name)
        return name
    if implementation not in IMPLEMENTATIONS:
        close = difflib.get_close_matches(str(implementation), IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation must be one of {known}; got {implementation!r}{hint}")
    if erases and implementation == "triton":
        reason = why_not_erase(q.device, q.dtype, q.shape[3])
        if reason is not None:
            raise ValueError(f'implementation="triton" cannot run here: {reason}')
    return implementation
