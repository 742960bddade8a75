"""The daemon's page in a real Chromium: what it shows, that names stay text, and that people can use it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvkern.config import RemoteConfig
from tests.node.conftest import eventually, hits, served, store
from tests.node.web.conftest import TOKEN, Web, web_daemon
from tests.remote.required_servers import need
from tests.support import NAMESPACE, SHAPE, chain_keys, key

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
PATIENCE_MS = 30_000
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, of the system."""
    need("chromium", program="chromium", module="playwright.sync_api")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


class Seen:
    """What a page did."""

    def __init__(self, page: Any) -> None:
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.addresses.append(request.url))


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """An empty page."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    context.close()


def until(page: Any, expression: str) -> None:
    """Wait until an expression of the page is true. Playwright's own waiting evaluates text there, which the policy forbids."""
    for _ in range(PATIENCE_MS // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not true: {expression}")


def show(page: Any, web: Web) -> Seen:
    """Open the daemon's page and wait until it shows figures."""
    seen = Seen(page)
    page.goto(f"http://127.0.0.1:{web.metrics}/")
    page.wait_for_selector("main:not([hidden])")
    return seen


@pytest.fixture
def busy(web: Web) -> Iterator[Web]:
    """A daemon with an engine, chunks of two tenants with hostile names, hits, and something wrong."""
    with ExitStack() as stack:
        client = web.client(HOSTILE)
        stack.callback(client.close)
        client.describe_namespace(NAMESPACE, {"model": HOSTILE, "salt": HOSTILE, "dtype": HOSTILE})
        client.describe_namespace(key("other"), {"model": "llama", "dtype": "bfloat16"})
        assert store(client, chain_keys("a", 6)) == 6
        other = client.reserve(chain_keys("b", 2), chain_keys("b", 2), SHAPE.__class__(key("other"), 0, 16))
        client.arena.headers["written"][list(other.slots), 0] = other.generations
        assert client.commit(other) == 2
        for _ in range(3):
            assert hits(client, chain_keys("a", 6)) == 6
        web.server.counters.dropped_chunks += 7
        eventually(lambda: len(web.server.namespace_chunks()) == 2, "a count of the namespaces")
        time.sleep(1.1)  # until the overview is rendered anew
        yield web


def test_what_it_shows(busy: Web, page: Any) -> None:
    seen = show(page, busy)
    text = page.inner_text("body")
    for expected in (
        "kvkern default",
        "Live",
        "18 of 18 chunks",
        "8",
        "llama",
        chain_keys("a", 1)[0].hex()[:16],
        "none: chunks",
    ):
        assert expected in text
    assert "Warning: 7 chunks found no free slot within the last hour" in text
    assert "--capacity" in text
    assert page.title() == "100 % hits · kvkern default"
    assert not seen.complaints
    assert {address.split("/")[2] for address in seen.addresses if not address.startswith("data:")} == {
        f"127.0.0.1:{busy.metrics}"
    }


def test_names_stay_text(busy: Web, page: Any) -> None:
    seen = show(page, busy)
    assert page.inner_text("#tenants").count(HOSTILE) >= 1
    assert HOSTILE in page.inner_text("#engines")
    assert page.locator("main img, main script").count() == 0
    assert not seen.complaints


def test_it_can_run_no_other_script(busy: Web, page: Any) -> None:
    """The policy refuses what somebody would bring into the page: a script, a style, an image, another address."""
    seen = show(page, busy)
    page.evaluate(
        """() => { for (const [name, key, value] of [["script", "textContent", "document.title = 'owned'"],
        ["img", "src", "http://127.0.0.1:9/x"], ["iframe", "src", "http://127.0.0.1:9/"]]) {
        const node = document.createElement(name); node[key] = value; document.body.append(node); }
        return fetch("http://127.0.0.1:9/").catch(() => 0); }"""
    )
    assert page.title() != "owned"
    refused = [complaint for complaint in seen.complaints if "Content Security Policy" in complaint]
    assert len(refused) >= 4


def test_it_is_live(busy: Web, page: Any) -> None:
    show(page, busy)
    with ExitStack() as stack:
        for number in range(2):
            stack.callback(busy.client(f"engine-{number}").close)
        until(page, "document.getElementById('engines').textContent.includes('engine-1')")
        assert page.inner_text("#conn") == "3"
    until(page, "!document.getElementById('engines').textContent.includes('engine-1')")


def test_a_lost_connection_is_seen_and_heals(folder: Path, page: Any) -> None:
    with web_daemon(folder) as web:
        config = replace(web.server.config, metrics=web.server.endpoints[0], rpc=None)  # on the same port
        show(page, web)
        first = web.server.daemon_id[:8]
        assert first in page.inner_text("#foot")
    page.wait_for_selector("#state[data-state=lost]")
    assert "Connection lost" in page.inner_text("#state")
    assert page.locator("main").is_visible()  # the last figures stay
    with served(config) as server:
        page.wait_for_selector("#state[data-state=live]")
        until(page, f"document.getElementById('foot').textContent.includes('{server.daemon_id[:8]}')")
        assert server.daemon_id[:8] != first


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_at_two_widths_light_and_dark(busy: Web, browser: Any, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True, has_touch=width < 500
    )
    context.set_default_timeout(PATIENCE_MS)
    try:
        page = context.new_page()
        show(page, busy)
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 20)"
        assert dark == (scheme == "dark")
        results = Axe().run(page, options={"resultTypes": ["violations"]})
        assert not results.response["violations"], results.generate_report()
    finally:
        context.close()


