#!/usr/bin/env python3
"""Counts what keeps the program short and easy to read, prints each number with its limit, and fails if one is exceeded.

    make lint                       # or: python3 tests/counts.py

A code line is neither blank nor only a comment. Comments, strings and characters do not count as code of a line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What the two programs have now, and must not exceed. The aims of the second edition were 2,200 and 1,650. The first
# had 2,561 lines of run.c, of which some 280 went. What came, in lines: several machines 84 (53 of them in section
# 12), busy machines 30, CPU quotas and the check of the CPU 57, dropped thoughts and messages of several lines 50,
# whitespace of Unicode and templates that add to an answer or move the system prompt 29, checks of hostile tokenizers
# 54, plain loops 52; and `if` in place of 79 conditional expressions. Before these 29, run.c had grown by 8 % in tokens
# of C. No block of 50 lines could go without a feature, a check or speed.
RUN_LINES = 2981
EXPORT_LINES = 2686

NOT_CODE = re.compile(r"\s*(//.*|/?\*.*)?")
COMMENT_OR_LITERAL = re.compile(
    r"//[^\n]* | /\*.*?\*/ | \"(?:\\.|[^\"\\\n])*\" | '(?:\\.|[^'\\\n])*'", re.DOTALL | re.VERBOSE
)
ONE_LINE_FUNCTION = re.compile(r"\w[^{]*\)\s*\{.*\}")


@dataclass
class Count:
    what: str
    found: float
    limit: float
    places: list[int]  # line numbers, where they help

    def __str__(self) -> str:
        over = "" if self.found <= self.limit else "   <- too many"
        if over and self.places:
            over += ": lines " + ", ".join(map(str, self.places[:20])) + (", ..." if self.places[20:] else "")
        return f"{self.what:<56} {self.found:>8.4g} {self.limit:>6g}{over}"


def code_lines(text: str) -> int:
    return sum(not NOT_CODE.fullmatch(line) for line in text.splitlines())


def bare(text: str) -> str:
    """The text without comments, and with empty strings and characters; its lines stay where they are."""

    def replacement(match: re.Match[str]) -> str:
        first = match[0][0]
        return "\n" * match[0].count("\n") if first == "/" else first * 2

    return COMMENT_OR_LITERAL.sub(replacement, text)


def without_loop_headers(text: str) -> str:
    """`bare` text in which the semicolons of for (...;...;...) are commas."""
    parts: list[str] = []
    at = 0
    for match in re.finditer(r"\bfor \(", text):
        if match.start() < at:
            continue
        end, depth = match.end(), 1
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        parts += [text[at : match.start()], text[match.start() : end].replace(";", ",")]
        at = end
    return "".join([*parts, text[at:]])


def crowded_lines(text: str) -> list[int]:
    """The numbers of lines that have more than one statement, except functions of one line."""
    lines = enumerate(without_loop_headers(bare(text)).splitlines(), start=1)
    return [n for n, line in lines if line.count(";") > 1 and not ONE_LINE_FUNCTION.fullmatch(line.rstrip())]


def wide_lines(text: str) -> list[int]:
    return [n for n, line in enumerate(text.splitlines(), start=1) if len(line) > 120]


def model_part(text: str) -> str:
    """What comes before section 5: the whole language model."""
    end = re.search(r"^// 5 ", text, re.MULTILINE)
    if not end:
        raise SystemExit("run.c: expected a line that starts with '// 5 ', the tokenizer's section, found none")
    return text[: end.start()]


def counts(read: Callable[[str], str]) -> list[Count]:
    run, readme, export = read("run.c"), read("README.md"), read("export.py")
    code = code_lines(run)
    crowded, wide, wide_readme = crowded_lines(run), wide_lines(run), wide_lines(readme)
    return [
        Count("run.c: code lines of sections 1 to 4", code_lines(model_part(run)), 500, []),
        Count("run.c: code lines", code, RUN_LINES, []),
        Count("run.c: ternaries per 100 code lines", 100 * bare(run).count("?") / max(code, 1), 4, []),
        Count("run.c: lines of more than one statement", len(crowded), 0, crowded),
        Count("run.c: lines of more than 120 columns", len(wide), 0, wide),
        Count("README.md: lines of more than 120 columns", len(wide_readme), 0, wide_readme),
        Count("README.md: lines", len(readme.splitlines()), 350, []),
        Count("export.py: lines", len(export.splitlines()), EXPORT_LINES, []),
    ]


def main() -> int:
    found = counts(lambda name: (ROOT / name).read_text())
    print(f"{'':<56} {'found':>8} {'limit':>6}", *found, sep="\n")
    return int(any(count.found > count.limit for count in found))


if __name__ == "__main__":
    sys.exit(main())
