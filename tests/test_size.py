"""Large files: sparse ones, whose weights are all 0, so that they cost neither disk nor time."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_weights
from files import ROOT, Program, default_vocabulary, write_model

import export

MB = 1 << 20
TOKENIZER = ROOT / "tokenizer.bin"


def sparse(path: Path, shape: str, layers: int | None = None) -> export.Config:
    """A weights file of the shape, as export.py would lay it out, without its weights."""
    config = random_weights.SHAPES[shape]
    config = export.replace(config, n_layers=layers or config.n_layers)
    with path.open("wb") as file:
        file.write(export.header(config, "bf16", export.read_tokenizer(TOKENIZER).vocab_hash))
        file.truncate(export.file_size(config))
    return config


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
def test_own_memory_is_the_cache_and_64_mb(run: Program, shape: str, layers: int, prompt: int, tmp_path: Path) -> None:
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
    assert f"prefill: {prompt} tokens" in done.stderr


def test_70b_runs_whole(run: Program, tmp_path: Path) -> None:
    """A token through all 138 GB: the last layer and the classifier decide, from beyond 32 and 37 bits of offset.

    All weights are 0 but these: the embedding of bos is all ones; the last layer's FFN makes component 5 very
    negative; of the classifier, the last row asks for the sum, and the one before it for minus component 5.
    """
    if run.sanitized or not os.environ.get("LARGE"):
        pytest.skip("reads 138 GB of a sparse file: LARGE=1 runs it")
    path = tmp_path / "m.bin"
    config = sparse(path, "70b")
    places = {part.name: at for at, parts in export.layout(config) for part in parts[:1]}
    places["up"] = places["model.layers.79.mlp.gate_proj.weight"] + 2 * config.hidden_dim * config.dim
    ones = np.ones(config.dim, np.float32)

    def put(name: str, element: int, values: Any) -> None:
        file.seek(places[name] + 2 * element)
        file.write(np.asarray(values, export.DTYPES["bf16"]).tobytes())

    with path.open("r+b") as file:
        put("model.embed_tokens.weight", 1 * config.dim, ones)
        put("model.layers.79.post_attention_layernorm.weight", 0, ones)
        put("model.layers.79.mlp.gate_proj.weight", 0, ones / 1024)
        put("up", 0, ones / 1024)
        put("model.layers.79.mlp.down_proj.weight", 5 * config.hidden_dim, [-100.0])
        put("model.norm.weight", 0, ones)
        put("lm_head.weight", (config.vocab_size - 1) * config.dim, ones)
        put("lm_head.weight", (config.vocab_size - 2) * config.dim + 5, [-1.0])
    limit = 2 * config.n_layers * config.kv_dim * 64 * 2 + 64 * MB
    args = [path, "-z", TOKENIZER, "-n", 1, "-t", 0, "-j", 2, "--json"]
    done = run.ok(*args, preexec=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    assert json.loads(done.stdout)["id"] == config.vocab_size - 2


def test_a_prompt_of_100000_tokens(run: Program, tmp_path: Path) -> None:
    """No int overflows, and no memory but the cache and the workspace; batches do not matter to the result."""
    if run.sanitized or not sys.platform.startswith("linux"):
        pytest.skip("needs RLIMIT_DATA, and no sanitizers, which take memory of their own")
    path, n = tmp_path / "m.bin", 100_000
    sizes = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "max_seq_len": 1 << 17}
    model = write_model(path, tokenizer=default_vocabulary(), **sizes)
    text = tmp_path / "long.txt"
    text.write_bytes(bytes(97 + i * i % 26 for i in range(n)))
    positions = (n + 64) // 64 * 64
    limit = 2 * model.n_kv_heads * model.head_dim * positions * 2 + 64 * MB
    args = [path, "-f", text, "-n", 0, "-t", 0, "-c", n + 40, "--json"]
    done = run.ok(*args, preexec=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    fed = re.search(r"prefill: (\d+) tokens", done.stderr)
    assert fed and int(fed[1]) > 0.9 * n
    assert all(math.isfinite(json.loads(line)["logprob"]) for line in done.stdout.splitlines())


@contextmanager
def memory_of(limit: int) -> Iterator[Callable[[], object]]:
    """A group of processes that have so much memory, files in memory counted. Yields what makes a process join it."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # versions of Linux's interface
    first = (one / "memory.limit_in_bytes").exists()
    group = (one if first else two) / f"twofiles-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a cgroup of its own, which takes root: {error}")
    try:
        try:
            (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"needs cgroups that limit memory: {error}")
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def test_a_model_larger_than_memory(run: Program, tmp_path: Path) -> None:
    """It says the same, and does not read the whole file for each token, as much of it stays in memory."""
    path, tokens = tmp_path / "m.bin", 20
    subprocess.run(
        [sys.executable, ROOT / "models" / "random_weights.py", "110m", "-o", path],
        check=True,
        capture_output=True,
    )
    args = [path, "-i", "Hello", "-n", tokens, "-t", 0, "-c", 64, "--json"]
    expected = run.ok(*args).stdout
    size = path.stat().st_size
    with memory_of(size * 3 // 4) as join:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read now counts for the group
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
        assert run.ok(*args, preexec=join).stdout == expected
        read = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * 512
    if read < 2 * size:
        pytest.skip("the file is not on a disk")
    passes = tokens - 1
    assert read < 0.75 * passes * size, f"{read / passes / size:.2f} of the file for each token"


def test_a_text_that_never_ends(run: Program) -> None:
    run.fails(1, "-z", TOKENIZER, "-m", "tokenize", "-f", "/dev/zero", says=["1073741824 bytes, found more"])


def mapping_of(process: int, path: Path) -> dict[str, int]:
    """What a process has in memory of a file, in KB: Rss, Pss (pages divided by how many have them), Private_Dirty..."""
    found: dict[str, int] = {}
    here = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            here = line.endswith(str(path))
        elif here and rest[-1] == "kB":
            found[first[:-1]] = found.get(first[:-1], 0) + int(rest[0])
    return found


def test_32_processes_share_the_weights(run: Program, tmp_path: Path) -> None:
    """All are in the middle of a text, as nobody reads what they print, and have been through the whole file."""
    if run.sanitized or not Path("/proc/self/smaps").exists():
        pytest.skip("needs /proc, and no sanitizers, which take memory of their own")
    path, n = tmp_path / "m.bin", 32
    shutil.copy(ROOT / "models" / "stories.bin", path)
    command = [
        run.path,
        path,
        "-z",
        ROOT / "models" / "stories.tokenizer.bin",
        *["-n", "0", "-t", "0", "-j", "1", "--json", "--probs"],
    ]
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "pipesize": 4096,
        "bufsize": 0,
    }
    processes = [subprocess.Popen(command, **pipes) for _ in range(n)]
    try:
        for process in processes:
            assert process.stdout
            process.stdout.read(1)  # then it has computed some tokens
        found = [mapping_of(process.pid, path) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    size = path.stat().st_size / 1024
    shared = sum(one["Pss"] for one in found)
    print(f"{n} processes: {size:.0f} KB of weights, {shared} KB in memory", file=sys.stderr)
    assert all(one["Rss"] > 0.5 * size for one in found)
    assert all(one["Private_Dirty"] == 0 for one in found)
    assert shared < 1.1 * size
