"""Measures what it costs to be observed: the same work with and without it, in turns, as a ratio of times.

    metrics_acquire   the CPU time of a daemon's thread for an acquire of 128 chunks and its release, with and without metrics
    metrics_step      a step of a vLLM engine: the time inside kvkern's metrics as a share of it; needs vLLM
    page_acquire      an acquire by 8 clients while 10 pages follow the daemon live, and without pages; ratio is that of the p99

Targets: 1.01 for metrics, 1.1 for pages. Ratios are medians over many short rounds, because a machine's speed changes more
from second to second than what is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import _metrics_cost
from _common import option_parser, print_row, write_json
from _page_acquire import page_acquire

Row = dict[str, object]


def rows(quick: bool, cases: set[str]) -> Iterator[Row]:
    """Yield the rows of these cases."""
    if "metrics_acquire" in cases:
        yield _metrics_cost.acquire(*((3, 0.3) if quick else (40, 1.0)))
    if "metrics_step" in cases and importlib.util.find_spec("vllm") is not None:
        yield _metrics_cost.step(5 if quick else 150)
    if "page_acquire" in cases:
        yield from page_acquire(*((1, 0.5) if quick else (20, 2.0)))


def main() -> None:
    parser = option_parser(__doc__, "few rounds: shows that it runs, and measures nothing")
    known = ("metrics_acquire", "metrics_step", "page_acquire")
    parser.add_argument("--case", choices=known, action="append", help="measure only this one; may be repeated")
    options = parser.parse_args()
    found = []
    for row in rows(options.quick, set(options.case or known)):
        print_row(row)
        found.append(row)
    write_json(options.json, found)


if __name__ == "__main__":
    main()
