"""Facts about a GPU, read from a stand-in for the driver's library, and the names of the real binding if it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.transfer.gpu import nvml
from kvkern.transfer.gpu.link_table import HostLink

ANSWERS: dict[str, Any] = {
    "nvmlSystemGetDriverVersion": "570.124.06",
    "nvmlSystemGetCudaDriverVersion": 12080,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": 0,
    "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:3B:00.0"),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 << 30),
    "nvmlDeviceGetCurrPcieLinkGeneration": 1,
    "nvmlDeviceGetMaxPcieLinkGeneration": 4,
    "nvmlDeviceGetGpuMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 8,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetPerformanceState": 8,
    "nvmlDeviceGetCudaComputeCapability": [9, 0],
    "nvmlDeviceGetC2cModeInfoV": SimpleNamespace(isC2cEnabled=0),
    "nvmlInit": None,
    "nvmlShutdown": None,
}


class Driver:
    """Answers as the binding does. Functions in `broken` raise; functions in `missing` do not exist."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: tuple[str, ...] = (), missing: tuple[str, ...] = (), **answers: Any) -> None:
        self.started = 0
        self.answers = {name: value for name, value in (ANSWERS | answers).items() if name not in missing}
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def answer(*_: Any) -> Any:
            if name in self.broken:
                raise self.NVMLError("Not Supported")
            self.started += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return self.answers[name]

        return answer


def sysfs(folder: Path, node: str) -> Path:
    device = folder / "0000:3b:00.0"
    device.mkdir()
    (device / "numa_node").write_text(node)
    return folder


def test_a_gpu(tmp_path: Path) -> None:
    driver = Driver()
    found = nvml._read(driver, sysfs(tmp_path, "1\n"))
    (gpu,) = found.gpus
    assert gpu == nvml.GpuInfo(
        "NVIDIA H100 80GB HBM3", "570.124.06", "0000:3b:00.0", 80 << 30, 1, 4, 5, 8, 16, 1, 8, False, 9
    )
    assert gpu.link == HostLink(4, 8)  # the link sleeps at generation 1; its highest possible generation counts
    assert found.line == "NVML: 1 GPU(s), driver 570.124.06"
    assert found.cuda == 12080
    assert found.by_bus_id("0000:3B:00.0") is gpu
    assert found.by_bus_id("0000:3c:00.0") is None
    assert driver.started == 0


@pytest.mark.parametrize("node", ["-1\n", "", "x"])
def test_a_numa_node_that_is_not_reported(tmp_path: Path, node: str) -> None:
    (gpu,) = nvml._read(Driver(), sysfs(tmp_path, node)).gpus
    assert gpu.numa_node is None


@pytest.mark.parametrize("how", ["broken", "missing"])
def test_unanswered_questions_are_zero_or_none(tmp_path: Path, how: str) -> None:
    parts = ("Link", "C2c", "State", "Memory", "Capability")
    names = tuple(name for name in ANSWERS if any(part in name for part in parts))
    (gpu,) = nvml._read(Driver(**{how: names}), tmp_path).gpus
    assert (gpu.generation, gpu.width, gpu.memory_nbytes, gpu.c2c, gpu.numa_node) == (0, 0, 0, False, None)
    assert gpu.capability == 0
    assert gpu.link == HostLink(0, 0)


def test_c2c(tmp_path: Path) -> None:
    (gpu,) = nvml._read(Driver(nvmlDeviceGetC2cModeInfoV=SimpleNamespace(isC2cEnabled=1)), tmp_path).gpus
    assert gpu.link.c2c


@pytest.mark.parametrize(
    "broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion"]
)
def test_no_driver_is_a_line(tmp_path: Path, broken: str) -> None:
    driver = Driver(broken=(broken,))
    found = nvml._read(driver, tmp_path)
    assert (found.gpus, found.line.startswith("NVML: Not Supported; ")) == ((), True)
    assert driver.started == 0


def test_no_binding_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = nvml.read_gpus()
    assert found.gpus == ()
    assert "pip install nvidia-ml-py" in found.line


def test_the_binding_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert [gpu.driver for gpu in nvml.read_gpus(tmp_path).gpus] == ["570.124.06"]


def test_the_real_binding_has_these_functions() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in ANSWERS if not hasattr(pynvml, name)] == []
    assert nvml.read_gpus().line.startswith("NVML: ")
