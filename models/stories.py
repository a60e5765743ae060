"""The stories that the small model learns from, and those that are held out."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

HELDOUT_SHARE = 40  # one story in so many
SAME_WORDS = 30  # a story with such a run of words in common with a held-out one is not trained on


def read_stories(path: Path) -> list[str]:
    """The distinct stories of a file with a JSON object a line, in its order; .xz: compressed."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        return list(dict.fromkeys(json.loads(line)["text"].strip() for line in file))


def held_out(text: str) -> bool:
    """Decided by the text alone, so that it does not depend on the order or the number of stories."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELDOUT_SHARE == 0


def word_runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SAME_WORDS]) for i in range(len(words) - SAME_WORDS + 1)}


def split(stories: list[str]) -> tuple[list[str], list[str]]:
    """The stories to train on, and the held-out ones; no two of them are nearly the same."""
    heldout = [text for text in stories if held_out(text)]
    known = set().union(*map(word_runs, heldout))
    return [text for text in stories if not held_out(text) and known.isdisjoint(word_runs(text))], heldout
