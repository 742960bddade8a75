"""docs/map.svg is what docs/draw_map.py draws of these sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_map_is_drawn_from_these_imports() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import draw_map; sys.stdout.write(draw_map.draw())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    drawn = (ROOT / "docs" / "map.svg").read_text(encoding="utf-8")
    assert done.stdout == drawn, "the imports or a component's docstring have changed: run `python docs/draw_map.py`"
