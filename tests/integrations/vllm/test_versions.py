"""Which vLLM is taken: known releases, newer ones that pass the self-test with a warning, and no others."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from kvkern.errors import UnsupportedError
from kvkern.integrations.vllm import contract, derived, shim, versions
from tests.integrations.vllm.engine import Engine, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("version", "minor"),
    [("0.31.0", (0, 31)), ("0.33.1.dev4+g12ab", (0, 33)), ("1.0", (1, 0)), ("0.30.0rc1", (0, 30)), ("dev", (0, 0))],
)
def test_minor_of_a_version(version: str, minor: tuple[int, int]) -> None:
    assert versions.minor_of(version) == minor
    assert versions.is_known(version) == (minor in versions.KNOWN)


@pytest.mark.parametrize("version", ["0.29.0", "0.8.5.post1", "dev"])
def test_older_releases_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"vLLM {version} is not supported.*0\.30 to 0\.33.*Install vLLM 0\.33"):
        versions.refuse_old(version)


@pytest.mark.parametrize("version", ["0.30.0", "0.33.9", "0.34.0", "1.2"])
def test_later_releases_are_not_too_old(version: str) -> None:
    versions.refuse_old(version)


def test_vllm_tells_its_version_itself() -> None:
    """The metadata of packages may name another vLLM, where one environment lies over another."""
    import vllm

    assert versions.installed_version() == shim.VLLM_VERSION == vllm.__version__


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run with a vLLM that says it is 0.99.1."""
    monkeypatch.setattr("vllm.version.__version__", "0.99.1")
    yield
    monkeypatch.undo()
    importlib.reload(shim)


def test_a_newer_release_that_fits_is_taken_with_one_warning(
    newer: None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.reload(shim)
    derived.refuse_unfit()
    lines: list[str] = []  # a handler would be lost: vLLM sets up its loggers anew
    monkeypatch.setattr(shim.logger, "warning", lambda line, values: lines.append(line % values))
    with Engine(llama) as engine:
        first, _, hit = engine.three_ways(prompt(300, 7))
        assert (hit.cached_tokens, hit.tokens) == (288, first.tokens)
    said = [line for line in lines if "vLLM 0.99.1" in line]
    assert len(said) == 1
    assert "newer than the releases that this kvkern was tested with (0.30 to 0.33)" in said[0]


def test_a_newer_release_that_lacks_a_name_is_refused(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"vllm.v1.core.block_pool:BlockPool": "blocks cached_block_hash_to_block free_list_of_tomorrow"}
    monkeypatch.setattr(contract, "READS", contract.READS | lost)
    with pytest.raises(
        UnsupportedError, match=r"vLLM 0\.99\.1 is newer.*BlockPool has no free_list_of_tomorrow.*Install"
    ):
        importlib.reload(shim)


def test_a_newer_release_that_calls_otherwise_is_refused(newer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Any, job_ids: set[int], timeout_s: float = 0) -> None:
        """What a later vLLM might have."""

    monkeypatch.setattr(shim.OffloadingWorker, "wait", wait)
    importlib.reload(shim)
    with pytest.raises(UnsupportedError, match=r"0\.99\.1.*wait takes \(self, job_ids, timeout_s=\).*newer kvkern"):
        derived.refuse_unfit()


def test_a_refusal_shows_five_differences_and_counts_the_rest() -> None:
    text = str(versions.refusal("0.99.1", [f"difference {i}" for i in range(8)]))
    assert "difference 4; and 3 more" in text
    assert "difference 5" not in text
