"""The published deployment's variables: what each is here, which values mean off, and which are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvkern.config.engine import used_by_engine
from kvkern.config.options import BY_NAME, Reader
from kvkern.config.published import OL, SECOND_SWITCH, SWITCH, VARIABLES, Family, is_on, merged, read, switched_on
from kvkern.config.sources import gather
from kvkern.errors import ConfigError

LLM = "AIBRIX_LLM_KV_CACHE_"
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "published_deployment.md"


@pytest.mark.parametrize(("text", "on"), [
    (None, False), ("", False), ("0", False), ("false", False), ("FALSE", False), ("no", False), ("off", False),
    ("1", True), ("true", True), ("yes", True), ("anything", True),
])  # fmt: skip
def test_what_means_off(text: str | None, on: bool) -> None:
    assert is_on(text) is on


@pytest.mark.parametrize(("first", "second", "on", "named"), [
    ("1", "1", True, ""), ("0", "0", False, ""), ("", "", False, ""), ("1", "", False, f"Set {SECOND_SWITCH}=1"),
    ("1", "false", False, f"Set {SECOND_SWITCH}=1"), ("0", "1", False, f"Set {SWITCH}=1"),
])  # fmt: skip
def test_both_switches_must_be_on(first: str, second: str, on: bool, named: str) -> None:
    found, line = switched_on({SWITCH: first, SECOND_SWITCH: second})
    assert found is on
    assert named in line
    assert bool(line) is bool(named)


def values(environ: Mapping[str, str], family: Family = Family.VINEYARD) -> dict[str, Any]:
    return {name: setting.value for name, setting in read(environ, family).settings.items()}


@pytest.mark.parametrize(("name", "text", "expected"), [
    (LLM + "SOCKET", "/var/run/vineyard.sock", {"socket": "/var/run/vineyard.sock"}),
    (LLM + "CHUNK_SIZE", "16", {"chunk_tokens": 16}),
    (LLM + "CHUNK_SIZE", "0" * 5000 + "128", {"chunk_tokens": 128}),
    (LLM + "KV_CACHE_NS", "aibrix", {"salt": "aibrix"}),
    (LLM + "RPC_ENDPOINT", "cache-rpc:9600", {"rpc_endpoint": "cache-rpc:9600"}),
    ("VINEYARD_CACHE_METRICS_ENABLED", "1", {"metrics_port": 8080, "published_metrics": True}),
])  # fmt: skip
def test_mapped_variables(name: str, text: str, expected: dict[str, Any]) -> None:
    deployment = read({name: text}, Family.VINEYARD)
    assert {key: setting.value for key, setting in deployment.settings.items()} == expected
    assert {setting.origin.name for setting in deployment.settings.values()} == {name}
    assert not deployment.notes
    assert all(option in BY_NAME for option in expected)


@pytest.mark.parametrize(("name", "text"), [
    ("VINEYARD_CACHE_CPU_MEM_LIMIT_GB", "10"), ("VINEYARD_CACHE_ENABLE_ASYNC_UPDATE", "1"),
    ("VINEYARD_CACHE_ASYNC_UPDATE_CPU_MEM_UTIL", "0.2"), ("VINEYARD_CACHE_MIN_INFLIGHT_TASKS", "1"),
    ("VINEYARD_CACHE_MAX_INFLIGHT_TASKS", "32"), ("VINEYARD_CACHE_METRICS_ENABLED", "0"), (LLM + "RDMA_ENDPOINT", "x:1"),
    (LLM + "LOCAL_SYNC_INTERVAL_S", "180"), (LLM + "ENABLE_GLOBAL_GC", "1"), (LLM + "GLOBAL_GC_INTERVAL_S", "600"),
    (LLM + "GLOBAL_TTL_S", "480"), (LLM + "SOMETHING_NEW", "1"), ("VINEYARD_LLM_CACHE_FILESYSTEM", "1"),
])  # fmt: skip
def test_accepted_variables_have_a_line(name: str, text: str) -> None:
    deployment = read({name: text}, Family.VINEYARD)
    assert not deployment.settings
    (note,) = deployment.notes
    assert note.startswith(name)
    assert " has no effect: " in note


@pytest.mark.parametrize(
    "text", ["redis://u:hunter2@h:1", "a\nforged", "\x1b[2J", "x" * 10_000], ids=lambda text: repr(text[:20])
)
def test_lines_show_what_is_no_secret_and_fits_a_line(text: str) -> None:
    (note,) = read({LLM + "RDMA_ENDPOINT": text}, Family.VINEYARD).notes
    assert "hunter2" not in note
    assert note.isprintable()
    assert len(note) < 250


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, {"capacity": 10 << 30}),
    ({"L1_CACHE_ENABLED": "1", "L1_CACHE_EVICTION_POLICY": "S3FIFO", "L1_CACHE_CAPACITY_GB": "80"},
     {"capacity": 80 << 30, "policy": "s3fifo"}),
    ({"L1_CACHE_ENABLED": "0", "L1_CACHE_EVICTION_POLICY": "FIFO", "L1_CACHE_CAPACITY_GB": "80"}, {}),
    ({"CHUNK_SIZE": "512", "L2_CACHE_NAMESPACE": "aibrix", "L1_CACHE_ENABLED": "0"}, {"chunk_tokens": 512, "salt": "aibrix"}),
    ({"L1_CACHE_CAPACITY_GB": "0.5"}, {"capacity": 1 << 29}),
])  # fmt: skip
def test_the_samples_variables(environ: dict[str, str], expected: dict[str, Any]) -> None:
    assert values({OL + name: text for name, text in environ.items()}, Family.OFFLOADING) == expected


@pytest.mark.parametrize(("line", "used"), [
    ('socket = "/s"', {"socket": "/s"}), ('capacity = "64GiB"', {"capacity": "64GiB"}), ("", {"capacity": 10 << 30}),
])  # fmt: skip
def test_a_file_is_preferred_to_a_size_that_nobody_wrote(tmp_path: Path, line: str, used: dict[str, Any]) -> None:
    path = tmp_path / "kvkern.toml"
    path.write_text(line)
    own = gather(Reader.ENGINE, {}, "", environ={"KVKERN_CONFIG": str(path)})
    found = used_by_engine(merged(own, read({}, Family.OFFLOADING).settings), "")
    assert {name: setting.value for name, setting in found.items()} == used


def test_what_the_samples_set_beside() -> None:
    """InfiniStore's samples: nothing of it has an effect, and every variable says why."""
    set_there = {
        "L2_CACHE_BACKEND": "infinistore", "INFINISTORE_CONNECTION_TYPE": "RDMA", "INFINISTORE_IB_PORT": "1",
        "INFINISTORE_LINK_TYPE": "Ethernet", "INFINISTORE_VISIBLE_DEV_LIST": "mlx5_0", "INFINISTORE_HOST_ADDR": "h",
        "INFINISTORE_SERVICE_PORT": "12345", "META_SERVICE_BACKEND": "redis", "META_SERVICE_URL": "redis://u:pw@h:6379",
        "META_SERVICE_CLUSTER_META_KEY": "kvcache_nodes", "NUM_ASYNC_WORKERS": "8",
    }  # fmt: skip
    environ = {OL + name: text for name, text in set_there.items()}
    deployment = read(environ | {OL + "L1_CACHE_ENABLED": "0"}, Family.OFFLOADING)
    assert not deployment.settings
    assert {note.partition("=")[0].partition(" ")[0] for note in deployment.notes} == {OL + name for name in set_there}
    assert "u:pw" not in "".join(deployment.notes)


