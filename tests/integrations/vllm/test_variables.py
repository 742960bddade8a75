"""The plugin and the published variables: when it fills in vLLM's transfer configuration, and with what. No engine starts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import urllib.request
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils

from kvkern.errors import ConfigError
from kvkern.integrations import vllm_metrics_port, vllm_variables
from kvkern.integrations.vllm import connector, options, rpc_check, shim
from kvkern.integrations.vllm_plugin import register
from tests.integrations.vllm.published import VARIABLES
from tests.integrations.vllm.server import transfer_config
from tests.remote.required_servers import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
SOCKET = {"AIBRIX_LLM_KV_CACHE_SOCKET": "/var/run/vineyard.sock"}
OL = "AIBRIX_KV_CACHE_OL_"
AIBRIX = {"kv_connector": "AIBrixOffloadingConnectorV1Type3", "kv_role": "kv_both"}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that the plugin logs."""
    found: list[str] = []

    def log(message: str, *args: Any) -> None:
        found.append(message % (args[0] if args and isinstance(args[0], dict) else args))

    monkeypatch.setattr(vllm_variables, "_logger", lambda: SimpleNamespace(info=log, warning=log))
    return found


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in list(os.environ):
        if name.startswith(("AIBRIX_", "VINEYARD_", "KVKERN_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def args(**given: Any) -> Any:
    return SimpleNamespace(**{"kv_transfer_config": None, "block_size": None, "kv_offloading_size": None} | given)


def test_the_wrapped_engine_arguments_are_filled_in(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM itself makes of it: the connector, its policy, and a block that fits the chunk."""
    set_variables(monkeypatch, VARIABLES | SOCKET)
    register()
    register()
    config = EngineArgs(model=llama, skip_tokenizer_init=True).create_engine_config()
    transfer = config.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role, transfer.kv_load_failure_policy) == (
        "KvkernConnector", "kv_both", "recompute",
    )  # fmt: skip
    assert transfer.kv_connector_extra_config["kvkern"] == {
        "socket": "/var/run/vineyard.sock", "chunk_tokens": 32, "salt": "aibrix", "metrics_port": 8080,
        "published_metrics": True,
    }  # fmt: skip
    assert config.cache_config.block_size == 32
    parsed = options.parse_options(transfer.kv_connector_extra_config)
    assert (parsed.socket, parsed.salt, parsed.metrics_port) == ("/var/run/vineyard.sock", "aibrix", 8080)


def test_without_switches_nothing_changes(llama: str, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    set_variables(monkeypatch, {"KVKERN_SOCKET": "/s", "KVKERN_NONSENSE": "1"})
    register()
    assert EngineArgs(model=llama, skip_tokenizer_init=True).create_engine_config().kv_transfer_config is None
    assert not lines


@pytest.mark.parametrize("off", ["0", "false", "no"])
def test_a_switch_that_is_off(monkeypatch: pytest.MonkeyPatch, lines: list[str], off: str) -> None:
    set_variables(monkeypatch, VARIABLES | SOCKET | {"AIBRIX_LLM_KV_CACHE": off})
    given = args()
    vllm_variables.fill_in(given)
    assert given.kv_transfer_config is None
    assert ["Set AIBRIX_LLM_KV_CACHE=1" in line for line in lines] == [True]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv_transfer_config": KVTransferConfig(**transfer_config(capacity="64MiB"))}, "-config with KvkernConnector"),
        ({"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}, "with NixlConnector counts"),
        ({"kv_offloading_size": 4.0}, "--kv-offloading-size counts"),
    ],
)  # fmt: skip
def test_the_users_own_choice_wins_with_a_line(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], given: dict[str, Any], named: str
) -> None:
    set_variables(monkeypatch, VARIABLES | SOCKET)
    theirs = args(**given)
    before = theirs.kv_transfer_config
    assert vllm_variables.fill_in(theirs) is None
    assert theirs.kv_transfer_config is before
    assert [named in line and "have no effect" in line for line in lines] == [True]


def test_own_variables_are_preferred(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    own = {"KVKERN_SOCKET": "/own", "KVKERN_SALT": "s3cret", "KVKERN_METRICS_PORT": "9100", "KVKERN_CHUNK_TOKENS": "64"}
    set_variables(monkeypatch, VARIABLES | SOCKET | own)
    given = args()
    vllm_variables.fill_in(given)
    extra = given.kv_transfer_config.kv_connector_extra_config
    assert extra == {"kvkern": {"published_metrics": True}}
    parsed = options.parse_options(extra)
    assert (parsed.socket, parsed.salt, parsed.metrics_port, parsed.chunk_tokens) == ("/own", "s3cret", 9100, 64)
    assert "s3cret" not in "".join(lines)


def test_lines_of_the_front_end_are_written_as_log_format_says(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """The plugin's own, and those about the second metrics port. A mistake elsewhere does not hide the line about it."""
    formats: list[str] = []
    monkeypatch.setattr(vllm_variables, "set_up_engine", formats.append)
    set_variables(monkeypatch, VARIABLES | SOCKET | {"KVKERN_LOG_FORMAT": "json"})
    vllm_variables.fill_in(args())
    set_variables(monkeypatch, {"KVKERN_LOG_FORMAT": "json"})
    monkeypatch.delenv("VLLM_USE_VINEYARD_CACHE")
    vllm_variables.fill_in(args())  # kvkern is off
    set_variables(monkeypatch, VARIABLES | SOCKET | {"KVKERN_NONSENSE": "1"})
    with pytest.raises(ConfigError, match="KVKERN_NONSENSE"):
        vllm_variables.fill_in(args())
    assert formats == ["json", "text"]
    monkeypatch.delenv("KVKERN_NONSENSE")
    monkeypatch.setattr(connector, "set_up_engine", formats.append)
    transfer = KVTransferConfig(**transfer_config(capacity="64MiB", log_format="json"))
    with pytest.raises(AttributeError, match="kv_transfer_config is all"):
        connector.KvkernConnector.build_prom_metrics(cast(Any, OnlyTransfer(transfer)))
    assert formats == ["json", "text", "json"]


class OnlyTransfer:
    """A VllmConfig of which nothing but the transfer configuration may be read."""

    def __init__(self, transfer: KVTransferConfig) -> None:
        self.kv_transfer_config = transfer

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"kv_transfer_config is all, not {name}")


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_samples_connector_is_replaced(monkeypatch: pytest.MonkeyPatch, lines: list[str], as_dict: bool) -> None:
    sample = {"L1_CACHE_ENABLED": "1", "L1_CACHE_EVICTION_POLICY": "S3FIFO", "L1_CACHE_CAPACITY_GB": "2"}
    set_variables(monkeypatch, {OL + name: text for name, text in sample.items()})
    given = args(kv_transfer_config=AIBRIX if as_dict else KVTransferConfig(**AIBRIX))
    vllm_variables.fill_in(given)
    transfer = given.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_load_failure_policy) == ("KvkernConnector", "recompute")
    assert options.parse_options(transfer.kv_connector_extra_config).capacity_nbytes == 2 << 30
    monkeypatch.setenv("KVKERN_SOCKET", "/s")  # the node's daemon instead of a cache of its own
    given = args(kv_transfer_config=AIBRIX)
    vllm_variables.fill_in(given)
    parsed = options.parse_options(given.kv_transfer_config.kv_connector_extra_config)
    assert (parsed.socket, parsed.capacity_nbytes) == ("/s", 0)
    assert any("AIBrixOffloadingConnector switches the cache on" in line for line in lines)
    assert any("has no connector AIBrixOffloadingConnectorV1Type3 and no module path" in line for line in lines)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("registered", [True, False])
def test_who_has_the_samples_connector_itself_keeps_it(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], registered: bool, as_dict: bool, on: bool
) -> None:
    """It is registered in vLLM by a plugin, or the transfer configuration says in which module it is."""
    set_variables(monkeypatch, {OL + "L1_CACHE_ENABLED": "1"} | (VARIABLES | SOCKET if on else {}))
    theirs = AIBRIX
    if registered:
        monkeypatch.setitem(KVConnectorFactory._registry, AIBRIX["kv_connector"], lambda: object)
    else:
        theirs = AIBRIX | {"kv_connector_module_path": "aibrix_kvcache.integration.vllm"}
    given = args(kv_transfer_config=theirs if as_dict else KVTransferConfig(**theirs))
    before = given.kv_transfer_config
    assert vllm_variables.fill_in(given) is None
    assert given.kv_transfer_config is before
    assert given.block_size is None
    assert "which is installed here, so kvkern leaves it alone" in lines[0]
    assert len(lines) == 1 + on


