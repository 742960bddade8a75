"""docs/configuration.md and docs/published_deployment.md are what docs/list_options.py draws; every option is on its page."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from kvkern.cli import daemon
from kvkern.config.options import OPTIONS, Reader, names_of

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("page", ["configuration", "published_deployment"])
def test_the_page_is_drawn_from_the_table(page: str) -> None:
    function = page.partition("_")[0]
    code = f"import sys; sys.path.insert(0, 'docs'); import list_options; sys.stdout.write(list_options.{function}())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert done.stdout == committed, "kvkern/config has changed: run `python docs/list_options.py`"


def test_serve_has_every_option_of_a_daemon() -> None:
    assert set(inspect.signature(daemon.serve).parameters) == names_of(Reader.DAEMON) | {"config"}


def test_every_option_has_a_reader_and_a_name_of_its_own() -> None:
    assert all(option.readers for option in OPTIONS)
    assert len({option.variable for option in OPTIONS}) == len(OPTIONS)
