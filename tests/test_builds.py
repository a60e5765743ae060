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
    variables = [f"CC={compiler}", f"CFLAGS=-O3 -Werror {level}", f"OUT={tmp_path}/run"]
    variables += [] if openmp else ["OPENMP="]
    done = subprocess.run(
        ["make", "-s", "-B", "portable", *variables], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