def test_a_sample_without_a_first_level_needs_a_place(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    set_variables(monkeypatch, {OL + "L1_CACHE_ENABLED": "0", OL + "L2_CACHE_BACKEND": "infinistore"})
    with pytest.raises(ConfigError, match=r"KVKERN_SOCKET=/run/kvkern\.sock"):
        vllm_variables.fill_in(args(kv_transfer_config=AIBRIX))
    assert any("L2_CACHE_BACKEND=infinistore has no effect" in line for line in lines)


@pytest.mark.parametrize(
    ("chunk", "block", "message"),
    [(24, 16, "is 24, which is no multiple of vLLM's block size of 16 tokens"), (160, 128, "Set it to 256"),
     (16, 128, "On CPUs vLLM's blocks are multiples of 32 tokens")],
)  # fmt: skip
def test_a_chunk_that_is_no_whole_number_of_blocks(chunk: int, block: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        vllm_variables.refuse_chunk_size(chunk, block, "X")
    vllm_variables.refuse_chunk_size(2 * block, block, "X")


@pytest.mark.parametrize(
    ("chunk", "given", "block"),
    [
        (16, None, None),
        (32, None, 32),
        (64, None, 64),
        (96, None, 32),
        (128, None, None),
        (256, None, None),
        (32, 16, 16),
    ],
)
def test_the_block_that_fits_a_chunk_on_cpus(
    lines: list[str], chunk: int, given: int | None, block: int | None
) -> None:
    theirs = args(block_size=given)
    vllm_variables._choose_block_size(theirs, chunk, vllm_variables._logger())
    assert theirs.block_size == block
    assert len(lines) == (block is not None and given is None)


def groups(*block_tokens: int) -> Any:
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size)) for size in block_tokens]
    )


