"""vLLM 0.33's synchronous loads: it computes with their blocks in the same step, and ignores that the load failed its checksum.

kvkern switches them off, refuses the option by name, and its worker refuses such a load.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.errors import UnsupportedError
from kvkern.integrations.vllm import kv_transfer_config, options, shim
from kvkern.integrations.vllm.worker import KvkernWorker
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
KEY = "sync_load_budget_bytes"
needs_sync_loads = pytest.mark.skipif(
    not shim.FEATURES.sync_loads,
    reason="this vLLM has no synchronous loads (OffloadingWorker.submit_load has no parameter `expedited`)",
)


@pytest.mark.parametrize("budget", [1024, 1, -1, "1GiB", True, None])
def test_the_option_is_refused_by_name(budget: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"{KEY} is {budget!r}.*checksum.*Leave.*or set it to 0"):
        options.parse_options({"kvkern": {"capacity": "1GiB"}, KEY: budget})


def test_the_option_may_say_that_they_are_off() -> None:
    assert options.parse_options({"kvkern": {"capacity": "1GiB"}, KEY: 0}).capacity_nbytes == 1 << 30


@pytest.mark.parametrize("has_them", [True, False])
def test_they_are_off_whatever_the_default_of_vllm_is(has_them: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "FEATURES", dataclasses.replace(shim.FEATURES, sync_loads=has_them))
    transfer = kv_transfer_config("1GiB")
    options.fill_defaults(SimpleNamespace(kv_transfer_config=transfer, instance_id="i"))  # type: ignore[arg-type]
    assert transfer.kv_connector_extra_config.get(KEY) == (0 if has_them else None)


def test_the_worker_refuses_such_a_load() -> None:
    worker = KvkernWorker(None, 1, lambda: None)  # type: ignore[arg-type]
    nothing: Any = None
    with pytest.raises(UnsupportedError, match=r"Load job 7 is synchronous.*checksum"):
        worker.submit_load(7, nothing, nothing, expedited=True)
    assert not worker._jobs


@needs_sync_loads
def test_an_engine_that_would_load_synchronously_does_not_start(
    llama: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As if vLLM took its budget from elsewhere than the option: the connector asks the scheduler side what it will do."""
    monkeypatch.setattr(shim, "sync_load_budget", lambda connector: 4096)
    with pytest.raises((UnsupportedError, RuntimeError)) as caught, Engine(llama):
        pass
    assert f"{KEY} is 4096" in "".join([str(caught.value), *capfd.readouterr()])


def _switch_on(engine: Engine) -> None:
    """Switch synchronous loads on in a running scheduler, behind all refusals at start."""
    side = engine.scheduler.connector.connector_scheduler
    side.config = side.config._replace(**{KEY: 1 << 30})


@needs_sync_loads
@pytest.mark.parametrize("broken", [True, False])
def test_no_reply_is_computed_with_a_synchronous_load(llama: str, broken: bool) -> None:
    """Without the worker's refusal vLLM 0.33 answers with other tokens here: it counts nine bad chunks and uses them."""
    with Engine(llama) as engine:
        text = prompt(300, 5)
        engine.one(text)
        engine.reset_native()
        if broken:
            parts = engine.dram._arena.parts(0)
            for slot in engine.dram._index.values():
                parts[slot, :8192] ^= 0x40
        _switch_on(engine)
        with pytest.raises(RuntimeError, match=r"Load job \d+ is synchronous"):
            engine.one(text)
