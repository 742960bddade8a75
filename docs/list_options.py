"""Draws docs/configuration.md and docs/published_deployment.md from kvkern/config: python docs/list_options.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvkern.config.environment import OTHER_PREFIXES, OTHER_VARIABLES
from kvkern.config.options import OPTIONS, Option, Reader
from kvkern.config.published import SECOND_SWITCH, SWITCH, VARIABLES, Family

CONFIGURATION = """# Configuration

`python docs/list_options.py` draws this page from `kvkern/config/`.

An engine's cache and the daemon have one configuration each: a frozen object, checked when it is made. Every option can
be given in three places. The first that has a value counts:

1. **Explicitly**: in vLLM's `kv_connector_extra_config["kvkern"]`, as an argument of `kvkern.open_cache`, or as an
   option of `kvkern serve`.
2. **As a variable** `KVKERN_NAME`. An empty variable counts as not set. Lists are separated by commas or blanks; yes
   and no are 1, true, yes, on and 0, false, no, off. The variables of the [published
   deployment](published_deployment.md) come right after these.
3. **In a file** in TOML: `kvkern serve --config FILE`, or the file that `KVKERN_CONFIG` names, for engines and the
   daemon. What stands above all tables is for both; a key of `[engine]` or `[daemon]` is preferred to the same key
   above.

```toml
socket = "/run/kvkern/kvkern.sock"

[engine]
connect_s = 30

[daemon]
capacity = "64GiB"
quota = ["llama-*=40GiB"]
metrics = "127.0.0.1:8080"
```

`kvkern config --show` prints what is in force, and where each value came from: option, variable with its name, file
with the line, or default. `--json` prints the same for programs, and `NAME=VALUE` tries an option. Salts and passwords
are blanked. Without `--show` it only checks.

Commands that ask a daemon, such as `kvkern stat`, take `--socket` and `--daemon-uid` from the same two variables.

An unknown option, variable or key is an error that names the nearest known name. So is a value that cannot be used, and
the error names where it came from. Variables that Kubernetes sets for a Service whose name begins with `kvkern`
(`KVKERN_PORT_9600_TCP`) are let alone.

**What excludes what.** An engine with `socket` uses the daemon's capacity, policy and remote store. So `capacity`,
`hbm`, `policy`, `remote` and what belongs to it are an error beside `socket`, if they come from an equally good or a
better place. From a worse place they are meant for something else, and are not used: an engine with a `socket` among
its options does not mind `KVKERN_CAPACITY`. An explicit `capacity` is preferred to a `socket` from a worse place. An
engine for which nothing says how large the cache is, or where, does not start.

vLLM starts kvkern only if its `--kv-transfer-config` names `KvkernConnector`, or if the published deployment's
variables do. `KVKERN_*` variables alone switch nothing on.

## Options
"""
VARIABLES_HEAD = """
## Variables that are no options

| variable | read for |
|---|---|
"""
PUBLISHED = """# The published deployment

`python docs/list_options.py` draws this page from `kvkern/config/published.py`.

kvkern follows a published deployment of vLLM with a cache daemon beside it. That deployment switches the cache on by
environment variables alone. With kvkern installed beside vLLM, its engine side works as published, without another
option:

```
export VLLM_USE_VINEYARD_CACHE=1 AIBRIX_LLM_KV_CACHE=1
export AIBRIX_LLM_KV_CACHE_SOCKET=/var/run/vineyard.sock AIBRIX_LLM_KV_CACHE_CHUNK_SIZE=16
python3 -m vllm.entrypoints.openai.api_server --port 8000 --uvicorn-log-level warning --model MODEL --served-model-name NAME \\
  --max-model-len 8192 --enable-prefix-caching --disable-fastapi-docs
```

The daemon is `kvkern serve --socket /var/run/vineyard.sock --capacity 64GiB`. Engines and daemon must see the same
folder of the socket.

kvkern's plugin (`vllm.general_plugins`) fills in vLLM's transfer configuration before vLLM checks it. If `VLLM_PLUGINS`
is set, add `kvkern` to it. vLLM's log says for every variable what it does, or why it has no effect.

- **On and off.** The cache is on if `VLLM_USE_VINEYARD_CACHE` and `AIBRIX_LLM_KV_CACHE` are both on. `0`, `false`,
  `no`, `off` and an empty value mean off; in the original deployment any value switched on. If one is on alone, a
  warning says that there is no cache.
- **Your own options win.** A `--kv-transfer-config` or `--kv-offloading-size` on the command line counts, and a line
  says that the variables do not. `KVKERN_*` variables are preferred to the published ones: `KVKERN_METRICS_PORT=9100`
  moves the second port.