def test_blocks_of_a_chunk() -> None:
    config = options.parse_options({"kvkern": {"capacity": "64MiB", "chunk_tokens": 64}})
    extra: dict[str, Any] = {}
    engine = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra))
    options.fill_chunk_size(engine, groups(16, 16), config)
    options.fill_chunk_size(engine, groups(16), config)
    assert extra == {"blocks_per_chunk": 4}
    extra.clear()
    with pytest.raises(
        ConfigError, match=r"chunk_tokens .*AIBRIX_LLM_KV_CACHE_CHUNK_SIZE\) is 64, which is no multiple"
    ):
        options.fill_chunk_size(engine, groups(48), config)
    with pytest.raises(ConfigError, match=re.escape("have blocks of [16, 32] tokens")):
        options.fill_chunk_size(engine, groups(16, 32), config)
    extra["block_size"] = 128
    options.fill_chunk_size(engine, groups(16), config)
    assert extra == {"block_size": 128}  # the user's own


@pytest.mark.parametrize("fixed", [True, False])
def test_the_hash_seed_of_older_releases(monkeypatch: pytest.MonkeyPatch, lines: list[str], fixed: bool) -> None:
    set_variables(monkeypatch, VARIABLES | SOCKET)
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    if fixed:
        monkeypatch.setattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", "x", raising=False)
    else:
        monkeypatch.delattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED", raising=False)
    vllm_variables.fill_in(args())
    assert os.environ["PYTHONHASHSEED"] == ("random" if fixed else "0")
    assert any("PYTHONHASHSEED" in line for line in lines) is not fixed


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"answer"]


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_the_second_metrics_port(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_metrics_port.logger, "warning", lambda message, fields: warnings.append(message % fields))
    port = free_port()
    assert vllm_metrics_port.serve_metrics(port, application) == port
    assert vllm_metrics_port.serve_metrics(port, application) is None  # another engine of the same process
    assert not warnings
    assert get(port) == "answer"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/")
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(vllm_metrics_port.MAX_REQUESTS)]
    try:
        with pytest.raises(OSError):  # noqa: PT011  (refused or reset: both are right)
            get(port)
    finally:
        for client in idle:
            client.close()


