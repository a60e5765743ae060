"""run.c compiles without a warning, with gcc and clang, for every instruction set, with and without OpenMP."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT, X86

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
