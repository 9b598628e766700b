"""Loggers of the package: silent in a library, on stderr in the command line.

Results go to stdout, so everything that is said on the way goes through here to stderr.

    logger = get_logger(__name__)
    log_once(logger, "attention runs as %s", "chunk")
"""

from __future__ import annotations

import logging
import sys

_ROOT = "cottention"
_said: set[tuple[str, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`, placed below "cottention" when it is not there already."""
    inside = name == _ROOT or name.startswith(f"{_ROOT}.")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def log_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log `message % args` at INFO, the first time only that this text meets this logger."""
    key = (logger.name, message % args if args else message)
    if key not in _said:
        _said.add(key)
        logger.info(message, *args)


def setup_cli_logging(verbose: bool) -> None:
    """Send the package's log to stderr: INFO and above, with `verbose` DEBUG too.

    Calling it again replaces the handler, so that tests and nested commands see the current sys.stderr.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose else "%(message)s"))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
