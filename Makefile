# twofiles: `make help` says what there is.

CC ?= cc
CFLAGS = -O3
WARNINGS = -Wall -Wextra -Wshadow -Wconversion -Wno-unknown-pragmas
# No -ffast-math: a sum keeps the order that run.c gives it, and products and sums are fused only where it says so.
RULES = -std=c11 -ffp-contract=off -fno-math-errno $(WARNINGS)
OPENMP := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)

.PHONY: help portable debug test check clean

run: run.c Makefile ## for this machine's CPU, with OpenMP where the compiler has it
	$(if $(OPENMP),,@echo "$(CC) has no OpenMP: run will use one thread")
	$(CC) $(CFLAGS) $(RULES) -march=native $(OPENMP) run.c -o run -lm

portable: ## for any CPU of this kind: slower
	$(CC) $(CFLAGS) $(RULES) $(OPENMP) run.c -o run -lm

debug: ## build/run-debug: with AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p build
	$(CC) -O1 -g $(RULES) -march=native -fsanitize=address,undefined -fno-sanitize-recover=all run.c -o build/run-debug -lm

# The tests' programs include run.c: one for each instruction set that this machine may have.
TEST_FLAGS = $(RULES) -Wno-unused-function -g
ARCH_-native = -march=native
ARCH_-v4 = -march=x86-64-v4
ARCH_-v3 = -march=x86-64-v3
ARCH_-portable =
build/probe%: tests/probe.c run.c Makefile
	@mkdir -p build
	$(CC) -O2 $(TEST_FLAGS) $(ARCH_$*) $(OPENMP) $< -o $@ -lm
build/probe: build/probe-native
	cp $< $@

help: ## this text
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12