def test_clients_that_drip_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the request does not."""
    monkeypatch.setattr(vllm_metrics_port, "REQUEST_S", 2.0)
    monkeypatch.setattr(vllm_metrics_port._Handler, "timeout", 2.0)
    port = free_port()
    assert vllm_metrics_port.serve_metrics(port, application) == port
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(vllm_metrics_port.MAX_REQUESTS)]
    try:
        with pytest.raises(OSError):  # noqa: PT011  (refused or reset: both are right)
            get(port)
        deadline, answer = time.monotonic() + 30, ""
        while not answer:
            assert time.monotonic() < deadline, "nobody else got an answer"
            for client in idle:
                with contextlib.suppress(OSError):
                    client.sendall(b"G")
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                answer = get(port)
        assert answer == "answer"
    finally:
        for client in idle:
            client.close()


def test_a_metrics_port_that_is_taken_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(vllm_metrics_port.logger, "warning", lambda message, fields: warnings.append(message % fields))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert vllm_metrics_port.serve_metrics(port, application) is None
    assert len(warnings) == 1
    assert f"metrics_port {port} cannot be used" in warnings[0]
    assert "KVKERN_METRICS_PORT" in warnings[0]


class _Daemon:
    """Stands for the daemon on the socket, whose id it tells. A real one is in test_published."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> _Daemon:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, _request: object) -> list[dict[str, Any]]:
        return [{"daemon": "a" * 32}]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"daemon": "a" * 32}, []),
        ({"daemon": "b" * 32}, ["is the daemon " + "b" * 32, "is " + "a" * 32]),
        ({"status": "ok"}, ["does not tell which daemon it is"]),
        (["x"], ["does not tell which daemon it is"]),
        ({"daemon": "b\nINFO forged"}, ["does not tell which daemon it is (no daemon of kvkern answers there)"]),
        ("[" * 50_000, ["does not tell which daemon it is"]),
        (None, ["does not tell which daemon it is"]),
    ],
    ids=["same", "other", "stranger", "no object", "two lines", "deep", "silent"],
)
def test_the_rpc_endpoint_is_compared(monkeypatch: pytest.MonkeyPatch, answer: Any, words: list[str]) -> None:
    found: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(shim.logger, level, lambda message, fields: found.append(message % fields))
    monkeypatch.setattr(rpc_check, "AdminClient", _Daemon)
    monkeypatch.setattr(rpc_check, "TIMEOUT_S", 5.0)

    def tell(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json")])
        return [(answer if isinstance(answer, str) else json.dumps(answer)).encode()]

    port = free_port()
    if answer is not None:
        monkeypatch.setattr(vllm_metrics_port, "_only_metrics", lambda app: app)
        assert vllm_metrics_port.serve_metrics(port, tell) == port
    config = options.parse_options({"kvkern": {"socket": "/s", "rpc_endpoint": f"127.0.0.1:{port}"}})
    rpc_check.compare(config)
    compared = [line for line in found if "rpc_endpoint" in line]
    assert len(compared) == bool(words)
    assert all(word in compared[0] for word in words)
