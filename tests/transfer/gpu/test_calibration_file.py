"""The calibration file: a written file is read back, and an invalid file is ignored with one warning."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvkern.transfer.gpu import calibration_file
from kvkern.transfer.gpu.calibration_file import DeviceId
from kvkern.transfer.gpu.link_table import Abilities, Costs, HostLink, Rate, seed_calibration
from kvkern.transfer.gpu.numa import process_nodes
from kvkern.transfer.gpu.nvml import GpuInfo

DEVICE = DeviceId("NVIDIA H100 80GB HBM3", "570.124.06", HostLink(5, 16))
TABLE = seed_calibration(DEVICE.link)

numbers = st.floats(1e-8, 0.9)
rates = st.lists(st.builds(Rate, st.integers(1, 500), st.floats(1e-3, 9e5)), max_size=4).map(tuple)
costs = st.builds(
    Costs, st.floats(1e-3, 9e5), numbers, numbers, numbers, st.floats(1e-3, 9e5), numbers, rates, rates,
    *[st.lists(st.sampled_from(["copy_gb_s", "zero_copy"]), max_size=2).map(tuple)] * 2,
)  # fmt: skip


nodes = st.tuples(st.none() | st.integers(0, 9), st.lists(st.integers(0, 99), max_size=9).map(tuple))


@given(costs, costs, st.text(min_size=1, max_size=40), st.text(max_size=20), st.integers(0, 6), st.booleans(), nodes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(
    tmp_path: Path, d2h: Costs, h2d: Costs, name: str, driver: str, generation: int, c2c: bool, near: Any
) -> None:
    device = DeviceId(name, driver, HostLink(generation, 16, c2c), *near)
    table = replace(TABLE, d2h=d2h, h2d=h2d)
    calibration_file.save(device, table, tmp_path)
    assert calibration_file.load(device, TABLE, tmp_path) == table
    assert calibration_file.path_of(device, tmp_path).parent == tmp_path / "calibration"  # for any device name


def test_the_name_tells_the_device() -> None:
    assert DEVICE.file_name == "NVIDIA-H100-80GB-HBM3-570.124.06-pcie5x16.json"
    assert str(DEVICE) == "NVIDIA H100 80GB HBM3, PCIe 5 x16, driver 570.124.06"
    bound = replace(DEVICE, gpu_node=1, cpu_nodes=(0, 1))
    assert bound.file_name == "NVIDIA-H100-80GB-HBM3-570.124.06-pcie5x16-on-NUMA-node-1-used-from-NUMA-node-0-1.json"
    assert str(bound) == f"{DEVICE}, on NUMA node 1, used from NUMA node 0 1"


def test_the_nodes_of_a_process(tmp_path: Path) -> None:
    for node, cpus in {0: "0-3,8", 1: "4-7\n", 2: "", 10: "9"}.items():
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    assert process_nodes({1, 2}, tmp_path) == (0,)
    assert process_nodes({8, 5, 9}, tmp_path) == (0, 1, 10)
    (tmp_path / "node1" / "cpulist").write_text("nonsense")
    assert process_nodes({5}, tmp_path) == process_nodes({1}, tmp_path / "absent") == ()
    here = DeviceId.for_this_process(GpuInfo("H100", "570", "0000:3b:00.0", 1, 5, 5, 5, 16, 16, 1, 0, False))
    assert here == DeviceId("H100", "570", HostLink(5, 16), 1, process_nodes())


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        calibration_file.measuring_lock(tmp_path, 0) as first,
        calibration_file.measuring_lock(tmp_path, 0.06) as second,
    ):
        assert (first, second) == (True, False)
    with calibration_file.measuring_lock(tmp_path, 0) as third:
        assert third


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A waiting process gets the lock as soon as the holder dies."""
    code = f"""
import time
from pathlib import Path
from kvkern.transfer.gpu import calibration_file
with calibration_file.measuring_lock(Path({str(tmp_path)!r}), 0):
    print(1, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        with calibration_file.measuring_lock(tmp_path, 0) as mine:
            assert not mine
        holder.kill()
        with calibration_file.measuring_lock(tmp_path, 30) as mine:
            assert mine
    finally:
        holder.kill()
        holder.communicate()


def test_a_folder_without_locks_is_measured_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with calibration_file.measuring_lock(tmp_path / "file", 0) as mine:
        assert mine

    def unsupported(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(calibration_file.fcntl, "flock", unsupported)
    with calibration_file.measuring_lock(tmp_path, 0) as mine:
        assert mine


def test_abilities_are_this_start_s(tmp_path: Path) -> None:
    calibration_file.save(DEVICE, TABLE, tmp_path)
    able = Abilities(batch_api=False, host_pointers=False)
    found = calibration_file.load(DEVICE, seed_calibration(DEVICE.link, able), tmp_path)
    assert found is not None
    assert found.abilities == able


def test_no_file_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert calibration_file.load(DEVICE, TABLE, tmp_path) is None
    assert not caplog.records


def changed(data: bytes, **values: Any) -> bytes:
    return json.dumps({**json.loads(data), **values}).encode()


def spoiled(data: bytes) -> dict[str, bytes]:
    costs = json.loads(data)["d2h"]
    return {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "noise": os.urandom(200),
        "not UTF-8": data.replace(b"H100", b"H\xff00"),
        "a list": b"[]",
        "nested": b"[" * 5000,
        "version": changed(data, version=calibration_file.VERSION + 1),
        "extra field": changed(data, extra=1),
        "another device": changed(data, device={**json.loads(data)["device"], "name": "Other"}),
        "negative": changed(data, d2h={**costs, "copy_gb_s": -1.0}),
        "zero": changed(data, d2h={**costs, "copy_s": 0}),
        "infinite": data.replace(b"53.0", b"1e999", 1),
        "not a number": changed(data, d2h={**costs, "copy_gb_s": float("nan")}),
        "a string": changed(data, d2h={**costs, "copy_gb_s": "53"}),
        "no thread blocks": changed(data, d2h={**costs, "relayout": [{"ctas": 0, "gb_s": 1.0}]}),
    }


@pytest.mark.parametrize("how", list(spoiled(b'{"d2h": {}, "device": {}}')))
def test_a_bad_file_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    calibration_file.save(DEVICE, TABLE, tmp_path)
    path = calibration_file.path_of(DEVICE, tmp_path)
    path.write_bytes(spoiled(path.read_bytes())[how])
    assert calibration_file.load(DEVICE, TABLE, tmp_path) is None
    (record,) = caplog.records
    assert (record.levelno, str(path) in record.getMessage()) == (logging.WARNING, True)
    calibration_file.save(DEVICE, TABLE, tmp_path)
    assert calibration_file.load(DEVICE, TABLE, tmp_path) == TABLE


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration_file.save(DEVICE, TABLE, tmp_path)
    before = calibration_file.path_of(DEVICE, tmp_path).read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        calibration_file.save(DEVICE, replace(TABLE, d2h=TABLE.h2d), tmp_path)
    assert [p.read_bytes() for p in (tmp_path / "calibration").iterdir()] == [before]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    calibration_file.save(DEVICE, TABLE, tmp_path / "file")
    assert "not saved" in caplog.text
    assert calibration_file.load(DEVICE, TABLE, tmp_path / "file") is None
