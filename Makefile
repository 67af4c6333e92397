# `make help` lists the targets. Each sets up what it needs in .venv.
PYTHON ?= python3
# The torch to install where .venv has none; any release from 2.11 on.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml

.PHONY: help demo test lint format bench sanitize clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch is installed only where there is none, so that a venv with another one can be brought along.
$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q '$(TORCH)'
	$(BIN)/pip install -q 'setuptools>=77' ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo,lint,test]'
	touch $@

demo: $(VENV)/built  ## train a tagger with nn.LSTM and FusedLSTM side by side
	$(BIN)/python examples/train_tagger.py

test: $(VENV)/built  ## run the tests
	$(BIN)/python -m pytest

# The extra of what is installed, so nothing is built again.
$(VENV)/bench: $(VENV)/built
	$(BIN)/pip install -q 'fusedrnn[bench]'
	touch $@

bench: $(VENV)/bench  ## time fusedrnn and its peers in turn, in about seven minutes
	$(BIN)/python -m benchmarks --readme README.md
	$(BIN)/python -m benchmarks steady --readme README.md

lint: $(VENV)/built  ## check formats, types and style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find benchmarks csrc tests -name '*.cpp' -o -name '*.h')

format: $(VENV)/built  ## rewrite to the project's formats
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find benchmarks csrc tests -name '*.cpp' -o -name '*.h')

# Leaks are not looked for: the interpreter and torch keep much on purpose.
sanitize: $(VENV)/built  ## run the tests under AddressSanitizer and UBSan
	rm -rf build/sanitize build/temp-sanitize
	FUSEDRNN_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize \
	  --build-temp build/temp-sanitize
	cp fusedrnn/*.py build/sanitize/fusedrnn/
	cd tests && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=../build/sanitize \
	  FUSEDRNN_TEST_EXAMPLES=$${FUSEDRNN_TEST_EXAMPLES:-500} \
	  ../$(BIN)/python -m pytest -p no:cacheprovider $(SANITIZE_ARGS)

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info fusedrnn/*.so fusedrnn/_build.py $(VENV)/built
