# Every verb makes the virtual environment .venv when it is missing, and brings it up to date when the build changed.
#   make demo | test | lint | types | bench | convergence | sanitize | soak | gpu | birthplaces | clean

PYTHON ?= python3
# A build without the native library is not what these verbs are for; NLPFAST_NATIVE=auto lets it pass.
export NLPFAST_NATIVE ?= required
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := .venv/bin
NATIVE := $(shell find csrc -type f)
INSTALLED := .venv/installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test test-cpu test-cpu-ops test-cpu-rest test-triton test-triton-attention test-triton-losses test-cuda
.PHONY: lint types
.PHONY: bench convergence sanitize soak gpu
.PHONY: birthplaces clean

# Trains small GPTs that learn where invented people were born, with and without pretraining and bottleneck, and
# times the kernel against PyTorch's.
demo: $(INSTALLED)
	$(BIN)/nlpfast birthplaces demo --output_dir runs/demo
	$(BIN)/nlpfast bench attention --quick

# Five parts, the longest first, for `make -j2 test`; test-triton runs the Triton kernels on the CPU, in float32, and
# test-cuda the CUDA kernels, by csrc/cuda_emulator.h.
test: test-cpu test-triton test-cuda

test-cpu: test-cpu-ops test-cpu-rest

test-cpu-ops: $(INSTALLED)
	$(BIN)/python -m pytest tests/ops

test-cpu-rest: $(INSTALLED)
	$(BIN)/python -m pytest tests --ignore tests/ops

TEST_TRITON = TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
test-triton: test-triton-attention test-triton-losses

test-triton-attention: $(INSTALLED)
	$(TEST_TRITON) tests/ops/test_*attention*.py

test-triton-losses: $(INSTALLED)
	$(TEST_TRITON) tests/ops/test_*cross_entropy*.py tests/ops/test_alignment_loss*.py \
		tests/ops/test_add_layer_norm.py tests/ops/test_bias_gelu.py tests/ops/test_dropout.py

test-cuda: $(INSTALLED)
	$(BIN)/cmake -S . -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/emulated --target nlpfast_cuda_emulated
	EMULATED_CUDA=$(CURDIR)/build/emulated/libnlpfast_cuda_emulated.so OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/ops/test_cross_entropy.py tests/ops/test_add_layer_norm.py \
		tests/ops/test_alignment_loss.py tests/ops/test_cuda_*.py tests/ops/test_compiled_kernels_on_device.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu,$(NATIVE))

types: $(INSTALLED)
	$(BIN)/mypy

# Takes an hour or two; leave the machine alone meanwhile. In the end it says which ratios fell since the results before.
bench: $(INSTALLED)
	mkdir -p benchmarks/results build
	rm -rf build/before && cp -r benchmarks/results build/before
	$(BIN)/nlpfast bench --output benchmarks/results
	$(BIN)/python -m benchmarks.plots benchmarks/results
	$(BIN)/python -m benchmarks.report benchmarks/results benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.headline benchmarks/results README.md
	$(BIN)/python -m benchmarks.predict_attention benchmarks/PREDICTED.md
	$(BIN)/python -m benchmarks.predict_cuda benchmarks/PREDICTED_CUDA.md
	$(BIN)/python -m benchmarks.regressions build/before benchmarks/results

# Trains each trainer by the kernels and by plain PyTorch, and adds to the results how their losses go; half an hour.
convergence: $(INSTALLED)
	mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.convergence benchmarks/results
	$(BIN)/python -m benchmarks.report benchmarks/results benchmarks/RESULTS.md

