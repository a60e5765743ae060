"""Runs the tests of tests/unit.c one by one, for each instruction set that this machine has."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from builds import ROOT, build, variants

NAMES = re.findall(r'\{"(\w+)", test_\w+\}', (ROOT / "tests" / "unit.c").read_text())


@pytest.fixture(scope="session", params=variants("native,portable,v3,v4,amx"))
def unit(request: pytest.FixtureRequest) -> list[str]:
    return build("unit", request.param)


def test_list(unit: list[str]) -> None:
    listed = subprocess.run(unit, capture_output=True, text=True, check=True).stdout.split()
    assert listed == NAMES
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_unit(unit: list[str], name: str) -> None:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # the tests free nothing
    done = subprocess.run([*unit, name], capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 77:
        pytest.skip("the system does not forget files here")
    assert done.returncode == 0, done.stderr
