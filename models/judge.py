#!/usr/bin/env python3
"""Lets one model judge the stories of others: a row of a table for each.

    python3 models/judge.py models/smollm2.bin models/stories.bin other.bin

Fewer bits per byte mean that the judge finds the text more like what it knows. A story that repeats itself is cheap,
too, and that is what the share of repeated 4-grams of words is for. A story that ended stopped by itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "run"


def run(model: Path, *options: str) -> list[dict[str, float | str]]:
    """The JSON objects that it prints."""
    done = subprocess.run([RUN, model, "--json", *options], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def story(model: Path, seed: int, temperature: float, length: int) -> tuple[str, bool]:
    """What it tells, and whether it came to an end: the last token is then one that has no text."""
    tokens = run(model, "-t", str(temperature), "-s", str(seed), "-n", str(length))
    texts = [str(token["text"]) for token in tokens]
    return "".join(texts).strip(), texts[-1] == ""


def repeated(text: str) -> tuple[int, int]:
    """Of the text's 4-grams, how many were there before, and how many there are."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) - len(set(grams)), len(grams)


def bits(judge: Path, text: str) -> float:
    [found] = run(judge, "-m", "perplexity", "-i", text)
    return float(found["bits_per_byte"]) * len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Lets one model judge the stories of others.")
    parser.add_argument("judge", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("-n", type=int, default=200, help="stories of each")
    parser.add_argument("-t", type=float, default=0.8, help="temperature")
    parser.add_argument("--length", type=int, default=256, help="tokens that a story may have")
    args = parser.parse_args()
    print(
        "| model | stories | bits per byte | perplexity per byte | repeated 4-grams | ended | bytes a story |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in args.models:
        told = [story(model, seed, args.t, args.length) for seed in range(args.n)]
        texts = [text for text, _ in told]
        again, all_grams = (sum(counts) for counts in zip(*map(repeated, texts), strict=True))
        size = sum(len(text.encode()) for text in texts)
        cost = sum(bits(args.judge, text) for text in texts) / size
        row = [model.name, str(args.n), f"{cost:.3f}", f"{2**cost:.3f}", f"{again / all_grams:.2%}"]
        row += [f"{sum(ended for _, ended in told) / args.n:.0%}", f"{size / args.n:.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
