"""LoRA without an engine: digests of adapters, what a worker admits, and what the scheduler forecasts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.lora import LoRAConfig

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.adapter_digest import AdapterDigests, AdapterUse, lora_settings
from kvkern.integrations.vllm.adapter_loads import AdapterLoads
from kvkern.integrations.vllm.adapter_names import AdapterNames
from kvkern.integrations.vllm.worker_report import WorkerReport


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder."""
    path = tmp_path / "a"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


def request(path: Path | str, number: int = 1, **options: Any) -> shim.LoRARequest:
    return shim.LoRARequest("a", number, str(path), **options)


def digest(path: Path | str, **options: Any) -> str | None:
    return AdapterDigests().digest(request(path, **options))


@pytest.mark.parametrize("change", [
    lambda path: (path / "adapter_config.json").write_text('{"r": 8}'),
    lambda path: (path / "adapter_model.safetensors").write_bytes(b"weightz"),
    lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"),
    lambda path: (path / "new_embeddings.safetensors").write_bytes(b""),
    lambda path: (path / "adapter_config.json").unlink(),
])  # fmt: skip
def test_every_file_of_an_adapter_counts(folder: Path, change: Callable[[Path], None]) -> None:
    before = digest(folder)
    change(folder)
    assert digest(folder) not in (before, None)


def test_a_digest_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    assert before is not None
    assert digest(folder, is_3d_lora_weight=True) not in (before, None)
    (folder / "README.md").write_text("x")
    assert digest(folder) == before
    folder.rename(tmp_path / "b")
    assert digest(tmp_path / "b") == before


@pytest.mark.parametrize("path", ["nowhere", "/nowhere", "owner/name"])
def test_what_is_no_folder_is_not_known(path: str) -> None:
    assert digest(path) is None


def test_an_empty_folder_is_not_known(tmp_path: Path) -> None:
    assert digest(tmp_path) is None


def test_settings_that_change_what_an_adapter_computes() -> None:
    base = lora_settings(LoRAConfig(max_lora_rank=8))
    assert lora_settings(LoRAConfig(max_lora_rank=8, max_loras=4, max_cpu_loras=9)) == base
    for changed in (LoRAConfig(lora_dtype="float16"), LoRAConfig(target_modules=["q_proj"]), LoRAConfig()):
        assert lora_settings(changed) != base


class Worker:
    """A worker with vLLM's manager replaced by a dict: number -> the bytes that were read."""

    def __init__(self) -> None:
        self.loads = AdapterLoads()
        self.loaded: dict[int, bytes] = {}
        self.while_reading: Callable[[], object] = lambda: None
        self.loads.bind(self, type(self)._read)

    def list_adapters(self) -> set[int]:
        return set(self.loaded)

    def _read(self, asked: shim.LoRARequest) -> Any:
        content = Path(asked.lora_path, "adapter_model.safetensors").read_bytes()
        self.while_reading()
        return SimpleNamespace(content=content, loras={}, modules_to_save={})

    def load(self, asked: shim.LoRARequest) -> None:
        """vLLM loads an adapter between two steps."""
        self.loaded[asked.lora_int_id] = self.loads.load(self, asked, type(self)._read).content

    def run(self, asked: shim.LoRARequest, step: int) -> bytes:
        """A step uses an adapter. Returns its content."""
        self.loads.begin_use(self, type(self)._read)
        if asked.lora_int_id not in self.loaded or asked.load_inplace:
            self.load(asked)
        self.loads.end_use()
        self.loads.step = step
        return self.loaded[asked.lora_int_id]


def use(path: Path, since: int, known: str | None = None, **options: Any) -> AdapterUse:
    asked = request(path, **options)
    return AdapterUse("r", asked, known or str(AdapterDigests().digest(asked)), since)


def test_kv_of_an_adapter_that_stays_is_stored_and_loaded(folder: Path) -> None:
    worker = Worker()
    named = use(folder, since=1)
    assert not worker.loads.holds(named)  # nothing is loaded
    worker.run(named.request, 1)
    assert worker.loads.holds(named)
    assert worker.loads.admits(named)
    assert worker.loads.take_news() == {1: named.digest}
    assert worker.loads.take_news() == {}
    assert not worker.loads.holds(use(folder, 1, "another"))
    worker.loaded.clear()  # evicted, and loaded again as it was
    worker.run(named.request, 2)
    assert worker.loads.holds(named)


@pytest.mark.parametrize("in_place", [True, False])
def test_after_a_change_only_later_requests_are_stored(folder: Path, in_place: bool) -> None:
    worker = Worker()
    old = use(folder, since=1)
    worker.run(old.request, 1)
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    assert worker.run(old.request, 2) == b"weights"  # it is loaded, so vLLM reads no file
    assert worker.loads.holds(old)
    if not in_place:
        worker.loaded.clear()
    worker.load(request(folder, load_inplace=in_place))
    assert not worker.loads.holds(old)
    for since, right in ((1, False), (2, False), (3, True)):
        assert worker.loads.holds(use(folder, since)) == right
        assert worker.loads.admits(use(folder, since)) == right


