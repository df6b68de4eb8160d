# `make demo` and `make test` do all the set-up on a fresh machine; only Python 3.11 to 3.13 and
# make are needed. PYTHON and VENV may be overridden.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= runs/demo
DEMO_FLAGS ?=
CERTS_FLAGS ?=

BIN := $(VENV)/bin
# Exact versions: an unpinned torch would bring several GB of CUDA packages to a machine without GPU.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint bench certs clean

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/fedcopra compare experiments/demo.toml --out $(DEMO) \
		--strategies fedavg,ffa-lora,flexlora,copra-merge,copra-merge+copra.enabled=true \
		--seeds 0,1,2 $(DEMO_FLAGS)
	@echo "open $(DEMO)/report.html in a browser"

test: lint
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.merge
	$(BIN)/python -m bench.copra
	$(BIN)/python -m bench.prompts
	$(BIN)/python -m bench.simulation

certs: $(VENV)/.installed
	$(BIN)/fedcopra certs $(CERTS_FLAGS)

$(VENV)/bin/pip:
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info < (3, 14), 'Python 3.11 to 3.13 is needed, this is ' + sys.version"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(INSTALL) -e '.[text,dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
