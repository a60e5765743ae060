"""The program's JSON, strictly: a shape is an object's names in order, a list of one shape, or what a value has to be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest


def whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def real(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def string(value: Any) -> bool:
    return isinstance(value, str)


LIKELY: dict[str, Any] = {"id": whole(0), "text": string, "logprob": real(-math.inf, 0)}
SAID = LIKELY
SAID_WITH_TOP = LIKELY | {"top": [LIKELY | {"prob": real(0, 1)}]}
NEXT = {"tokens": whole(1), "entropy_bits": real(0), "next": [LIKELY | {"prob": real(0, 1)}]}
SCRIPT = {"cached": whole(0), "prompt_tokens": [whole(0)]}  # what chat gives the model to read
PERPLEXITY = {
    "tokens": whole(1), "nll": real(0), "perplexity": real(1), "stderr": real(0), "bits_per_byte": real(0),
    "tok_s": real(1e-9),
}  # fmt: skip


def check_shape(value: Any, shape: Any, where: str = "") -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{where}: {value}"
        if value.get("bytes"):  # beside a text that does not say them
            shape = {"id": whole(0), "text": string, "bytes": [whole(0)]} | shape
            assert "\ufffd" in value["text"]
            with pytest.raises(UnicodeDecodeError):
                bytes(value["bytes"]).decode()
        assert list(value) == list(shape), f"{where}: {value}"
        for name in shape:
            check_shape(value[name], shape[name], f"{where}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), f"{where}: {value}"
        for i, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{i}]")
    else:
        assert shape(value), f"{where}: {value!r}"


def objects(stdout: bytes, *shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of an output, one a line, in UTF-8, with no name twice and no NaN, which JSON does not have. Of
    several shapes, an object has to be of the one that begins as it does."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({name for name, _ in pairs}) == len(pairs), pairs
        return dict(pairs)

    def refuse(name: str) -> None:
        raise AssertionError(f"JSON has no {name}")

    *lines, rest = stdout.decode().split("\n")
    assert not rest, f"the last line has no end: {rest}"
    found = [json.loads(line, object_pairs_hook=unique, parse_constant=refuse) for line in lines]
    for value in found:
        check_shape(value, next((s for s in shapes if [*s][:1] == [*value][:1]), shapes[0]))
    return found
