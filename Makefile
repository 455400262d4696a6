# Works with GNU make on Linux and macOS. README.md gives the same steps as plain python and pip lines.

PYTHON ?= python3
VENV ?= .venv
# The torch installed last time, else the pinned one.
TORCH ?= $(shell cat "$(VENV)/torch.txt" 2>/dev/null || grep '^torch==' constraints.txt)
OUT ?= results
# Recipes read these from the environment, so that paths with spaces arrive whole and an empty one can be left out.
export DATA OUT EPOCHS

BIN = $(VENV)/bin
# The native library's sources.
CSRC = $(wildcard kernels/csrc/*.cpp kernels/csrc/*.h)
PIP = "$(BIN)/python" -m pip --disable-pip-version-check --no-input
# --no-build-isolation: the pinned setuptools of the environment builds, not the newest one.
INSTALL = $(PIP) install --no-build-isolation -c "$(VENV)/constraints.txt"
# Triton beside the last torch with Pascal, and beside a torch of many GPU machines; in folders of their own: the tests
# compile with them.
TRITONS = $(VENV)/triton-3.3.1 $(VENV)/triton-3.6.0
# A PYTHON given by hand is taken or refused; a python3 that is too old gives way to a newer one beside it.
PYTHONS = $(if $(filter file,$(origin PYTHON)),$(PYTHON) python3.13 python3.12 python3.11 python3.10,"$(PYTHON)")

.PHONY: help venv install native wheels reproduce test test-all fuzz fuzz-coverage gpu-check sanitize test-windows test-arm64 lint format bench bench-full readme docs doctor clean FORCE
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PYTHON=$(PYTHON)  the interpreter, 3.10 or newer'
	@echo '  VENV=$(VENV)  the virtual environment (a path without spaces)'
	@echo '  TORCH="$(TORCH)"  what pip installs as torch; may carry pip options'
	@echo '  FASTMAF_BUILD=auto|0|1 CXX=...  for the native library'
	@echo '  OUT=$(OUT) DATA=... EPOCHS=...  for make reproduce'

venv: $(BIN)/python  ## create the virtual environment

install: $(VENV)/.installed  ## install fastmaf and its pinned dependencies there (editable)

native: export FASTMAF_BUILD = 1
native: install  ## build the native library, or fail and say why; not again while no source has changed
	"$(BIN)/python" setup.py -q build_ext --inplace

# One wheel a platform serves every Python and every torch: the library needs neither. TARGET=TAG, of zig and of the wheel.
WHEELS = x86_64-linux-gnu.2.17=manylinux_2_17_x86_64 aarch64-linux-gnu.2.17=manylinux_2_17_aarch64 \
	x86_64-macos.11.0=macosx_11_0_x86_64 aarch64-macos.11.0=macosx_11_0_arm64 x86_64-windows-gnu=win_amd64
ZIG = $(abspath $(BIN))/python -m ziglang c++
# What the library in a wheel begins with: a compiler that is told to link one may leave an archive or an object there.
define FORMATS
import sys, zipfile
for path in sys.argv[1:]:
    begins = {"linux": b"\177ELF", "macosx": b"\317\372\355\376", "win": b"MZ"}
    begin = next(begin for name, begin in begins.items() if f"none-{name}" in path or f"-many{name}" in path)
    with zipfile.ZipFile(path) as wheel:
        [library] = [name for name in wheel.namelist() if "/_native." in name and not name.endswith(".txt")]
        found = wheel.read(library)
    if not found.startswith(begin):
        sys.exit(f"{library} in {path} is no library: it begins with {found[:8]}")
endef
export FORMATS
wheels: export FASTMAF_BUILD = 1
wheels: $(VENV)/.installed-wheels  ## compile the wheels of all platforms to dist, on any of them
	rm -rf build/wheels dist/*.whl
	for wheel in $(WHEELS); do tag=$${wheel#*=}; \
		CXX="$(ZIG) -target $${wheel%=*} -s" "$(BIN)/python" setup.py -q build --build-base build/wheels/$$tag \
			bdist_wheel --plat-name $$tag --dist-dir dist || exit 1; \
	done
	rm -f a.o  # empty; zig leaves it where it links for macOS
	"$(BIN)/twine" check --strict dist/*.whl
	if test "$$(uname)" = Linux; then for wheel in dist/*manylinux*.whl; do tag=$${wheel##*-none-}; \
		"$(BIN)/auditwheel" show $$wheel | tr '\n' ' ' | grep -o "consistent with *the following platform tag: *\"$${tag%.whl}\"" || \
			{ "$(BIN)/auditwheel" show $$wheel; echo "$$wheel is not what its name says"; exit 1; }; \
	done; fi
	"$(BIN)/python" -c "$$FORMATS" dist/*.whl
	@ls -l dist/*.whl; found=$$(find dist -name '*.whl' -size +3M); test -z "$$found" || { echo "over 3 MB: $$found"; exit 1; }

reproduce: $(VENV)/.installed-inspection  ## train, sample and evaluate on the synthetic capsules, or on DATA="/path/to/capsule"; writes to OUT
	"$(BIN)/fastmaf" capsule reproduce --out "$$OUT" $${DATA:+--data "$$DATA"} $${EPOCHS:+--epochs "$$EPOCHS"}

test: $(VENV)/.installed-test  ## run the tests that a change needs, ten minutes on two cores
	"$(BIN)/python" -m pytest -m "not slow"

test-all: test $(TRITONS) $(VENV)/.installed-docs $(VENV)/.installed-features  ## those, then the slow ones: GPU kernels interpreted and compiled, benchmarks, interruptions, pretrained features, documentation
	"$(BIN)/python" -m pytest -m slow

COUNT ?= 20000
SEED ?= 0
fuzz: $(VENV)/.installed-test  ## read COUNT=20000 damaged models and images: each is refused by name or computes
	"$(BIN)/python" -m tests.fuzz.run $(COUNT) $(SEED)

SECONDS ?= 120
fuzz-coverage: $(VENV)/.installed-fuzz  ## the same, guided by coverage (atheris), SECONDS=120 for models and for images
	for kind in model image; do \
		"$(BIN)/python" -m tests.fuzz.coverage_guided $$kind build/fuzz/$$kind -max_total_time=$(SECONDS) || exit 1; \
	done

# compute-sanitizer comes with the CUDA toolkit; in some sandboxes it cannot watch a process. It is slow: two small tests of every
# kernel, with torch's allocator out of the way, whose pools would hide what lies beyond a tensor. racecheck sees shared
# memory only; races in global memory show in the tests that repeat a call 20 times.
SANITIZER ?= compute-sanitizer
gpu-check: $(VENV)/.installed-test  ## on a GPU: the marked tests, then memory and races under compute-sanitizer
	"$(BIN)/python" -m pytest -m gpu
	for tool in memcheck racecheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 \
			"$(BIN)/python" -m pytest -m gpu -k 'launch_paths or paths_of_the_inverse' tests/kernels || exit 1; \
	done

# With vector instructions and without, on one thread and on several. SANITIZERS=thread looks for data races instead.
SANITIZERS ?= address,undefined
CHECKED = -std=c++17 -pthread -Ikernels/csrc $(filter-out %/linked.cpp %/loaded.cpp,$(wildcard tests/kernels/csrc/*.cpp))
SANITIZE = $(CXX) $(CHECKED) -ffp-contract=fast -fno-math-errno -DFASTMAF_ISA=checked tests/kernels/csrc/linked.cpp \
	$(addprefix kernels/csrc/,kernels.cpp thread_pool.cpp storage.cpp uniform.cpp) \
	-g -O1 -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all

sanitize:  ## run the native kernels under the address and undefined-behaviour sanitizers
	mkdir -p build/sanitize
	$(SANITIZE) -march=native -o build/sanitize/vector
	build/sanitize/vector 1 3
	$(SANITIZE) -DFASTMAF_SCALAR -o build/sanitize/scalar
	build/sanitize/scalar 1 3

# The same tests of the libraries of other platforms' wheels, loaded as ctypes loads them, with every instruction set that
# the processor has. Debian's packages: wine64; qemu-user and libc6-arm64-cross.
WINE ?= WINEDEBUG=-all WINEPREFIX=$(abspath build/cross/wine) /usr/lib/wine/wine64
QEMU ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
CROSS = FASTMAF_BUILD=1 CXX="$(ZIG) -target $(1) -s" "$(BIN)/python" setup.py -q build_ext --build-lib build/cross/$(2)
LOADED = $(ZIG) -target $(1) $(CHECKED) -DFASTMAF_ISA=loaded tests/kernels/csrc/loaded.cpp -O2
test-windows: $(VENV)/.installed-wheels  ## test the library of the Windows wheel under wine
	$(call CROSS,x86_64-windows-gnu,windows)
	$(call LOADED,x86_64-windows-gnu) -static -o build/cross/tests.exe
	FASTMAF_LIBRARY=build/cross/windows/fastmaf/kernels/_native.dll $(WINE) build/cross/tests.exe 1 3

test-arm64: $(VENV)/.installed-wheels  ## test the library of the Linux wheel for 64-bit ARM under qemu
	$(call CROSS,aarch64-linux-gnu.2.17,arm64)
	$(call LOADED,aarch64-linux-gnu.2.17) -ldl -o build/cross/tests-arm64
	FASTMAF_LIBRARY=build/cross/arm64/fastmaf/kernels/_native.so $(QEMU) build/cross/tests-arm64 1 3

# mypy cannot know that kernels/ is fastmaf.kernels, so it gets the tree as installed. vermin finds what Python 3.10 does not
# have; imports of tomllib stand beside one of tomli, and names that were Python 2's builtins are not taken for these.
lint: $(VENV)/.installed-dev  ## ruff check, ruff format --check, vermin, mypy
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/vermin" --quiet --no-tips --violations --target=3.10- --exclude tomllib --exclude file fastmaf kernels bench setup.py tests
	rm -rf build/lint
	"$(BIN)/python" setup.py -q build_py --no-compile --build-lib build/lint
	cp -r bench/dev build/lint/fastmaf/bench/
	cd build/lint && "$(abspath $(BIN))/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fastmaf

format: $(VENV)/.installed-dev  ## let ruff sort the imports and format
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

bench: $(VENV)/.installed-bench  ## the quick benchmark suite: fastmaf beside other libraries, under two minutes
	"$(BIN)/fastmaf" bench --quick

bench-full: $(VENV)/.installed-test  ## the full one, half an hour to an hour, and every op by itself
	"$(BIN)/fastmaf" bench
	"$(BIN)/python" -m fastmaf.bench.dev.ops

# To bench/results/ goes what README.md quotes.
readme: $(VENV)/.installed-bench  ## write the tables of README.md and the benchmarks' page from bench/results
	"$(BIN)/python" -m fastmaf.bench.dev.readme

# SPHINX: further options, such as "-t online" for links to the documentation of torch and numpy.
docs: $(VENV)/.installed-docs  ## build the documentation to build/docs; a warning is an error
	"$(BIN)/python" -m sphinx -W --keep-going $(SPHINX) -b html docs build/docs

doctor: $(VENV)/.installed-cli  ## versions, devices, the backends in use and why
	"$(BIN)/fastmaf" doctor

clean:  ## remove builds and caches; the environment and OUT stay
	rm -rf build dist fastmaf.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastmaf kernels bench tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHONS); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
			echo "creating $(VENV) with $$("$$python" --version)"; \
			exec "$$python" -m venv "$(VENV)"; \
		fi; \
	done; \
	echo "fastmaf needs Python 3.10 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>/dev/null || echo not there)." >&2; \
	echo 'Name a newer one: make PYTHON=/path/to/python3.12 ...' >&2; \
	exit 1

# Changes only when TORCH does: another TORCH installs anew, and later calls without it keep that one.
$(VENV)/torch.txt: FORCE | $(BIN)/python
	@printf '%s\n' '$(TORCH)' | cmp -s - "$@" || printf '%s\n' '$(TORCH)' > "$@"

# What became of the native library is said last.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(CSRC) $(VENV)/torch.txt
	@grep -vE '^(torch|triton)==' constraints.txt > "$(VENV)/constraints.txt"
	$(INSTALL) pip setuptools
	$(INSTALL) $(TORCH)
	@"$(BIN)/python" -c 'import triton' 2>/dev/null || grep '^triton==' constraints.txt >> "$(VENV)/constraints.txt"
	$(INSTALL) -e .
	@echo "native library $$(cat kernels/_native.txt)"
	@touch "$@"

# Only where it exists; the tests say so where it does not.
$(TRITONS): $(VENV)/triton-%: $(VENV)/.installed
	$(PIP) install -q --no-deps --target "$@" triton==$* || mkdir -p "$@"
	@touch "$@"

$(VENV)/.installed-%: $(VENV)/.installed
	$(INSTALL) -q -e '.[$*]'
	@touch "$@"
