"""`python docs/list_messages.py`: writes docs/messages.md from the sources, every log line and every error that kvkern has.

tests/test_messages.py fails if the committed page differs. A placeholder of a message is shown as <name>.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.import_graph import MODULES, Module  # noqa: E402

OUT = ROOT / "docs" / "messages.md"
LEVELS = ("debug", "info", "warning", "warning_once", "error", "exception", "announce")  # announce: logs.LogHandler's
PYTHONS_OWN = {
    "AssertionError",
    "AttributeError",
    "KeyError",
    "StopIteration",
    "NotImplementedError",
    "ValueError",
    "TypeError",
}
AREAS = {  # title -> modules that begin so; the first that fits
    "The daemon, `kvkern serve`": ("kvkern.node.daemon", "kvkern.node.web", "kvkern.cli.daemon"),
    "Its clients: engines and operators' commands": ("kvkern.node", "kvkern.cli"),
    "vLLM": ("kvkern.integrations",),
    "An engine of your own": ("kvkern.api", "kvkern.keys", "kvkern.kernels", "kvkern.transfer.base"),
    "The cache, its arena and its tiers": (
        "kvkern.arena",
        "kvkern.cache",
        "kvkern.tiers",
        "kvkern.assemble",
        "kvkern.policy",
    ),
    "Remote stores": ("kvkern.remote",),
    "Options": (
        "kvkern.config",
        "kvkern.option_values",
        "kvkern.errors",
        "kvkern.regular_files",
        "kvkern.file_digests",
    ),
    "GPUs": ("kvkern.transfer",),
    "Metrics, logs and spans": ("kvkern.observability", "kvkern.metrics"),
    "The demo, the doctor and the replay": ("kvkern",),
}
HEAD = """# Messages

Every line that kvkern logs, and every error that it raises. `python docs/list_messages.py` writes this page from the sources.

A message says what happened, with the values (`<name>` below), and what to do. [Operations](operations.md#log-lines) says more
of those that an operator may have to act on. With `--log-format json` a line has its event under `event`, and the values under
`fields`.
"""


@dataclass(frozen=True)
class Message:
    """One log line or one error."""

    module: str
    kind: str  # a level, or the name of an exception
    event: str  # of a log line
    text: str


def template(node: ast.expr) -> str:
    """The text of a message, its placeholders as <name>. Empty: it is made elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            text = re.sub(r"%\((\w+)\)[-#0-9.]*[a-z]", r"<\1>", text)
            return re.sub(r"%[-#0-9.]*[dsrfx]", "<value>", text).replace("%%", "%")
        case ast.JoinedStr(values=values):
            return "".join(template(v) if isinstance(v, ast.Constant) else f"<{_name(v)}>" for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = template(left), template(right)
            return "".join(part or "<...>" for part in parts) if any(parts) else ""
        case _:
            return ""


def _name(node: ast.expr) -> str:
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(inner)
        if isinstance(n, ast.Attribute | ast.Name)
    ]
    known = [
        name for name in names if name not in ("self", "str", "len", "format_nbytes", "join", "sorted", "map", "repr")
    ]
    return known[0].strip("_") if known else "value"


def messages_of(module: Module) -> list[Message]:
    """Every log call and every raise of a module, in their order."""
    found, function = [], [""]
    constants = {
        target.id: node.value
        for node in module.tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function.append(node.name)
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args:
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            first = call.args[0]
            text = template(constants.get(first.id, first) if isinstance(first, ast.Name) else first)
            if isinstance(node, ast.Raise) and text and name[:1].isupper() and name not in PYTHONS_OWN:
                found.append(Message(module.name, name, "", text))
            elif name in LEVELS and _is_logger(call.func) and text:
                kind = {"warning_once": "warning", "exception": "error", "announce": _announced(call)}.get(name, name)
                events = _events(call) or [f"{module.name.rpartition('.')[2]}.{function[-1]}"]
                found.extend(Message(module.name, kind, event, text) for event in events)
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function.pop()

    visit(module.tree)
    return found


def _events(call: ast.Call) -> list[str]:
    """The events that a log call names, more than one if it chooses."""
    for arg in call.args:
        if isinstance(arg, ast.Dict):
            for key, value in zip(arg.keys, arg.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "event":
                    chosen = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
                    return [str(node.value) for node in chosen if isinstance(node, ast.Constant)]
    return []


def _announced(call: ast.Call) -> str:
    """The level of a line that LogHandler.announce writes; info unless the call gives another."""
    given = [*call.args[2:3], *(keyword.value for keyword in call.keywords if keyword.arg == "level")]
    return given[0].attr.lower() if given and isinstance(given[0], ast.Attribute) else "info"


def _is_logger(func: ast.expr) -> bool:
    owner = func.value if isinstance(func, ast.Attribute) else None
    return (isinstance(owner, ast.Name) and owner.id in ("logger", "log", "handler")) or (
        isinstance(owner, ast.Attribute) and owner.attr == "logger"
    )


def all_messages() -> list[Message]:
    """Every message of kvkern, by module."""
    return [message for module in MODULES for message in messages_of(module)]


def page() -> str:
    """The page's text."""
    messages = dict.fromkeys(all_messages())  # the same text twice in a module is one row
    lines = [HEAD]
    left = list(messages)
    for title, prefixes in AREAS.items():
        here = [m for m in left if m.module.startswith(prefixes)]
        left = [m for m in left if m not in here]
        if not here:
            continue
        lines.append(f"## {title}\n")
        if logged := [m for m in here if m.event]:
            lines += ["| event | level | line |", "|---|---|---|"]
            lines += [f"| `{m.event}` | {m.kind} | {_cell(m.text)} |" for m in logged] + [""]
        if raised := [m for m in here if not m.event]:
            lines += ["| error | message |", "|---|---|"]
            lines += [f"| `{m.kind}` | {_cell(m.text)} |" for m in raised] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    text = text.removeprefix("kvkern: ").replace("\n", " ")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([*_`|\[\]\\~$])", r"\\\1", text)


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")
