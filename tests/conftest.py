"""Fixtures. The program under test is $RUN, or ./run at the top of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from files import ROOT, Model, Program, write_model


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def run() -> Program:
    program = Program()
    if not program.path.exists():
        pytest.fail(f"{program.path} is not there: run make first, or set RUN")
    return program


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Karpathy's 260K-parameter model and its tokenizer, which do not come with the repository."""
    folder = ROOT.parent / "shared" / "models"
    if not (folder / "stories260K.bin").exists():
        pytest.skip("../shared/models/stories260K.bin is not there")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model of two layers with a context of 64; where it lies is `tiny_path`."""
    return write_model(tmp_path_factory.getbasetemp() / "tiny.bin")


@pytest.fixture(scope="session")
def tiny_path(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny.bin"
