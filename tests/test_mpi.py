"""Several processes say what one says (`make mpi`), and end together. Needs mpicc and mpirun."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from builds import make
from files import (
    ADD_BOS,
    ROOT,
    Program,
    Result,
    byte_level_vocabulary,
    check_one_line,
    fix,
    patch,
    write_model,
)

PROCESSES = [1, 2, 3, 5]
README = (ROOT / "README.md").read_text()
TEXT = b"the cat on the street, and once again: the cat on the street, and the cat in the street. " * 4

# How Open MPI gets to run by root, with more processes than cores, and without messages of its own.
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_orte_execute_quiet": "1",
    "OMP_WAIT_POLICY": "passive",
}


@pytest.fixture(scope="session")
def built() -> Path:
    if missing := [name for name in ("mpicc", "mpirun") if not shutil.which(name)]:
        pytest.skip(f"{' and '.join(missing)} not installed: several machines are not tested")
    make("run-mpi")
    return ROOT / "run-mpi"


def mpirun(*words: object, stdin: bytes = b"", cwd: Path | None = None) -> Result:
    command = ["mpirun", *map(str, words)]
    done = subprocess.run(
        command,
        input=stdin,
        cwd=cwd,
        env=os.environ | SETTINGS,
        capture_output=True,
        check=False,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models whose matrices have odd numbers of rows and several blocks of 32, the second one for a chat."""
    folder = tmp_path_factory.mktemp("mpi")
    shape = {"dim": 90, "n_heads": 5, "n_kv_heads": 5, "head_dim": 18, "hidden_dim": 151, "max_seq_len": 64}
    write_model(folder / "f16.bin", **shape)
    write_model(folder / "bf16.bin", dtype="bf16", tokenizer=byte_level_vocabulary(), **shape)
    return folder


def without_speed(text: bytes) -> bytes:
    return re.sub(rb'(?m)^tok_s .*$|"tok_s\w*": [^,}]*|"g\w+": [^,}]*', b"", text)


