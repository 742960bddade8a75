"""bench/observability.py, case page_acquire: it runs and writes what the documents promise. Does not judge times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.test_bench import files_left, run_quick


@pytest.mark.slow
def test_an_acquire_while_pages_are_open(tmp_path: Path) -> None:
    result, printed = run_quick("observability", tmp_path, "--case", "page_acquire")
    (row,) = result["rows"]
    assert (row["case"], row["clients"], row["chunks"], row["pages"]) == ("page_acquire", 8, 128, 10)
    assert 0 < row["p50_us"] <= row["p99_us"]
    assert 0 < row["alone_p50_us"] <= row["alone_p99_us"]
    assert row["ratio"] > 0
    assert printed.count("page_acquire") == 1
    assert files_left("node") == set()
