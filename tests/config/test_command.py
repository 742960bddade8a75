"""`kvkern config`: what it prints, where it says that values come from, what it hides, and how it ends for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvkern.cli import app


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kvkern.toml"
    path.write_text('socket = "/run/x.sock"\n[engine]\nconnect_s = 7\n[daemon]\ncapacity = "1GiB"\n')
    monkeypatch.setenv("KVKERN_CONFIG", str(path))
    monkeypatch.setenv("KVKERN_SALT", "hunter2")
    monkeypatch.setenv("KVKERN_THREADS", "3")


def rows(*arguments: str) -> dict[tuple[str, str], tuple[str, str]]:
    done = CliRunner().invoke(app, ["config", "--json", *arguments])
    assert done.exit_code == 0, done.output
    assert "hunter2" not in done.output
    return {(row["reader"], row["option"]): (row["value"], row["from"]) for row in json.loads(done.output)}


def test_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    found = rows("daemon_uid=7")
    file = f"file {tmp_path}/kvkern.toml line"
    assert found["engine", "socket"] == ("/run/x.sock", f"{file} 1")
    assert found["daemon", "socket"] == ("/run/x.sock", f"{file} 1")
    assert found["engine", "connect_s"] == ("7", f"{file} 3")
    assert found["daemon", "capacity"] == ("1GiB", f"{file} 5")
    assert found["engine", "salt"] == ("***", "variable KVKERN_SALT")
    assert found["engine", "threads"] == ("3", "variable KVKERN_THREADS")
    assert found["engine", "daemon_uid"] == ("7", "option")
    assert found["engine", "store_replies"] == ("true", "default")
    assert ("daemon", "threads") not in found


def test_the_published_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIX_LLM_KV_CACHE_SOCKET", "/var/run/vineyard.sock")
    assert rows()["engine", "socket"][0] == "/run/x.sock"  # nothing is switched on
    monkeypatch.setenv("VLLM_USE_VINEYARD_CACHE", "1")
    monkeypatch.setenv("AIBRIX_LLM_KV_CACHE", "1")
    assert rows()["engine", "socket"] == ("/var/run/vineyard.sock", "variable AIBRIX_LLM_KV_CACHE_SOCKET")
    monkeypatch.setenv("KVKERN_SOCKET", "/own")
    assert rows()["engine", "socket"] == ("/own", "variable KVKERN_SOCKET")


def test_the_variables_of_the_samples_count_and_a_line_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "2")
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_CHUNK_SIZE", "64")
    done = CliRunner().invoke(app, ["config", "--json"])
    assert done.exit_code == 0
    assert "count only in a vLLM whose --kv-transfer-config is the samples'" in done.stderr
    found = {row["option"]: (row["value"], row["from"]) for row in json.loads(done.stdout) if row["reader"] == "engine"}
    assert found["chunk_tokens"] == ("64", "variable AIBRIX_KV_CACHE_OL_CHUNK_SIZE")
    assert found["capacity"] == (str(2 << 30), "variable AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB")
    monkeypatch.setenv("KVKERN_SOCKET", "/own")  # the node's daemon instead of a cache of its own
    done = CliRunner().invoke(app, ["config", "--json", "--reader", "engine"])
    found = {row["option"]: (row["value"], row["from"]) for row in json.loads(done.stdout)}
    assert (found["socket"][0], found["capacity"][0]) == ("/own", "-")
    monkeypatch.setenv("AIBRIX_KV_CACHE_OL_L1_CACHE_CAPACITY_GB", "much")
    assert CliRunner().invoke(app, ["config"]).exit_code == 2


def test_paths_that_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVKERN_SOCKET", "/run/\udcff")  # as Python reads the byte FF
    assert rows()["daemon", "socket"] == ("/run/\\udcff", "variable KVKERN_SOCKET")


def test_passwords_of_stores_are_blanked() -> None:
    done = CliRunner().invoke(app, ["config", "--show", "--reader", "daemon", "remote=redis://me:hunter2@h"])
    assert "redis://me:***@h" in done.output
    assert "hunter2" not in done.output


@pytest.mark.parametrize(("arguments", "words"), [
    (["connect_s=9999"], "connect_s is 9999; it must lie in 0..3600"), (["nothing"], "'nothing' is no option"),
    (["colour=red"], "'colour=red' is no option"), (["--reader", "me"], "expected engine, daemon or both"),
    (["--config", "/nowhere"], "--config is '/nowhere'"), (["fair=perhaps"], "fair in the command line is 'perhaps'"),
])  # fmt: skip
def test_mistakes_end_with_a_line_and_status_2(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["config", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_without_show_it_only_checks() -> None:
    done = CliRunner().invoke(app, ["config"])
    assert (done.exit_code, done.output.count("\n")) == (0, 1)


def test_commands_find_the_daemon_by_the_same_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVKERN_SOCKET", "/nowhere/s")
    assert "no daemon answers on /nowhere/s" in CliRunner().invoke(app, ["stat"]).output
