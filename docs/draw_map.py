"""Draws docs/map.svg: the components of kvkern, level by level, from the imports in the sources. `python docs/draw_map.py`

A box is an entry of LEVELS in tests/import_graph.py: its path, the first sentence of its docstring, its modules. An arrow
is an import; one that follows from others (a imports b, b imports c, so a -> c) is left out. Boxes of one level that import
each other stand one above the other. The standard library alone: the same sources give the same bytes.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.import_graph import KERNELS, LEVELS, MODULES, TOP, component, component_imports, reached  # noqa: E402

OUT = ROOT / "docs" / "map.svg"
WIDTH, LEFT, RIGHT, GAP = 1240, 150, 20, 22
LINE, PAD, ROW_GAP, LEVEL_GAP = 15, 10, 34, 30
CHAR = 5.8  # pixels of a character at 11 px; wide enough for any sans-serif
COLUMNS = 3
COLUMN = {  # where a box stands; others take a free column from the left
    "kvkern.demo_remote": 0, "kvkern.cli": 1,
    "kvkern.demo": 0, "kvkern.integrations": 0, "kvkern.replay": 1, "kvkern.doctor": 2,
    "kvkern.api": 0, "kvkern.node": 1, "kvkern.assemble": 0, "kvkern.cache": 1, "kvkern.transfer": 0, "kvkern.remote": 2,
    "kvkern.tiers": 1, "kvkern.arena": 1, "kvkern.config": 1, "kvkern.keys": 0, "kvkern.policy": 2, "kvkern.errors": 1,
    KERNELS: 0, "kvkern.bounded_dict": 1, "kvkern.metrics": 2, "kvkern.measurement_json": 0,
}  # fmt: skip
BOX = (WIDTH - LEFT - RIGHT - GAP * (COLUMNS - 1)) / COLUMNS
LEVEL_TITLES = {
    0: "kernels, shared types", 1: "keys, policy, arena", 2: "copies, tiers, stores", 3: "the cache",
    4: "assembly, daemon, API", 5: "engines and tools", 6: "the command line",
}  # fmt: skip


@dataclass
class Box:
    """One component."""

    name: str
    targets: set[str]
    x: float = 0
    y: float = 0
    lines: list[tuple[str, str]] = field(default_factory=list)  # (class of the text, text)

    @property
    def height(self) -> float:
        """With its padding."""
        return 2 * PAD + LINE * len(self.lines)


def first_sentence(text: str) -> str:
    """The summary line of a docstring, up to its first full stop or colon's end."""
    line = text.strip().split("\n\n")[0].replace("\n", " ")
    end = line.find(". ")
    return line if end < 0 else line[: end + 1]


def contents(name: str) -> tuple[str, str, str]:
    """(path, first sentence, names of its modules) of a component."""
    modules = sorted((m for m in MODULES if m.name not in TOP and component(m.name) == name), key=lambda m: m.name)
    head = next(m for m in modules if m.name == name)
    sentence = first_sentence(ast.get_docstring(head.tree) or "")
    if len(modules) == 1:
        return head.rel, sentence, ""
    folder = head.rel.removesuffix("__init__.py")
    folders: dict[str, list[str]] = {}
    for module in modules:
        where, _, file = module.rel.removeprefix(folder).rpartition("/")
        if file != "__init__.py":
            folders.setdefault(where, []).append(file.removesuffix(".py"))
    return folder, sentence, "; ".join(f"{f}: {' '.join(n)}" if f else " ".join(n) for f, n in sorted(folders.items()))


def depth_in_level(name: str, components: dict[str, set[str]]) -> int:
    """How many boxes of its own level a component stands on, one above the other."""
    below = [t for t in components[name] if LEVELS[t] == LEVELS[name]]
    return 1 + max(depth_in_level(t, components) for t in below) if below else 0


