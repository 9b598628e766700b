"""The Triton implementation under torch.library, torch.compile, autocast and checkpointing, and its one-token step."""

from __future__ import annotations

from tests.ops.triton_process import run_interpreted


def test_operators_and_the_step_in_the_interpreter() -> None:
    run_interpreted("interpreted_triton_library.py", "not slow")