- **Chunks.** A chunk is a whole number of vLLM's blocks. vLLM's blocks have 16 tokens on most GPUs, as the published
  chunk has. On CPUs they are multiples of 32, 128 if nobody asks: set `AIBRIX_LLM_KV_CACHE_CHUNK_SIZE=32` there, and
  kvkern chooses blocks of 32. A size that does not fit is an error that names sizes that do.
- **No daemon.** The engine waits `connect_s` seconds (`KVKERN_CONNECT_S`, 300), and says so every 10 s. Then it serves
  without a cache. When the daemon comes, scheduler and workers connect, each worker proves its copies, and from then on
  requests are stored and loaded. It is an error at the start only if somebody must act: the socket may not be opened,
  the daemon does not let this user in, is another user's, or is another model's
  ([node.md](node.md#use-it-from-an-engine)).
- **The RPC endpoint** is asked once, at start, which daemon it is (`GET /healthz` of `kvkern serve --rpc`). If it is
  not the daemon on the socket, one warning names both; if it does not answer, one line says so. The engine needs it for
  nothing else.
- **Port 8080.** With `VINEYARD_CACHE_METRICS_ENABLED` the API server serves its `/metrics` there too, on all
  interfaces, because the published Service has it scraped. If the port is taken, one warning says so and the engine
  goes on. The published metrics' names are exported beside kvkern's ([metrics.md](metrics.md)).
- **Other engines on the same daemon** share with these if they have the same salt: `"salt": "aibrix"`, or what
  `AIBRIX_LLM_KV_CACHE_KV_CACHE_NS` says.
- **Hash seed.** vLLM 0.32 and newer name blocks alike in all engines. For older releases kvkern sets `PYTHONHASHSEED=0`
  if it is not set.

"""
FAMILIES = {
    Family.VINEYARD: """## The deployment's variables

| variable | what kvkern does with it | why |
|---|---|---|
| `{first}`, `{second}` | both on: `KvkernConnector`, with `kv_load_failure_policy` `recompute` | the deployment's switches |
""",
    Family.OFFLOADING: """
## The samples' variables

Later samples of the same project name a connector, `--kv-transfer-config '{{"kv_connector":
"AIBrixOffloadingConnectorV1Type3", "kv_role": "kv_both"}}'`. kvkern takes its place, whatever follows
`AIBrixOffloadingConnector`, and reads these variables. If the real connector is there, kvkern leaves it alone: a plugin
has registered its name in vLLM, or `kv_connector_module_path` says where it is. Their first level is a cache in the
engine's own memory; with `KVKERN_SOCKET` the node's daemon is used instead.

| variable | what kvkern does with it | why |
|---|---|---|
""",
}
OTHERS = """
Any other variable that begins with {prefixes} is accepted with a line in the log: kvkern has nothing like it.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _default(option: Option) -> str:
    if option.daemon and option.engine and option.daemon_default is not None:
        return f"engine: {_value(option.default) or 'none'}, daemon: {_value(option.daemon_default)}"
    return _value(option.default_of(option.readers[0]))


def _row(option: Option) -> str:
    readers = "both" if len(option.readers) == 2 else option.readers[0]
    cells = (
        f"`{option.name}`", f"`{option.variable}`", f"`{option.flag}`" if Reader.DAEMON in option.readers else "",
        str(option.kind).lower(), _default(option), option.unit, readers,
        _cell(option.help) + (" A secret." if option.secret else ""),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def configuration() -> str:
    """Return the text of docs/configuration.md."""
    names = ("name", "variable", "`kvkern serve`", "type", "default", "unit", "read by", "what it does")
    lines = [CONFIGURATION.rstrip("\n"), "", f"| {' | '.join(names)} |", "|" + "---|" * len(names), *map(_row, OPTIONS)]
    others = [f"| `{name}` | {text} |" for name, text in OTHER_VARIABLES.items()]
    others += [f"| `{prefix}*` | {text} |" for prefix, text in OTHER_PREFIXES.items()]
    return "\n".join(lines) + "\n" + VARIABLES_HEAD + "\n".join(others) + "\n"


def published() -> str:
    """Return the text of docs/published_deployment.md."""
    text = PUBLISHED
    prefixes = {
        Family.VINEYARD: "`AIBRIX_LLM_KV_CACHE_` or `VINEYARD_`", Family.OFFLOADING: "`AIBRIX_KV_CACHE_OL_`",
    }  # fmt: skip
    for family, variables in VARIABLES.items():
        text += FAMILIES[family].format(first=SWITCH, second=SECOND_SWITCH)
        text += "".join(f"| `{each.name}` | {_cell(each.does)} | {_cell(each.why)} |\n" for each in variables)
        text += OTHERS.format(prefixes=prefixes[family])
    return text


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "configuration.md").write_text(configuration(), encoding="utf-8")
    (here / "published_deployment.md").write_text(published(), encoding="utf-8")
