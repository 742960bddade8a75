"""Where values come from: the best source counts, whatever the option, and every mistake names its source."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkern.config import Config
from kvkern.config.options import OPTIONS, Kind, Option, Reader
from kvkern.config.sources import Rank, converted, gather, in_force
from kvkern.errors import ConfigError
from kvkern.node.daemon.node_config import NodeConfig

# kind -> three values: (as a user writes it in code or in TOML, as text)
VALUES: dict[Kind, list[tuple[Any, str]]] = {
    Kind.SIZE: [("8GiB", "8GiB"), (4096, "4096"), ("1MB", "1MB")],
    Kind.INT: [(1, "1"), (2, "2"), (3, "3")],
    Kind.FLOAT: [(1.5, "1.5"), (2.0, "2"), (3.25, "3.25")],
    Kind.BOOL: [(True, "on"), (False, "no"), (True, "1")],
    Kind.TEXT: [("a", "a"), ("b b", "b b"), ("ü#", "ü#")],
    Kind.PATH: [("/a", "/a"), ("/b", "/b"), ("/c", "/c")],
    Kind.INTS: [([1, 2], "1,2"), ([3], "3"), ([4, 5], "4 5")],
    Kind.TEXTS: [(["m=1GiB"], "m=1GiB"), (["a=1MB", "b=2MB"], "a=1MB,b=2MB"), (["c=1"], "c=1")],
}
PLACES = ("file", "table", "variable", "option")  # from the worst to the best


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize("reader", Reader)
@given(data=st.data())
def test_the_best_source_counts(reader: Reader, data: st.DataObject) -> None:
    """Options are set in any of the places with any values; what is in force is what the best place says, or the default."""
    readable = [option for option in OPTIONS if reader in option.readers]
    chosen = data.draw(st.lists(st.sampled_from(readable), max_size=6, unique=True))
    settings = {
        option: data.draw(st.dictionaries(st.sampled_from(PLACES), st.sampled_from(VALUES[option.kind]), min_size=1))
        for option in chosen
    }
    in_file = [f"{o.name} = {toml(places['file'][0])}" for o, places in settings.items() if "file" in places]
    in_table = [f"{o.name} = {toml(places['table'][0])}" for o, places in settings.items() if "table" in places]
    environ = {o.variable: places["variable"][1] for o, places in settings.items() if "variable" in places}
    given_options = {o.name: places["option"][0] for o, places in settings.items() if "option" in places}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kvkern.toml")
        path.write_text("\n".join([*in_file, f"[{reader}]", *in_table]) + "\n", encoding="utf-8")
        found = gather(reader, given_options, "the test", path, environ)
        assert set(found) == {option.name for option in chosen}
        for option, places in settings.items():
            best = max(places, key=PLACES.index)
            setting = found[option.name]
            assert option.convert(setting.value, "the test") == option.convert(places[best][0], "the test")
            assert setting.origin.rank == {"variable": Rank.VARIABLE, "option": Rank.OPTION}.get(best, Rank.FILE)
            if best in ("file", "table"):
                line = int(str(setting.origin).rpartition(" line ")[2])
                assert path.read_text(encoding="utf-8").splitlines()[line - 1].startswith(f"{option.name} = ")
            elif best == "variable":
                assert str(setting.origin) == f"variable {option.variable}"
    for name, setting in in_force(found, reader).items():
        if name not in found:
            assert str(setting.origin) == "default"


def test_the_other_readers_options_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text('capacity = "1GiB"\nfair = true\nthreads = 2\n[daemon]\ndrain = 1\n[engine]\nconnect_s = 3\n')
    environ = {"KVKERN_QUOTA": "m=1GiB", "KVKERN_STORE_REPLIES": "no"}
    assert set(gather(Reader.ENGINE, {}, "x", path, environ)) == {"capacity", "threads", "connect_s", "store_replies"}
    assert set(gather(Reader.DAEMON, {}, "x", path, environ)) == {"capacity", "fair", "drain", "quota"}


@pytest.mark.parametrize(("environ", "message"), [
    ({"KVKERN_CAPACTY": "1"}, "unknown variable KVKERN_CAPACTY; did you mean 'KVKERN_CAPACITY'?"),
    ({"KVKERN_": "1"}, "unknown variable KVKERN_; "),
    ({"KVKERN_THREADS": "four"}, "threads in the variable KVKERN_THREADS is 'four'; expected int"),
    ({"KVKERN_THREADS": "٣"}, "threads in the variable KVKERN_THREADS"),
    ({"KVKERN_THREADS": "99"}, "in 0..64 (0: kvkern chooses at start) (threads comes from the variable KVKERN_THREADS)"),
    ({"KVKERN_PREFAULT": "maybe"}, "prefault in the variable KVKERN_PREFAULT is 'maybe'; expected one of 1, true, yes, on, 0,"),
    ({"KVKERN_REMOTE_TIMEOUT": "nan"}, "remote_timeout in the variable KVKERN_REMOTE_TIMEOUT is 'nan'; expected float"),
    ({"KVKERN_CAPACITY": "8QiB"}, "capacity in the variable KVKERN_CAPACITY is '8QiB'; expected a size"),
    ({"KVKERN_POLICY": "fifo"}, "(policy comes from the variable KVKERN_POLICY)"),
    ({"KVKERN_CONFIG": "/nowhere/at/all"}, "KVKERN_CONFIG is '/nowhere/at/all'"),
    ({"KVKERN_RPC_ENDPOINT": "host"}, "rpc_endpoint is 'host'; expected HOST:PORT"),
    ({"KVKERN_SOCKET": "/s", "KVKERN_CAPACITY": "1GiB"},
     "capacity in the variable KVKERN_CAPACITY and socket in the variable KVKERN_SOCKET exclude each other"),
], ids=str)  # fmt: skip
def test_a_wrong_variable_is_named(environ: dict[str, str], message: str) -> None:
    given_options = {} if {"KVKERN_SOCKET", "KVKERN_CAPACITY"} & set(environ) else {"capacity": "1GiB"}
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.resolve(given_options, "the options", environ)


@pytest.mark.parametrize(("text", "message"), [
    ("threads = 4\ncapactiy = 1\n", "unknown key 'capactiy' in {} line 2; did you mean 'capacity'?"),
    ("[daemon]\nthreads = 4\n", "unknown key 'threads' in {} line 2, in [daemon]"),
    ("[engine]\nfair = true\n", "unknown key 'fair' in {} line 2, in [engine]"),
    ("[deamon]\nfair = true\n", "unknown key 'deamon' in {}"),
    ("engine = 5\n", "engine in {} is of the type int; expected a table"),
    ("threads = \n", "{} is no TOML"),
    ("\n\nthreads = '4'\n", "threads in {} line 3 is '4' (str); expected int"),
    ("[engine]\nthreads = 99\n", "(threads comes from {} line 2)"),
    ("salt = 5\n", "salt in {} line 1 is of the type int; expected str"),
    ("capacity = " + "[" * 5000, "{} has a number of thousands of digits, or values nested"),
    ("[engine]\nthreads" + ".a" * 2000 + " = 1\n", "{} has a number of thousands of digits, or values nested"),
    ("threads = " + "9" * 5000, "{} has a number of thousands of digits, or values nested"),
    ("threads = 0x" + "f" * 9000, "{} has a number of thousands of digits, or values nested"),
    ("[engine]\nremote = 'file:///x'\nremote_timeout = " + "9" * 4000, "remote_timeout in {} line 3 is a number of 13288 bits"),
    ("hbm = " + "9" * 4000, "hbm in {} line 1 is a number of 13288 bits; it must lie in"),
], ids=lambda text: text[:60])  # fmt: skip
def test_a_wrong_key_of_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message.format(path))):
        Config.resolve({"capacity": "1GiB"}, "the options", {"KVKERN_CONFIG": str(path)})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "big", b"#" * (1 << 21)), (tmp_path / "bytes", b"\xff\xfe")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="which cannot be read"):
            gather(Reader.ENGINE, {}, "x", path, {})
    with pytest.raises(ConfigError, match="--config is"):
        gather(Reader.ENGINE, {}, "x", tmp_path, {})


@pytest.mark.parametrize("name", [
    "KVKERN_SERVICE_HOST", "KVKERN_SERVICE_PORT", "KVKERN_SERVICE_PORT_RPC", "KVKERN_PORT", "KVKERN_PORT_9600_TCP",
    "KVKERN_PORT_9600_TCP_ADDR", "KVKERN_CACHE_RPC_SERVICE_HOST", "KVKERN_CACHE_RPC_PORT_9600_TCP_PROTO", "KVKERN_METRICS_PORT",
])  # fmt: skip
def test_variables_of_a_kubernetes_service_are_let_alone(name: str) -> None:
    """Kubernetes sets them in every container, for a Service whose name begins with kvkern."""
    assert not gather(Reader.ENGINE, {}, "x", None, {name: "tcp://10.0.0.7:9600"})


def test_known_variables_that_are_no_options() -> None:
    environ = dict.fromkeys(("KVKERN_NVTX", "KVKERN_REQUIRE", "KVKERN_SOAK_SECONDS", "KVKERN_BUILD_CUDA"), "1")
    assert not gather(Reader.ENGINE, {}, "x", None, environ | {"KVKERN_CAPACITY": "", "KVKERNEL": "x"})


def resolve(options: dict[str, Any], **environ: str) -> Config:
    return Config.resolve(options, "the options", environ)


def test_a_better_source_displaces_what_contradicts_it(tmp_path: Path) -> None:
    assert (
        resolve(
            {"socket": "/s"}, KVKERN_CAPACITY="1GiB", KVKERN_POLICY="lru", KVKERN_REMOTE="file:///x"
        ).capacity_nbytes
        == 0
    )
    assert resolve({"capacity": "1GiB"}, KVKERN_SOCKET="/s") == Config(1 << 30)
    path = tmp_path / "f"
    path.write_text('socket = "/s"\n[daemon]\ncapacity = "1GiB"\npolicy = "lru"\n')
    assert resolve({}, KVKERN_CONFIG=str(path)) == Config(socket="/s")
    assert resolve({}, KVKERN_CONFIG=str(path), KVKERN_CAPACITY="1MiB") == Config(1 << 20)
    with pytest.raises(
        ConfigError, match="policy in the options and socket in the variable KVKERN_SOCKET exclude each other"
    ):
        resolve({"policy": "lru"}, KVKERN_SOCKET="/s")


def test_without_anything_the_error_is_the_same_as_ever() -> None:
    with pytest.raises(ConfigError, match="no capacity in the options; set how much memory to use"):
        resolve({})


def test_a_list_that_is_none_says_once_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('quota = "x"\n')
    with pytest.raises(ConfigError, match=re.escape(f"quota in {path} line 1 is 'x' (str); expected list of str")):
        converted(gather(Reader.DAEMON, {}, "x", path, {}))


def test_secrets_are_not_in_messages() -> None:
    for environ in ({"KVKERN_SALT": "hunter2"}, {"KVKERN_REMOTE": "redis://me:hunter2@h", "KVKERN_PERSIST": "some"}):
        with pytest.raises(ConfigError) as caught:
            resolve({"capacity": 1, "threads": 99}, **environ)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['[[engine]]\nsalt = "hunter2"\n', 'engine = "hunter2"\n', '[[daemon]]\nremote = "hunter2"\n']
)
def test_secrets_in_what_is_no_table_are_not_in_messages(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a table") as caught:
        gather(Reader.ENGINE, {}, "x", path, {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["threads", "remote_timeout", "capacity"])
def test_numbers_that_python_cannot_show(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} .*is a number of 20001 bits"):
        Config.parse({"capacity": "1GiB", "remote": "file:///x", name: 1 << 20000})


def default_of(option: Option, reader: Reader) -> Any:
    value = option.default_of(reader)
    return None if value is None else option.convert(value, "the table")


def test_the_table_says_the_defaults_of_the_objects() -> None:
    engine = Config.parse({"capacity": 1})
    fields = {"remote_queue": "remote_queue_nbytes", "hbm": "hbm_nbytes"}
    for option in OPTIONS:
        if option.engine and option.name != "capacity":
            value = getattr(engine, fields.get(option.name, option.name))
            assert value == (default_of(option, Reader.ENGINE) or type(value)()), option.name
    settings = gather(Reader.DAEMON, {"capacity": 1}, "x", None, {})
    assert NodeConfig.from_settings(settings) == NodeConfig(Path("/run/kvkern.sock"), 1)


def test_a_daemon_takes_every_option_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 32)
    path = tmp_path / "f"
    path.write_text(f"""
        capacity = "1GiB"
        socket = "{tmp_path}/s"
        name = "a"
        arena_dir = "{tmp_path}"
        prefault = false
        dump_arena = true
        allow_uid = [1]
        allow_gid = [2, 3]
        operator_uid = [4]
        operator_gid = [5]
        quota = ["m=1MiB", "*=2MiB"]
        tenant_quota = 4096
        fair = true
        policy = "lru"
        policy_state = "{tmp_path}/state"
        remote = "file://{tmp_path}/store"
        persist = "all"
        remote_queue = "1MiB"
        remote_timeout = 3
        drain = 1
        verbose = true
        log_format = "json"
    """)
    config = NodeConfig.from_settings(gather(Reader.DAEMON, {}, "x", path, {}))
    assert (config.capacity_nbytes, config.name, config.arena_dir, config.prefault, config.dump_arena) == (
        1 << 30, "a", tmp_path, False, True,
    )  # fmt: skip
    assert (config.uids, config.gids, config.operator_uids, config.operator_gids) == ({1}, {2, 3}, {4}, {5})
    assert (dict(config.quotas.models), config.quotas.tenant, config.quotas.fair) == (
        {"m": 1 << 20, "*": 2 << 20},
        4096,
        True,
    )
    assert (config.policy, config.policy_state, config.drain_s) == ("lru", tmp_path / "state", 1.0)
    assert config.remote is not None
    assert (config.remote.persist, config.remote.queue_nbytes, config.remote.timeout_s) == ("all", 1 << 20, 3.0)
    assert (config.verbose, config.log_format) == (True, "json")
