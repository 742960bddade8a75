"""The plugin, and what is refused or cleaned before an engine serves. No engine starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger

from kvkern.errors import ConfigError, UnsupportedError
from kvkern.integrations.vllm import kv_transfer_config, options, shim
from kvkern.integrations.vllm.request_hints import drop_malformed_params
from kvkern.integrations.vllm_plugin import register
from tests.import_graph import ROOT
from tests.integrations.vllm.server import transfer_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
URL = "redis://me:s3cret@127.0.0.1:1/0"


def multi(policy: str, *children: dict[str, Any]) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy=policy,
        kv_connector_extra_config={"connectors": list(children)},
    )  # fmt: skip


def test_vllm_finds_the_connector_by_its_name_in_a_new_process() -> None:
    """MultiConnector's front end asks for a class by name. Loading the plugin imports nothing of the adapter."""
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins();"
        "assert 'kvkern.integrations.vllm' not in sys.modules;"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory;"
        "print(KVConnectorFactory.get_connector_class_by_name('KvkernConnector').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.split()[-1:] == ["kvkern.integrations.vllm.connector"], done.stderr[-3000:]


def test_passwords_are_not_in_vllms_repr(llama: str) -> None:
    register()
    register()
    alone, inside = (
        kv_transfer_config("64MiB", remote=URL, salt="the-salt"),
        multi("recompute", transfer_config(capacity="64MiB", remote=URL)),
    )
    for config in (alone, inside, {"nested": [inside]}, EngineArgs(model=llama, kv_transfer_config=inside)):
        assert "redis://me:***@127.0.0.1:1/0" in repr(config)
        assert "s3cret" not in repr(config)
        assert "the-salt" not in repr(config)
    assert alone.kv_connector_extra_config["kvkern"]["remote"] == URL


def test_a_password_in_the_options_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(shim.logger, "warning_once", warnings.append)
    options.parse_options({"kvkern": {"capacity": "64MiB", "remote": "redis://me@h?password_file=/p"}})
    assert not warnings
    options.parse_options({"kvkern": {"capacity": "64MiB", "remote": URL}})
    assert len(warnings) == 1
    assert "password_file=PATH" in warnings[0]
    assert "s3cret" not in warnings[0]


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        (
            multi("fail", transfer_config(capacity="64MiB")),
            ["kv_load_failure_policy of MultiConnector is 'fail'", "recompute"],
        ),
        (
            multi("recompute", transfer_config(capacity="64MiB"), transfer_config(capacity="64MiB")),
            ["MultiConnector has KvkernConnector 2 times"],
        ),
    ],
)
def test_the_outer_configuration_is_judged(outer: KVTransferConfig, words: list[str]) -> None:
    inner = SimpleNamespace(kv_transfer_config=KVTransferConfig(**transfer_config(capacity="64MiB")))
    with pytest.raises(ConfigError) as caught:
        options.refuse_outer(inner, SimpleNamespace(kv_transfer_config=outer))
    assert all(word in str(caught.value) for word in words)


def test_an_outer_configuration_that_is_right() -> None:
    inner = SimpleNamespace(kv_transfer_config=KVTransferConfig(**transfer_config(capacity="64MiB")))
    outer = multi(
        "recompute", {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}, transfer_config(capacity="64MiB")
    )
    options.refuse_outer(inner, SimpleNamespace(kv_transfer_config=outer))
    options.refuse_outer(inner, inner)
    options.refuse_outer(inner, None)


@pytest.mark.parametrize(("size", "engine_id"), [(2, "x"), (1, "x_dp1")])
def test_a_data_parallel_rank_needs_a_daemon(size: int, engine_id: str) -> None:
    """vLLM tells a rank of a dense model that it is alone. Its index and the end of its engine id remain."""
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id=engine_id),
        parallel_config=SimpleNamespace(data_parallel_size=size, data_parallel_index=1),
    )
    embedded = options.parse_options({"kvkern": {"capacity": "64MiB"}})
    with pytest.raises(UnsupportedError, match=r"data parallel rank.* 64 MiB .*kvkern serve.*`socket`"):
        options.refuse_data_parallel(embedded, config)
    options.refuse_data_parallel(options.parse_options({"kvkern": {"socket": "/run/kvkern.sock"}}), config)


@pytest.mark.parametrize("params", ["x", [1], 7, True, 1.5, ("a",)])
def test_params_that_are_no_object_are_dropped(params: object) -> None:
    request: Any = SimpleNamespace(kv_transfer_params=params)
    drop_malformed_params(request)
    assert request.kv_transfer_params is None


@pytest.mark.parametrize("params", [None, {}, {"kvkern": []}, {"max_load_tokens": 3}])
def test_params_that_are_an_object_stay(params: object) -> None:
    request: Any = SimpleNamespace(kv_transfer_params=params)
    drop_malformed_params(request)
    assert request.kv_transfer_params is params


def test_two_engines_with_statistics_in_one_process(llama: str) -> None:
    """vLLM removes the metrics of an earlier engine before it registers them anew, and kvkern does so too."""
    config = EngineArgs(
        model=llama, skip_tokenizer_init=True, kv_transfer_config=kv_transfer_config("64MiB")
    ).create_engine_config()
    PrometheusStatLogger(config, [0])
    PrometheusStatLogger(config, [0, 1])


@pytest.mark.parametrize(
    ("page", "options"),
    [
        ("README.md", {"socket": "/run/kvkern.sock"}),
        ("docs/vllm.md", {"capacity": "8GiB"}),
        ("docs/node.md", {"socket": "/run/kvkern.sock"}),
    ],
)
def test_the_docs_say_what_the_served_tests_run(page: str, options: dict[str, str]) -> None:
    text = (ROOT / page).read_text()
    found = re.search(r"vllm serve MODEL --kv-transfer-config '(.*?)'", text, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == transfer_config(**options)
