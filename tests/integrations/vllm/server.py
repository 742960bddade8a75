"""`vllm serve` with kvkern as a user starts it: another process, reached over HTTP by the official client."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kvkern.arena.slots import MAGIC
from tests.integrations.vllm.engine import BLOCK_TOKENS, VOCAB, Reply, build_model
from tests.remote.required_servers import free_port

VLLM = Path(sys.executable).with_name("vllm")  # the command that README and docs use
START_S = 600  # on a machine that others use too
_SERIES = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$")


def write_word_tokenizer(path: Path, special: dict[str, int] | None = None) -> None:
    """Write a tokenizer of one word a token to a model's folder: `t7` is token 7. `special` words have tokens of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = special or {}
    vocabulary = {f"t{i}": i for i in range(VOCAB) if i not in special.values()} | special
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    words.save(str(path / "tokenizer.json"))
    chat = "{% for m in messages %}{{ m.content }} {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2", "chat_template": chat}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def build_served_model(path: Path) -> str:
    """Write the tests' Llama with a tokenizer, which a server needs. Return its path."""
    name = build_model("llama", path)
    write_word_tokenizer(path)
    return name


def transfer_config(**options: Any) -> dict[str, Any]:
    """Return the `--kv-transfer-config` of the docs."""
    return {
        "kv_connector": "KvkernConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvkern": options},
    }  # fmt: skip


class Server:
    """A running `vllm serve`. Leaving the context ends it with SIGTERM."""

    def __init__(self, model: str, transfer: dict[str, Any] | None, log: Path, *args: str, **env: str) -> None:
        self.log_path, self.model = log, model
        self.port = free_port()
        options = {
            "host": "127.0.0.1", "port": self.port, "dtype": "float32", "block-size": BLOCK_TOKENS,
            "num-gpu-blocks-override": 40, "kv-cache-memory-bytes": 64 << 20, "max-model-len": 1024,
            "max-num-batched-tokens": 256, "max-num-seqs": 8, "seed": 0, "shutdown-timeout": 0,
        }  # fmt: skip
        command = [str(VLLM), "serve", model, "--enforce-eager", "--enable-prompt-tokens-details"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        own = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self._start([*command, *args], own | env)

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        with self.log_path.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | env, start_new_session=True
            )

    @property
    def log(self) -> str:
        """All that the server has printed."""
        return self.log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises if it ends before."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self.process.returncode}:\n{self.log[-6000:]}")
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise TimeoutError(f"vllm serve was not ready after {START_S} s:\n{self.log[-6000:]}")

    def client(self) -> Any:
        """Return the official client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def one(self, tokens_in: list[int], tokens: int = 4, rank: int | None = None, **extra: Any) -> Reply:
        """Return the greedy reply to a prompt, of a certain data parallel rank."""
        answer = self.client().completions.create(
            model=self.model, prompt=tokens_in, max_tokens=tokens, temperature=0, logprobs=1,
            extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
            extra_headers={} if rank is None else {"X-data-parallel-rank": str(rank)},
        )  # fmt: skip
        choice = answer.choices[0]
        details = answer.usage.prompt_tokens_details
        return Reply(
            tuple(choice.token_ids), tuple(choice.logprobs.token_logprobs), (details and details.cached_tokens) or 0
        )

    def post(self, path: str, body: Any = None) -> tuple[int, str]:
        """Post JSON. Returns (status, text)."""
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def reset(self, external: bool = False) -> None:
        """Empty vLLM's own prefix cache, and with `external` kvkern's too. Tries again while requests hold blocks."""
        for _ in range(50):
            status, text = self.post(f"/reset_prefix_cache?reset_external={'true' if external else 'false'}")
            if status == 200 and "false" not in text.lower():
                return
            time.sleep(0.1)
        raise AssertionError(f"/reset_prefix_cache answered {status}: {text}")

    def metrics(self) -> dict[str, float]:
        """Return every series of /metrics by its name with labels. Fails if a series appears twice."""
        found: dict[str, float] = {}
        for line in self.metrics_text().splitlines():
            if match := _SERIES.match(line):
                assert match[1] not in found, f"{match[1]} appears twice"
                found[match[1]] = float(match[2])
        return found

    def counter(self, name: str) -> float:
        """Return the sum of a counter over all engines. A series appears with its first count, its description at once."""
        assert f"# HELP {name}_total " in self.metrics_text(), f"/metrics has no {name}"
        return sum(value for series, value in self.metrics().items() if series.partition("{")[0] == f"{name}_total")

    def metrics_text(self) -> str:
        """Return /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def processes(self) -> list[int]:
        """Return the server's process and all its descendants."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def flip_bytes(self) -> int:
        """Flip a byte in the payload of every READY slot of the server's arenas. Returns how many."""
        flipped = 0
        for path in self._arenas():
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                flipped += _flip(memory)
        return flipped

    def shared_memory(self) -> set[Path]:
        """Return the files of /dev/shm that the server's processes map, whether they have a name now or not."""
        found = set()
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if "/dev/shm/" in line:
                        found.add(Path("/dev/shm/" + line.partition("/dev/shm/")[2].removesuffix(" (deleted)")))
        return found

    def _arenas(self) -> Iterator[str]:
        """Paths of the open arenas. Their names are unlinked, so the way to them leads through a process that has them open."""
        seen = set()
        for pid in self.processes():
            with suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        inode = link.stat().st_ino
                        if "/kvkern-" in os.readlink(link) and link.stat().st_size and inode not in seen:
                            seen.add(inode)
                            yield str(link)

    def stop(self, seconds: float = 60) -> float:
        """End the server with SIGTERM. Returns how long it took until no process was left. Raises if any is left in time."""
        processes, begin = self.processes(), time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        while time.monotonic() - begin < seconds:
            self.process.poll()
            left = [pid for pid in processes if _alive(pid)]
            if not left:
                return time.monotonic() - begin
            time.sleep(0.05)
        raise AssertionError(f"{seconds} s after SIGTERM these processes are left: {left}\n{self.log[-4000:]}")

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self._kill()

    def _kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _flip(memory: mmap.mmap) -> int:
    flipped, magic = 0, int(MAGIC).to_bytes(8, "little")
    at = memory.find(magic)
    while at >= 0:
        header_nbytes = int.from_bytes(memory[at + 12 : at + 16], "little")
        if at % 4096 == 0 and header_nbytes % 4096 == 0 and header_nbytes:
            memory[at + header_nbytes + 1234] ^= 4
            flipped += 1
        at = memory.find(magic, at + 8)
    return flipped
