# Everything from nothing: each target makes the environment it needs, in .venv, and stamps what it has installed there.
#   make quickstart ARGS="--arch bert"      PYTHON=python3.12 make test      make test-slow WORKERS=1

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
OUTPUT ?= runs/bench

BIN := $(VENV)/bin
NATIVE := src/cottention/ops/native
CONSTRAINTS := constraints.txt
# The torch of constraints.txt stands in every call, so that nothing replaces it.
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) $(UPGRADE) $(TORCH)
# What pip gives to a user today, gigabytes of GPU libraries included: no constraints, upgraded whenever it is asked for.
NEWEST := CONSTRAINTS= TORCH=torch UPGRADE="--upgrade --upgrade-strategy eager"

# One thread a test worker: several that share the cores slow each other down many times over. Bytecode is written, or
# every process that a test starts compiles the package again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
UNATTENDED := not gpu and not slurm and not network and not peers

.DEFAULT_GOAL := help
.PHONY: test-browser test-kills versions run-peers help setup quickstart test test-slow test-oldest test-newest test-peers sanitize test-gpu sanitize-gpu check format bench bench-gpu release-models docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.stamp-dev $(VENV)/.stamp-native ## make the environment for development (tests, checks) in .venv
	@echo "ready: . $(BIN)/activate"

quickstart: $(VENV)/.stamp-native ## install, then train, score and sample a small model (about 5 minutes of training)
	$(BIN)/cottention quickstart $(ARGS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-native ## run the tests that need no GPU, cluster or network
	$(PYTEST) -m "not slow and $(UNATTENDED)" $(ARGS)

test-slow: $(VENV)/.stamp-test $(VENV)/.stamp-native ## run the tests that take longer
	$(PYTEST) -m "slow and $(UNATTENDED)" $(ARGS)

test-oldest: ## run the tests with the oldest versions that pyproject.toml allows and we tried, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-newest: ## run the tests with the newest versions, upgraded first, in .venv-newest
	rm -f .venv-newest/.stamp-*
	$(MAKE) versions test VENV=.venv-newest $(NEWEST)

test-peers: ## run other projects' tests and clients on our models, all newest, upgraded first, in .venv-peers
	rm -f .venv-peers/.stamp-*
	$(MAKE) versions run-peers VENV=.venv-peers EXTRA=peers $(NEWEST)

# What was run is part of what a run without constraints says.
EXTRA := test
versions: $(VENV)/.stamp-$(EXTRA)
	@$(BIN)/python -m pip freeze --exclude-editable

run-peers: $(VENV)/.stamp-peers $(VENV)/.stamp-native
	$(BIN)/python -m tests.peers.unpack
	$(PYTEST) -m peers tests/peers $(ARGS)

# The models are tiny and the browser starts once: less than a minute. A browser that is missing is an error here, not a skip.
test-browser: $(VENV)/.stamp-browser $(VENV)/.stamp-native ## drive the playground's page in a headless Chromium, at two widths
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "make: no Chromium here; Debian has it: apt-get install chromium" >&2; exit 1; }
	$(PYTEST) -n 0 -m slow tests/playground/test_page.py $(ARGS)

# The sanitizers of gcc have to be loaded before everything else. Leaks at exit are Python's and torch's.
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
SANITIZED := build/sanitize
# A run that took the ordinary library would find nothing.
IS_SANITIZED := from cottention.ops.native import is_available; is_available() or exit('the library does not load'); \
    '$(SANITIZED)' in open('/proc/self/maps').read() or exit('another library was loaded')
sanitize: $(VENV)/.stamp-test $(VENV)/.stamp-native ## run the tests of the native library under gcc's sanitizers
	CXX="$(CXX)" CXXFLAGS="$(SANITIZER)" LDFLAGS="$(SANITIZER)" COTTENTION_BUILD_NATIVE=1 \
	    $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	export LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | paste -sd:)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HF_HUB_OFFLINE=1 \
	    COTTENTION_NATIVE_LIBRARY=$(abspath $(SANITIZED)/$(NATIVE:src/%=%)/_kernels.so); \
	$(BIN)/python -c "$(IS_SANITIZED)" && \
	    $(BIN)/python -m pytest -m "not slow" $(ARGS) $(wildcard tests/ops/test_native*.py) tests/ops/test_fuzz.py

fuzz: $(VENV)/.stamp-test $(VENV)/.stamp-native ## try thousands of command lines and damaged model directories: EXAMPLES=2000
	COTTENTION_FUZZ_EXAMPLES=$(or $(EXAMPLES),2000) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	    $(BIN)/python -m pytest -m slow $(ARGS) tests/hostile/test_fuzz.py

test-kills: $(VENV)/.stamp-test $(VENV)/.stamp-native ## kill a run at random moments and compare its end: COUNT=30 PROCESSES=2
	$(BIN)/python -m tests.training.kill_trial --count $(or $(COUNT),30) --processes $(or $(PROCESSES),1) $(ARGS)

