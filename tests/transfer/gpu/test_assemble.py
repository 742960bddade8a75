"""A rank gets the copier of its tensors' device, and the copier is tested before the first request."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from kvkern import assemble
from kvkern.config import Config
from kvkern.errors import LayoutError, UnsupportedError
from kvkern.kernels.paged_tensors import PagedTensors
from kvkern.transfer.gpu import calibrate, cuda_device
from kvkern.transfer.gpu.calibration_file import DeviceId
from kvkern.transfer.gpu.copier import GpuCopier
from kvkern.transfer.gpu.device import DeviceError
from kvkern.transfer.gpu.link_table import Calibration, HostLink, seed_calibration
from kvkern.transfer.gpu.numa import process_nodes
from kvkern.transfer.host import HostCopier
from tests.kernels.paged_cases import CASES
from tests.support import make_arena
from tests.transfer.gpu.copier_rig import TensorsOnGpu
from tests.transfer.gpu.fake_device import FakeDevice
from tests.transfer.gpu.orders import Random


class Standin(FakeDevice):
    """Replaces CudaDevice."""

    batch_api, host_pointers, info, name = True, True, None, "Test GPU 80GB"
    made: list[FakeDevice] = []  # noqa: RUF012  # the devices that the test has made

    def __init__(self, device: Any) -> None:
        super().__init__(Random(0))
        assert str(device) == "cuda:0"
        TensorsOnGpu.where = "cpu"
        Standin.made.append(self)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PagedTensors]:
    monkeypatch.setattr(TensorsOnGpu, "where", "cuda:0")
    monkeypatch.setattr(Standin, "made", [])
    monkeypatch.setattr(cuda_device, "CudaDevice", Standin)
    monkeypatch.setattr(assemble, "user_cache_dir", lambda: tmp_path)
    paged = CASES["FA bf16"]()
    return [TensorsOnGpu(paged.layout, paged.tensors, paged.bases)]


def build(folder: Path, groups: list[PagedTensors]) -> Any:
    arena = make_arena(folder, part_nbytes=groups[0].layout.part_nbytes(2), planes=4)
    return assemble.build_copier(Config(capacity_nbytes=1 << 20), arena, groups, rank=0, blocks_per_chunk=2)


def test_tensors_on_a_gpu_get_the_gpu_copier(tmp_path: Path, groups: list[PagedTensors]) -> None:
    copier = build(tmp_path, groups)
    assert type(copier) is GpuCopier
    assert Standin.made[0].registered
    copier.close()
    assert not Standin.made[0].registered


def test_a_gpu_that_nvml_does_not_show_has_a_table_of_its_own(
    tmp_path: Path, groups: list[PagedTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts may share a home folder: two GPU models must not share one file."""
    seen = []

    def table(make: Any, identity: DeviceId, able: Any, folder: Path) -> Calibration:
        seen.append(identity)
        return seed_calibration(identity.link, able)

    monkeypatch.setattr(calibrate, "load_or_calibrate", table)
    build(tmp_path, groups).close()
    assert seen == [DeviceId("Test GPU 80GB", "unknown", HostLink(0, 0), cpu_nodes=process_nodes())]


def test_tensors_in_host_memory_get_the_host_copier(tmp_path: Path) -> None:
    copier = build(tmp_path, [CASES["FA bf16"]()])
    assert type(copier) is HostCopier
    copier.close()


def test_a_layout_that_does_not_fit_gives_the_memory_back(tmp_path: Path, groups: list[PagedTensors]) -> None:
    other = CASES["FA bf16"]()
    with pytest.raises(LayoutError, match="bound to the addresses of other tensors"):
        build(tmp_path, [TensorsOnGpu(groups[0].layout, groups[0].tensors, other.bases)])
    assert not Standin.made[0].registered


def test_an_unusable_gpu_is_an_error_for_the_user(
    tmp_path: Path, groups: list[PagedTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, nbytes: int) -> None:
        raise DeviceError("no 32 MiB of GPU memory for staging")

    monkeypatch.setattr(Standin, "allocate", full)
    with pytest.raises(UnsupportedError, match="cannot copy to and from cuda:0: no 32 MiB"):
        build(tmp_path, groups)


def test_an_hbm_tier_without_room_is_an_error_for_the_user(
    tmp_path: Path, groups: list[PagedTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = make_arena(tmp_path, part_nbytes=groups[0].layout.part_nbytes(2), planes=4)

    def full(self: Any, nbytes: int) -> None:
        raise DeviceError("no 1 MiB of GPU memory")

    monkeypatch.setattr(Standin, "allocate", full)
    config, none = Config(capacity_nbytes=1 << 20, hbm_nbytes=1 << 20), cast(Any, None)
    with pytest.raises(
        UnsupportedError, match=r"hbm: kvkern cannot keep 1 MiB of chunks on .*: no 1 MiB of GPU memory"
    ):
        assemble.add_hbm_tier(config, none, arena, none, groups[0], 2)
    arena.close()


def test_groups_on_two_devices_are_refused(tmp_path: Path, groups: list[PagedTensors]) -> None:
    with pytest.raises(
        LayoutError, match=r"tensors are on 2 devices: cpu, cuda:0; give each rank tensors of one device"
    ):
        build(tmp_path, [*groups, CASES["FA bf16"]()])