MODES: dict[str, tuple[Sequence[str], bytes]] = {
    "generate": (["-f", "-", "-t", "0.9", "-s", "7", "-n", "55", "--json"], TEXT[:50]),
    "draft": (["-f", "-", "-t", "0", "-n", "60", "--draft", "5", "--json"], TEXT[:52]),
    "perplexity": (["-f", "-", "-m", "perplexity", "--json"], TEXT),
    "next": (["-f", "-", "-m", "next", "--json"], TEXT[:40]),
    "tokenize": (["-f", "-", "-m", "tokenize"], TEXT),
    "bench": (["-m", "bench", "--prefill", "40", "--decode", "2", "--repeat", "1", "--json"], b""),
    "chat": (["-m", "chat", "-s", "3", "-n", "6", "--json"], b"the cat\nand the\\\nother\n\nthe end"),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_of_one_process(run: Program, built: Path, models: Path, mode: str) -> None:
    args, stdin = MODES[mode]
    for name in ("f16", "bf16"):
        if mode == "chat" and name == "f16":
            continue
        words = [models / f"{name}.bin", "-j", "2", *args]
        expected = without_speed(run.ok(*words, stdin=stdin).stdout)
        for n in PROCESSES if name == "bf16" else PROCESSES[-1:]:
            found = mpirun("-n", n, built, *words, stdin=stdin)
            assert found.status == 0, found
            assert without_speed(found.stdout) == expected, f"{name}, {n} processes"
            assert found.stderr.count("prefill: ") == (mode in ("generate", "draft", "chat"))


def test_the_time_as_seed(built: Path, models: Path) -> None:
    """All processes take that of process 0, so that they choose the same tokens; the text can be had again."""
    args = [models / "f16.bin", "-n", "30", "-t", "2"]
    found = mpirun("-n", 3, built, *args)
    seed = re.search(r"seed (\d+)$", found.stderr)
    assert seed, found
    assert mpirun("-n", 2, built, *args, "-s", seed[1]).stdout == found.stdout


def fails(result: Result, status: int, *says: str) -> None:
    assert (result.status, result.stdout) == (status, b""), result
    check_one_line(result.stderr)
    for word in says:
        assert word in result.stderr, result


def test_one_message_of_all(built: Path, models: Path) -> None:
    """What fails in all processes is said once, with the status that a single process has."""
    fails(mpirun("-n", 3, built, "none.bin"), 1, "run: none.bin: expected a weights file")
    fails(mpirun("-n", 3, built, "--none"), 2, "run: unknown flag '--none'")
    broken = models / "nan.bin"
    model = write_model(broken, hidden_dim=64)
    model.weights["final_norm"][:] = float("nan")
    model.write(broken)
    fails(mpirun("-n", 2, built, broken, "-m", "next", "-i", "a"), 1, "logits after position")


def test_a_process_alone_fails(built: Path, models: Path, tmp_path: Path) -> None:
    args = [built, "f16.bin", "-n", "9"]
    found = mpirun("-n", 2, "-wdir", models, *args, ":", "-n", 1, "-wdir", tmp_path, *args)
    fails(found, 1, "run: process 2: f16.bin: expected a weights file")


def test_others_are_refused(built: Path, models: Path, tmp_path: Path) -> None:
    """Another weights file, tokenizer, build, or other flags in one of the processes."""
    args = ["f16.bin", "-n", "9"]
    same = [built, *args]
    found = mpirun("-n", 1, "-wdir", models, *same, ":", "-n", 1, "-wdir", models, built, *args[:-1], "8")
    fails(found, 1, "process 1: flags: expected the same as in process 0, found a difference")

    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    data = bytearray((models / "f16.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "f16.bin").write_bytes(data)
    both = ["-n", 2, "-wdir", models, *same, ":", "-n", 1, "-wdir", tmp_path]
    fails(mpirun(*both, *same), 1, "process 2: weights file: expected the same as in process 0, found a difference")

    shutil.copy(models / "f16.bin", tmp_path)
    vocabulary = (tmp_path / "f16.tokenizer.bin").read_bytes()
    (tmp_path / "f16.tokenizer.bin").write_bytes(fix(patch(vocabulary, flags=ADD_BOS)))
    fails(mpirun(*both, *same), 1, "process 2: tokenizer file: expected the same as in process 0, found a difference")

    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run(["make", "-s", "run-mpi", "ARCH=", "CFLAGS=-O1"], cwd=tmp_path, check=True)
    version = subprocess.run([built, "--version"], env=os.environ | SETTINGS, capture_output=True, check=True)
    if b"portable" not in version.stdout:
        fails(
            mpirun(*both, tmp_path / "run-mpi", *args),
            1,
            "process 2: build: expected the same as in process 0, found a difference",
        )


def test_each_touches_its_rows_only(built: Path, tmp_path: Path) -> None:
    """With four processes, the largest memory of one falls by more than half of the weights."""
    path = tmp_path / "m.bin"
    subprocess.run(
        [sys.executable, ROOT / "models" / "random_weights.py", "110m", "-o", path],
        check=True,
        capture_output=True,
    )
    script = tmp_path / "peak.py"
    script.write_text(
        "import os, resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024\n"
        "open(f'{sys.argv[0]}.{os.getpid()}', 'w').write(str(peak))\n"
    )
    args = ["-i", "Hello", "-n", "4", "-c", "64", "-t", "0", "-j", "1"]
    peaks = {}
    for n in (1, 4):
        with path.open("rb") as file:  # a file that was written just now is in memory in large pages, mapped as a whole
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = mpirun("-n", n, sys.executable, script, built, path, *args)
        assert found.status == 0, found
        files = list(tmp_path.glob("peak.py.*"))  # mpirun may mix what the processes print
        assert len(files) == n
        peaks[n] = max(int(file.read_text()) for file in files)
        for file in files:
            file.unlink()
    size = path.stat().st_size
    assert peaks[1] > 0.75 * size
    assert peaks[4] < peaks[1] - 0.5 * size, (peaks, size)


def test_the_command_of_the_readme(built: Path, models: Path) -> None:
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    if "Open MPI" not in version:
        pytest.skip("it is for Open MPI")
    line = re.search(r"^    mpirun (.*) --hostfile machines \./run-mpi my.bin (.*)$", README, re.MULTILINE)
    assert line
    found = mpirun(*line[1].split(), built, models / "bf16.bin", *line[2].split(), "-n", "3", stdin=b"the cat\n")
    assert found.status == 0 and "prefill: " in found.stderr, found


def test_the_end_of_one_ends_all(built: Path, models: Path) -> None:
    """A process that is killed while it waits for the next message takes the others with it."""
    command = ["mpirun", "-n", "3", str(built), str(models / "bf16.bin"), "-m", "chat", "-n", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | SETTINGS)
    assert process.stdin and process.stdout
    process.stdin.write(b"the cat\n")
    process.stdin.flush()
    process.stdout.readline()
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-x", "run-mpi"], capture_output=True, text=True, check=False
    )
    children = [int(pid) for pid in found.stdout.split()]
    assert len(children) == 3
    os.kill(children[-1], 9)
    assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
