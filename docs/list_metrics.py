"""Writes docs/metrics.md from the catalogue in kvkern/observability/catalogue.py: python docs/list_metrics.py"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from kvkern.observability.catalogue import (
    CATALOGUE,
    MAX_MODELS,
    MAX_TENANTS,
    OTHER,
    PUBLISHED,
    REASONS,
    Kind,
    Metric,
    Needs,
)

PAGE = Path(__file__).with_name("metrics.md")
HEAD = f"""# Metrics

`python docs/list_metrics.py` writes this page from `kvkern/observability/catalogue.py`. A test fails if they differ.

A daemon exports its metrics at `/metrics` of the address that `kvkern serve --metrics` gives. An engine exports its own through
vLLM, at vLLM's `/metrics`, with vLLM's labels `model_name` and `engine`. Nothing has to be switched on there.

- **What engines say and what a daemon says.** A daemon counts a chunk as a hit when it has pinned it for an engine. An engine
  counts it when it has loaded and verified it. So an engine's numbers say what was saved, a daemon's what was asked of it.
- **Counters never go back** while their process lives. A daemon's outlive engines and the arena: engines that restart, and a
  slot size that changes, add to them. A request counts once, however often it asks while it waits.
- **Labels are bounded.** `model` is the architecture, or what an engine of your own gives. `tenant` is the digest of a salt.
  The first {MAX_MODELS} models and {MAX_TENANTS} tenants have their own series, and the others share `{OTHER}`. No label
  contains a prompt, a key, a path or an address.
- **Series with fixed labels exist from the start**, at 0, so that rates and alerts work before the first event. Series of a
  model appear with its first engine.
- `deploy/observability/` has a scrape configuration, alert rules and a dashboard for these metrics.

![A dashboard of kvkern](dashboard.png)
"""


def page() -> str:
    """Return the page's text."""
    daemon = [metric for metric in CATALOGUE if metric.daemon is not None]
    engine = [metric for metric in CATALOGUE if metric.engine is not None]
    parts = [
        HEAD,
        "## Daemon",
        _table(daemon, lambda metric: (metric.daemon_name, metric.daemon or (), False)),
        "## Engine",
        "A metric marked with * needs a cache or a remote store of the engine's own: with a daemon, the daemon exports it.",
        _table(engine, lambda metric: (metric.engine_name, metric.engine or (), metric.needs in _OWN)),
        "## Names of the published deployment",
        "An engine exports these too if `VINEYARD_CACHE_METRICS_ENABLED` is on, or the option `published_metrics`. Names "
        "and types are those of the published deployment: what counts there is a gauge. Its "
        "buckets begin at 10 ms, these at 10 us.",
        _table(list(PUBLISHED), lambda metric: (metric.engine_name, metric.engine or (), False)),
        "## Reasons",
        "| reason | meaning |\n|---|---|\n" + "\n".join(f"| `{name}` | {text} |" for name, text in REASONS.items()),
        "## Buckets",
        "\n".join(_buckets()),
    ]
    return "\n\n".join(parts) + "\n"


_OWN = (Needs.OWN_CACHE, Needs.OWN_REMOTE)


def _table(
    metrics: Iterable[Metric],
    row: Callable[[Metric], tuple[str, tuple[str, ...], bool]],  # name, labels, whether it is marked
) -> str:
    lines = ["| name | type | unit | labels | meaning |", "|---|---|---|---|---|"]
    for metric in metrics:
        name, labels, starred = row(metric)
        cells = (f"`{name}`{' *' if starred else ''}", metric.kind.value, metric.unit)
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'`{label}`' for label in labels)} | {metric.help} |")
    return "\n".join(lines)


def _buckets() -> list[str]:
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for metric in (*CATALOGUE, *PUBLISHED):
        if metric.kind is Kind.HISTOGRAM:
            by_bounds.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    return [
        f"- {', '.join(names)}: {', '.join(f'{bound:g}' for bound in bounds)}" for bounds, names in by_bounds.items()
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
