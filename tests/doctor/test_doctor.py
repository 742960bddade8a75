"""The doctor: findings for a table of hosts, gathering on this host and on an invented /proc and /sys, and the output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvkern.cli import app
from kvkern.doctor import facts as facts_module
from kvkern.doctor.facts import REQUIRED, Facts, Gpu, NumaNode, gather
from kvkern.doctor.findings import Severity, findings
from kvkern.doctor.report import as_json, print_report
from kvkern.kernels.jit import cache_folders
from kvkern.transfer.gpu import calibration_file
from kvkern.transfer.gpu.calibration_file import DeviceId
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.link_table import Calibration, seed_calibration
from kvkern.transfer.gpu.numa import parse_cpu_list
from kvkern.transfer.gpu.nvml import GpuInfo

INFO = GpuInfo("NVIDIA H100", "570.124", "0000:3b:00.0", 80 << 30, 5, 5, 5, 16, 16, 0, 0, False)
TABLE = seed_calibration(INFO.link)
MEASURED = ("call_s", "copy_gb_s", "copy_s", "descriptor_s", "launch_s", "relayout", "zero_copy")


def measured(table: Calibration, **costs: Any) -> Calibration:
    return replace(table, d2h=replace(table.d2h, measured=MEASURED), h2d=replace(table.h2d, measured=MEASURED, **costs))


GPU = Gpu(INFO, measured(TABLE), is_saved=True)
GOOD = Facts(
    gpus=(GPU,), nvml="NVML: 1 GPU(s), driver 570.124", cuda=12080, has_nvidia_device=True,
    versions=dict.fromkeys([*REQUIRED, "torch", "triton", "nvidia-ml-py"], "1.0"),
    kernel="6.8.0-60-generic", cpu="Xeon", cpu_flags=frozenset({"avx512f", "avx2"}), cpus=(0, 1, 2, 3),
    nodes=(NumaNode(0, (0, 1, 2, 3)), NumaNode(1, (4, 5, 6, 7))),
    memory_nbytes=256 << 30, arena_fs="tmpfs", arena_writable=True,
    arena_total_nbytes=128 << 30, arena_free_nbytes=128 << 30, shmem_huge="never",
)  # fmt: skip
NO_GPU = replace(GOOD, gpus=(), cuda=0, has_nvidia_device=False, nvml="NVML: no Python binding")


def gpu(**fields: Any) -> Facts:
    return replace(GOOD, gpus=(replace(GPU, info=replace(INFO, **fields)),))


def lacking(*packages: str) -> Facts:
    return replace(GOOD, versions={name: v for name, v in GOOD.versions.items() if name not in packages})


SLOW, BROKEN, NOTE = Severity.SLOW, Severity.BROKEN, Severity.NOTE
CASES: dict[str, tuple[Facts, list[tuple[Severity, str]]]] = {
    "all good": (GOOD, []),
    "no gpu": (NO_GPU, []),
    "x8 of x16": (gpu(width=8), [(SLOW, "reach 8/16 of its link: it is x8, the GPU has x16")]),
    "gen 3 of gen 5": (gpu(generation=3, generation_here=3), [(SLOW, "reach 1/4 of its link: slot or BIOS allow PCIe 3")]),
    "asleep": (gpu(generation=1, power_state=8), [(NOTE, "sleeps at PCIe 1 (power state P8)")]),
    "trained down": (gpu(generation=1), [(SLOW, "PCIe 1 at power state P0, 5 is possible")]),
    "link not told": (gpu(generation=0, generation_here=0, generation_gpu=0, width=0, width_gpu=0), []),
    "c2c": (gpu(c2c=True, width=1, generation=1), [(SLOW, "reach 53.0 GB/s; such a link reaches 346.0")] * 2),
    "gpu on the other node": (gpu(numa_node=1), [(SLOW, "it is on NUMA node 1, this process on 0")]),
    "gpu on its node": (gpu(numa_node=0), []),
    "gpu on no node": (gpu(numa_node=None), []),
    "process on both nodes": (
        replace(gpu(numa_node=1), cpus=(0, 5)), [(NOTE, "the GPU is on NUMA node 1, this process may run on 0, 1")],
    ),
    "one node": (replace(gpu(numa_node=0), nodes=GOOD.nodes[:1]), []),
    "memlock 64 KiB": (
        replace(GOOD, memlock_nbytes=64 << 10),
        [(NOTE, "this process may lock 64 KiB, an arena takes 64 GiB")],
    ),
    "memlock for what is meant": (replace(GOOD, memlock_nbytes=8 << 30, capacity_nbytes=8 << 30), []),
    "memlock without a gpu": (replace(NO_GPU, memlock_nbytes=64 << 10), []),
    "no arena folder": (replace(GOOD, arena_fs="", arena_writable=False), [(BROKEN, "/dev/shm is not there")]),
    "arena folder of somebody else": (replace(GOOD, arena_writable=False), [(BROKEN, "/dev/shm cannot be written")]),
    "arena on a disk": (replace(GOOD, arena_fs="ext4"), [(SLOW, "/dev/shm is on ext4")]),
    "docker's shm": (
        replace(GOOD, arena_total_nbytes=64 << 20, arena_free_nbytes=64 << 20), [(SLOW, "/dev/shm has only 64 MiB in total")],
    ),
    "an arena too large": (
        replace(GOOD, capacity_nbytes=200 << 30), [(BROKEN, "an arena of 200 GiB does not fit: /dev/shm has 128 GiB free")],
    ),
    "no memory for it": (
        replace(GOOD, capacity_nbytes=100 << 30, memory_nbytes=50 << 30, memory_source="below the limit of /x: 60 GiB"),
        [(BROKEN, "only 50 GiB of memory are free below the limit of /x: 60 GiB")],
    ),
    "small pages": (replace(GOOD, kernel="5.15.0-100"), [(SLOW, "Linux 5.15.0-100 has shmem_enabled at never")]),
    "small pages denied": (replace(GOOD, shmem_huge="deny"), [(SLOW, "shmem_enabled at deny")]),
    "huge pages of an old kernel": (replace(GOOD, kernel="5.15.0", shmem_huge="advise"), []),
    "no batch api": (replace(GOOD, cuda=12040), [(SLOW, "batch copies need CUDA 12.8, the driver has 12.4")]),
    "no triton": (lacking("triton"), [(BROKEN, "without triton no kernel")]),
    "a daemon's host": (lacking("torch", "triton"), []),
    "torch for cpus": (
        replace(GOOD, versions={**GOOD.versions, "torch": "2.13.0+cpu"}), [(SLOW, "torch 2.13.0+cpu is a build for CPUs")],
    ),
    "torch for cpus without a gpu": (replace(NO_GPU, versions={**GOOD.versions, "torch": "2.13.0+cpu"}), []),
    "a gpu nobody can ask": (
        replace(GOOD, gpus=(), nvml="NVML: no Python binding"), [(NOTE, "kvkern cannot read the GPU's properties: NVML: no")],
    ),
    "wsl": (replace(GOOD, wsl=True), [(NOTE, "under WSL2")]),
    "a package is missing": (
        replace(GOOD, broken_imports=("blake3", "numba")), [(BROKEN, "not installed: blake3 numba")],
    ),
    "no avx-512": (replace(GOOD, cpu_flags=frozenset({"avx2"})), [(NOTE, "Xeon has no AVX-512")]),
    "arm": (replace(GOOD, cpu_flags=frozenset(), machine="aarch64"), []),
    "one cpu": (replace(GOOD, cpus=(0,)), [(SLOW, "may use only one")]),
    "cold": (replace(GOOD, numba_cold=("paged_copy_numba",)), [(SLOW, "paged_copy_numba not in numba's cache")]),
    "cold for ever": (
        replace(GOOD, numba_cold=("grit_trie",), numba_writable=False), [(SLOW, "every start compiles for up to half")],
    ),
    "compiled at installation": (replace(GOOD, numba_writable=False), []),
    "not measured": (replace(GOOD, gpus=(Gpu(INFO, TABLE, is_saved=False),)), [(NOTE, "GPU 0 is not measured yet")]),
    "slow loads": (
        replace(GOOD, gpus=(replace(GPU, table=measured(TABLE, copy_gb_s=11.0)),)),
        [(SLOW, "loads of GPU 0 reach 11.0 GB/s; such a link reaches 53.0 GB/s")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_findings(case: str) -> None:
    facts, expected = CASES[case]
    found = findings(facts)
    assert [finding.severity for finding in found] == [severity for severity, _ in expected], found
    for finding, (_, part) in zip(found, expected, strict=True):
        assert part in finding.what
        assert "\n" not in finding.what + finding.remedy
        assert finding.remedy


def test_every_gpu_is_judged() -> None:
    facts = replace(GOOD, gpus=(GPU, replace(GPU, info=replace(INFO, width=4))))
    (finding,) = findings(facts)
    assert "GPU 1 reach 4/16" in finding.what


def test_the_worst_comes_first() -> None:
    facts = replace(gpu(width=8), wsl=True, broken_imports=("numpy",))
    assert [finding.severity for finding in findings(facts)] == [BROKEN, SLOW, NOTE]


# -- gathering -------------------------------------------------------------------------------------------------------------


def test_this_host(tmp_path: Path) -> None:
    facts = gather(capacity_nbytes=1 << 20, arena_dir=tmp_path, cache_dir=tmp_path)
    assert set(REQUIRED) <= set(facts.versions)
    assert facts.broken_imports == ()
    assert facts.cpus
    assert facts.memory_nbytes > 1 << 20
    assert facts.arena_writable
    assert facts.arena_fs  # "unknown" in a chroot whose root is no mount
    assert facts.arena_total_nbytes >= facts.arena_free_nbytes > 0
    assert facts.needed_nbytes == 1 << 20
    assert not [finding for finding in findings(facts) if finding.severity is BROKEN]


@pytest.mark.parametrize("what", ["missing", "file"])
def test_a_missing_arena_folder(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("")
    facts = gather(arena_dir=tmp_path / what)
    assert (facts.arena_fs, facts.arena_writable) == ("", False)
    assert [f.severity for f in findings(facts) if "no arena can be made" in f.what] == [BROKEN]


def test_an_invented_host(tmp_path: Path) -> None:
    root = tmp_path / "root"
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: sse4_2 avx2 fpu\n\nprocessor\t: 1\nmodel name\t: B\n",
        "proc/self/mounts": f"none / ext4 rw 0 0\nnone {tmp_path} tmpfs rw 0 0\nnone {tmp_path}/arena hugetlbfs rw 0 0\n",
        "sys/devices/system/node/node0/cpulist": "0-1,4\n",
        "sys/devices/system/node/node10/cpulist": "2-3\n",
        "sys/devices/system/node/node2/cpulist": "\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [deny] never force\n",
        "dev/nvidia0": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "arena").mkdir()
    facts = gather(arena_dir=tmp_path / "arena", cache_dir=tmp_path, root=root)
    assert (facts.cpu, facts.cpu_flags) == ("A CPU", {"sse4_2", "avx2"})
    assert facts.nodes == (NumaNode(0, (0, 1, 4)), NumaNode(2, ()), NumaNode(10, (2, 3)))
    assert facts.shmem_huge == "deny"
    assert facts.arena_fs == "hugetlbfs"
    assert gather(arena_dir=tmp_path, root=root).arena_fs == "tmpfs"
    assert facts.has_nvidia_device
    bare = gather(arena_dir=tmp_path, root=tmp_path / "nothing")
    assert (bare.nodes, bare.cpu, bare.shmem_huge, bare.arena_fs) == ((), "", "", "unknown")
    assert bare.process_nodes == ()


@pytest.mark.parametrize(("text", "cpus"), [
    ("", ()), ("\n", ()), ("3", (3,)), ("0-2", (0, 1, 2)), ("0-1,4,6-7\n", (0, 1, 4, 6, 7)),
])  # fmt: skip
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


def test_a_gpu_with_its_saved_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts_module.read_gpus()
    monkeypatch.setattr(facts_module, "read_gpus", lambda sysfs: replace(found, gpus=(INFO,), cuda=12080))
    assert [g.is_saved for g in gather(cache_dir=tmp_path).gpus] == [False]
    calibration_file.save(DeviceId.for_this_process(INFO), GPU.table, tmp_path)
    (with_table,) = gather(cache_dir=tmp_path).gpus
    assert (with_table.is_saved, with_table.table.d2h) == (True, GPU.table.d2h)
    assert with_table.table.abilities.batch_api
    newer = replace(INFO, capability=12)
    monkeypatch.setattr(facts_module, "read_gpus", lambda sysfs: replace(found, gpus=(newer,), cuda=13000))
    assert not gather(cache_dir=tmp_path).gpus[0].table.abilities.batch_api  # batch copies have crashed there


def test_a_cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    source = Path(facts_module.__file__).parent.parent / "kernels" / "layout.py"
    monkeypatch.setattr(facts_module, "_COMPILED", ("kernels/layout.py",))
    assert (gather().numba_cold, gather().numba_writable) == (("layout",), True)
    index = cache_folders(source)[0][0] / f"layout.f-1.py{sys.version_info.major}{sys.version_info.minor}.nbi"
    index.parent.mkdir(parents=True)
    index.write_text("")
    assert gather().numba_cold == ()
    os.utime(index, (1, source.stat().st_mtime - 10))  # the index is older than its source
    assert gather().numba_cold == ("layout",)


def test_a_cache_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation compiled counts. What a folder that cannot be written lacks is compiled at every start."""
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setattr(facts_module, "_can_write", lambda folder: False)
    monkeypatch.setattr(facts_module, "_COMPILED", ("kernels/layout.py",))
    index = tmp_path / "numba" / f"layout.f-1.py{sys.version_info.major}{sys.version_info.minor}.nbi"
    index.parent.mkdir()
    index.write_text("")
    assert (gather().numba_cold, gather().numba_writable) == (("layout",), False)
    monkeypatch.setattr(facts_module, "_COMPILED", ())
    assert (gather().numba_cold, gather().numba_writable) == ((), True)
    folder = cache_folders(Path(facts_module.__file__).parent.parent / "kernels" / "layout.py")[1][0]
    folder.mkdir()
    index.rename(folder / index.name)
    monkeypatch.setattr(facts_module, "_COMPILED", ("kernels/layout.py",))
    assert (gather().numba_cold, gather().numba_writable) == ((), False)


