"""tests/bench.py: what it estimates, and that the whole of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest
from files import ROOT

from export import SHAPES, file_size, replace


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
    command = [sys.executable, ROOT / "tests" / "bench.py", "--shapes", "15m", "--folder", tmp_path, *sizes]
    made = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    r = json.loads(made.stdout)
    assert (r["layers"], r["whole"], r["file_bytes"]) == (3, False, file_size(whole))
    read = file_size(half) + 4 * half.n_layers * half.kv_dim * 1.5  # the classifier is the embedding here
    measured = r["decode"]["gb_s"] * 1e9 / read  # tokens a second of the file as it was
    assert r["decode"]["tok_s"] == pytest.approx(measured * file_size(half) / file_size(whole), rel=1e-3)
    assert not list(tmp_path.iterdir())
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| 15m (3 of 6 layers) | 0.0304 | ~" in table
