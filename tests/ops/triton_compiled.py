"""Compiles the Triton kernels ahead of time, without a GPU, and reads what they need from the machine code.

A call is made on tensors without memory, its launches are recorded, and each is compiled for the arguments that it
would have had: so what is checked is what runs. As a program it prints the table of docs/kernels-gpu.md:

    python -m tests.ops.triton_compiled > table.md
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cottention.ops.triton import config, launch, passes, step
from cottention.ops.triton.table import KINDS, WIDTHS

# Per block, as the vendors state it: what a program may take of shared memory (LDS).
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_KERNELS = ("state_kernel", "scan_kernel", "linear_kernel", "unit_gradient_kernel", "quadratic_kernel")
_TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel and the arguments that it was started with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel, and for those that compute several things which."""
        name = self.kernel.__name__.removesuffix("_kernel")
        role = self.arguments.get("FIRST_ROLE")
        if role is None:
            return name
        return f"{name} {('forward', 'dq, dk, dv' if self.arguments['NUM_ROLES'] == 3 else 'dq', 'dk, dv')[role]}"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one program of a kernel takes."""

    registers: int
    """Of a thread; on AMD vector registers."""
    spilled: int
    """Bytes of stack a thread (NVIDIA), or registers (AMD)."""
    shared_bytes: int


def launches_of(call: Callable[[], object], arch: str) -> list[Launch]:
    """What a call on tensors of device "meta" would have launched on an architecture."""
    found: list[Launch] = []
    with mock.patch.object(config, "architecture", return_value=arch), _recorded(found):
        call()
    return found


@contextmanager
def _recorded(found: list[Launch]) -> Iterator[None]:
    from cottention.ops.triton import step_kernel

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(0 < size < 2**31 for size in grid)
            return self._record

        def _record(self, *args: Any, **options: Any) -> None:
            arguments = dict(zip(self._kernel.arg_names, args, strict=False))
            arguments |= {name: options.pop(name) for name in [*options] if name in self._kernel.arg_names}
            assert arguments.keys() == set(self._kernel.arg_names)
            found.append(Launch(kernel=self._kernel, arguments=arguments, options=options))

    with mock.patch.object(step_kernel, "step_kernel", Recorder(step_kernel.step_kernel)):
        patches = [mock.patch.object(launch, name, Recorder(getattr(launch, name))) for name in _KERNELS]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def compile_for(arch: str, launched: Launch) -> Resources:
    """Compile one launch as Triton would: integers of 1 are known, others may be known as multiples of 16."""
    kernel, arguments = launched.kernel, launched.arguments
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value: Any = arguments[name]
        if value is None or kernel.params[i].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _TRITON_TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=_TARGETS[arch], options=launched.options)
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)
    return Resources(registers=registers, spilled=spilled, shared_bytes=compiled.metadata.shared)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler says"
    return int(match[1])


def calls_of(kind: str, K: int, V: int, *, form: str, causal: bool = True) -> Callable[[], None]:
    """Forward and backward, short, in segments or with decay; with what costs registers: a mask, a divisor, states."""
    dtype = {"bf16": torch.bfloat16, "tf32": torch.float16, "ieee": torch.float32}[kind]
    B, T, H = 2, 8192, 16
    segment = {"short": 0, "segments": 2048, "decay": 2048}[form]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call() -> None:
        q, k, v, do = empty(B, T, H, K), empty(B, T, H, K), empty(B, T, H, V), empty(B, T, H, V)
        m, mask = empty(H, dtype=torch.float32), empty(B, T, dtype=torch.bool)
        inputs = (q, k, v, m, mask, None)
        if form == "decay":
            state = (empty(B, H, K, V, dtype=torch.float32), empty(B, dtype=torch.int64)) if causal else (None, None)
            inputs = (*inputs, *state, empty(B, T, H, dtype=torch.float32), None)
            states = passes.gated(*inputs, causal, 0, segment)[3]
            passes.gated_backward(do, state[0], *inputs, states, causal, 0, segment)
            return
        if not causal:
            _, kv = passes.bidirectional(*inputs, 0, segment)
            passes.bidirectional_backward(do, *inputs, kv, 0, segment)
            return
        state = (empty(B, H, K, V, dtype=torch.float32), empty(B, dtype=torch.int64)) if segment else (None, None)
        states = passes.causal(*inputs, *state, bool(segment), 0, segment)[3]
        passes.causal_backward(do, state[0], *inputs, *state, states, 0, segment)

    return call


def step_of(kind: str, K: int, V: int, *, is_gated: bool = False) -> Callable[[], None]:
    """The one-token step; gated: with log_decay, beta and rows of a pool."""
    dtype = {"bf16": torch.bfloat16, "tf32": torch.float16, "ieee": torch.float32}[kind]
    B, H = 8, 16

    def call() -> None:
        q, k, v = (torch.empty(B, H, D, dtype=dtype, device="meta") for D in (K, K, V))
        kv, seen = torch.empty(B, H, K, V, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
        gates = (torch.empty(B, H, device="meta"), torch.empty(B, H, device="meta"), seen) if is_gated else (None,) * 3
        step._launch(q, k, v, torch.empty(H, device="meta"), None, kv, seen, kv, *gates)

    return call


def main() -> None:
    """Print, for every entry of the table and every architecture, what its kernels compiled to."""
    print("| kind, K = V | kernel | " + " | ".join(f"{arch}" for arch in _TARGETS) + " |")
    print("|---|---|" + "---|" * len(_TARGETS))
    for kind in KINDS:
        for width in WIDTHS:
            rows: dict[str, list[str]] = {}
            for arch in _TARGETS:
                for form in ("segments", "short"):
                    for each in launches_of(calls_of(kind, width, width, form=form), arch):
                        if each.name.startswith(("scan", "unit")):
                            continue
                        cell = _cell(each, compile_for(arch, each))
                        rows.setdefault(each.name, [])
                        if len(rows[each.name]) < [*_TARGETS].index(arch) + 1:
                            rows[each.name].append(cell)
            for name, cells in rows.items():
                print(f"| {kind}, {width} | {name} | " + " | ".join(cells) + " |", flush=True)


def _cell(launched: Launch, found: Resources) -> str:
    a, o = launched.arguments, launched.options
    spilled = f", {found.spilled} spilled" if found.spilled else ""
    tiles = f"{a['BT']}x{a['BZ']}, {o['num_warps']} warps"
    return f"{tiles}: {found.registers} registers, {found.shared_bytes / 1024:.0f} KiB{spilled}"


if __name__ == "__main__":
    main()
