"""The pages of messages are complete: messages.md lists what the sources say, operations.md what to do about every warning."""

from __future__ import annotations

import ast
import re

import pytest

from docs import list_messages
from docs.list_messages import Message, all_messages, messages_of, template
from tests.import_graph import MODULES, ROOT

NAMED = ("kvkern.node", "kvkern.remote", "kvkern.cache", "kvkern.arena")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_the_page_of_messages_is_made_from_these_sources() -> None:
    assert list_messages.OUT.read_text(encoding="utf-8") == list_messages.page(), "run: python docs/list_messages.py"


def test_it_lists_what_is_logged_and_raised() -> None:
    messages = all_messages()
    assert len([m for m in messages if m.event]) > 60
    assert len([m for m in messages if not m.event]) > 250
    page = list_messages.page()
    assert "| `remote_back` | warning | remote &lt;remote&gt; works again |" in page
    for name in (
        "ConfigError",
        "LayoutError",
        "ArenaError",
        "UnsupportedError",
        "RemoteError",
        "ProtocolError",
        "DeviceError",
    ):
        assert f"| `{name}` | " in page


@pytest.mark.parametrize(
    "message", [m for m in dict.fromkeys(all_messages()) if m.kind in ("warning", "error")], ids=lambda m: m.event
)
def test_operations_says_what_to_do_about_every_warning(message: Message) -> None:
    """Every event of the level warning or above is in a table of the page, with what to do."""
    rows = [line for line in OPERATIONS.splitlines() if line.startswith("|") and f"`{message.event}`" in line]
    assert rows, f"docs/operations.md lacks {message.event}: {message.text}"
    assert all(len(row.split(" | ")) == 3 for row in rows)


def test_operations_names_only_events_that_exist() -> None:
    events = {m.event for m in all_messages()}
    section = OPERATIONS.partition("## Log lines")[2]
    named = {
        name
        for row in section.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([\w.]+)`", row.split(" | ")[0])
    }
    assert named
    assert not named - events - {"log_lines_left_out"}  # made without a logger


def test_one_event_is_one_kind_of_thing() -> None:
    """The same name with another level or in another module would make alerts on it ambiguous."""
    levels: dict[str, set[tuple[str, str]]] = {}
    for m in all_messages():
        if m.event and "." not in m.event:
            levels.setdefault(m.event, set()).add((m.module, m.kind))
    assert not {event: found for event, found in levels.items() if len(found) > 1}


def test_a_message_names_its_values() -> None:
    """Daemon and vLLM adapter: every log line has an event and named fields, so that programs need not parse its text."""
    plain = [
        (m.event, m.text) for module in MODULES if module.name.startswith(NAMED)
        for m in messages_of(module) if m.event and ("." in m.event or "<value>" in m.text)
    ]  # fmt: skip
    assert not plain


@pytest.mark.parametrize(("code", "text"), [
    ("'a %(path)s of %(n)04d'", "a <path> of <n>"),
    ("'a %s of %d %%'", "a <value> of <value> %"),
    ("f'a {self._path} of {len(keys)}'", "a <path> of <keys>"),
    ("'a ' + why", "a <...>"),
    ("why", ""),
])  # fmt: skip
def test_a_placeholder_is_shown_by_its_name(code: str, text: str) -> None:
    assert template(ast.parse(code, mode="eval").body) == text


def test_the_level_of_an_announced_line() -> None:
    """LogHandler.announce writes info unless it is told another level."""
    module = next(m for m in MODULES if m.name == "kvkern.cli.daemon")
    levels = {message.event: message.kind for message in messages_of(module) if message.event}
    assert (levels["ready"], levels["not_serving"]) == ("info", "error")