# The tests of the ops on a library that watches every memory access; PyTorch itself is not watched.
WATCHED = LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)"
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export UBSAN_OPTIONS = print_stacktrace=1
sanitize: export PYTHONPATH = $(CURDIR)/build/sanitize/site
sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DNLPFAST_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitize
	rm -rf $(PYTHONPATH)
	mkdir -p $(PYTHONPATH)
	cp -r nlpfast $(PYTHONPATH)
	rm -f $(PYTHONPATH)/nlpfast/*.so
	$(BIN)/cmake --install build/sanitize --prefix $(PYTHONPATH)/nlpfast
	cd $(PYTHONPATH) && $(WATCHED) $(CURDIR)/$(BIN)/python -c \
		'from nlpfast import native; print("sanitizers:", native.build_info()["sanitizers"] or exit("none"))'
	$(WATCHED) $(BIN)/pytest tests/ops

soak: $(INSTALLED)
	$(BIN)/python -m pytest tests/ops tests/train tests/test_triton_resources.py --hypothesis-profile=soak \
		-k 'any_call or kills_at_any_instant or every_configuration'

# Uses PYTHON as it is, with torch and triton: no virtual environment and no network. The native library is built for
# this device if there is what that takes; without, Triton's kernels are tested and measured alone. Most of the time
# goes into compiling kernels; with pytest-xdist, PYTEST_ADDOPTS='-n 8' compiles on as many cores.
GPU_BENCH = $(PYTHON) -m nlpfast bench --quick --device cuda --output benchmarks/results
gpu:
	@if ! $(PYTHON) -c 'import torch' 2>/dev/null && command -v nvidia-smi >/dev/null; then \
		echo "make gpu: $(PYTHON) has no torch; name an interpreter that has it: make gpu PYTHON=..." >&2; exit 2; \
	elif ! $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		echo "make gpu: PyTorch sees no CUDA device here: nothing to do"; \
	else \
		missing=$$($(PYTHON) -c 'from importlib.util import find_spec; \
			print(*(name for name in ("triton", "pytest", "hypothesis") if find_spec(name) is None))'); \
		if [ -n "$$missing" ]; then \
			echo "make gpu: $(PYTHON) lacks $$missing: $(PYTHON) -m pip install $$missing" >&2; exit 2; \
		fi; \
		mkdir -p benchmarks/results; compiled=; \
		if command -v nvcc >/dev/null && command -v cmake >/dev/null && command -v ninja >/dev/null && \
			$(PYTHON) -c 'import pybind11' 2>/dev/null; then \
			arch=$$($(PYTHON) -c 'import torch; major, minor = torch.cuda.get_device_capability(); \
				print(f"{major}{minor}" + "a" * (major == 9))'); \
			cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$$(command -v $(PYTHON))" \
				-DNLPFAST_CUDA_ARCHITECTURES=$$arch && \
			cmake --build build/gpu && cmake --install build/gpu --prefix nlpfast || exit 2; compiled=yes; \
		else \
			echo "make gpu: Triton's kernels alone: nvcc, cmake, ninja and pybind11 make the compiled ones" >&2; \
		fi; \
		$(PYTHON) -m pytest tests -m cuda && $(GPU_BENCH) && \
			if [ "$$compiled" ]; then $(GPU_BENCH) --backend cuda && \
				$(PYTHON) -m benchmarks.overhead benchmarks/results; fi; \
	fi

# The whole task of CS224N's assignment 5 on its files in DATA, with the interpreter as it is, as for gpu: make
# birthplaces DATA=... PYTHON=... TASK='--dtype bfloat16 --max_epochs 100'. Some minutes on a GPU.
DATA ?= .
TASK ?= --dtype bfloat16
RUN_BIRTHPLACES = $(PYTHON) -m nlpfast birthplaces
birthplaces:
	mkdir -p runs/birthplaces
	set -e; corpus=$(DATA)/wiki.txt; for variant in vanilla perceiver; do kept=runs/birthplaces/$$variant; \
		$(RUN_BIRTHPLACES) pretrain $$variant $$corpus --bottleneck_dim 64 --writing_params_path $$kept.pretrain $(TASK); \
		$(RUN_BIRTHPLACES) finetune $$variant $$corpus --bottleneck_dim 64 --reading_params_path $$kept.pretrain \
			--writing_params_path $$kept.finetune --finetune_corpus_path $(DATA)/birth_places_train.tsv \
			$(filter --compat seed --prefix_lm,$(TASK)); \
		$(RUN_BIRTHPLACES) evaluate $$variant $$corpus --bottleneck_dim 64 --reading_params_path $$kept.finetune \
			--eval_corpus_path $(DATA)/birth_dev.tsv --outputs_path $$kept.dev $(filter --prefix_lm,$(TASK)); \
	done

clean:
	rm -rf build dist runs/demo *.egg-info nlpfast/*.so $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find nlpfast benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: setup.py builds against the one that is there, with the cmake and ninja that are in the PATH.
$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo \
		"nlpfast needs Python 3.10 or later as $(PYTHON): install it, or name it: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
		"$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" \
		>&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
		|| { echo "$(PYTHON) has no header files: install them (Debian, Ubuntu: apt install python3-dev)" >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo \
		"nlpfast needs a C++ compiler: install one (Debian, Ubuntu: apt install g++) or name it in CXX" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch numpy
	$(PIP_INSTALL) cmake ninja pybind11 setuptools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
