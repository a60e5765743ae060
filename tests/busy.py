#!/usr/bin/env python3
"""Measures how run shares the cores with other programs: the default number of threads against each fixed one.

    python3 tests/busy.py models/smollm2.bin                  # build/peers/bin/python adds llama.cpp: --gguf FILE

A busy program is a loop that does nothing. In each round, every number of threads has its turn with 0, 1, ... of them.
After each round, prints a table of the medians so far, in tokens per second, and the default's share of the best fixed
number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, PEER = "default", "llama.cpp"
Speeds = dict[tuple[int, str, str], list[float]]  # by busy programs, work and threads


@contextmanager
def busy(number: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def bench(program: Path, model: Path, threads: str, prefill: int, decode: int) -> dict[str, float]:
    flags = ["-m", "bench", "--json", "--prefill", str(prefill), "--decode", str(decode), "--repeat", "1"]
    if threads != DEFAULT:
        flags += ["-j", threads]
    made = subprocess.run([program, model, *flags], capture_output=True, text=True, check=True)
    found = json.loads(made.stdout)
    return {work: float(found[work]["tok_s"]) for work in ("prefill", "decode")}


def bench_llama_cpp(path: Path, threads: int, prefill: int, decode: int) -> dict[str, float]:
    from speed import LlamaCpp

    peer = LlamaCpp(path, threads)
    found = {
        "prefill": peer.prefill(list(range(1, prefill + 1))),
        "decode": peer.decode(list(range(1, decode + 2))),
    }
    peer.close()
    return found


def measure(args: argparse.Namespace, counts: list[str], speeds: Speeds) -> None:
    """One round."""
    for number in range(args.busy + 1):
        for threads in counts:
            with busy(number):
                if threads == PEER:
                    cores = os.cpu_count() or 1
                    found = bench_llama_cpp(args.gguf, cores, args.prefill, args.decode)
                else:
                    found = bench(args.run, args.model, threads, args.prefill, args.decode)
            for work, speed in found.items():
                speeds.setdefault((number, work, threads), []).append(speed)


def print_table(args: argparse.Namespace, counts: list[str], speeds: Speeds) -> None:
    fixed = [name for name in counts if name.isdigit()]
    names = [f"-j {name}" if name in fixed else name for name in counts]
    print("| busy programs | work |", *(f"{name} |" for name in names), "default / best -j |")
    print("|--:|---|" + "--:|" * (len(counts) + 1))
    for number in range(args.busy + 1):
        for work in ("prefill", "decode"):
            medians = {name: statistics.median(speeds[number, work, name]) for name in counts}
            share = medians[DEFAULT] / max(medians[n] for n in fixed)
            figures = (f"{speed:.0f} |" for speed in medians.values())
            print(f"| {number} | {work} |", *figures, f"{share:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--run", type=Path, default=ROOT / "run")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--busy", type=int, default=2, help="the most busy programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=100)
    args = parser.parse_args()
    counts = [*map(str, range(1, (os.cpu_count() or 1) + 1)), DEFAULT]
    if args.gguf:
        counts.append(PEER)
    speeds: Speeds = {}
    for number in range(args.rounds):
        measure(args, counts, speeds)
        print(f"\nAfter {number + 1} of {args.rounds} rounds:\n")
        print_table(args, counts, speeds)


if __name__ == "__main__":
    main()