test-slurm: $(VENV)/.stamp-test $(VENV)/.stamp-native ## run a job in a SLURM on this machine: needs root, slurm-wlm, munge
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

test-gpu: $(VENV)/.stamp-test ## run the tests that need a CUDA or HIP device
	$(BIN)/python -m pytest -m "gpu and not slurm and not network and not peers" $(ARGS)

# Out-of-bounds accesses and races in the kernels; compute-sanitizer comes with CUDA.
SANITIZED_TESTS := tests/ops/test_triton_gpu.py -k "fuzz or step"

sanitize-gpu: $(VENV)/.stamp-test ## run the GPU kernels under compute-sanitizer (memcheck, then racecheck)
	@command -v compute-sanitizer >/dev/null || { echo "make: no 'compute-sanitizer' here; it comes with CUDA: add its bin to PATH" >&2; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED_TESTS) $(ARGS)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest $(SANITIZED_TESTS) $(ARGS)

check: $(VENV)/.stamp-dev ## format, lint, types, import layers; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev ## format, and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-native ## measure attention and decoding against softmax: OUTPUT=runs/bench ARGS=--full
	$(BIN)/cottention bench attention --output-dir $(OUTPUT)/attention $(ARGS)
	$(BIN)/cottention bench decode --output-dir $(OUTPUT)/decode

# Everything that docs/kernels-gpu.md asks to be measured, causal and bidirectional, at three shapes.
bench-gpu: $(VENV)/.stamp-run ## measure the attention on a GPU against flash attention and flash-linear-attention
	$(PIP_INSTALL) flash-linear-attention
	$(BIN)/cottention bench attention --device cuda --causal --bidirectional --dtypes bfloat16,float32 \
	    --lengths 512,1024,2048,4096,8192,16384,32768,65536,131072 --batch-heads 16,8x16 --head-dims 64 \
	    --output-dir runs/bench-gpu $(ARGS)
	$(BIN)/cottention bench attention --device cuda --causal --bidirectional --dtypes bfloat16,float32 \
	    --lengths 512,1024,2048,4096,8192,16384,32768,65536,131072 --batch-heads 8x32 --head-dims 128 \
	    --output-dir runs/bench-gpu-128 $(ARGS)

# Each is a run that goes on where it was stopped; what is packed opens where it is unpacked, by the path in its card.
MINUTES ?= 5
# What two slow cores learn from in about as many minutes.
PAIRS = $(shell awk 'BEGIN { print int($(MINUTES) * 4000) }')
MODELS := dist/models
COTTENTION = cd $(MODELS) && $(abspath $(BIN))/cottention

release-models: $(VENV)/.stamp-native ## train and pack three small models with cards in dist/models: MINUTES=5
	mkdir -p $(MODELS)
	for split in train validation; do $(BIN)/python examples/speech_pairs.py sotu:$$split > $(MODELS)/pairs-$$split.jsonl || exit; done
	$(COTTENTION) quickstart --minutes $(MINUTES) --output-dir speeches-gpt
	$(COTTENTION) quickstart --arch bert --minutes $(MINUTES) --output-dir speeches-bert
	$(COTTENTION) finetune --model speeches-bert/model --objective similarity --data pairs-train.jsonl --dev pairs-validation.jsonl \
	    --text-column sentence --text-pair-column next --train-limit $(PAIRS) --epochs 1 --batch-size 64 --learning-rate 5e-4 \
	    --license mit --output-dir speeches-sentences
	cd $(MODELS) && for name in speeches-gpt speeches-bert speeches-sentences; do tar -czf $$name.tar.gz $$name/model || exit; done
	cd $(MODELS) && sha256sum speeches-*.tar.gz > SHA256SUMS && cat SHA256SUMS

docs: $(VENV)/.stamp-docs ## build the documentation in site/
	$(BIN)/mkdocs build --strict

clean: ## remove environments, caches and builds; runs/ stays
	rm -rf .venv .venv-oldest .venv-newest .venv-peers build site *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f $(NATIVE)/_kernels.* $(NATIVE)/_build.json
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; name yours: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c '' 2>/dev/null || { echo "make: $(PYTHON) does not run ('$(PYTHON) --version' says why). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that whatever asks for it later keeps this build.
# setuptools comes with it, because the native library is built by it outside of pip.
$(VENV)/.stamp-run: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.stamp-test $(VENV)/.stamp-peers $(VENV)/.stamp-dev $(VENV)/.stamp-docs $(VENV)/.stamp-browser: $(VENV)/.stamp-%: $(VENV)/.stamp-run
	$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@

# Built by the install already; this builds again what has changed, and shows the warning that pip hides.
$(VENV)/.stamp-native: setup.py $(wildcard $(NATIVE)/src/*) $(VENV)/.stamp-run
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
