"""run.c compiles without a warning, with gcc and clang, for every instruction set, with and without OpenMP, and with zig
for other systems."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from builds import NEEDS, ROOT, X86, build
from files import reference_logits, write_model

LEVELS = ["-march=native", *([f"-march=x86-64{v}" for v in ("", "-v2", "-v3", "-v4")] if X86 else [])]


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compiles_without_a_warning(compiler: str, level: str, openmp: bool, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = [f"CC={compiler}", f"CFLAGS=-O3 -Werror {level}", *([] if openmp else ["OPENMP="])]
    done = make(tmp_path, "portable", *variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_plain_program_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = make(tmp_path, "plain", f"CC={compiler} -Werror")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run-plain").exists()


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_other_flags_build_it_anew(tmp_path: Path) -> None:
    (tmp_path / "run.c").write_text("int main(void) { return 0; }\n")
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for words, built in (([], True), ([], False), (["portable"], True), ([], True), (["CFLAGS=-O1"], True)):
        done = make(tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert ("run.c -o run" in done.stdout) == built, (words, done.stdout)


@pytest.mark.skipif("SYSTEMS" not in os.environ, reason="takes minutes; make check sets SYSTEMS=1")
@pytest.mark.parametrize("system", [name for name, needs in NEEDS.items() if "ziglang" in needs])
def test_other_systems(system: str, tmp_path: Path) -> None:
    """run.c compiles for them without a warning. Those of Linux also compute the logits of a small model."""
    build("run", system)
    if not system.endswith("-musl"):
        return
    tokens, out = [1, 270, 280, 290, 300], tmp_path / "out"
    model = write_model(tmp_path / "m.bin", hidden_dim=45)
    probe = build("probe", system)
    subprocess.run([*probe, tmp_path / "m.bin", "1", "3", "0", out, *map(str, tokens)], check=True)
    logits = np.fromfile(out, np.float32)[-len(tokens) * model.vocab_size :].reshape(len(tokens), -1)
    assert np.abs(logits - reference_logits(model, tokens)).max() < 0.02


@pytest.mark.parametrize("libc", ["musl", "glibc"])
def test_a_static_program(libc: str, tmp_path: Path) -> None:
    """It needs no other file, has threads, and says the same as the program for any CPU of this kind."""
    if libc == "musl" and not shutil.which("musl-gcc"):
        pytest.skip("no musl-gcc here")
    for name in ("run.c", "Makefile", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    if (done := make(tmp_path, "static", *(["MUSL="] if libc == "glibc" else []))).returncode:
        pytest.skip(f"no static libraries here: {done.stderr}")
    assert make(tmp_path, "portable").returncode == 0
    program = (tmp_path / "run-static").read_bytes()
    assert program.startswith(b"\x7fELF") and b"/ld-" not in program[:4096]
    assert (b"Fatal glibc error" in program) == (libc == "glibc")
    assert b"GOMP_parallel" in program
    say = ["-t", "0", "-n", "40"]
    texts = [
        subprocess.run([tmp_path / name, *say], cwd=tmp_path, capture_output=True, check=True).stdout
        for name in ("run", "run-static")
    ]
    assert texts[0] == texts[1]


# A compiler as Apple's: it knows neither -march=native nor OpenMP without -Xpreprocessor and Homebrew's library.
APPLE = """#!/bin/sh
echo "$*" >> log
case "$*" in *-march=native*) exit 1;; *-fopenmp*) ;; *) exit 0;; esac
case "$*" in *"-Xpreprocessor -fopenmp -I$PWD/omp/include -L$PWD/omp/lib -lomp"*) test -d omp;; *) exit 1;; esac
"""


@pytest.mark.parametrize("libomp", [True, False])
def test_what_a_mac_has(libomp: bool, tmp_path: Path) -> None:
    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "cc").write_text(APPLE)
    (tmp_path / "brew").write_text(f"#!/bin/sh\necho {tmp_path}/omp\n")
    for name in ("cc", "brew"):
        (tmp_path / name).chmod(0o755)
    if libomp:
        (tmp_path / "omp").mkdir()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["make"], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = (tmp_path / "log").read_text().splitlines()[-1]
    assert "-mcpu=native" in compiled and ("-lomp" in compiled) == libomp
    assert ("libomp" in done.stdout.replace(str(tmp_path), "").replace(compiled, "")) == (not libomp)
