"""What the system refuses: each system call of a run fails once, and the files change while they are in use.

strace makes the calls fail (its option -e inject); without it, these tests are skipped. A run in which one call fails
either says the same as without, or ends with status 1 and one line that says why. It never ends by a signal.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from files import Program, check_one_line, check_sanitizers
from test_chat import talker
from test_cli import endless_model

STRACE = shutil.which("strace")
# What each call may answer. Calls before the first file is opened are the dynamic loader's, and are left alone; so is
# brk: if only that fails, the malloc of glibc 2.36 crashes.
ERRORS = {
    "openat": ["EMFILE", "EIO"],
    "newfstatat": ["EIO"],
    "fstat": ["EIO"],
    "pread64": ["EIO"],
    "read": ["EIO", "EINTR"],
    "write": ["ENOSPC", "EIO", "EPIPE"],
    "mmap": ["ENOMEM"],
    "munmap": ["EINVAL"],
    "close": ["EIO"],
    "ioctl": ["EIO"],
    "madvise": ["EINVAL"],
    "mincore": ["ENOMEM"],
    "getcwd": ["EACCES"],
    "readlink": ["EACCES"],
    "access": ["EACCES"],
    "lseek": ["ESPIPE"],
}
CALL = re.compile(r"^\d+ +(\w+)\(")
MODES = {
    "generate": (["-t", "0", "-i", ":"], b""),
    "json": (["-t", "0", "-i", ":", "--json", "--probs"], b""),
    "chat": (["-m", "chat", "-t", "0"], b"Hello\nYou\\\nthere\n"),
    "next": (["-m", "next", "-i", "abc"], b""),
    "tokenize": (["-m", "tokenize", "-f", "-"], b"some text\n"),
    "perplexity": (["-m", "perplexity", "-f", "-"], b"some more text, to be read in one go\n" * 3),
}
# What changes from one run to the next: speeds and seeds.
VARIES = re.compile(rb"\d+\.?\d* tok/s|seed \d+|tok_s +\S+")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(b"Helo!", max_seq_len=256).write(tmp_path_factory.mktemp("faults") / "m.bin")


@pytest.fixture(scope="module")
def tracer(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where strace may write, if it is there and may trace."""
    if not STRACE:
        pytest.skip("strace is not there")
    if run.sanitized:
        pytest.skip("sanitizers do not work under strace")
    path = tmp_path_factory.mktemp("strace") / "trace"
    if subprocess.run([STRACE, "-o", path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    return path


def traced(
    run: Program, trace: Path, model: Path, args: list[str], stdin: bytes, *options: str
) -> subprocess.CompletedProcess[bytes]:
    """A run under strace. With GOMP_SPINCOUNT set, the program does not start itself anew."""
    command = [STRACE or "", "-f", "-o", str(trace), *options, str(run.path), str(model), "-j", "1", *args]
    environment = os.environ | {"GOMP_SPINCOUNT": "3000"}
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60, env=environment)


def calls(trace: Path, model: Path) -> Iterator[tuple[str, int]]:
    """The calls that can fail, from the one that opens the model on: name, and how many of this name it makes."""
    counts: Counter[str] = Counter()
    begun = False
    for line in trace.read_text(errors="replace").splitlines():
        match = CALL.match(line)
        if not match:
            continue
        counts[match[1]] += 1
        begun |= match[1] == "openat" and str(model) in line
        if begun and match[1] in ERRORS:
            yield match[1], counts[match[1]]


@pytest.mark.parametrize("mode", MODES)
def test_each_system_call_fails_once(run: Program, model: Path, tracer: Path, mode: str) -> None:
    args, stdin = MODES[mode]
    expected = traced(run, tracer, model, args, stdin)
    assert expected.returncode == 0, expected
    said = VARIES.sub(b"", expected.stdout)
    tried: Counter[int] = Counter()
    for name, number in list(calls(tracer, model)):
        for error in ERRORS[name]:
            injection = f"inject={name}:error={error}:when={number}"
            found = traced(run, tracer, model, args, stdin, "-e", injection)
            tried[found.returncode] += 1
            if found.returncode == 0:
                assert VARIES.sub(b"", found.stdout) == said, (injection, found)
                continue
            assert found.returncode == 1, (injection, found)
            lines = found.stderr.decode().splitlines()
            assert lines[-1].startswith("run: "), (injection, found)
            assert sum(line.startswith("run: ") for line in lines) == 1, (injection, found)
            assert said.startswith(VARIES.sub(b"", found.stdout)), (injection, found)
    assert tried[0] > 3 and tried[1] > 3  # some faults matter, and some do not


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_output_that_cannot_be_written(run: Program, model: Path, tracer: Path, error: str) -> None:
    """The nth write and all after it fail: the message names standard output and the reason."""
    args, stdin = MODES["generate"]
    for number in range(1, 5):
        found = traced(run, tracer, model, args, stdin, "-e", f"inject=write:error={error}:when={number}")
        assert found.returncode == 1
        reason = os.strerror(getattr(errno, error))
        assert found.stderr.decode() == f"run: standard output: cannot write: {reason}\n"


# ---------------------------------------------------------------------------------------------------------
# Memory

# Fails the call of posix_memalign or realloc whose number is $FAIL_AT, and writes the number of calls to $CALLS.
ALLOCATORS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
static long n_calls, fail_at = -1;
static int fails(void) {
    if (fail_at < 0)
        fail_at = atol(getenv("FAIL_AT"));
    n_calls++;
    return n_calls == fail_at;
}
int posix_memalign(void **out, size_t alignment, size_t size) {
    int (*real)(void **, size_t, size_t) = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    return fails() ? ENOMEM : real(out, alignment, size);
}
void *realloc(void *memory, size_t size) {
    void *(*real)(void *, size_t) = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    return fails() ? NULL : real(memory, size);
}
__attribute__((destructor)) static void report(void) {
    FILE *file = fopen(getenv("CALLS"), "w");
    if (file)
        fprintf(file, "%ld", n_calls), fclose(file);
}
"""


@pytest.fixture(scope="module")
def allocators(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if run.sanitized:
        pytest.skip("sanitizers have an allocator of their own")
    folder = tmp_path_factory.mktemp("allocators")
    (folder / "a.c").write_text(ALLOCATORS)
    command = ["cc", "-shared", "-fPIC", "-O1", folder / "a.c", "-o", folder / "a.so", "-ldl"]
    if not shutil.which("cc") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cc makes no shared object here")
    return folder / "a.so"


@pytest.mark.parametrize("mode", MODES)
def test_each_allocation_fails_once(run: Program, model: Path, allocators: Path, tmp_path: Path, mode: str) -> None:
    args, stdin = MODES[mode]

    def with_failure(number: int) -> subprocess.CompletedProcess[bytes]:
        environment = run.env | {
            "LD_PRELOAD": str(allocators),
            "FAIL_AT": str(number),
            "CALLS": str(tmp_path / "calls"),
        }
        command = [run.path, model, "-j", "1", *args]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60, env=environment)

    expected = with_failure(0)
    assert expected.returncode == 0
    n_calls = int((tmp_path / "calls").read_text())
    assert n_calls >= 3
    for number in range(1, n_calls + 1):
        found = with_failure(number)
        assert found.returncode == 1, (number, found)
        lines = found.stderr.decode().splitlines()
        assert lines[-1].startswith("run: no memory for ") and lines[-1].endswith(" MB needed"), (
            number,
            found,
        )


# ---------------------------------------------------------------------------------------------------------
# Files that change


def start_endless(run: Program, path: Path) -> subprocess.Popen[bytes]:
    """A run that does not end by itself, and has begun to write."""
    process = subprocess.Popen(
        [run.path, path, "-t", "0", "-n", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=run.env
    )
    assert process.stdout and process.stdout.read(9) == b"abcabcabc"
    return process


def end_of(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=60)
    check_sanitizers(stderr.decode())
    return process.returncode, stderr.decode()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    return endless_model(b"abc", max_seq_len=2_000_000).write(tmp_path / "m.bin")


def test_the_weights_become_shorter(run: Program, endless: Path) -> None:
    process = start_endless(run, endless)
    os.truncate(endless, 4096)
    status, stderr = end_of(process)
    assert status == 1
    check_one_line(stderr)
    assert "it was made shorter" in stderr


def test_the_weights_are_overwritten(run: Program, endless: Path) -> None:
    """Numbers change under it: whatever it says, it says why it ends."""
    process = start_endless(run, endless)
    size = endless.stat().st_size
    with endless.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    status, stderr = end_of(process)
    assert status == 1
    check_one_line(stderr)
    assert "not finite" in stderr


def test_the_weights_are_replaced(run: Program, endless: Path, tmp_path: Path) -> None:
    """Another file of this name is another file: the run goes on with its own."""
    process = start_endless(run, endless)
    (tmp_path / "other").write_bytes(b"nothing")
    (tmp_path / "other").rename(endless)
    assert process.stdout and process.stdout.read(3000) == b"abc" * 1000
    process.kill()
    end_of(process)


def test_the_tokenizer_is_overwritten(run: Program, endless: Path) -> None:
    """It has been read into memory, and what has been checked stays as it was."""
    tokenizer = endless.with_suffix(".tokenizer.bin")
    process = start_endless(run, endless)
    tokenizer.write_bytes(Random(1).randbytes(tokenizer.stat().st_size))
    assert process.stdout and process.stdout.read(3000) == b"abc" * 1000
    process.kill()
    end_of(process)


@pytest.mark.parametrize("seed", range(6))
def test_signals_at_random_moments(run: Program, tmp_path: Path, seed: int) -> None:
    """Stopped and continued, it goes on; SIGTERM ends it, and it has said nothing but the text."""
    path = endless_model(b"abc", max_seq_len=2_000_000).write(tmp_path / "m.bin")
    process = start_endless(run, path)
    random = Random(seed)
    for _ in range(5):
        time.sleep(random.random() / 50)
        process.send_signal(random.choice([signal.SIGSTOP, signal.SIGTSTP]))
        time.sleep(random.random() / 50)
        process.send_signal(signal.SIGCONT)
        assert process.stdout and process.stdout.read(300) == b"abc" * 100
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert set(stdout) <= set(b"abc\n") and stderr == b""