@pytest.mark.parametrize(("family", "name", "text", "message"), [
    (Family.VINEYARD, LLM + "CHUNK_SIZE", "x", "CHUNK_SIZE is 'x'; expected a number of tokens"),
    (Family.VINEYARD, LLM + "CHUNK_SIZE", "0", "CHUNK_SIZE is '0'"),
    (Family.VINEYARD, LLM + "CHUNK_SIZE", "-16", "CHUNK_SIZE is '-16'"),
    (Family.VINEYARD, LLM + "CHUNK_SIZE", "٣", "CHUNK_SIZE is"),
    (Family.VINEYARD, LLM + "CHUNK_SIZE", "9" * 5000, "CHUNK_SIZE is '9999"),
    (Family.OFFLOADING, OL + "L1_CACHE_CAPACITY_GB", "1e308", "L1_CACHE_CAPACITY_GB is '1e308'"),
    (Family.VINEYARD, "VINEYARD_CACHE_CPU_MEM_LIMIT_GB", "many", "CPU_MEM_LIMIT_GB is 'many'; expected a number of GiB"),
    (Family.VINEYARD, "VINEYARD_CACHE_CPU_MEM_LIMIT_GB", "nan", "CPU_MEM_LIMIT_GB is 'nan'"),
    (Family.OFFLOADING, OL + "L1_CACHE_CAPACITY_GB", "-1", "L1_CACHE_CAPACITY_GB is '-1'"),
    (Family.OFFLOADING, OL + "L1_CACHE_EVICTION_POLICY", "FIFO", "is 'FIFO'; kvkern has lru, arc, s3fifo, lirs, grit. Unset"),
])  # fmt: skip
def test_values_that_cannot_be_honoured(family: Family, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read({name: text}, family)


def test_the_page_lists_every_variable() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for family in Family:
        for variable in VARIABLES[family]:
            assert f"| `{variable.name}` |" in page
    assert f"`{SWITCH}`, `{SECOND_SWITCH}`" in page
