"""Builds tests/unit.c and tests/probe.c for the CPUs and compilers that this machine has or can imitate."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() == "x86_64"
CPU = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []

# What each variant (see the Makefile) needs: flags of the CPU, or programs.
NEEDS: dict[str, list[str]] = {
    "native": [],
    "portable": [],
    "plain": [],  # the plain loops of run.c alone, as `make plain`
    "sanitized": [],
    "covered": [],  # sanitized, and counts the lines of run.c that it runs: tests/lines.py
    "v3": ["avx2", "fma", "f16c"],
    "v4": ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
    "amx": ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"],  # tiles in plain C: tests/amx.h
    "clang": ["clang"],
    "neon": ["aarch64-linux-gnu-gcc", "qemu-aarch64"],
    "neon-bf16": ["aarch64-linux-gnu-gcc", "qemu-aarch64"],
    # other systems, which zig compiles for; qemu runs those of Linux
    "aarch64-linux-musl": ["ziglang", "qemu-aarch64"],
    "x86_64-linux-musl": ["ziglang", *([] if X86 else ["qemu-x86_64"])],
    "riscv64-linux-musl": ["ziglang", "qemu-riscv64"],
    "aarch64-macos": ["ziglang"],
    "x86_64-macos": ["ziglang"],
    "aarch64-freebsd": ["ziglang"],
}


def variants(default: str) -> list[str]:
    """Those named by $VARIANTS, or the default ones."""
    return os.environ.get("VARIANTS", default).split(",")


def is_there(need: str) -> bool:
    """Has this machine this flag of the CPU, program or Python package?"""
    return need in CPU or bool(shutil.which(need) or importlib.util.find_spec(need))


def build(program: str, variant: str) -> list[str]:
    """The command that runs it; skips the test if this machine lacks something."""
    if missing := [need for need in NEEDS[variant] if not is_there(need)]:
        pytest.skip(f"{variant} needs {', '.join(missing)}")
    target = f"build/{program}-{variant}"
    make(target)
    emulator = [need for need in NEEDS[variant] if need.startswith("qemu-")]
    return [*emulator, *(["-cpu", "max"] if variant.startswith("neon") else []), str(ROOT / target)]


def make(target: str) -> None:
    """Makes it without a warning."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "lock").open("w") as lock:  # pytest-xdist's workers must not build the same at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(["make", "-s", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "warning" not in made.stderr, made.stderr