def test_files_that_change_between_a_load_and_its_first_step(folder: Path) -> None:
    """The KV was loaded for the old content, so the step computes with the old content."""
    worker = Worker()
    worker.loads.step = 4
    named = use(folder, since=4)
    assert worker.loads.admits(named)
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    assert worker.run(named.request, 5) == b"weights"
    assert worker.loads.holds(named)
    worker.loaded.clear()
    assert worker.run(named.request, 6) == b"retrained"
    assert not worker.loads.holds(named)


def test_files_that_changed_before_the_load(folder: Path) -> None:
    worker = Worker()
    named = use(folder, since=1)
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    assert not worker.loads.admits(named)
    assert worker.run(named.request, 1) == b"retrained"
    assert not worker.loads.holds(named)
    assert worker.loads.holds(use(folder, since=1))


def test_what_was_staged_goes_with_its_request(folder: Path) -> None:
    worker = Worker()
    assert worker.loads.admits(use(folder, since=1))
    worker.loads.drop({"r"})
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    assert worker.run(request(folder), 1) == b"retrained"


def test_an_explicit_load_reads_the_files(folder: Path) -> None:
    """Somebody who loads an adapter by hand gets what the files hold, not what was staged."""
    worker = Worker()
    named = use(folder, since=1)
    assert worker.loads.admits(named)
    (folder / "adapter_model.safetensors").write_bytes(b"retrained")
    worker.load(request(folder))
    assert worker.run(named.request, 1) == b"retrained"
    assert not worker.loads.holds(named)


def test_files_that_change_while_they_are_read(folder: Path) -> None:
    worker = Worker()
    worker.while_reading = lambda: (folder / "adapter_config.json").write_text("{ }")
    named = use(folder, since=1)
    worker.run(named.request, 1)
    assert worker.loads.take_news() == {1: None}
    assert not worker.loads.holds(named)
    assert not worker.loads.holds(use(folder, since=1))


def test_files_that_cannot_be_read_fail_the_load_alone(tmp_path: Path) -> None:
    worker = Worker()
    assert not worker.loads.admits(use(tmp_path / "nowhere", 1, "x"))


def test_tensors_mapped_from_a_file_are_copied(folder: Path, tmp_path: Path) -> None:
    """A write to the file after the load must not change what the engine computes."""
    path = tmp_path / "tensor"
    path.write_bytes(bytes(16))
    layer = SimpleNamespace(lora_a=torch.from_file(str(path), shared=True, size=4), lora_b=None)
    worker = Worker()
    adapter = SimpleNamespace(content=b"", loras={"layer": layer}, modules_to_save={})
    worker.loads.load(worker, request(folder), lambda manager, asked: adapter)
    path.write_bytes(b"\1" * 16)
    assert layer.lora_a.tolist() == [0.0] * 4


def names(empty: Callable[[], bool] = lambda: False, **options: Any) -> AdapterNames:
    return AdapterNames(LoRAConfig(**options), empty)


def test_the_forecast_is_the_files_until_a_worker_reports(folder: Path) -> None:
    scheduler = names()
    of_files = digest(folder)
    named = scheduler.use_of("r", request(folder), 3)
    assert named == AdapterUse("r", request(folder), str(of_files), 3)
    assert scheduler.use_of("r", request("/nowhere"), 3) is None
    scheduler.note_loaded({1: "reported"})
    assert scheduler.use_of("r", request(folder), 3).digest == "reported"  # type: ignore[union-attr]
    assert scheduler.use_of("r", request(folder, load_inplace=True), 3).digest == of_files  # type: ignore[union-attr]
    scheduler.note_loaded({1: None})
    assert scheduler.use_of("r", request(folder), 3) is None


def test_blocks_of_vllm_s_own_cache_count_from_when_it_was_empty(folder: Path) -> None:
    empty = True
    scheduler = names(lambda: empty)
    first = scheduler.use_of("r", request(folder), 5)
    assert first is not None
    empty = False
    assert scheduler.since(first, 9, 0) == 9
    assert scheduler.since(first, 9, 64) == 5
    scheduler.use_of("s", request(folder, 2), 10)  # another number under the same name: whose blocks are they?
    assert scheduler.since(first, 11, 64) is None
    assert scheduler.since(first, 11, 0) == 11
    empty = True
    scheduler.use_of("t", request(folder), 12)
    empty = False
    assert scheduler.since(first, 13, 64) == 12


def test_results_of_encoders_outlive_a_reset(folder: Path) -> None:
    scheduler = names(lambda: True, enable_tower_connector_lora=True)
    first = scheduler.use_of("r", request(folder), 5)
    assert first is not None
    assert scheduler.since(first, 9, 0) == 0


def test_workers_that_disagree_know_nothing() -> None:
    first, second = (
        WorkerReport({1: 1}, adapters={1: "x", 2: "y"}),
        WorkerReport(adapters={1: "z", 3: "w"}),
    )
    merged = first.aggregate(second)
    assert merged.adapters == {1: None, 2: "y", 3: "w"}
    assert merged.completed_jobs == {1: 1}
    assert first.aggregate(shim.OffloadingWorkerMetadata({1: 1})).completed_jobs == {1: 2}
