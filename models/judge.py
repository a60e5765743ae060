#!/usr/bin/env python3
"""Measures how well models tell stories; prints a row of a table for each model.

    judge.py heldout heldout.jsonl models/stories.bin other.bin     # bits per byte of real stories
    judge.py stories models/smollm2.bin models/stories.bin other.bin --known tinystories.jsonl.xz
    judge.py stories models/smollm2.bin models/stories.bin other.bin --begin heldout.jsonl
    judge.py beginnings models/stories.bin -t 0 -n 150              # how often greedy decoding loops

`stories` samples stories, from nothing or (--begin) from the first eight words of the stories in a file, and another
model judges them: fewer bits per byte mean that they are more like what the judge knows. A story that repeats itself
is cheap as well, so the table has the share of 4-grams of words that repeat. A story has ended if the model stopped
by itself. --known adds the longest run of words that a sample shares with a file of stories: a model that recites its
training text shows there. `beginnings` continues the lines of beginnings.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from models.stories import read_stories

RUN = TOP / "run"
BEGINNINGS = TOP / "models" / "beginnings.txt"


def run(model: Path, *options: str, text: str = "") -> list[dict[str, float | str]]:
    """The JSON objects that it prints; the prompt is `text`."""
    command: list[str | Path] = [RUN, model, "--json", "-j", "1", *options, "-f", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def continuation(model: Path, seed: int, temperature: float, length: int, beginning: str = "") -> tuple[str, bool]:
    """What the model adds, and whether it came to an end: the last token is then one without text."""
    options = ["-t", str(temperature), "-s", str(seed), "-n", str(length)]
    texts = [str(token["text"]) for token in run(model, *options, text=beginning)]
    return "".join(texts), texts[-1] == ""


def bits(judge: Path, text: str) -> float:
    [found] = run(judge, "-m", "perplexity", text=text)
    return float(found["bits_per_byte"]) * len(text.encode())


def repeated(text: str, n: int = 4) -> tuple[int, int]:
    """The number of n-grams of words that occurred before in the text, and of all n-grams."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)


def loops(text: str) -> bool:
    """Whether a run of ten words occurs twice."""
    return repeated(text, 10)[0] > 0


class Known:
    """An index of texts, to find runs of words in them; line breaks do not count."""

    SEED = 6  # words: shorter runs are not found

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = [text.split() for text in texts]
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for number, words in enumerate(self.texts):
            for i in range(len(words) - self.SEED + 1):
                self.places.setdefault(tuple(words[i : i + self.SEED]), []).append((number, i))

    def longest_run(self, text: str) -> int:
        """The number of words in the longest run of `text` that occurs in one of the texts."""
        words = text.split()
        longest = 0
        for start in range(len(words) - self.SEED + 1):
            for number, i in self.places.get(tuple(words[start : start + self.SEED]), ()):
                known, n = self.texts[number], self.SEED
                while start + n < len(words) and i + n < len(known) and words[start + n] == known[i + n]:
                    n += 1
                longest = max(longest, n)
        return longest


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(cells: list[str]) -> None:
    print_row(cells)
    print_row(["---"] * len(cells))


def judge_heldout(args: argparse.Namespace) -> None:
    texts = read_stories(args.file)
    size = sum(len(text.encode()) for text in texts)
    print_head(["model", "stories", "bytes", "bits per byte"])
    for model in args.models:
        cost = sum(bits(model, text) for text in texts)
        print_row([model.name, f"{len(texts):,}", f"{size:,}", f"{cost / size:.4f}"])


def judge_stories(args: argparse.Namespace) -> None:
    beginnings = [""] * args.n
    if args.begin:
        beginnings = [" ".join(text.split()[:8]) for text in read_stories(args.begin)[: args.n]]
    known = Known(read_stories(args.known)) if args.known else None
    columns = ["model", "stories", "bits per byte", "repeated 4-grams", "ended", "bytes a story"]
    print_head(columns + ["longest known run"] * (known is not None))
    for model in args.models:
        told = [continuation(model, seed, args.t, args.length, beginning) for seed, beginning in enumerate(beginnings)]
        texts = [(start + text).strip() for start, (text, _) in zip(beginnings, told, strict=True)]
        again, all_grams = (sum(counts) for counts in zip(*map(repeated, texts), strict=True))
        size = sum(len(text.encode()) for text in texts)
        cost = sum(bits(args.judge, text) for text in texts) / size
        row = [model.name, str(len(texts)), f"{cost:.3f}", f"{again / all_grams:.2%}"]
        row += [f"{sum(ended for _, ended in told) / len(told):.0%}", f"{size / len(told):.0f}"]
        print_row(row + [f"{max(map(known.longest_run, texts))} words"] if known else row)


def judge_beginnings(args: argparse.Namespace) -> None:
    beginnings = BEGINNINGS.read_text().splitlines()
    looping = 0
    for number, beginning in enumerate(beginnings, 1):
        text, _ = continuation(args.model, args.seed, args.t, args.length, beginning)
        mark = ""
        if loops(beginning + text):
            looping += 1
            mark = " (loops)"
        print(f"{number}.{mark} **{beginning}**{text.rstrip()}\n", flush=True)
    print(f"In {looping} of {len(beginnings)}, a run of ten words occurs twice.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    heldout = commands.add_parser("heldout", help="bits per byte of the stories in a file")
    heldout.add_argument("file", type=Path)
    heldout.add_argument("models", type=Path, nargs="+")
    heldout.set_defaults(command=judge_heldout)
    stories = commands.add_parser("stories", help="sampled stories, judged by another model")
    stories.add_argument("judge", type=Path)
    stories.add_argument("models", type=Path, nargs="+")
    stories.add_argument("-n", type=int, default=200, help="stories of each model")
    stories.add_argument("-t", type=float, default=0.8, help="temperature")
    stories.add_argument("--length", type=int, default=256, help="tokens of a story, at most")
    stories.add_argument("--begin", type=Path, help="stories whose first eight words are continued")
    stories.add_argument("--known", type=Path, help="stories among which to look for runs of words")
    stories.set_defaults(command=judge_stories)
    beginnings = commands.add_parser("beginnings", help="continues the lines of beginnings.txt")
    beginnings.add_argument("model", type=Path)
    beginnings.add_argument("-t", type=float, default=0.7, help="temperature")
    beginnings.add_argument("-n", dest="length", type=int, default=256, help="tokens, at most")
    beginnings.add_argument("-s", dest="seed", type=int, default=1)
    beginnings.set_defaults(command=judge_beginnings)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
