# Needs Python 3.11 or newer and make. Everything else goes into .venv and, of the last targets, .venv-*.

PYTHON ?= $(shell for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done)

.DELETE_ON_ERROR:
.PHONY: help demo test test-lowest test-newest lint types docs bench gpu cuda crash fuzz interrupts soak mutation clients dist-check clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@echo
	@echo "Arguments go in ARGS: make test ARGS='-k schedules'"

demo: .venv/demo.installed ## Train a small network with LARS and with SGD
	.venv/bin/python -m lars_array demo $(ARGS)

test: .venv/test.installed .venv/timm.installed ## Run the tests and the examples in the documentation
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: .venv/lint.installed ## Check the style
	.venv/bin/python -m ruff check $(ARGS)

types: .venv/lint.installed ## Check the types
	.venv/bin/python -m mypy $(ARGS)

docs: .venv/docs.installed ## Build docs/_build/index.html, warnings are errors
	.venv/bin/python -m sphinx --fresh-env --fail-on-warning --nitpicky --quiet docs docs/_build $(ARGS)

bench: .venv/bench.installed .venv/timm.installed ## Measure speed and memory beside other LARS
	.venv/bin/python -m benchmarks cpu $(ARGS)

gpu: ## On a machine with a GPU: tests, benchmark, compute-sanitizer in ten minutes, by what PYTHON has
	@$(PYTHON) tests/gpu/on_a_gpu.py $(ARGS)

crash: .venv/test.installed ## Kill processes that save, 200 times
	LARS_CRASHES=200 .venv/bin/python -m pytest tests/files/test_atomic.py $(ARGS)

fuzz: .venv/fuzz.installed ## Fuzz load and load_state_dict for ten minutes
	.venv/bin/python -W error tests/fuzz/run.py .fuzz-corpus -artifact_prefix=.fuzz- -max_total_time=600 $(ARGS)

mutation: .venv/mutation.installed ## Break the source on purpose; the tests must notice
	LARS_ARRAY_THREADS=1 OMP_NUM_THREADS=1 .venv/bin/python -m mutmut run $(ARGS)

cuda: .venv/test.installed ## Without a GPU: the CUDA kernels for all architectures, and one launch in all turns
	LARS_CHECKS=all .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 tests/kernels/cuda $(ARGS)

interrupts: .venv/test.installed ## Interrupt steps at thousands of moments, and let memory run out in each
	LARS_INTERRUPTS=100 LARS_MOMENTS_EVERY=7 .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 tests/interrupts -rP $(ARGS)

soak: .venv/test.installed ## Take a million steps: memory is flat, bits are equal; writes tests/soak/RESULTS.md
	.venv/bin/python tests/soak/run.py $(ARGS)

# The subset that shows whether a release of a library will do. Each run makes its environment anew: its versions, and
# the Python that PYTHON names, may be others.
SUBSET = tests/adapters tests/golden tests/core/test_lars_step.py tests/core/test_stages.py \
	tests/kernels/test_agreement.py tests/optimizer/test_interface.py lars_array adapters README.md docs

test-lowest: .venv-uv/bin/uv ## Run a part of the tests with the lowest versions that pyproject.toml allows
	$(call run_with,lowest-direct)

test-newest: .venv-uv/bin/uv ## Run a part of the tests with the newest versions that there are
	$(call run_with,highest)

define run_with
	@.venv-uv/bin/uv venv --quiet --clear --python "$(PYTHON)" .venv-$@
	@.venv-uv/bin/uv pip install --quiet --python .venv-$@ --resolution $(1) --editable '.[versions]'
	@.venv-uv/bin/uv pip list --quiet --python .venv-$@ | grep -E '^(array-api|jax|ml|numba|numpy|optax|torch) ?'
	.venv-$@/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --quiet $(SUBSET) $(ARGS)
endef

clients: ## Train with Lightning, transformers, flax and others, and write tests/clients/RESULTS.md
	@$(PYTHON) -m venv --clear .venv-clients
	@.venv-clients/bin/python -m pip install --disable-pip-version-check -qq -r tests/clients/requirements.txt --editable '.[fast,jax,torch]'
	@.venv-clients/bin/python -m pip install --disable-pip-version-check -qq --no-deps lightly lightly-utils torchmetrics
	.venv-clients/bin/python tests/clients/run.py $(ARGS)

# pyroma without its question for an e-mail address of the authors, who give none.
dist-check: ## Build the source distribution and the wheel into dist, check them, and install the wheel
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv-dist
	@.venv-dist/bin/python -m pip install --disable-pip-version-check -qq 'pip>=25.1'
	@.venv-dist/bin/python -m pip install --disable-pip-version-check -qq --group dist
	@rm -rf dist
	@.venv-dist/bin/python -m build --outdir dist . > /dev/null
	.venv-dist/bin/check-wheel-contents dist/*.whl
	.venv-dist/bin/twine --no-color check --strict dist/*
	.venv-dist/bin/pyroma --min 10 --skip-tests AuthorEmail dist/*.tar.gz
	.venv-dist/bin/cffconvert --validate
	@.venv-dist/bin/python -m pip install --disable-pip-version-check -qq dist/*.whl
	cd dist && ../.venv-dist/bin/python -m lars_array --version

clean: ## Remove everything that make makes
	rm -rf .venv .venv-* .hypothesis .mypy_cache .pytest_cache .ruff_cache .fuzz-* build demo-output dist docs/_build mutants

.venv/%.installed: pyproject.toml .venv/bin/pip
	@echo "Installing lars-array[$*] into .venv. The first time takes a few minutes."
	@.venv/bin/python -m pip install --disable-pip-version-check -qq --editable '.[$*]'
	@.venv/bin/python -m compileall -q lars_array adapters  # as pip does for what is not editable
	@touch $@

# Without what timm requires: only its optimizer is used, and torchvision's wheels are built for torch with CUDA.
.venv/timm.installed: .venv/bin/pip
	@.venv/bin/python -m pip install --disable-pip-version-check -qq --no-deps timm==1.0.31
	@touch $@

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv

.venv-uv/bin/uv:
	@$(PYTHON) -m venv --clear .venv-uv
	@.venv-uv/bin/python -m pip install --disable-pip-version-check -qq uv
