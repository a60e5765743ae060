#!/usr/bin/env python3
"""Lets one model judge the stories of another: bits per byte, and the share of 4-grams of words that repeat.

    python3 models/judge.py models/smollm2.bin models/stories.bin other.bin

Fewer bits mean that the judge finds the text more like what it knows; a story that repeats itself is cheap, too, and
that is what the second figure is for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "run"


def stories(model: Path, count: int, temperature: float) -> list[str]:
    told = []
    for seed in range(count):
        command = [str(RUN), str(model), "-t", str(temperature), "-s", str(seed), "-n", "256"]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        told.append(made.stdout.strip())
    return told


def repeated(text: str) -> tuple[int, int]:
    """Of the text's 4-grams, how many were there before, and how many there are."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) - len(set(grams)), len(grams)


def bits(judge: Path, text: str) -> float:
    command = [str(RUN), str(judge), "-m", "perplexity", "--json", "-i", text]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(made.stdout)["bits_per_byte"]) * len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Lets one model judge the stories of others.")
    parser.add_argument("judge", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-n", type=int, default=200, help="stories of each")
    parser.add_argument("-t", type=float, default=0.8, help="temperature")
    args = parser.parse_args()
    for model in args.models:
        told = stories(model, args.n, args.t)
        again, all_grams = (sum(counts) for counts in zip(*map(repeated, told), strict=True))
        size = sum(len(text.encode()) for text in told)
        cost = sum(bits(args.judge, text) for text in told)
        print(f"{model}: {cost / size:.3f} bits per byte, {100 * again / all_grams:.1f} % of 4-grams repeat")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