def test_by_keyboard_and_for_screen_readers(busy: Web, page: Any) -> None:
    show(page, busy)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert page.locator("#config").is_visible()
    assert page.locator("header").count() == page.locator("main").count() == page.locator("h1").count() == 1
    assert page.get_attribute("#state", "aria-live") == "polite"
    assert page.locator("table th[scope=col]").count() >= 10
    for name in ("chart-ratio", "chart-rate"):
        assert "over the last hour" in page.get_attribute(f"#{name} svg", "aria-label")
    assert "cached chunks: 8" in page.get_attribute("#dram-bar", "aria-label")


def test_figures_do_not_steal_the_focus(busy: Web, page: Any) -> None:
    show(page, busy)
    page.focus("#engines")
    page.evaluate("window.told = document.getElementById('foot').textContent")
    until(page, "document.getElementById('foot').textContent !== window.told")
    assert page.evaluate("document.activeElement.id") == "engines"


def test_a_token_is_asked_for_once(folder: Path, page: Any) -> None:
    with web_daemon(folder, token=TOKEN) as web:
        page.goto(f"http://127.0.0.1:{web.metrics}/")
        assert "needs the daemon's token" in page.inner_text("main")
        page.fill("#token", "wrong, and long enough")
        page.keyboard.press("Enter")
        page.wait_for_url("**/?token=*")
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("main:not([hidden]) #ratio")
        assert TOKEN not in page.url
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert TOKEN not in cookie["value"]
        page.reload()
        page.wait_for_selector("#state[data-state=live]")
        page.context.clear_cookies()  # as if the token had changed
        web.server.stop()


def test_a_remote_store_and_its_failure(folder: Path, page: Any) -> None:
    """What is in the store, at what rate it moves, and that it does not work."""
    store_folder = folder / "store"
    store_folder.mkdir()
    with web_daemon(folder, remote=RemoteConfig(f"file://{store_folder}", "all")) as web, ExitStack() as stack:
        client = web.client()
        stack.callback(client.close)
        assert store(client, chain_keys("a", 3)) == 3
        eventually(lambda: web.server.stat()["remote_written_chunks"] == 3, "three chunks in the store")
        time.sleep(1.1)
        seen = show(page, web)
        text = page.inner_text("#remote")
        assert "works" in text
        assert "3 chunks in the last hour" in text
        assert str(store_folder) not in page.inner_text("#config")
        assert web.server._remote is not None
        for _ in range(3):
            web.server._remote.breaker.failed("no answer")
        until(page, "document.getElementById('advice').textContent.includes('does not work')")
        assert "does not work" in page.inner_text("#remote")
        assert not seen.complaints