def direct(components: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""
    return {
        a: {b for b in bs if not any(b in reached(components, c) for c in bs - {b})} for a, bs in components.items()
    }


def rows(boxes: list[Box]) -> list[dict[int, Box]]:
    """Rows of boxes that do not point at each other, each by its column. Boxes with a column of their own come first."""
    found: list[dict[int, Box]] = []
    for box in sorted(boxes, key=lambda b: b.name not in COLUMN):
        columns = [COLUMN[box.name]] if box.name in COLUMN else list(range(COLUMNS))
        free = [(row, c) for row in found for c in columns if c not in row]
        if free:
            free[0][0][free[0][1]] = box
        else:
            found.append({columns[0]: box})
    return found


def place(components: dict[str, set[str]]) -> tuple[dict[str, Box], list[tuple[int, float, float]], float]:
    """(boxes with their places, (level, top, bottom) of each level, height of the picture)."""
    arrows = direct(components)
    boxes = {name: Box(name, arrows[name]) for name in components}
    levels, y = [], 50.0
    for level in sorted(set(LEVELS.values()), reverse=True):
        top = y
        names = [n for n in LEVELS if LEVELS[n] == level]
        for depth in sorted({depth_in_level(n, components) for n in names}, reverse=True):
            for row in rows([boxes[n] for n in names if depth_in_level(n, components) == depth]):
                for column, box in row.items():
                    path, sentence, modules = contents(box.name)
                    columns = int((BOX - 2 * PAD) / CHAR)
                    box.lines = [("path", path)]
                    box.lines += [("what", line) for line in textwrap.wrap(sentence, columns)]
                    box.lines += [("files", line) for line in textwrap.wrap(modules, columns)]
                    box.x, box.y = LEFT + column * (BOX + GAP), y
                y += max(box.height for box in row.values()) + ROW_GAP
        levels.append((level, top, y - ROW_GAP))
        y += LEVEL_GAP - ROW_GAP + 24
    return boxes, levels, y


def arrow(source: Box, target: Box, boxes: dict[str, Box]) -> str:
    """From the lower edge of one box to the upper edge of another."""
    into = sorted((b for b in boxes.values() if target.name in b.targets), key=lambda b: (b.x + BOX / 2, b.name))
    out_of = sorted((boxes[t] for t in source.targets), key=lambda b: (b.x + BOX / 2, b.name))
    x0 = source.x + BOX * (out_of.index(target) + 1) / (len(out_of) + 1)
    x1 = target.x + BOX * (into.index(source) + 1) / (len(into) + 1)
    y0, y1 = source.y + source.height, target.y
    bend = min(60.0, (y1 - y0) / 2)
    curve = f"M{x0:.0f} {y0:.0f} C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1 - 3:.0f}"
    return f'<path class="arrow" d="{curve}" marker-end="url(#head)"/>'


def draw() -> str:
    """The picture, as SVG."""
    components = component_imports()
    boxes, levels, height = place(components)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'aria-label="Components of kvkern">',
        "<style>",
        "text{font-family:ui-sans-serif,system-ui,sans-serif;font-size:11px;fill:#1f2937}",
        ".path{font-family:ui-monospace,monospace;font-weight:600;font-size:12px} .files{fill:#6b7280}",
        ".floor{font-size:12px;fill:#6b7280} .title{font-size:14px;font-weight:600}",
        ".band{fill:#f3f4f6} .box{fill:#ffffff;stroke:#9ca3af} .arrow{fill:none;stroke:#3b82f6;stroke-width:1.1;opacity:.6}",
        "</style>",
        '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#3b82f6"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        '<text class="title" x="20" y="28">An arrow is an import. Imports go down, never up, and make no circle.</text>',
    ]
    for level, top, bottom in levels:
        out.append(
            f'<rect class="band" x="8" y="{top - 10:.0f}" width="{WIDTH - 16}" height="{bottom - top + 20:.0f}" rx="6"/>'
        )
        out.append(f'<text class="floor" x="20" y="{top + 12:.0f}">level {level}</text>')
        out.append(f'<text class="floor" x="20" y="{top + 28:.0f}">{LEVEL_TITLES[level]}</text>')
    for name in sorted(boxes):
        out += [arrow(boxes[name], boxes[target], boxes) for target in sorted(boxes[name].targets)]
    for box in boxes.values():
        out.append(
            f'<rect class="box" x="{box.x:.0f}" y="{box.y:.0f}" width="{BOX:.0f}" height="{box.height:.0f}" rx="4"/>'
        )
        for row, (kind, line) in enumerate(box.lines):
            y = box.y + PAD + LINE * (row + 0.75)
            out.append(f'<text class="{kind}" x="{box.x + PAD:.0f}" y="{y:.0f}">{escape(line)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")
