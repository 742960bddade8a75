"""The images' commands, run here: what they install, as whom it runs, what it writes, how large it is, how soon it serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.dockerfile import ROOT, copy_context, read_stages, run_stage
from tests.test_stranger import READ_ONLY

DAEMON = ROOT / "deploy" / "Dockerfile"
ENGINE = ROOT / "deploy" / "Dockerfile.engine"
BASE_NBYTES = 60_000_000  # allowed for python:3.13-slim, compressed; not measured here
ETCD_NBYTES = 13_100_000  # Debian 12's etcd-server and etcd-client, as packages
MOST_NBYTES = 250_000_000  # of the image, compressed, as a registry stores it and a node fetches it
UID = 10001

# One worker builds it once; a busy machine takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.xdist_group("images")]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be another user"
)


@dataclass
class Image:
    """What the daemon's build stage has made here."""

    prefix: Path
    folder: Path  # writable: what a container mounts at /run/kvkern and /dev/shm
    environment: dict[str, str]  # of a container


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    folder = Path(tempfile.mkdtemp(prefix="kvkern-image-", dir="/tmp"))
    try:
        prefix, source = folder / "opt", folder / "src"
        copy_context(source)
        build, final = read_stages(DAEMON)
        (folder / "bin").mkdir()
        (folder / "bin" / "python").symlink_to(sys.executable)
        host = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
        host |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HTTP"))}
        pip_settings = Path.home() / ".config" / "pip" / "pip.conf"
        if pip_settings.exists():
            host.setdefault("PIP_CONFIG_FILE", str(pip_settings))
        run_stage(build, source, host | build.variables(PREFIX=str(prefix)))
        inside = final.variables(PREFIX=str(prefix))
        inside["PATH"] = f"{prefix}/bin:{os.environ['PATH']}"
        mounts = folder / "mounts"
        mounts.mkdir()
        os.chmod(folder, 0o755)
        yield Image(prefix, mounts, inside)
    finally:
        shutil.rmtree(folder)


def test_the_daemons_image_has_no_torch_and_no_pip(image: Image) -> None:
    site = next((image.prefix / "lib").glob("python*/site-packages"))
    names = {path.name.split("-")[0].lower() for path in site.glob("*.dist-info")}
    assert {"kvkern", "numba", "redis", "obstore"} <= names
    assert not names & {"torch", "triton", "vllm", "pip", "matplotlib", "mkdocs", "opentelemetry_api"}


def test_the_daemons_image_is_small(image: Image, tmp_path: Path) -> None:
    """A layer is a compressed tar. This one is measured; for the base image more is allowed than its registry lists."""
    with tarfile.open(tmp_path / "layer.tar.gz", "w:gz", compresslevel=6) as layer:
        layer.add(image.prefix, arcname="opt/kvkern")
    nbytes = (tmp_path / "layer.tar.gz").stat().st_size
    print(f"layer {nbytes / 1e6:.0f} MB, base image {BASE_NBYTES / 1e6:.0f} MB, compressed")
    assert nbytes + BASE_NBYTES + ETCD_NBYTES < MOST_NBYTES


@needs_root
def test_the_daemon_runs_as_a_stranger_on_a_read_only_root(image: Image) -> None:
    """It serves, compiles nothing, and writes nowhere but into the two mounts. The health check is the image's."""
    _, final = read_stages(DAEMON)
    (user,) = final.all("USER")
    assert user == f"{UID}:{UID}"
    arenas = image.folder / "shm"
    arenas.mkdir(exist_ok=True)
    os.chown(image.folder, UID, UID)
    os.chown(arenas, UID, UID)
    socket = image.folder / "kvkern.sock"
    who = [  # it may read what root may read, because this tree may lie in root's home
        "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
        "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
    ]  # fmt: skip
    here = {"KVKERN_SOCKET": str(socket), "KVKERN_ARENA_DIR": str(arenas), "KVKERN_CAPACITY": "1MiB"}
    variables = [f"{name}={value}" for name, value in (image.environment | here).items()]
    sandbox = [
        "unshare",
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        READ_ONLY,
        str(image.folder),
        *who,
        "env",
        "-i",
        *variables,
    ]
    serve = [*sandbox, *final.exec_form("ENTRYPOINT"), *final.exec_form("CMD")]
    log = image.folder.parent / "log"
    began = time.monotonic()
    with log.open("wb") as out:
        daemon = subprocess.Popen(serve, stdout=out, stderr=out)
    try:
        while b"serving on" not in log.read_bytes():
            assert daemon.poll() is None, log.read_text()
            assert time.monotonic() - began < 120, "it does not serve"
            time.sleep(0.05)
        assert "compiles in memory" not in log.read_text()
        (check,) = final.all("HEALTHCHECK")
        command = json.loads(check[check.index("[") :])
        healthy = subprocess.run([*sandbox, *command], capture_output=True, text=True, timeout=60)
        assert healthy.returncode == 0, healthy.stderr
        written = subprocess.run([*sandbox, "touch", f"{image.prefix}/x"], capture_output=True, text=True, timeout=60)
        assert "Read-only file system" in written.stderr
    finally:
        daemon.send_signal(signal.SIGTERM)
        status = daemon.wait(60)
    assert status == 0, log.read_text()
    unhealthy = subprocess.run([*sandbox, *command], capture_output=True, text=True, timeout=60)
    assert unhealthy.returncode != 0


def test_the_engines_image_changes_none_of_vllms_packages(tmp_path: Path) -> None:
    """Its commands, in an environment that sees this one's packages as vLLM's image has them."""
    (stage,) = read_stages(ENGINE)
    environment, source = tmp_path / "venv", tmp_path / "src"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "vllm.pth").write_text(here + "\n")
    copy_context(source)
    python = str(environment / "bin" / "python3")
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    before = _packages(python)
    run_stage(stage, source, dict(os.environ, PATH=path) | {"PIP_NO_CACHE_DIR": "1"}, tuple(stage.exec_form("SHELL")))
    after = _packages(python)
    assert {name: version for name, version in after.items() if name in before and name != "kvkern"} == {
        name: version for name, version in before.items() if name != "kvkern"
    }
    assert set(after) == set(before) | {"kvkern"}
    found = subprocess.run(
        [python, "-c", "import kvkern; print(kvkern.__file__); from importlib.metadata import entry_points as e; "
         "print([x.value for x in e(group='vllm.general_plugins') if x.name == 'kvkern'])"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(site) in found
    assert "kvkern.integrations.vllm_plugin:register" in found


def _packages(python: str) -> dict[str, str]:
    done = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", row["name"]).lower(): row["version"] for row in json.loads(done.stdout)}


@pytest.mark.parametrize("path", [DAEMON, ENGINE], ids=lambda p: p.name)
def test_the_images_are_built_where_docker_is(path: Path) -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode:
        pytest.skip("no docker daemon runs here")
    subprocess.run(
        ["docker", "build", "-f", str(path), "-t", f"kvkern-test-{path.name.lower()}", "."],
        cwd=ROOT,
        check=True,
        timeout=1800,
    )


def test_what_the_images_copy_is_what_the_wheel_needs(tmp_path: Path) -> None:
    copy_context(tmp_path)
    assert (tmp_path / "kvkern" / "kernels").is_symlink()
    for name in (
        "kernels/jit.py",
        "kvkern/cli/daemon.py",
        "requirements/cpu.lock",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    ):
        assert (tmp_path / name).is_file(), name
    assert not (tmp_path / "tests").exists()
    assert not list(tmp_path.rglob("*.pyc"))
