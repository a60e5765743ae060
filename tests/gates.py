"""Tools that find what tests do not show: valgrind, ThreadSanitizer and cppcheck, each as a test of run.c.

    python -m pytest -rs tests/gates.py       # part of make check

Where a tool is not installed, its tests are skipped.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from files import (
    QK_NORM,
    QKV_BIAS,
    ROOT,
    TIED,
    byte_level_vocabulary,
    write_model,
)

TEXT = b"the cat and the hen can sing, the cat and the rest can not; once in the inn the cat sat on the hen. "
MESSAGES = b"the cat\nthe hen\\\nsat on the cat\n\x1b[1m <s> \xff\nand the rest\n"

# What run.c does.
WORK = {
    "generate": "-f text -n 0 -t 0.8 -k 9 -s 1 --draft 3",
    "greedy": "-f text -n 145 -t 0 --json --probs",
    "next": "-m next -f text -k 3",
    "perplexity": "-m perplexity -f text",
    "stride": "-m perplexity -f text -c 40 --stride 11 --json",
    "tokenize": "-m tokenize -f text --json",
    "bench": "-m bench --repeat 1 --prefill 30 --decode 2",
    "chat": "-m chat -n 12 -s 2 --draft 2",
}


def need(*programs: str) -> None:
    if missing := [name for name in programs if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} is not installed")


def make(target: str, folder: Path = ROOT) -> Path:
    (folder / "build").mkdir(exist_ok=True)
    with (folder / "build" / "lock").open("w") as lock:  # pytest-xdist's workers may want the same program
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(["make", "-s", target], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / target


def run_work(
    command: list[str | Path], work: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command, *WORK[work].split()],
        input=MESSAGES,
        cwd=folder,
        env=os.environ | {"GOMP_SPINCOUNT": "0"} | variables,
        capture_output=True,
        timeout=300,
        check=False,
    )


# ---------------------------------------------------------------------------------------------------------
# valgrind: memory that was not initialised, allocated or freed


@pytest.fixture(scope="session")
def odd_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models whose sizes are no multiples of a vector."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "text").write_bytes(TEXT * 2)
    byte_level = byte_level_vocabulary()
    write_model(folder / "f16.bin", dim=33, hidden_dim=17, n_kv_heads=4, head_dim=6, flags=QK_NORM, max_seq_len=160)
    write_model(
        folder / "bf16.bin",
        dtype="bf16",
        tokenizer=byte_level,
        flags=TIED | QKV_BIAS,
        dim=20,
        hidden_dim=50,
        max_seq_len=160,
        n_kv_heads=1,
    )
    return folder


@pytest.mark.parametrize("work", WORK)
def test_valgrind(work: str, odd_models: Path) -> None:
    need("valgrind")
    program = make("build/run-valgrind")
    command: list[str | Path] = [
        *(
            "valgrind",
            "--quiet",
            "--error-exitcode=99",
            "--leak-check=full",
            "--errors-for-leak-kinds=definite",
        ),
        program,
    ]
    for model in ("bf16.bin",) if work == "chat" else ("f16.bin", "bf16.bin"):
        done = run_work([*command, model], work, odd_models)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
        assert b"==" not in done.stderr, done.stderr.decode(errors="replace")[-4000:]


# ---------------------------------------------------------------------------------------------------------
# ThreadSanitizer: threads that do not wait for each other

RACES = {  # what is left out of run.c, and then has to be found
    "a barrier after rmsnorm": (
        "#pragma omp for\n    for (size_t t = 0; t < out.rows; t++) {\n        float *row = thread_scratch(s);\n        rms",
        "#pragma omp for nowait\n    for (size_t t = 0; t < out.rows; t++) {\n        float *row = thread_scratch(s);\n        rms",
    ),
    "a barrier after attention": ("collapse(2) schedule(dynamic)", "collapse(2) schedule(dynamic) nowait"),
    "a buffer for each thread": ("s->scratch + (size_t)omp_get_thread_num()", "s->scratch + (size_t)0"),
}


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of 3.4 MB, so that run uses four threads for it, each in every matrix product."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "text").write_bytes(TEXT)
    vocabulary = byte_level_vocabulary()
    write_model(
        folder / "m.bin",
        tokenizer=vocabulary,
        dim=128,
        hidden_dim=4096,
        n_layers=1,
        head_dim=32,
        max_seq_len=90,
    )
    return folder


def races(program: Path, folder: Path, work: str, threads: int) -> str:
    """What ThreadSanitizer says."""
    command: list[str | Path] = [program, "m.bin", "-j", str(threads)]
    done = run_work(command, work, folder, TSAN_OPTIONS="exitcode=99")
    said = done.stderr.decode(errors="replace")
    assert done.returncode == (99 if "ThreadSanitizer" in said else 0), said
    return said if done.returncode else ""


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("work", ["generate", "perplexity", "next", "chat"])
def test_threads(work: str, threads: int, wide_model: Path) -> None:
    need("gcc")
    assert races(make("build/run-threads"), wide_model, work, threads) == ""


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_found(name: str, wide_model: Path, tmp_path: Path) -> None:
    need("gcc")
    source, (good, bad) = (ROOT / "run.c").read_text(), RACES[name]
    assert source.count(good) == 1
    (tmp_path / "run.c").write_text(source.replace(good, bad))
    for path in ("Makefile", "tests"):
        (tmp_path / path).symlink_to(ROOT / path)
    program = make("build/run-threads", tmp_path)
    assert any("data race" in races(program, wide_model, "next", threads) for threads in (2, 4) * 6)


# ---------------------------------------------------------------------------------------------------------
# cppcheck: what it finds without running

# Agreed: sums of exponentials are at least 1, as the largest logit is among them; and mmap's file is -1 for memory.
AGREED = ["invalidFunctionArg:run.c"]


def test_cppcheck() -> None:
    need("cppcheck")
    command = [
        "cppcheck",
        "--std=c11",
        "--enable=warning,performance,portability",
        "--quiet",
        "--library=posix",
    ]
    command += ["--error-exitcode=1", "--suppress=missingIncludeSystem", *(f"--suppress={a}" for a in AGREED)]
    for macros in (
        ["-D__x86_64__", "-D__linux__"],
        ["-D__x86_64__", "-D__linux__", "-D_OPENMP", "-D__AVX2__"],
    ):
        done = subprocess.run([*command, *macros, "run.c"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
