"""A real Prometheus scrapes a daemon and two real vLLM engines under load. Every query of dashboard and alerts is answered."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kvkern.node import protocol as p
from kvkern.observability.catalogue import CATALOGUE, Kind
from tests.node.conftest import eventually
from tests.observability.monitored_node import SCRAPE_S, Node, monitored_node
from tests.remote.required_servers import need

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy" / "observability"
PUBLISHED = {
    "Hit Rate": ["Tokens", "Blocks"], "Hit Tokens & Blocks": ["Tokens", "Blocks"],
    "Total Tokens & Blocks": ["Tokens", "Blocks"], "Query Latency": ["P99", "P90", "P50"],
    "Update Latency": ["P99", "P90", "P50"], "Error": ["Query", "Update", "Update QFull"],
}  # fmt: skip
WINDOW = "60s"
ROUNDS = 8  # of requests, at most, until a chunk was read from the store
METRIC = re.compile(r"\b(?:kvkern[:_]\w+|vllm:\w+|up)\b")


@pytest.fixture(scope="session")
def needs_prometheus() -> None:
    need("prometheus", "prometheus")
    need("prometheus", "promtool")


def load(name: str) -> ModuleType:
    """Import a script of the deployment."""
    spec = importlib.util.spec_from_file_location(name, DEPLOY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def panels() -> list[dict[str, Any]]:
    found = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def queries() -> list[tuple[str, str, str]]:
    """Return (panel, legend, query with its variables filled in) of every line of the dashboard."""
    return [
        (panel["title"], target["legendFormat"], filled(target["expr"]))
        for panel in panels()
        for target in panel["targets"]
    ]


def filled(query: str) -> str:
    return query.replace("$model_name", ".*").replace("$__rate_interval", WINDOW)


def has_number(series: list[dict[str, Any]]) -> bool:
    """Return True if a series has a value. NaN is none: it is 0/0, or a quantile of nothing."""
    return any(not math.isnan(float(one["value"][1])) for one in series)


def _value(series: list[dict[str, Any]]) -> float:
    return float(series[0]["value"][1]) if series else 0.0


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


# -- without servers -----------------------------------------------------------------------------------------------------


def test_the_dashboard_is_what_its_script_writes() -> None:
    written = load("write_dashboard").text()
    assert (DEPLOY / "dashboard.json").read_text() == written, "run python deploy/observability/write_dashboard.py"


def test_the_published_panels_have_their_titles_and_legends() -> None:
    found = {panel["title"]: [target["legendFormat"] for target in panel["targets"]] for panel in panels()}
    assert {title: found[title] for title in PUBLISHED} == PUBLISHED
    assert list(found)[: len(PUBLISHED)] == list(PUBLISHED)


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in panels()
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_has_a_page_that_names_it(rule: dict[str, Any]) -> None:
    page = (ROOT / rule["annotations"]["runbook"]).read_text()
    assert page.startswith(f"# {rule['alert']}: ")
    for heading in ("What it means", "Where to look", "What to do"):
        assert f"\n## {heading}\n" in page
    for link in re.findall(r"\]\(([\w.]+)\)", page):
        assert (ROOT / "docs" / "runbooks" / link).exists(), link


def test_the_overview_lists_each_alert() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    for rule in rules():
        path = rule["annotations"]["runbook"].removeprefix("docs/")
        assert f"| [{rule['alert']}]({path}) | {rule['labels']['severity']} |" in page


def test_each_page_is_of_an_alert() -> None:
    pages = {f"docs/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {rule["annotations"]["runbook"] for rule in rules()}


@pytest.mark.usefixtures("needs_prometheus")
@pytest.mark.parametrize("command", [
    ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml"),
], ids=" ".join)  # fmt: skip
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DEPLOY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize(("values", "is_data"), [
    ([], False), (["NaN"], False), (["NaN", "0"], True), (["+Inf"], True),
])  # fmt: skip
def test_nan_is_no_data(values: list[str], is_data: bool) -> None:
    assert has_number([{"metric": {}, "value": [0, value]} for value in values]) == is_data


# -- with servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, needs_prometheus: None) -> Iterator[Node]:
    """A node that has served for a while, from DRAM and from its remote store."""
    with monitored_node(tmp_path_factory.mktemp("node"), DEPLOY / "alerts.yml") as running:
        running.load(6)
        for _ in range(ROUNDS):  # on a busy machine a round may find that computing is faster than reading
            running.daemon.ask(p.Clear(1, None))  # what comes now is read from the store
            for engine in running.engines:
                engine.reset()
            running.load(6)
            if running.prometheus.query('sum(kvkern_hit_chunks_total{tier="remote"}) > 0'):
                break
        ended = time.time()
        # rates need two scrapes after the last request, and figures are compared as they were when it had ended
        loaded = "sum(kvkern:loaded_tokens_total) > 0 and sum(rate(kvkern:first_token_seconds_count[30s])) > 0"
        eventually(lambda: running.prometheus.query(loaded), "loads in Prometheus")
        scraped = "min(timestamp(kvkern:requests_total) or timestamp(kvkern_arena_slots))"
        eventually(lambda: _value(running.prometheus.query(scraped)) > ended + 2 * SCRAPE_S, "two more scrapes")
        yield running


def with_servers(test: Any) -> Any:
    """Mark a test that needs the node."""
    for mark in (pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(900)):
        test = mark(test)
    return test


@with_servers
def test_every_query_of_every_panel_returns_data(node: Node) -> None:
    silent = [
        (panel, legend, query) for panel, legend, query in queries() if not has_number(node.prometheus.query(query))
    ]
    assert not silent, silent


@with_servers
def test_every_metric_of_every_alert_exists(node: Node) -> None:
    for rule in rules():
        names = set(METRIC.findall(rule["expr"]))
        assert names, rule["alert"]
        for name in names:
            assert node.prometheus.query(name), f"{rule['alert']}: metric not found: {name}"
    states = {
        rule["name"]: rule["health"] for group in node.prometheus.get("rules")["groups"] for rule in group["rules"]
    }
    assert states == {rule["alert"]: "ok" for rule in rules()}


@with_servers
def test_nothing_fires_on_a_healthy_node(node: Node) -> None:
    firing = [alert["labels"] for alert in node.prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    assert firing == []


@with_servers
def test_figures_agree(node: Node) -> None:
    """What the engines loaded, the daemon had given; both tiers were hit; seconds were avoided."""

    def total(query: str) -> float:
        (found,) = node.prometheus.query(f"sum({query})")
        return float(found["value"][1])

    assert 0 < total("kvkern:hit_chunks_total") <= total("kvkern_hit_chunks_total")
    assert total('kvkern_hit_chunks_total{tier="remote"}') > 0
    assert total("kvkern_stored_chunks_total{tier='remote'}") > 0
    assert total("kvkern:loaded_tokens_total") == total('kvkern:hit_tokens_total{tier="dram"}')
    assert total("kvkern:requests_total") == total("kvkern:first_token_seconds_count")
    assert total("kvkern:connected") == 2


@with_servers
def test_every_metric_of_the_daemon_reaches_prometheus(node: Node) -> None:
    for metric in CATALOGUE:
        if metric.daemon is not None:
            name = metric.daemon_name + ("_bucket" if metric.kind is Kind.HISTOGRAM else "")
            assert node.prometheus.query(f'{name}{{job="kvkern"}}'), f"metric not found: {name}"