class Libcuda:
    def __init__(self, version: int, code: int = 0) -> None:
        self.version, self.code = version, code

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return self.code


@pytest.mark.parametrize(("lib", "version"), [(Libcuda(12040), 12040), (Libcuda(12040, 100), 0), (None, 0)])
def test_a_driver_without_nvml(monkeypatch: pytest.MonkeyPatch, lib: Libcuda | None, version: int) -> None:
    def load() -> Libcuda:
        if lib is None:
            raise DeviceError("no libcuda")
        return lib

    monkeypatch.setattr(facts_module, "load_libcuda", load)
    assert gather().cuda == version


def test_it_needs_no_torch() -> None:
    code = "import sys, kvkern.doctor.facts as f, kvkern.doctor.report; f.gather(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- printing --------------------------------------------------------------------------------------------------------------


def printed(facts: Facts) -> str:
    out = StringIO()
    print_report(facts, findings(facts), Console(file=out, width=160))
    return out.getvalue()


def test_what_is_printed_with_a_gpu() -> None:
    text = printed(gpu(width=8, numa_node=1))
    assert "PCIe 5 x8 now (P0), generation 5 at most here, built for 5 x16" in text
    assert "copy engine, one large copy" in text
    assert "slow   loads and stores of GPU 0 reach 8/16" in text
    assert "       -> another slot" in text
    assert "found nothing" not in text


def test_what_is_printed_without_a_gpu() -> None:
    text = printed(NO_GPU)
    assert "none found; NVML: no Python binding" in text
    assert "kvkern found nothing here that makes it slow" in text
    assert "NVLink-C2C" in printed(gpu(c2c=True))


def test_json_is_the_same() -> None:
    facts = gpu(width=8)
    value = json.loads(as_json(facts, findings(facts)))
    assert value["facts"]["gpus"][0]["info"]["width"] == 8
    assert value["facts"]["gpus"][0]["table"]["d2h"]["copy_gb_s"] == 53.0
    assert [finding["severity"] for finding in value["findings"]] == ["slow"]
    assert msgspec.convert(value["facts"], Facts) == facts


@pytest.mark.parametrize(("arguments", "status"), [
    ([], 0), (["--json"], 0), (["--capacity", "1TiB"], 1), (["--arena-dir", "/nowhere"], 1), (["--capacity", "lots"], 2),
])  # fmt: skip
def test_the_command(arguments: list[str], status: int) -> None:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == status, done.output
    if arguments == ["--json"]:
        assert set(json.loads(done.output)) == {"facts", "findings"}
    elif status == 1:
        assert "broken" in done.output
