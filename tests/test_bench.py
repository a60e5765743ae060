"""tests/roofline.c: what it measures; tests/bench.py: what it estimates, and that the whole of it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import bench
import pytest
from builds import build
from files import Model, Program, check_one_line
from random_weights import SHAPES

from export import file_size, replace


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_layers_as_fit(shape: str) -> None:
    whole = SHAPES[shape]
    assert bench.that_fits(whole, file_size(whole)) == whole
    fewer = bench.that_fits(whole, file_size(whole) - 1)
    assert fewer == replace(whole, n_layers=whole.n_layers - 1)
    assert bench.that_fits(whole, 0).n_layers == 1


def test_a_model_that_does_not_fit_is_scaled_by_its_bytes(tmp_path: Path) -> None:
    whole = SHAPES["15m"]
    half = replace(whole, n_layers=3)
    sizes = ["--prefill", "16", "--decode", "2", "--repeat", "1", "--room", str(file_size(half))]
    build("roofline", "native")
    command = [sys.executable, bench.__file__, "--shapes", "15m", "--folder", tmp_path, *sizes]
    made = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    r = json.loads(made.stdout)
    assert (r["layers"], r["whole"], r["file_bytes"]) == (3, False, file_size(whole))
    read = file_size(half) + 4 * half.n_layers * half.kv_dim * 1.5  # the classifier is the embedding here
    measured = r["decode"]["gb_s"] * 1e9 / read  # tokens a second of the file as it was
    assert r["decode"]["tok_s"] == pytest.approx(measured * file_size(half) / file_size(whole), rel=1e-3)
    assert not list(tmp_path.iterdir())
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| 15m (3 of 6 layers) | 0.0304 | ~" in table


@pytest.fixture(scope="module")
def roofline() -> list[str]:
    return build("roofline", "native")


def measure(roofline: list[str], path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [*roofline, str(path), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_limits_beside_the_work(roofline: list[str], run: Program, tiny: Model, tiny_path: Path) -> None:
    """The fields of `run -m bench --json`, and of each work its limit and how near it came."""
    sizes = ["--prefill", 20, "--decode", 4, "-c", 30, "-j", 1, "--repeat", 3, "--json"]
    done = measure(roofline, tiny_path, *sizes)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    plain = json.loads(run.ok(tiny_path, "-m", "bench", *sizes).stdout)
    assert list(found) == list(plain)
    for name in ("model", "params", "dtype", "file_bytes", "threads", "context", "repeat"):
        assert found[name] == plain[name]
    for kind, rate, limit in [
        ("prefill", "gflops", "peak_gflops"),
        ("decode", "gb_s", "read_gb_s"),
        ("decode_at_end", "gb_s", "read_gb_s"),
    ]:
        work = found[kind]
        assert list(work) == ["tokens", "position", "tok_s", "tok_s_min", "tok_s_max", rate, limit, "ratio"]
        assert [work[k] for k in ("tokens", "position")] == [plain[kind][k] for k in ("tokens", "position")]
        assert 0 < work["tok_s_min"] <= work["tok_s"] <= work["tok_s_max"]
        assert work[rate] > 0 and work[limit] > 0 and work["ratio"] > 0
        work_per_token = plain[kind][rate] / plain[kind]["tok_s"]
        assert work[rate] == pytest.approx(work_per_token * work["tok_s"], rel=1e-4)
    assert found["prefill"]["ratio"] < 1.2  # nothing multiplies faster than its own instruction


def test_one_repetition_has_one_ratio(roofline: list[str], tiny_path: Path) -> None:
    sizes = ["--prefill", 20, "--decode", 4, "-c", 30, "-j", 1, "--repeat", 1, "--json"]
    found = json.loads(measure(roofline, tiny_path, *sizes).stdout)
    for kind, rate, limit in [("prefill", "gflops", "peak_gflops"), ("decode", "gb_s", "read_gb_s")]:
        work = found[kind]
        assert work["ratio"] == pytest.approx(work[rate] / work[limit], rel=1e-2, abs=2e-4)


def test_the_table_of_limits(roofline: list[str], tiny_path: Path) -> None:
    lines = measure(roofline, tiny_path, "--decode", 2, "--repeat", 2).stdout.splitlines()
    assert str(tiny_path) in lines[0] and "threads" in lines[0] and not lines[1]
    head, rule, *rows = lines[2:]
    assert set(rule) <= set("|-:") and len(rows) == 3
    assert {len(row) for row in [head, rule, *rows]} == {len(head)}
    assert {row.count("|") for row in [head, rule, *rows]} == {10}
    assert [row.split()[1] for row in rows] == ["prefill", "decode", "decode_at_end"]
    assert re.search(r"GFLOPS +[0-9.]+ \| GFLOPS +[0-9.]+ \| +[0-9.]+ \|$", rows[0])
    assert re.search(r"GB/s +[0-9.]+ \| GB/s +[0-9.]+ \| +[0-9.]+ \|$", rows[1])


@pytest.mark.parametrize("args", [["--prefill", 17, "-c", 16], ["-c", 65], ["--repeat", 0], ["--frob"]])
def test_bad_options(roofline: list[str], tiny_path: Path, args: list[object]) -> None:
    done = measure(roofline, tiny_path, *args)
    assert (done.returncode, done.stdout) == (2, "")
    check_one_line(done.stderr)
