"""An engine in a container with 50 MB to spare, while it loads and stores hundreds: it lives, and its bytes are right."""

from __future__ import annotations

import subprocess
import sys

from tests.memory_group import memory_group
from tests.node.conftest import ROOT, MakeDaemon

ENGINE = """
import sys
from pathlib import Path
import torch
import kvkern
socket, group, limit, used = map(Path, sys.argv[1:])
(group / "cgroup.procs").write_text("0")
torch.set_num_threads(1)
tensors = [torch.randint(-9999, 9999, (2, 64, 16, 8, 64), dtype=torch.int16).view(torch.bfloat16) for _ in range(4)]
layout = kvkern.layout.flash_attention(tensors)
cache = kvkern.open_cache(layout, tensors, model="m", weights="w", socket=str(socket), threads=2)
def prompt(number):  # 4 MiB of KV
    return [1000 * number + i for i in range(30 * 16)]

table, elsewhere = list(range(30)), list(range(31, 61))
assert cache.store(prompt(0), table) == 30
limit.write_text(str(int(used.read_text()) + (50 << 20)))
for number in range(100):
    tokens = prompt(number)
    with cache.match(tokens) as hit:
        assert cache.load(hit, elsewhere) == len(tokens), hit.num_tokens
    for tensor in tensors:
        words = tensor.view(torch.int16)
        assert torch.equal(words[:, table], words[:, elsewhere])
        words[:, elsewhere] = 0
    assert cache.store(prompt(number + 1), table) == 30
cache.close()
print("ended well")
"""


def test_a_load_with_little_memory_to_spare(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("64MiB").start()
    with memory_group(2 << 30) as group:
        command = [sys.executable, "-c", ENGINE, str(daemon.socket), *map(str, (group.path, group.limit, group.used))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr[-4000:]
