"""When writing fails or is ended at any moment, the old files are whole, or the new ones are, and never a half."""

from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import (
    array_source,
    in_memory,
    llama2c_arrays,
    llama2c_file,
    llama2c_pieces,
    llama2c_tokenizer,
)

import export

NAMES = ["out.bin", "out.tokenizer.bin"]


def models() -> list[tuple[export.Model, export.Tokenizer]]:
    """Two models of 300 tokens, each with a tokenizer of its own."""
    found = []
    for seed in (1, 2):
        tokens = [export.Token(b"%d/%d" % (seed, i), export.NORMAL, 0.0) for i in range(300)]
        config, arrays = array_source(np.random.default_rng(seed), "bf16")
        found.append((in_memory(config, arrays), export.Tokenizer(tokens, 1, 0, (2,), True, False)))
    return found


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the first model in it."""
    (tmp_path / "out").mkdir()
    export.write_model(tmp_path / "out" / "out.bin", *models()[0])
    return tmp_path / "out"


class Full(io.FileIO):
    """A file on a disk that takes so many writes, and then no more."""

    left = 0
    error = errno.ENOSPC

    def write(self, data: Any) -> int:
        if Full.left == 0:
            raise OSError(Full.error, os.strerror(Full.error))
        Full.left -= 1
        return super().write(data) or 0


def faulty_open(path: Path, mode: str, buffering: int = -1) -> Any:
    if mode != "xb":
        return open(path, mode, buffering)
    return io.BufferedWriter(Full(path, mode), 1024)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_the_disk_is_full_at_the_nth_write(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = contents(folder)
    monkeypatch.setattr(export, "open", faulty_open, raising=False)
    monkeypatch.setattr(export, "PIECE", 500)
    Full.error = number
    for n in itertools.count():
        Full.left = n
        try:
            export.write_model(folder / "out.bin", *models()[1])
            break
        except export.ExportError as error:
            assert "cannot write: " + os.strerror(number) in str(error)
            assert str(folder) in str(error)
        assert sorted(os.listdir(folder)) == NAMES and contents(folder) == before
    assert n > 8 and contents(folder) != before and sorted(os.listdir(folder)) == NAMES


def test_killed_at_any_moment(folder: Path) -> None:
    """Each file is that of one of two models, which are written by turns; what else lies there is called .tmp."""
    old = contents(folder)
    export.write_model(folder / "out.bin", *models()[1])
    new = contents(folder)
    rng = random.Random(4)

    def write_for_ever() -> None:
        both = models()
        for i in itertools.count():
            export.write_model(folder / "out.bin", *both[i % 2])

    left = 0
    for _ in range(25):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever)
        process.start()
        time.sleep(0.05 + 0.2 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -9
        for found, *whole in zip(contents(folder), old, new, strict=True):
            assert found in whole
        others = [name for name in os.listdir(folder) if name not in NAMES]
        assert all(".tmp-" in name for name in others)
        left += len(others)
        for name in others:
            (folder / name).unlink()
    assert left  # so it was killed in the middle of writing


def test_a_name_that_was_guessed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone has put links in the temporary files' places."""
    victim = folder.parent / "victim"
    victim.write_text("precious")
    before = contents(folder)
    monkeypatch.setattr(export.os, "urandom", lambda n: bytes(n))
    for name in NAMES:
        (folder / f"{name}.tmp-{bytes(8).hex()}").symlink_to(victim)
    with pytest.raises(export.ExportError, match="cannot write: File exists"):
        export.write_model(folder / "out.bin", *models()[1])
    assert victim.read_text() == "precious" and contents(folder) == before


# ---------------------------------------------------------------------------------------------------------
# What the output may be


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exports a small model to this path; returns the status and what was said."""
    source = llama2c_file(tmp_path / "tiny.bin", llama2c_arrays(np.random.default_rng(1)))
    tokenizer = llama2c_tokenizer(tmp_path / "tokenizer300.bin", llama2c_pieces())

    def call(out: Path) -> tuple[int, str]:
        args = ["export.py", source, "-o", out, "--tokenizer", tokenizer]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in args])
        return export.main(), capsys.readouterr().err

    return call


def test_the_output_is_a_link(tmp_path: Path, run: Any) -> None:
    """The file that it leads to is replaced, wherever that is, if it is there or not; the link stays."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "out.bin"
    link.symlink_to("real/model.bin")
    for _ in range(2):
        assert run(link)[0] == 0
        assert link.is_symlink() and sorted(os.listdir(tmp_path / "real")) == [
            "model.bin",
            "model.tokenizer.bin",
        ]
        assert (tmp_path / "real" / "model.bin").read_bytes()[:8] == b"twofiles"


def test_the_tokenizers_output_is_a_link(tmp_path: Path, run: Any) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "out.tokenizer.bin").symlink_to("other")
    assert run(tmp_path / "out.bin")[0] == 0
    assert (tmp_path / "other").read_text() == "precious"
    assert (tmp_path / "out.tokenizer.bin").read_bytes()[:8] == b"twotoken"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "device"])
def test_the_output_is_no_file(tmp_path: Path, run: Any, kind: str, name: str) -> None:
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        os.mkfifo(path if kind == "pipe" else tmp_path / "pipe")
        if kind != "pipe":
            path.symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    status, said = run(tmp_path / "out.bin")
    assert status == 1 and said.count("\n") == 1 and "expected a new or a regular file" in said
    assert sorted(os.listdir(tmp_path)) == before


def test_the_output_is_a_link_to_itself(tmp_path: Path, run: Any) -> None:
    (tmp_path / "out.bin").symlink_to("out.bin")
    status, said = run(tmp_path / "out.bin")
    assert status in (0, 1) and said.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]


def test_an_input_that_is_gone_while_the_output_is_written(folder: Path) -> None:
    """The message names the input, and the old files stay."""
    old = contents(folder)
    model, tokenizer = models()[1]
    name, tensor = list(model.tensors.items())[-1]
    model.tensors[name] = tensor._replace(rows=lambda start, stop: np.fromfile(folder / "gone.safetensors"))
    with pytest.raises(export.ExportError) as found, export.naming("the model"):
        export.write_model(folder / "out.bin", model, tokenizer)
    assert str(found.value) == f"{folder / 'gone.safetensors'}: No such file or directory"
    assert contents(folder) == old and len(os.listdir(folder)) == 2
