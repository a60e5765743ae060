#!/usr/bin/env python3
"""Measures how run shares the cores with other programs: the default number of threads against each fixed one.

    python3 tests/busy.py models/smollm2.bin                  # build/peers/bin/python adds llama.cpp: --gguf FILE

A busy program is a loop that does nothing. In each round, every number of threads has its turn with 0, 1, ... of them;
the table has the medians of the rounds, in tokens per second, and the default's share of the best fixed number.
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
DEFAULT = "default"
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
    flags = ["-m", "bench", "--json", "--prefill", str(prefill), "--decode", str(decode), "--repeat", "3"]
    if threads != DEFAULT:
        flags += ["-j", threads]
    made = subprocess.run([program, model, *flags], capture_output=True, text=True, check=True)
    found = json.loads(made.stdout)
    return {work: float(found[work]["tok_s"]) for work in ("prefill", "decode")}


def bench_llama_cpp(path: Path, threads: int, prefill: int, decode: int) -> dict[str, float]:
    from speed import LlamaCpp

    peer = LlamaCpp(path, threads)
    found = {
        "prefill": statistics.median(peer.prefill(list(range(1, prefill + 1))) for _ in range(3)),
        "decode": statistics.median(peer.decode(list(range(1, decode + 2))) for _ in range(3)),
    }
    peer.close()
    return found


def measure(args: argparse.Namespace, counts: list[str]) -> Speeds:
    speeds: Speeds = {}
    for _ in range(args.rounds):
        for number in range(args.busy + 1):
            for threads in counts:
                with busy(number):
                    found = bench(args.run, args.model, threads, args.prefill, args.decode)
                for work, speed in found.items():
                    speeds.setdefault((number, work, threads), []).append(speed)
            if args.gguf:
                with busy(number):
                    found = bench_llama_cpp(args.gguf, os.cpu_count() or 1, args.prefill, args.decode)
                for work, speed in found.items():
                    speeds.setdefault((number, work, "llama.cpp"), []).append(speed)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--run", type=Path, default=ROOT / "run")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--busy", type=int, default=2, help="the most busy programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--decode", type=int, default=200)
    args = parser.parse_args()
    fixed = [str(n) for n in range(1, (os.cpu_count() or 1) + 1)]
    counts = [*fixed, DEFAULT]
    speeds = measure(args, counts)
    peer = ["llama.cpp"] if args.gguf else []
    print(
        "| busy programs | work |",
        *(f"-j {n} |" for n in fixed),
        *(f"{name} |" for name in [DEFAULT, *peer]),
        "default / best -j |",
    )
    print("|--:|---|" + "--:|" * (len(counts) + len(peer) + 1))
    for number in range(args.busy + 1):
        for work in ("prefill", "decode"):
            medians = {name: statistics.median(speeds[number, work, name]) for name in [*counts, *peer]}
            share = medians[DEFAULT] / max(medians[n] for n in fixed)
            print(
                f"| {number} | {work} |", *(f"{speed:.0f} |" for speed in medians.values()), f"{share:.2f} |"
            )


if __name__ == "__main__":
    main()
