"""`python -m cottention`, and `torchrun --nproc-per-node N -m cottention pretrain ...` in several processes."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line given to the process."""
    try:
        from cottention.cli.main import entry_point
    except KeyboardInterrupt:  # until the entry point has taken over, Python would show where it was
        os._exit(130)
    entry_point()


if __name__ == "__main__":
    main()
