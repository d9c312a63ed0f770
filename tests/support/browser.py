"""Pages come in; a real browser's view of them goes out, offline."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 60_000  # milliseconds: a machine may be busy


@dataclass
class Seen:
    """An open page, with its requests and its console messages."""

    page: Any
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def panel(self) -> str:
        return self.page.locator(".panel").inner_text()

    def wait_for_address(self, *places: str) -> None:
        """Wait until the address ends in one of these places, without a script: the policy of the page forbids eval."""
        self.page.wait_for_url(lambda url: url.partition("#")[2].startswith(places))

    def current(self) -> str:
        return self.page.locator("[aria-current]").inner_text()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser; skip the test if there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if EXECUTABLE is None:
        pytest.skip("no Chromium is installed; apt-get install chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, file: Path, address: str = "", *, width: int = 1280, dark: bool = False) -> Iterator[Seen]:
    """Open a page and wait until it is drawn; at the end, require that it made no request and no console error."""
    context = browser.new_context(
        offline=True, viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    context.set_default_timeout(PATIENCE)
    seen = Seen(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.messages.append(message.text))
    seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))
    url = file.resolve().as_uri()
    try:
        seen.page.goto(url + address)
        seen.page.wait_for_selector("[data-ready]")
        yield seen
        assert seen.messages == [], seen.messages
        assert seen.requests == [url], seen.requests
    finally:
        context.close()
