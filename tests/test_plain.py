"""The program of the plain loops alone (`make plain`, -DPLAIN) computes what the program with the fast kernels computes:
the logits of tiny random models of every architecture, and the greedy text of the model that ships."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from builds import ROOT, build
from files import Program

pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_reference as reference

import export


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", reference.ARCHITECTURES)
def test_logits_of_the_fast_kernels(name: str, dtype: str, tmp_path: Path) -> None:
    _, config, arrays = reference.random_model(name, dtype)
    file = tmp_path / "m.bin"
    export.write_model(file, reference.in_memory(config, arrays), reference.some_tokenizer(), dtype)
    plain, fast = build("probe", "plain"), build("probe", "native")
    assert subprocess.run([*plain, "isa"], capture_output=True, text=True, check=True).stdout == "plain C\n"
    isa = subprocess.run([*fast, "isa"], capture_output=True, text=True, check=True).stdout
    expected = reference.run_probe(plain, file, reference.TOKENS, config)
    found = reference.run_probe(fast, file, reference.TOKENS, config)

    # As in test_reference.py: where the CPU multiplies bf16 by bf16, activations are rounded to bf16.
    tolerance = 0.03 if dtype == "bf16" and "BF16" in isa else 0.003
    for key in ("x", "q", "k", "v", "attended", "hidden"):
        scale = float(np.abs(expected[key]).max())
        difference = float(np.abs(found[key] - expected[key]).max()) / scale
        assert difference < tolerance, f"{key} differs by {difference:.2g} of its largest"
    p, q = reference.log_softmax(expected["logits"]), reference.log_softmax(found["logits"])
    assert (np.exp(p) * (p - q)).sum(axis=-1).max() < 1e-4
    top = np.sort(expected["logits"], axis=-1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 0.05
    assert clear.mean() > 0.5
    assert (found["logits"].argmax(-1) == expected["logits"].argmax(-1))[clear].all()


@pytest.mark.parametrize("name", ["gqa", "odd"])
def test_plain_bits_do_not_depend_on_batches(name: str, tmp_path: Path) -> None:
    _, config, arrays = reference.random_model(name, "bf16")
    file, plain, tokens = tmp_path / "m.bin", build("probe", "plain"), reference.TOKENS
    export.write_model(file, reference.in_memory(config, arrays), reference.some_tokenizer(), "bf16")
    expected = reference.run_probe(plain, file, tokens, config, chunk=1)["logits"]
    for chunk in (2, 7, len(tokens)):
        found = reference.run_probe(plain, file, tokens, config, chunk=chunk)["logits"]
        assert found.tobytes() == expected.tobytes(), f"batches of {chunk}"


@pytest.fixture(scope="module")
def run_plain(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("plain")
    for name in ("run.c", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run(["make", "-s", "plain"], cwd=folder, capture_output=True, check=True)
    return Program(folder / "run-plain")


@pytest.mark.parametrize("prompt", ["", "Tim had a dog", "The dragon looked at the"])
def test_the_same_greedy_text(run: Program, run_plain: Program, prompt: str) -> None:
    flags = ["models/stories.bin", "-t", 0, "-n", 100, "-i", prompt]
    plain = run_plain.ok(*flags, cwd=ROOT).text
    assert len(plain) > 200
    assert run.ok(*flags, cwd=ROOT).text == plain


def test_it_says_that_it_is_plain(run_plain: Program) -> None:
    assert run_plain.ok("--version").text.endswith("(plain C)\n")
