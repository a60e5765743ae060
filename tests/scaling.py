#!/usr/bin/env python3
"""Scaling, made visible: bits per byte against parameters, the same held-out text for every model; nothing is trained.

    make scaling                    # or: python3 tests/scaling.py MODEL.bin ...

Evaluates with `run -m perplexity` the models that are there (the shipped one, stories260K from ../shared/models, and
SmolLM2 from `make smollm2`) and those of the command line. Prints a Markdown table, puts it into the README between its
marks, and draws tests/scaling.svg. The passages of tests/heldout.txt are written for this project and in no training
set of its own; each is one window that starts anew, and fits the context of the three models.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from export import HEADER, Config, specs_of

SHARED = ROOT.parent / "shared" / "models"
KINDS = {
    "story": ("a simple story", "#3987e5"),
    "prose": ("other prose", "#d97020"),
}  # headings, names, colours
MARKS = re.compile(r"(?<=<!-- make scaling -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Result(NamedTuple):
    name: str
    parameters: int
    bits_per_byte: dict[str, float]  # of each kind of text, as the table has it


def config_of(path: Path) -> Config:
    """The shape in the header of a weights file."""
    with open(path, "rb") as file:
        _, _, _, flags, *fields, _, _ = HEADER.unpack(file.read(HEADER.size))
    return Config(*fields, *(bool(flags >> bit & 1) for bit in range(3)))


def read_passages(path: Path) -> list[tuple[str, str]]:
    """(kind, text) of each; a paragraph's lines are joined."""
    _, *parts = re.split(r"^== (\w+)\n", path.read_text(), flags=re.MULTILINE)
    texts = (re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip()) for text in parts[1::2])
    return list(zip(parts[::2], texts, strict=True))


def evaluate(run: Path, name: str, path: Path, passages: list[tuple[str, str]]) -> Result:
    bits: dict[str, float] = defaultdict(float)
    scored: dict[str, float] = defaultdict(float)  # bytes: all but the first token's, if a model has no bos
    for kind, text in passages:
        command: list[str | Path] = [run, path, "-m", "perplexity", "--json", "-f", "-"]
        made = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
        if made.returncode:
            raise SystemExit(made.stderr.decode())
        found = json.loads(made.stdout)
        cost = found["nll"] * found["tokens"] / math.log(2)
        bits[kind] += cost
        scored[kind] += cost / found["bits_per_byte"]
    parameters = sum(spec.size for spec in specs_of(config_of(path)))
    return Result(name, parameters, {kind: round(bits[kind] / scored[kind], 2) for kind in bits})


def models_here(folder: Path) -> Iterator[tuple[str, Path]]:
    """The project's own model and those that may be there; `folder` is for what has to be exported first."""
    yield "stories (ships with run)", ROOT / "models" / "stories.bin"
    if (smollm2 := ROOT / "models" / "smollm2.bin").exists():
        yield "SmolLM2-135M-Instruct", smollm2
    else:
        print("models/smollm2.bin is not there (make smollm2): left out", file=sys.stderr)
    if (source := SHARED / "stories260K.bin").exists():
        path = folder / "stories260K.bin"
        command: list[str | Path] = [ROOT / "export.py", source, "--tokenizer", SHARED / "tok512.bin"]
        subprocess.run([sys.executable, *command, "-o", path], check=True, capture_output=True)
        yield "stories260K", path
    else:
        print("../shared/models/stories260K.bin is not there: left out", file=sys.stderr)


def table(results: list[Result]) -> str:
    names = [name for name, _ in KINDS.values()]
    lines = [f"| model | parameters | {' | '.join(names)} |", "|---|--:|" + "--:|" * len(names)]
    for r in results:
        figures = (f"{r.bits_per_byte[kind]:.2f}" for kind in KINDS)
        lines.append(f"| {r.name} | {r.parameters:,} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def count(n: float) -> str:
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:g}{suffix}"
    return f"{n:g}"


def mark(kind: str, x: float, y: float) -> str:
    colour = KINDS[kind][1]
    if kind == "story":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}"/>'


def plot(results: list[Result]) -> str:
    """An SVG with a transparent ground; its grey is as far from white as from black."""
    width, height, left, right, top, bottom = 640, 360, 48, 24, 48, 48
    exponents = [math.log10(r.parameters) for r in results]
    low, high = math.floor(min(exponents)), math.floor(max(exponents)) + 1
    ceiling = math.ceil(max(max(r.bits_per_byte.values()) for r in results)) + 1  # room for a name

    def across(exponent: float) -> float:
        return left + (width - left - right) * (exponent - low) / (high - low)

    def up(bits: float) -> float:
        return height - bottom - (height - top - bottom) * bits / ceiling

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        "<title>Bits per byte of held-out text against parameters</title>",
        '<g font-family="sans-serif" font-size="13" fill="#767676">',
        '<g stroke="#767676" stroke-opacity="0.35">',
        *(f'<path d="M{left} {up(y):.1f}H{width - right}"/>' for y in range(ceiling + 1)),
        *(f'<path d="M{across(x):.1f} {up(0):.1f}v5"/>' for x in range(low, high + 1)),
        "</g>",
        *(text(left - 8, up(y) + 4, str(y), "end") for y in range(ceiling + 1)),
        *(text(across(x), up(0) + 20, count(10.0**x)) for x in range(low, high + 1)),
        text((left + width - right) / 2, height - 8, "parameters"),
        text(8, 20, "bits per byte", "start"),
    ]
    for i, (kind, (name, _)) in enumerate(KINDS.items()):
        at = width - right - 260 + 140 * i
        lines += [mark(kind, at, 16), text(at + 12, 20, name, "start")]
    names: list[tuple[float, float]] = []
    for r, exponent in zip(results, exponents, strict=True):
        x, costs = across(exponent), r.bits_per_byte.values()
        anchor = "start" if x < 110 else "end" if x > width - 110 else "middle"
        y = up(max(costs)) - 12
        while any(abs(x - a) < 120 and abs(y - b) < 14 for a, b in names):
            y -= 14
        names.append((x, y))
        figures = ", ".join(f"{r.bits_per_byte[kind]:.2f} for {KINDS[kind][0]}" for kind in KINDS)
        lines += [
            "<g>",
            f"<title>{escape(r.name)}: {r.parameters:,} parameters, {figures}</title>",
            f'<path d="M{x:.1f} {up(min(costs)):.1f}V{up(max(costs)):.1f}" stroke="#767676"/>',
            *(mark(kind, x, up(r.bits_per_byte[kind])) for kind in KINDS),
            text(x, y, r.name, anchor),
            "</g>",
        ]
    return "\n".join([*lines, "</g>", "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte against parameters, as a table and a plot.")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="besides those that are there")
    parser.add_argument("--run", type=Path, default=ROOT / "run")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "heldout.txt")
    parser.add_argument("--svg", type=Path, default=ROOT / "tests" / "scaling.svg")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="which has the table")
    args = parser.parse_args()
    passages = read_passages(args.text)
    with tempfile.TemporaryDirectory() as folder:
        models = [*models_here(Path(folder)), *((path.stem, path) for path in args.models)]
        results = [evaluate(args.run, name, path, passages) for name, path in models]
    results.sort(key=lambda r: r.parameters)
    print(table(results), end="")
    args.svg.write_text(plot(results))
    args.readme.write_text(MARKS.sub(lambda _: table(results), args.readme.read_text()))


if __name__ == "__main__":
    main()
