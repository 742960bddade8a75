"""One file, many processes: creating, attaching, refusing, and what is left when all processes have ended."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvkern.arena import file as arena_module
from kvkern.arena.file import Arena, ArenaSpec, create_or_attach
from kvkern.arena.folder import arena_prefix, sweep_stale
from kvkern.arena.process_identity import boot_id, process_start
from kvkern.arena.slots import PAGE, SlotGeometry, SlotState
from kvkern.assemble import open_arena
from kvkern.config import Config, parse_nbytes
from kvkern.errors import ArenaError, ConfigError, KvkernError

ROOT = Path(__file__).resolve().parents[2]
GEOMETRY = SlotGeometry(part_nbytes=5000, max_planes=3, world_size=2)
SPEC = ArenaSpec(GEOMETRY, num_slots=5)

OTHER = """
import sys
from pathlib import Path
from kvkern.arena.file import ArenaSpec, create_or_attach
from kvkern.arena.slots import SlotGeometry
path, expected = Path(sys.argv[1]), int(sys.argv[2])
arena = create_or_attach(ArenaSpec(SlotGeometry(5000, 3, 2), 5), path, expected)
print("attached", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Other:
    """Another process that has the arena mapped and runs lines of Python on it."""

    def __init__(self, path: Path, expected: int = 0) -> None:
        command = [sys.executable, "-c", OTHER, str(path), str(expected)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("attached")

    def run(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self._expect("done")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def _expect(self, word: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline().strip() == word


@contextmanager
def other(path: Path, expected: int = 0) -> Iterator[Other]:
    process = Other(path, expected)
    try:
        yield process
    finally:
        process.end()


@contextmanager
def opened(path: Path, spec: ArenaSpec = SPEC, expected: int = 0) -> Iterator[Arena]:
    arena = create_or_attach(spec, path, expected)
    try:
        yield arena
    finally:
        arena.close()


def test_create(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as arena:
        assert (tmp_path / "a").stat().st_size == SPEC.nbytes
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600  # a process that maps the file can read all of it
        assert arena.headers.shape == (5,)
        assert (arena.headers["state"] == SlotState.FREE).all()
        assert arena.bytes.size == SPEC.nbytes
        assert not arena.bytes[PAGE:].any()


def test_parts_of_all_ranks_and_headers_are_disjoint(tmp_path: Path) -> None:
    """Each byte of the file behind its first page belongs to one header or one part."""
    with opened(tmp_path / "a") as arena:
        owner = np.zeros(SPEC.nbytes, dtype=np.uint8)
        base = arena.bytes.ctypes.data
        for rank in range(2):
            parts = arena.parts(rank)
            assert parts.shape == (5, 2 * PAGE)
            assert parts.ctypes.data % PAGE == base % PAGE
            for row in parts:
                owner[row.ctypes.data - base :][: row.size] += 1
        for slot in range(5):
            header = arena.headers[slot : slot + 1]
            owner[header.ctypes.data - base :][:PAGE] += 1
        assert (owner[PAGE:] == 1).all()
        assert not owner[:PAGE].any()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world(tmp_path: Path, rank: int) -> None:
    with (
        opened(tmp_path / "a") as arena,
        pytest.raises(ArenaError, match=rf"rank {rank} is outside \[0, 2\), the ranks of arena"),
    ):
        arena.parts(rank)


def test_mark_bad(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as arena:
        arena.mark_bad(np.array([1, 3]))
        arena.mark_bad(np.zeros(0, np.int64))
        assert arena.headers["state"].tolist() == [0, 3, 0, 3, 0]


def test_another_process_sees_the_same_bytes(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as arena, other(tmp_path / "a") as peer:
        peer.run("arena.parts(1)[4, 4999] = 77; arena.headers['generation'][3] = 9")
        assert arena.parts(1)[4, 4999] == 77
        assert arena.headers["generation"][3] == 9
        arena.headers["state"][0] = SlotState.BAD
        peer.run("assert arena.headers['state'][0] == 3")
    assert (tmp_path / "a").exists()  # never unlinked here: expected is 0


def test_attaching_keeps_what_is_there(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as arena:
        arena.parts(0)[2] = 5
        with opened(tmp_path / "a") as again:
            assert (again.parts(0)[2] == 5).all()
    with opened(tmp_path / "a") as later:
        assert (later.parts(0)[2] == 5).all()


@pytest.mark.parametrize("change", [
    {"geometry": replace(GEOMETRY, part_nbytes=5001)},
    {"geometry": replace(GEOMETRY, max_planes=4)},
    {"geometry": replace(GEOMETRY, world_size=1)},
    {"num_slots": 4},
    {"identity": b"x" * 32},
], ids=lambda c: next(iter(c)))  # fmt: skip
def test_another_geometry_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    word = "identity" if "identity" in change else "geometry"
    with opened(tmp_path / "a") as arena:
        arena.parts(0)[:] = 7
        with pytest.raises(ArenaError, match=f"another {word}: found ArenaSpec"):
            create_or_attach(replace(SPEC, **change), tmp_path / "a")
        assert (arena.parts(0) == 7).all()
    with opened(tmp_path / "a"):  # the refused process left no lock behind
        pass


@pytest.mark.parametrize("content", [b"x", b"not an arena" * 1000, bytes(SPEC.nbytes)], ids=["short", "text", "zeros"])
def test_a_file_that_is_no_arena_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ArenaError, match="no finished kvkern arena"):
        create_or_attach(SPEC, path)
    assert path.read_bytes() == content


def test_another_version_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as arena:
        arena.bytes[8] = 9
        with pytest.raises(ArenaError, match="has version 9, this kvkern reads 2"):
            create_or_attach(SPEC, tmp_path / "a")


def test_a_truncated_arena_is_refused(tmp_path: Path) -> None:
    """Touching a page behind the end of a file would be a SIGBUS."""
    with opened(tmp_path / "a"):
        pass
    os.truncate(tmp_path / "a", SPEC.nbytes - PAGE)
    with pytest.raises(ArenaError, match=r"not whole: it has 102400 bytes instead of 106496"):
        create_or_attach(SPEC, tmp_path / "a")


def test_the_last_expected_process_unlinks(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with opened(path, expected=2) as arena:
        assert path.exists()
        with other(path, expected=2) as peer:
            assert not path.exists()
            peer.run("arena.parts(0)[0, 0] = 1")
            assert arena.parts(0)[0, 0] == 1
        assert arena.parts(0)[0, 0] == 1  # the memory lives as long as a process maps it


def test_two_engines_of_one_name_do_not_make_up_one_arena(tmp_path: Path) -> None:
    """Both have a worker in seat 0 and a scheduler in seat 1. The second worker is refused, and the first engine goes on."""
    path = tmp_path / "a"
    worker = create_or_attach(SPEC, path, expected=2, seat=0)
    with pytest.raises(ArenaError, match=r"seat 0 already.*`engine_id` of its own"):
        create_or_attach(SPEC, path, expected=2, seat=0)
    scheduler = create_or_attach(SPEC, path, expected=2, seat=1)
    assert not path.exists()
    assert worker.file_id() == scheduler.file_id()
    for arena in (worker, scheduler):
        arena.close()
    with pytest.raises(ArenaError, match=r"seat 1024 is outside \[0, 1024\)"):
        create_or_attach(SPEC, path, expected=2000, seat=1024)


def test_alone_the_name_is_gone_at_once(tmp_path: Path) -> None:
    """Embedded in one process, the arena has no name to remove later, even after kill -9."""
    with opened(tmp_path / "a", expected=1):
        assert list(tmp_path.iterdir()) == []


def test_waiting_attachers_wait_for_the_creator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attacher sees an unfinished file, and only one of the four creates it."""
    made, started = [], threading.Event()
    slow = threading.Event()
    real = arena_module._create

    def create(*args: object) -> object:
        made.append(threading.get_ident())
        started.set()
        slow.wait(10)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(arena_module, "_create", create)
    arenas: list[Arena] = []
    threads = [threading.Thread(target=lambda: arenas.append(create_or_attach(SPEC, tmp_path / "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    assert arenas == []
    slow.set()
    for thread in threads:
        thread.join(30)
    assert len(arenas) == 4
    assert len(made) == 1
    arenas[0].parts(0)[1, 1] = 9
    assert all(a.parts(0)[1, 1] == 9 for a in arenas)
    for a in arenas:
        a.close()


def test_a_creator_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_LOCK_WAIT_S", 0.1)
    with (
        open(tmp_path / "a", "w+b") as file,
        arena_module._record_lock(file.fileno(), tmp_path / "a"),
        pytest.raises(ArenaError, match="still being created by another process after 0 s"),
    ):
        create_or_attach(SPEC, tmp_path / "a")


def test_a_creator_killed_half_way_is_an_error_and_then_swept(tmp_path: Path) -> None:
    path = tmp_path / "kvkern-t-a"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 3 * PAGE)  # what kill -9 leaves
    with pytest.raises(ArenaError, match="no finished kvkern arena"):
        create_or_attach(SPEC, path)
    assert sweep_stale(tmp_path, "kvkern-t-") == [path]
    with opened(path):
        pass


def test_sweep_after_kill_and_never_alive(tmp_path: Path) -> None:
    dead, alive, foreign = (tmp_path / name for name in ("kvkern-t-dead", "kvkern-t-alive", "other-dead"))
    foreign.touch()
    with other(alive) as peer, opened(tmp_path / "kvkern-t-mine"):
        victim = Other(dead)
        assert sweep_stale(tmp_path, "kvkern-t-") == []
        victim.kill()
        assert sweep_stale(tmp_path, "kvkern-t-") == [dead]
        assert sweep_stale(tmp_path, "kvkern-t-") == []
        peer.run("arena.parts(0)[0, 0] = 1")
    assert {p.name for p in tmp_path.iterdir()} == {"kvkern-t-alive", "kvkern-t-mine", "other-dead"}
    assert sorted(sweep_stale(tmp_path, "kvkern-t-")) == [alive, tmp_path / "kvkern-t-mine"]


def test_a_view_keeps_an_arena_alive_after_close(tmp_path: Path) -> None:
    """`close` closes the descriptor. The lock goes with the last view, so that no process removes memory in use."""
    arena = create_or_attach(SPEC, tmp_path / "kvkern-t-a")
    parts = arena.parts(0)
    arena.close()
    arena.close()
    parts[0] = 3
    del arena
    assert sweep_stale(tmp_path, "kvkern-t-") == []
    del parts
    assert len(sweep_stale(tmp_path, "kvkern-t-")) == 1


@pytest.mark.parametrize("kind", ["folder", "socket"])
def test_sweep_ignores_folders_and_sockets(tmp_path: Path, kind: str) -> None:
    """All users share /dev/shm: a folder or socket with such a name must not keep an engine from starting."""
    import socket

    path = tmp_path / "kvkern-t-x"
    if kind == "folder":
        path.mkdir()
    else:
        here = os.getcwd()
        os.chdir(tmp_path)  # socket names are short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    assert sweep_stale(tmp_path, "kvkern-t-") == []
    assert path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: only root can make a file of another user")
def test_an_arena_of_another_user_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "a"):
        pass
    os.chown(tmp_path / "a", 65534, 65534)
    with pytest.raises(ArenaError):
        create_or_attach(SPEC, tmp_path / "a")


def test_opening_sweeps_first(tmp_path: Path) -> None:
    dead = Other(tmp_path / f"{arena_prefix(os.getuid())}dead")
    dead.kill()
    lines: list[str] = []
    config = Config.parse({"capacity": "1MiB", "arena_dir": str(tmp_path)})
    arena = open_arena(config, GEOMETRY, "mine", expected=0, progress=lines.append)
    assert [p.name for p in tmp_path.iterdir()] == [f"kvkern-{os.getuid()}-mine"]
    assert "removed" in lines[0]
    assert "ready after" in lines[-1]
    assert arena.spec.num_slots == ((1 << 20) - PAGE) // GEOMETRY.slot_nbytes
    assert arena.spec.nbytes <= 1 << 20
    arena.close()


@pytest.mark.parametrize("spare", [0, 1, GEOMETRY.slot_nbytes - 1])
def test_capacity_is_rounded_down_to_slots(spare: int) -> None:
    spec = ArenaSpec.for_capacity(GEOMETRY, PAGE + 3 * GEOMETRY.slot_nbytes + spare)
    assert spec.num_slots == 3


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + GEOMETRY.slot_nbytes - 1])
def test_a_capacity_below_one_slot(nbytes: int) -> None:
    with pytest.raises(ConfigError, match=r"holds no slot: one chunk of this model needs 24 KiB .*raise the capacity"):
        ArenaSpec.for_capacity(GEOMETRY, nbytes)


def test_the_largest_capacity_that_can_be_written_down_has_no_room(tmp_path: Path) -> None:
    spec = ArenaSpec.for_capacity(GEOMETRY, parse_nbytes("64TiB"))
    with pytest.raises(ArenaError, match="Lower `capacity`"):
        create_or_attach(spec, tmp_path / "a")


def test_attachers_that_waited_for_a_failed_creator_meet_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creator fails and unlinks the file. A process that waited on the old file must not map it alone."""
    real, entered, go = arena_module.allocate, threading.Event(), threading.Event()

    def allocate(*args: object) -> None:
        if not entered.is_set():
            entered.set()
            go.wait(10)
            raise ArenaError("no room")
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(arena_module, "allocate", allocate)
    arenas: list[Arena] = []

    def first() -> None:
        with pytest.raises(ArenaError):
            create_or_attach(SPEC, tmp_path / "a")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert entered.wait(10)
    threads.append(threading.Thread(target=lambda: arenas.append(create_or_attach(SPEC, tmp_path / "a"))))
    threads[1].start()
    while not locked_by_two(tmp_path / "a"):
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join(30)
    arenas.append(create_or_attach(SPEC, tmp_path / "a"))
    arenas[0].parts(0)[0, 0] = 9
    for arena in arenas:
        arena.close()
    assert arenas[1].parts(0)[0, 0] == 9


def locked_by_two(path: Path) -> bool:
    """Return True if two open files of this process name the arena: the waiting thread has opened it."""
    names = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    ]
    return names.count(str(path)) >= 2


def test_without_prefault_all_pages_are_reserved(tmp_path: Path) -> None:
    """A page that the file system has no room for when an engine touches it would end the engine with SIGBUS."""
    arena = create_or_attach(SPEC, tmp_path / "a", prefault=False)
    assert (tmp_path / "a").stat().st_size == SPEC.nbytes
    assert (tmp_path / "a").stat().st_blocks * 512 >= SPEC.nbytes
    arena.parts(1)[4] = 1
    arena.close()


@pytest.mark.parametrize("noted", ["this boot", "another boot", "none"])
def test_an_arena_of_another_boot_waits_for_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: str
) -> None:
    """On a disk the file survives a reboot. Then its pids and start times name nobody, or processes that never saw it."""
    mine = (os.getpid(), process_start(os.getpid()))
    with opened(tmp_path / "a") as arena:
        arena.parts(0)[2] = 5
        arena.processes[3] = mine
        arena.headers["state"][2] = SlotState.READY
        arena.headers["owner_pid"][2], arena.headers["owner_start"][2] = mine
        if noted == "none":  # by an earlier version of kvkern
            arena.bytes[96:112] = 0
    with monkeypatch.context() as patch:
        if noted == "another boot":
            patch.setattr(arena_module, "boot_id", lambda: b"another boot's..")
        for _ in range(2):
            with opened(tmp_path / "a") as arena:
                assert arena.headers["state"].tolist() == [0, 0, 2, 0, 0]
                assert (arena.parts(0)[2] == 5).all()
                owner = (arena.headers["owner_pid"][2], arena.headers["owner_start"][2])
                kept = (0, 0) if noted == "another boot" else mine
                assert (arena.processes[3].tolist(), owner) == (kept, kept)
    with opened(tmp_path / "a") as arena:
        assert arena.bytes[96:112].tobytes() == boot_id() != bytes(16)


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604])
def test_an_arena_that_others_could_open(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int) -> None:
    with opened(tmp_path / "a"):
        pass
    (tmp_path / "a").chmod(mode)
    with caplog.at_level("WARNING", "kvkern"), opened(tmp_path / "a"):
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert f"had the mode {mode:04o}, so other users could open it; it is 0600 now" in caplog.text


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_the_kernel_seals_no_file_that_has_a_name(seal: int) -> None:
    """Else a daemon could forbid its clients to cut the arena. A memfd can be sealed, but nobody finds it after `kill -9`."""
    with open(f"/dev/shm/kvkern-test-{os.getpid()}", "w+b") as file:
        os.unlink(file.name)
        with pytest.raises(PermissionError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seal)


def test_process_start() -> None:
    mine = process_start(os.getpid())
    assert mine > 0
    assert mine == process_start(os.getpid())
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert process_start(child.pid) >= mine
    finally:
        child.kill()
        child.wait()
    assert process_start(child.pid) == 0
    assert issubclass(ArenaError, KvkernError)
