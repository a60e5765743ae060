"""Large files: sparse ones, whose weights are all 0, so that they cost neither disk nor time."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import pytest
from files import ROOT, Program

import export

MB = 1 << 20
TOKENIZER = ROOT / "tokenizer.bin"


def sparse(path: Path, shape: str, layers: int | None = None) -> export.Config:
    """A weights file of the shape, as export.py would lay it out, without its weights."""
    source = export.open_source(f"random:{shape}", layers=layers)
    with path.open("wb") as file:
        file.write(export.header(source.config, "bf16", export.read_tokenizer(TOKENIZER).vocab_hash))
        file.truncate(export.file_size(source.config))
    return source.config


@pytest.mark.parametrize("shape", ["7b", "70b"])
def test_a_large_file_is_ready_at_once(run: Program, shape: str, tmp_path: Path) -> None:
    """Mapping and checking 13.5 or 138 GB takes no longer than 100 ms: nothing is read or copied."""
    path = tmp_path / "m.bin"
    try:
        sparse(path, shape)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert run.ok(path, "-z", TOKENIZER, "-m", "tokenize", "-i", "hello").text == "1 22172\n"
        times.append(time.perf_counter() - start)
    assert min(times) < (0.1 if not run.sanitized else 1)


@pytest.mark.parametrize(("shape", "layers", "prompt"), [("1b", 2, 600), ("70b", 1, 250)])
def test_own_memory_is_the_cache_and_64_mb(
    run: Program, shape: str, layers: int, prompt: int, tmp_path: Path
) -> None:
    """All memory that is not the mapped file is counted: RLIMIT_DATA is what a process may have of its own."""
    if run.sanitized or not sys.platform.startswith("linux"):
        pytest.skip("needs RLIMIT_DATA, and no sanitizers, which take memory of their own")
    path = tmp_path / "m.bin"
    config = sparse(path, shape, layers)
    positions = (prompt + 2 + 63) // 64 * 64
    limit = 2 * config.n_layers * config.kv_dim * positions * 2 + 64 * MB
    text = " ".join(["the"] * (prompt - 1))
    args = [path, "-z", TOKENIZER, "-i", text, "-n", prompt + 2, "-t", 0, "-j", 2]
    done = run.ok(*args, preexec=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    assert f"prompt: {prompt} tokens" in done.stderr
