"""What NVML and sysfs say of a GPU: name, driver, link, NUMA node, power state. Thin; decides nothing.

NVML comes with the driver, its binding with `nvidia-ml-py`. Either may be missing: that is a line to print, not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .link_table import HostLink

_SYSFS = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """One GPU. 0 or None where NVML does not say."""

    name: str  # "NVIDIA H100 80GB HBM3"
    driver: str  # "570.124.06"
    bus_id: str  # "0000:3b:00.0", as sysfs names it
    memory_nbytes: int
    generation: int  # of the PCIe link now; an idle GPU lets its link sleep at 1
    generation_here: int  # the most that GPU and slot allow
    generation_gpu: int  # the most that the GPU is built for
    width: int  # lanes now
    width_gpu: int  # lanes that the GPU is built for
    numa_node: int | None
    power_state: int  # 0: full speed .. 15: idle
    c2c: bool  # NVLink-C2C to the CPU
    capability: int = 0  # of compute, the major number: 9 for an H100

    @property
    def link(self) -> HostLink:
        """For the calibration table: what it can do when it is awake."""
        return HostLink(self.generation_here or self.generation, self.width, self.c2c)


@dataclass(frozen=True, slots=True)
class Gpus:
    """All GPUs of this host, or why there are none to see."""

    gpus: tuple[GpuInfo, ...]
    line: str  # what was found, for people
    cuda: int = 0  # the newest CUDA that the driver speaks: 12080 is 12.8

    def by_bus_id(self, bus_id: str) -> GpuInfo | None:
        """The GPU with this PCI address in sysfs form, None if NVML did not show it."""
        return next((gpu for gpu in self.gpus if gpu.bus_id == bus_id.lower()), None)


def read_gpus(sysfs: Path = _SYSFS) -> Gpus:
    """Ask NVML. Never raises for a missing library, driver or GPU; starts NVML and shuts it down."""
    try:
        import pynvml
    except ImportError:
        return Gpus((), "NVML: no Python binding; `pip install nvidia-ml-py` to see link, driver and NUMA node")
    return _read(pynvml, sysfs)


def _read(nvml: Any, sysfs: Path) -> Gpus:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Gpus((), f"NVML: {error}; no NVIDIA driver here, or this container has no access to it")
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(nvml, handle, driver, sysfs) for handle in handles)
        cuda = int(_ask(nvml, lambda: nvml.nvmlSystemGetCudaDriverVersion(), 0))
    except nvml.NVMLError as error:
        return Gpus((), f"NVML: {error}; see what `nvidia-smi` says")
    finally:
        nvml.nvmlShutdown()
    return Gpus(gpus, f"NVML: {len(gpus)} GPU(s), driver {driver}", cuda)


def _gpu(nvml: Any, handle: Any, driver: str, sysfs: Path) -> GpuInfo:
    def ask(function: str, otherwise: Any = 0) -> Any:
        return _ask(nvml, lambda: getattr(nvml, function)(handle), otherwise)

    bus_id = _sysfs_name(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
    c2c = ask("nvmlDeviceGetC2cModeInfoV", None)
    memory = ask("nvmlDeviceGetMemoryInfo", None)
    capability = ask("nvmlDeviceGetCudaComputeCapability", (0, 0))
    return GpuInfo(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=driver,
        bus_id=bus_id,
        memory_nbytes=0 if memory is None else int(memory.total),
        generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        generation_here=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        generation_gpu=ask("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        width_gpu=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        numa_node=_numa_node(sysfs / bus_id),
        power_state=ask("nvmlDeviceGetPerformanceState"),
        c2c=bool(c2c is not None and c2c.isC2cEnabled),
        capability=capability[0],
    )


def _ask(nvml: Any, question: Callable[[], Any], otherwise: Any) -> Any:
    """What a GPU, its driver or an old binding may not answer."""
    try:
        return question()
    except (nvml.NVMLError, AttributeError):
        return otherwise


def _text(value: str | bytes) -> str:
    """Old bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _sysfs_name(bus_id: str) -> str:
    """NVML writes the PCI domain with eight digits, sysfs with four."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _numa_node(device: Path) -> int | None:
    """None: the firmware does not say, or the host has one node."""
    try:
        node = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
