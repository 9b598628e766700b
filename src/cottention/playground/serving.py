"""Serves the page until it is stopped.

serve(["runs/quickstart-gpt/model"], host="127.0.0.1", port=7860, device="auto")
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

from cottention.errors import SettingsError
from cottention.logging import get_logger
from cottention.playground.opened import open_models

_logger = get_logger(__name__)


def serve(sources: Sequence[str], *, host: str, port: int, device: str) -> None:
    """Open the models and serve their page; comes back when the process is interrupted.

    Raises:
        SettingsError: the port is taken, the address is none of this machine's, or a model is given twice.
        CheckpointError: a model cannot be opened.
    """
    port = _free_port(host, port)
    models = open_models(sources, device=device)
    # gradio reads these when it is imported: it would report its use, and ask for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from cottention.playground.page import LAUNCH, build_page

    for noisy in ("httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    page = build_page(models)
    _, url, _ = page.queue().launch(
        server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, show_error=True, **LAUNCH
    )
    _logger.info("serving %s; Ctrl-C ends it", url)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _free_port(host: str, port: int) -> int:
    """The port, or any free one for 0; whether it can be had is known before models are opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise SettingsError(f"cannot serve on {host}, port {port}: {error}") from None
        return probe.getsockname()[1]
