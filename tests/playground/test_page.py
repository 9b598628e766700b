"""The page in a real browser, headless: every tab is used, nothing is fetched from elsewhere, no error is logged.

Needs gradio, playwright and Chromium (Debian: `apt-get install chromium`): `make test-browser`. The pictures go where
COTTENTION_SCREENSHOTS says; COTTENTION_MODELS names trained models to drive in place of the tiny ones: a GPT, a softmax
GPT, a BERT.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.models import CottentionBertForPreTraining
from tests import tiny
from tests.models.helpers import bert_config

pytest.importorskip("gradio", reason="pip install 'cottention[playground]'")
sync_api: Any = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium")]
_PATIENCE_S = 180


def _tiny_models(root: Path) -> list[str]:
    tokenizer = tiny.wordpiece_tokenizer()
    tiny.save(root / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    tiny.save(root / "twin", tiny.gpt("softmax", dtype=torch.float32, n_positions=256), tiny.bpe_tokenizer())
    bert = CottentionBertForPreTraining(bert_config("cosine", vocab_size=len(tokenizer)))
    tiny.save(root / "bert", bert, tokenizer)
    return [str(root / name) for name in ("gpt", "twin", "bert")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = os.environ.get("COTTENTION_MODELS", "").split() or _tiny_models(tmp_path_factory.mktemp("models"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [word for name in given for word in ("--model", name)]
    command = [sys.executable, "-m", "cottention", "playground", "--port", str(port), *models]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}/"
    try:
        _wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=60)


def _wait_for(address: str, server: subprocess.Popen[str]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        assert server.poll() is None, server.communicate()[1]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the page was not served in time")


class _Visitor:
    """Clicks and types as a person would, and keeps what the browser asked for and complained about."""

    def __init__(self, page: Any, address: str, width: int) -> None:
        self.page, self.width = page, width
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(_PATIENCE_S * 1000)
        page.on("request", lambda request: self._ask(request.url, address))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.goto(address)

    def _ask(self, asked: str, address: str) -> None:
        if not asked.startswith((address, "data:", "blob:")):
            self.elsewhere.append(asked)

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.count() or not tab.first.is_visible():  # a narrow page keeps the last ones behind three dots
            self.page.locator(".overflow-menu > button").first.click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.first.click()

    def wait(self, selector: str, text: str) -> str:
        self.page.wait_for_function(
            "([selector, text]) => (document.querySelector(selector)?.innerText ?? '').includes(text)",
            arg=[selector, text],
        )
        return self.page.inner_text(selector)

    def shoot(self, name: str) -> None:
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width, (
            "the page is wider than the screen"
        )
        if where := os.environ.get("COTTENTION_SCREENSHOTS"):
            self.page.screenshot(path=Path(where) / f"{name}-{self.width}.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_is_used(url: str, width: int, browser: Any):
    visitor = _Visitor(browser.new_page(viewport={"width": width, "height": 844}), url, width)
    page = visitor.page

    page.fill("#write-prompt textarea", "We the people")
    page.click("#write")
    assert "a state of" in visitor.wait("#figures-0", "tokens/s")
    assert "keys and values" in visitor.wait("#figures-1", "tokens/s")
    assert page.input_value("#written-0 textarea").startswith("We the people")
    visitor.shoot("write")

    visitor.tab("Ask a book")
    page.click("#ask")
    visitor.wait(".toast-wrap", "read a text first")
    page.fill("#book textarea", "We the people of the Union. " * 300)
    page.click("#read")
    assert "in a state of" in visitor.wait("#book-state", "are known")
    page.click("#ask")
    page.wait_for_function("document.querySelector('#answer textarea').value.length > 3")
    visitor.shoot("book")

    visitor.tab("Chat")
    page.fill("#turn textarea", "We")
    page.press("#turn textarea", "Enter")
    visitor.wait("#chat-state", "tokens said")
    visitor.shoot("chat")

    visitor.tab("Fill a mask")
    page.fill("#masked textarea", "people of the [MASK]")
    page.click("#fill")
    visitor.wait("#mask-0", "%")
    page.click("#split")
    page.locator("#tokens .token").first.click()
    page.wait_for_function("document.querySelector('#masked textarea').value.split('[MASK]').length == 3")
    visitor.wait("#mask-1", "%")
    visitor.shoot("mask")

    visitor.tab("Next sentence")
    page.click("#compare")
    visitor.wait("#follows", "does not")
    visitor.shoot("pair")

    visitor.tab("Search")
    page.fill("#lines textarea", "the people\nof the union")
    page.fill("#query textarea", "the people")
    page.click("#search")
    visitor.wait("#nearest", "1.000")
    visitor.shoot("search")

    visitor.tab("Look inside")
    page.click("#look")
    visitor.wait("#heads", "cosine")
    page.wait_for_selector("#map img")
    visitor.shoot("inside")
    assert visitor.elsewhere == []
    assert visitor.errors == []
