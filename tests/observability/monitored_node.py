"""A node under load as an operator has it: a daemon with a remote store, two `vllm serve`, and a real Prometheus over them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.server import Server, build_served_model, transfer_config
from tests.node.conftest import Daemon, eventually
from tests.remote.required_servers import free_port

PROMETHEUS = "prometheus"  # Debian's package of this name has it, and promtool
SCRAPE_S = 2  # also how long a scrape may take
START_S = 60.0


class Prometheus:
    """A Prometheus server on this host's own address, with its data in a folder. Leaving the context ends it."""

    def __init__(self, folder: Path, targets: dict[str, list[int]], rules: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            for job, ports in targets.items()
        ]
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(rules)],
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._log = folder / "prometheus.log"
        command = [
            PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def get(self, path: str, **params: str | float) -> Any:
        """Ask its HTTP API. Raises if it does not say success."""
        query = urllib.parse.urlencode(params)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the series of an instant query."""
        result: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return result

    def __enter__(self) -> Prometheus:
        def ready() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return True
            return False

        try:
            eventually(ready, "Prometheus", START_S)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(START_S)


class Node:
    """The running processes."""

    def __init__(self, daemon: Daemon, engines: list[Server], prometheus: Prometheus, metrics_port: int) -> None:
        self.daemon, self.engines, self.prometheus = daemon, engines, prometheus
        self.metrics_port = metrics_port

    def load(self, seconds: float, rest_s: float = 0.05) -> None:
        """Send prompts to both engines: each begins with one of four texts, and many come again after they left vLLM's pool."""
        stop = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._talk, args=(engine, number, stop, rest_s))
            for number, engine in enumerate(self.engines * 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _talk(self, engine: Server, number: int, stop: float, rest_s: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < stop:
            start = prompt(224, draw.randrange(4))  # one of four system prompts, which both engines see
            turn = prompt(draw.choice((32, 96, 160, 320)), draw.randrange(40))
            tenant = {"cache_salt": "a tenant of its own"} if draw.random() < 0.3 else {}
            engine.one(start + turn, tokens=draw.choice((2, 8)), **tenant)
            time.sleep(rest_s)


@contextmanager
def monitored_node(folder: Path, rules: Path) -> Iterator[Node]:
    """Start all of it. The folder takes models, logs and the data of Prometheus; sockets and arenas lie elsewhere."""
    with ExitStack() as stack:
        port = free_port()
        options = ["--metrics", f"127.0.0.1:{port}", "--remote", f"file://{folder / 'store'}", "--persist", "all"]
        (folder / "store").mkdir()
        daemon = Daemon(folder, "24MiB", options)
        stack.callback(daemon.close)
        daemon.start()
        model = build_served_model(folder / "model")
        transfer = transfer_config(socket=str(daemon.socket), published_metrics=True)
        engines = [Server(model, transfer, folder / f"engine{number}.log") for number in range(2)]
        for engine in engines:
            stack.push(engine.__exit__)
        for engine in engines:
            engine.wait_until_ready()
        targets = {"kvkern": [port], "vllm": [engine.port for engine in engines]}
        prometheus = stack.enter_context(Prometheus(folder, targets, rules))
        yield Node(daemon, engines, prometheus, port)


def missing() -> str:
    """Return what this machine lacks to run a monitored node; empty: nothing."""
    return (
        "" if shutil.which(PROMETHEUS) and shutil.which("promtool") else "Debian's package prometheus is not installed"
    )
