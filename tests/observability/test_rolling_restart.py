"""Engines and daemon are restarted and killed in turn under load: nobody else notices, no counter goes back, the page heals."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import APIError
from prometheus_client.parser import text_string_to_metric_families

from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.server import Server, build_served_model, transfer_config
from tests.node.conftest import Daemon, eventually
from tests.remote.required_servers import free_port, need
from tests.support import Threads

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(1500)]

NUM_CLIENTS = 8
START_S = 600.0
HEAL_S = 60.0
LOOK_S = 1.0  # between two scrapes
REST_S = 0.5  # of a client between two requests; an engine that starts needs the CPUs too


class Engines:
    """Two `vllm serve` on the daemon's socket. A place whose engine is being replaced is `down`."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        self._folder, self._daemon = folder, daemon
        self._model = build_served_model(folder / "model")
        self._starts = itertools.count()
        self.running = [self._start(), self._start()]
        self.down = [False, False]
        self.in_use: list[set[int]] = [set(), set()]  # clients that wait for an answer, by place
        for engine in self.running:
            engine.wait_until_ready()

    def _start(self) -> Server:
        transfer = transfer_config(socket=str(self._daemon.socket))
        log = self._folder / f"engine{next(self._starts)}.log"
        # vLLM would bind both engines to one core, where an engine that starts gets no time beside one that works
        return Server(self._model, transfer, log, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")

    def replace(self, place: int, kill: bool) -> None:
        """End an engine and start another in its place. Without `kill` it is drained first, as a rolling restart does."""
        self.down[place] = True
        if not kill:
            eventually(lambda: not self.in_use[place], f"draining of engine {place}", HEAL_S)
        else:
            os.killpg(self.running[place].process.pid, signal.SIGKILL)
            self.running[place].process.wait()
        self.running[place].__exit__(None, None, None)
        self.running[place] = self._start()
        self.running[place].wait_until_ready()
        self.down[place] = False

    def close(self) -> None:
        for engine in self.running:
            engine.__exit__(None, None, None)


class Clients(Threads):
    """Eight threads that ask, four an engine. They keep what failed on an engine that nobody had touched."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        super().__init__(partial(self._talk, number) for number in range(NUM_CLIENTS))
        self.failed: list[str] = []
        self.answered = [0] * NUM_CLIENTS

    def _talk(self, number: int) -> None:
        draw, place = random.Random(number), number % 2
        while not self.stop.is_set():
            self._engines.in_use[place].add(number)
            if not self._engines.down[place]:
                self._ask(number, place, draw)
            self._engines.in_use[place].discard(number)
            time.sleep(REST_S)

    def _ask(self, number: int, place: int, draw: random.Random) -> None:
        engine = self._engines.running[place]
        tokens = prompt(224, draw.randrange(4)) + prompt(draw.choice((32, 96, 160)), draw.randrange(40))
        try:
            engine.one(tokens, tokens=2)
            self.answered[number] += 1
        except APIError as error:
            if engine is self._engines.running[place] and not self._engines.down[place]:
                self.failed.append(f"client {number}, engine {place}: {error!r}")

    def all_answered_again(self) -> None:
        """Wait until each client has had two more answers."""
        before = list(self.answered)
        eventually(
            lambda: all(now >= then + 2 for now, then in zip(self.answered, before, strict=True)), "answers", HEAL_S
        )


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples that may never go back: of counters, and of histograms."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


class Scraper(Threads):
    """Reads /metrics of all three over and over, and keeps every sample that was smaller than before in the same process."""

    def __init__(self, metrics_port: int, engines: Engines) -> None:
        self._url, self._engines = f"http://127.0.0.1:{metrics_port}", engines
        super().__init__([self._run])
        self._before: dict[object, dict[Any, float]] = {}
        self.went_back: list[str] = []
        self.daemons: set[str] = set()
        self.scrapes = 0

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._url + path, timeout=10) as answer:
            return bytes(answer.read())

    def _run(self) -> None:
        while not self.stop.wait(LOOK_S):
            with suppress(OSError):  # it is being restarted
                daemon = self._get("/healthz")
                text = self._get("/metrics").decode()
                if self._get("/healthz") == daemon:  # else it was restarted in between
                    number = msgspec.json.decode(daemon)["daemon"]
                    self.daemons.add(number)
                    self._compare(number, text)
            for engine in list(self._engines.running):
                with suppress(OSError):
                    self._compare(engine, engine.metrics_text())

    def _compare(self, source: object, text: str) -> None:
        now, before = samples(text), self._before.get(source, {})
        self.went_back += [
            f"{name} went from {value} to {now.get(name)}"
            for name, value in before.items()
            if now.get(name, -1) < value
        ]
        self._before[source] = now
        self.scrapes += 1


@contextmanager
def open_page(port: int) -> Iterator[Any]:
    """Show the daemon's page in a real Chromium and leave it open."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("main:not([hidden])")
        yield page
        chromium.close()


def test_a_rolling_restart_and_kills_under_load(tmp_path: Path) -> None:
    need("chromium", program="chromium", module="playwright.sync_api")
    port = free_port()
    daemon = Daemon(tmp_path, "24MiB", ["--metrics", f"127.0.0.1:{port}"])
    try:
        daemon.start()
        engines = Engines(tmp_path, daemon)
        try:
            with Clients(engines) as clients, Scraper(port, engines) as scraper, open_page(port) as page:
                clients.all_answered_again()
                for kill in (False, True):
                    for place in (0, 1):
                        engines.replace(place, kill)
                        clients.all_answered_again()
                    daemon.kill() if kill else daemon.stop()
                    daemon.start()
                    clients.all_answered_again()
                heals(daemon, engines, page, port)
            assert not clients.failed
            assert not scraper.went_back
            assert len(scraper.daemons) == 3
            assert scraper.scrapes > 30
        finally:
            engines.close()
    finally:
        daemon.close()


def heals(daemon: Daemon, engines: Engines, page: Any, port: int) -> None:
    """Both engines load from the last daemon, and the page that was open all the time shows this daemon and both."""
    hits = [engine.counter("kvkern:hit_chunks") for engine in engines.running]
    eventually(
        lambda: all(
            engine.counter("kvkern:hit_chunks") > before for engine, before in zip(engines.running, hits, strict=True)
        ),
        "hits of both engines",
        HEAL_S,
    )

    def shows() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/overview", timeout=10) as answer:
            overview = msgspec.json.decode(answer.read())
        pids = [str(engine["pid"]) for engine in overview["engines"]]
        page.wait_for_timeout(200)
        text = page.inner_text("body")
        return len(pids) == 4 and "Live" in text and all(pid in text for pid in (str(daemon.pid), *pids))

    eventually(shows, "the page that was open all the time", HEAL_S)
