"""Counts the lines of run.c that programs built with --coverage have run, prints the others, and fails below 97 %.

    python tests/lines.py build/run-covered build/unit-covered    # part of make check, after their tests

A line counts as run if any of the programs has run it. Lines that no program was built with (other CPUs' code) do not
count. Processes that end by a signal, or by _exit, leave no counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.97


def reports(program: Path) -> Iterable[dict[str, Any]]:
    """gcov's, for each source file of a program."""
    for data in sorted(program.parent.glob(f"{program.name}-*.gcda")):
        command: list[str | Path] = ["gcov", "--json-format", "--stdout", data]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            yield from json.loads(line)["files"]


def counted_lines(files: Iterable[dict[str, Any]]) -> dict[int, int]:
    """How often each line of run.c was run."""
    counts: dict[int, int] = {}
    for file in files:
        if Path(file["file"]).name == "run.c":
            for line in file["lines"]:
                number = line["line_number"]
                counts[number] = counts.get(number, 0) + line["count"]
    return counts


def ranges(numbers: list[int], known: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of neighbours. Lines without code are between them."""
    order = {number: i for i, number in enumerate(sorted(known))}
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and order[number] == order[found[-1][1]] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def main(programs: list[str]) -> int:
    counts = counted_lines(file for name in programs for file in reports((ROOT / name).resolve()))
    if not counts:
        print(f"lines.py: expected .gcda files of {', '.join(programs)}, found none", file=sys.stderr)
        return 1
    source = (ROOT / "run.c").read_text().splitlines()
    missed = [number for number, count in counts.items() if count == 0]
    share = 1 - len(missed) / len(counts)
    print(f"run.c: {len(counts) - len(missed)} of {len(counts)} lines run by the tests, {share:.1%}; the others:")
    for first, last in ranges(missed, counts):
        print(f"  {first}{f'-{last}' if last > first else ''}: {source[first - 1].strip()[:90]}")
    if share < LEAST:
        print(f"lines.py: expected {LEAST:.0%} of the lines, found {share:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
