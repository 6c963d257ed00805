# make test and make train set everything up themselves, in .venv, and cost nothing to repeat.
#   PYTHON=python3.12 make test   another interpreter for a new .venv
#   make train ARGS="--steps 50"  further options for launch/train.py
#   WORKERS=4 make test           more test processes at a time (0: none but pytest's own)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ARGS ?=
# Two processes, each with eight ranks of its own: most tests of ranks leave half of two cores idle. A file is not split.
PYTEST := $(PY) -m pytest --numprocesses $${WORKERS:-2} --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help train test test-portable test-matrix test-all evidence evidence-all convert convert-all lint docs install clean

help:
	@echo "make train      train the small byte-level model on 8 ranks; results in out/train"
	@echo "make test       the test suite, without tests marked slow"
	@echo "make test-portable   the tests most at risk, computed as another processor would"
	@echo "make test-matrix    a core of the suite with other versions of Python and torch"
	@echo "make test-all   every test"
	@echo "make evidence   which operator learns what: a subset; evidence-all: the grid, resumed where it stopped"
	@echo "make convert    SmolLM2 (89 MiB, downloaded once) with windows and memories in place of softmax: what it loses"
	@echo "make convert-all   the same model without windows, and its generation after long contexts"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site in out/site"
	@echo "make install    only set up .venv"
	@echo "make clean      remove .venv, out/ and caches"

# One rank a GPU where there are GPUs (at most 8), else 8 ranks on the CPU with one thread each.
train: $(STAMP)
	@ranks=$$($(PY) -c "import torch; print(min(torch.cuda.device_count(), 8) or 8)") && \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m torch.distributed.run --standalone --nproc-per-node $$ranks \
	    launch/train.py --out out/train $(ARGS)

test: $(STAMP)
	@$(PYTEST) -m "not slow" $(ARGS)

# Other instructions and another order of sums than this processor's own: a test that is green in both asks no more than
# IEEE, torch and BLAS promise. The files compare bits, ratios and round-off.
PORTABLE := tests/laws tests/reference tests/operators/test_low_precision.py tests/operators/test_paper_form.py \
    tests/nn/test_attention.py tests/nn/test_softmax_attention.py tests/huggingface/test_model.py \
    tests/training/test_model.py
test-portable: $(STAMP)
	@ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(PYTEST) -m "not slow" $(PORTABLE) $(ARGS)

# Environments of its own under out/matrix, a few GB each.
test-matrix: $(STAMP)
	@$(PY) tests/matrix.py $(ARGS)

test-all: $(STAMP)
	@$(PYTEST) $(ARGS)

# One process per core, one thread each. --processes N, --part i/n or --device cuda in ARGS for other machines.
EVIDENCE := benchmarks/evidence/run.py --processes 2
evidence: $(STAMP)
	@$(PY) $(EVIDENCE) $(ARGS)

evidence-all: $(STAMP)
	@$(PY) $(EVIDENCE) --all $(ARGS)

# Goes on where it was stopped. The report is benchmarks/results/conversion.md.
convert: $(STAMP)
	@$(PY) benchmarks/conversion.py $(ARGS)

convert-all: $(STAMP)
	@$(PY) benchmarks/conversion_all.py $(ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)
	@echo "out/site/index.html"

install: $(STAMP)

# The stamp is newer than the files that decide what is installed, or the installation runs again; pip changes only
# what differs. A .venv without a working pip and Python >= 3.10 is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' on this machine's PATH;" \
	        "hla_dist needs Python 3.10 or later. Name one: PYTHON=python3.12 make ..." >&2; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: hla_dist needs Python 3.10" \
	        "or later; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: PYTHON=python3.12 make ..." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV) || { echo "error: '$(PYTHON) -m venv' failed, see above;" \
	        "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
