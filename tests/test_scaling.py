"""tests/scaling.py: what it adds up, the table, and the plot, with the models that are there and tiny ones."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scaling
from files import ROOT, Program, write_model

SVG = "{http://www.w3.org/2000/svg}"
TEXT = """== story

The cat sat
on a stone.

It slept.

== prose

Tea is hot.

== story

The end.
"""
PASSAGES = [
    ("story", "The cat sat on a stone.\n\nIt slept."),
    ("prose", "Tea is hot."),
    ("story", "The end."),
]


def points(svg: str) -> dict[str, list[tuple[float, float]]]:
    """What the plot shows: of each model's name, (x, y) of the circle and of the square."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if (title := group.find(f"{SVG}title")) is None:
            continue
        circle, square = group.findall(f"{SVG}circle"), group.findall(f"{SVG}rect")
        assert len(circle) == len(square) == 1
        name = (title.text or "").split(":")[0]
        assert name not in found and name in [text.text for text in group.findall(f"{SVG}text")]
        found[name] = [
            (float(circle[0].attrib["cx"]), float(circle[0].attrib["cy"])),
            (float(square[0].attrib["x"]) + 4.5, float(square[0].attrib["y"]) + 4.5),
        ]
    return found


def rows(table: str) -> dict[str, tuple[int, float, float]]:
    head, line, *lines = table.splitlines()
    assert head == "| model | parameters | a simple story | other prose |" and line == "|---|--:|--:|--:|"
    cells = [re.fullmatch(r"\| (.+) \| ([\d,]+) \| (\d+\.\d\d) \| (\d+\.\d\d) \|", line) for line in lines]
    assert all(cells)
    return {c[1]: (int(c[2].replace(",", "")), float(c[3]), float(c[4])) for c in cells if c}


def check_plot(svg: str, table: dict[str, tuple[int, float, float]]) -> None:
    """Places are a linear function of log parameters and of bits per byte, more bits being further up."""
    shown = points(svg)
    assert set(shown) == set(table)
    xs, ys = [], []
    for name, (parameters, *bits) in table.items():
        assert shown[name][0][0] == shown[name][1][0]
        xs.append((math.log10(parameters), shown[name][0][0]))
        ys += [(b, y) for b, (_, y) in zip(bits, shown[name], strict=True)]
    for places, tolerance, sign in ((xs, 0.2, 1), (ys, 0.2, -1)):
        (a, at), (b, to) = min(places), max(places)
        assert sign * (to - at) > 0
        for value, place in places:
            assert place == pytest.approx(at + (to - at) * (value - a) / (b - a), abs=tolerance)
    width, height = map(float, ElementTree.fromstring(svg).attrib["viewBox"].split()[2:])
    assert all(0 < x < width and 0 < y < height for pair in shown.values() for x, y in pair)


def test_table_and_plot(run: Program, tmp_path: Path) -> None:
    text, svg, readme = tmp_path / "text", tmp_path / "plot.svg", tmp_path / "readme"
    text.write_text(TEXT)
    readme.write_text("before\n<!-- make scaling -->\nold\n<!-- end -->\nafter\n")
    write_model(tmp_path / "tiny.bin")
    write_model(tmp_path / "a<b.bin", dim=64, n_layers=3)
    extra = [tmp_path / "tiny.bin", tmp_path / "a<b.bin"]
    command: list[str | Path] = [
        sys.executable,
        ROOT / "tests" / "scaling.py",
        "--run",
        run.path,
        "--text",
        text,
        *extra,
    ]
    command += ["--svg", svg, "--readme", readme]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    table = rows(made.stdout)
    here = ["stories (ships with run)", "tiny", "a<b"]
    here += ["SmolLM2-135M-Instruct"] if (ROOT / "models" / "smollm2.bin").exists() else []
    here += ["stories260K"] if (scaling.SHARED / "stories260K.bin").exists() else []
    assert set(table) == set(here)
    sizes = [parameters for parameters, *_ in table.values()]
    assert sizes == sorted(sizes)
    check_plot(svg.read_text(), table)
    assert readme.read_text() == f"before\n<!-- make scaling -->\n{made.stdout}<!-- end -->\nafter\n"

    # its figures: all bits that the tokens of a kind cost, by all its bytes
    bits, size = {"story": 0.0, "prose": 0.0}, {"story": 0, "prose": 0}
    for kind, passage in PASSAGES:
        found = json.loads(run.ok(extra[0], "-m", "perplexity", "--json", "-i", passage).stdout)
        bits[kind] += found["nll"] * found["tokens"] / math.log(2)
        size[kind] += len(passage)
    for kind, shown in zip(("story", "prose"), table["tiny"][1:], strict=True):
        assert shown == pytest.approx(bits[kind] / size[kind], abs=0.0051)

    before = svg.read_bytes(), readme.read_bytes()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == made.stdout
    assert (svg.read_bytes(), readme.read_bytes()) == before


def test_a_model_that_cannot_be_evaluated(run: Program, tmp_path: Path) -> None:
    model = tmp_path / "none.bin"
    command: list[str | Path] = [
        sys.executable,
        ROOT / "tests" / "scaling.py",
        "--run",
        run.path,
        "--svg",
        tmp_path / "s",
    ]
    made = subprocess.run([*command, model], capture_output=True, text=True, check=False)
    assert made.returncode == 1 and str(model) in made.stderr and not (tmp_path / "s").exists()


def test_what_the_readme_shows_is_one_run() -> None:
    found = scaling.MARKS.search((ROOT / "README.md").read_text())
    assert found
    check_plot((ROOT / "tests" / "scaling.svg").read_text(), rows(found[0]))


def test_a_passage_is_one_window(run: Program, tmp_path: Path) -> None:
    passages = scaling.read_passages(ROOT / "tests" / "heldout.txt")
    assert [kind for kind, _ in passages].count("story") == 2 and len(passages) == 6
    for name, path in scaling.models_here(tmp_path):
        for _, text in passages:
            tokens = run.ok(path, "-m", "tokenize", "-i", text).text.split()
            assert len(tokens) <= scaling.config_of(path).max_seq_len, name
