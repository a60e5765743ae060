"""Every bad file is one line on standard error and exit status 1, never a crash."""

from __future__ import annotations

import math
import os
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import (
    ADD_BOS,
    BYTE,
    CONTROL,
    MODEL_FIELDS,
    NORMAL,
    TOKENIZER_FIELDS,
    TOKENS_START,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    Piece,
    Program,
    Vocabulary,
    byte_level_vocabulary,
    chain_model,
    class_blocks,
    default_vocabulary,
    file_hash,
    fix,
    patch,
    u32,
)

HUGE = 0xFFFFFFFF
NAN = float("nan")
INF = float("inf")


class Victim:
    """A good model and tokenizer in a folder of their own, to be spoilt."""

    def __init__(self, run: Program, folder: Path) -> None:
        self.run = run
        self.path = folder / "m.bin"
        self.tokenizer_path = folder / "m.tokenizer.bin"
        self.model = Model(max_seq_len=16, dim=20, hidden_dim=24).randomise()
        self.model.write(self.path)
        self.data = self.path.read_bytes()
        self.tokens = self.tokenizer_path.read_bytes()
        run.ok(self.path, "-n", 2)

    def bad_model(self, data: bytes, *says: object) -> str:
        self.path.write_bytes(data)
        return self.run.fails(1, self.path, "-n", 2, says=[self.path, *says]).stderr

    def bad_tokenizer(self, data: bytes, *says: object) -> str:
        self.tokenizer_path.write_bytes(data)
        for args in [(self.path, "-n", 2), ("-m", "tokenize", "-i", "the cat", "-z", self.tokenizer_path)]:
            stderr = self.run.fails(1, *args, says=[self.tokenizer_path, *says]).stderr
        return stderr


@pytest.fixture
def victim(run: Program, tmp_path: Path) -> Victim:
    return Victim(run, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Files that are no files of ours


def spoil_path(path: Path, how: str) -> str:
    """Puts something at `path` that cannot be used; returns what the message says about it."""
    path.unlink()
    if how == "missing":
        return "No such file"
    if how == "directory":
        path.mkdir()
        return "directory"
    if how == "loop":
        path.symlink_to(path)
        return "symbolic links"
    if how == "device":
        path.symlink_to("/dev/null")
        return "found a device or a pipe"
    path.write_bytes({"empty": b"", "one byte": b"t", "text": b"To be, or not to be\n" * 1000}[how])
    return {"empty": "found 0", "one byte": "found 1", "text": 'found "To be, o"'}[how]


KINDS = ["missing", "directory", "loop", "device", "empty", "one byte", "text"]


@pytest.mark.parametrize("how", KINDS)
def test_no_weights_file(victim: Victim, how: str) -> None:
    found = spoil_path(victim.path, how)
    victim.run.fails(1, victim.path, says=[victim.path, "expected", found])


@pytest.mark.parametrize("how", KINDS)
def test_no_tokenizer_file(victim: Victim, how: str) -> None:
    found = spoil_path(victim.tokenizer_path, how)
    args = ["-z", victim.tokenizer_path]
    victim.run.fails(1, victim.path, *args, says=[victim.tokenizer_path, "expected", found])
    victim.run.fails(1, "-m", "tokenize", *args, says=[victim.tokenizer_path, "expected", found])


def test_no_permission(victim: Victim) -> None:
    become_nobody: Callable[[], None] | None = None
    if os.geteuid() == 0:  # root may read anything, so the child becomes someone else

        def become_nobody() -> None:
            os.setuid(65534)

        folder = victim.path.parent
        while folder != folder.parent:
            if folder.stat().st_mode & 0o005 != 0o005:
                try:
                    folder.chmod(folder.stat().st_mode | 0o055)
                except OSError:
                    pytest.skip(f"nobody cannot get to {folder}")
            folder = folder.parent
    if not os.access(victim.run.path, os.X_OK):
        pytest.skip("the program is not executable")
    victim.path.chmod(0)
    try:
        victim.run.fails(1, victim.path, says=[victim.path, "expected", "Permission denied"], preexec=become_nobody)
    except PermissionError:
        pytest.skip("another user may not run the program where it lies")
    victim.path.chmod(0o644)
    victim.tokenizer_path.chmod(0)
    victim.run.fails(1, victim.path, says=[victim.tokenizer_path, "Permission denied"], preexec=become_nobody)


# The beginnings of formats that people have, 8 KB of each.
FOREIGN = {
    "llama2.c": struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(8164),
    "llama2.c version 1": struct.pack("<2I", 0x616B3432, 1) + bytes(8184),
    "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 201, 24) + b"\x01" * 8168,
    "safetensors": struct.pack("<Q", 8000) + b'{"__metadata__":{"format":"pt"}}' + b" " * 8152,
    "PyTorch": b"PK\x03\x04" + b"\x00" * 8188,
    "zeros": bytes(8192),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 8149,
    "almost ours": b"twofilez" + bytes(8184),
    "ours, swapped": b"twotoken" + bytes(8184),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats(victim: Victim, name: str) -> None:
    known = "a Git LFS pointer" if name == "Git LFS" else '"twofiles"'
    victim.bad_model(FOREIGN[name], "expected", "a weights file", known, "found")


@pytest.mark.parametrize("name", [n for n in FOREIGN if n != "ours, swapped"])
def test_foreign_tokenizers(victim: Victim, name: str) -> None:
    known = "a Git LFS pointer" if name == "Git LFS" else '"twotoken"'
    victim.bad_tokenizer(FOREIGN[name], "expected", "a tokenizer file", known, "found")


def test_a_tokenizer_in_place_of_the_model_and_the_reverse(victim: Victim) -> None:
    victim.run.fails(1, victim.tokenizer_path, "-z", victim.tokenizer_path, says=["a weights file", "twotoken"])
    victim.run.fails(1, victim.path, "-z", victim.path, says=["a tokenizer file", "twofiles"])


# ---------------------------------------------------------------------------------------------------------
# The weights file


@pytest.mark.parametrize("fixed", [False, True], ids=["as it was", "with its size in the header"])
def test_truncated_weights(victim: Victim, fixed: bool) -> None:
    ends = {*range(97), 4094, 4095, 4096, 4097, 4098, len(victim.data) - 1}
    for _, start, end in victim.model.offsets():
        ends |= {start - 1, start, start + 1, end - 1, end, end + 1}
    for end in sorted(ends - {len(victim.data), len(victim.data) + 1}):
        data = victim.data[:end]
        stderr = victim.bad_model(fix(data) if fixed else data, "expected", "found")
        assert str(end) in stderr, stderr


def test_weights_that_are_too_long(victim: Victim) -> None:
    n = len(victim.data)
    for extra in [1, 2, 63, 64, 4096]:
        longer = victim.data + bytes(extra)
        victim.bad_model(longer, "expected", "found", n, n + extra)
        victim.bad_model(fix(longer), "expected", "found", n, n + extra)


SIZES = ["dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in SIZES for value in (0, HUGE, 0x80000000, 0x7FFFFFFF)],
        *[("version", v) for v in (0, 2, 0x01000000, HUGE)],
        *[("dtype", v) for v in (0, 3, HUGE)],
        *[("flags", v) for v in (8, 16, 9, 1 << 31, HUGE)],
        ("n_kv_heads", 3),
        ("n_kv_heads", 5),
        ("n_kv_heads", 8),
        ("head_dim", 7),
        ("head_dim", 1),
        *[("norm_eps", v) for v in (NAN, -1e-5, INF, -INF, 2.0)],
        *[("rope_theta", v) for v in (NAN, -10000.0, INF, 0.0, -0.0)],
        *[("rope_scaling", v) for v in (3, HUGE)],
    ],
)
def test_header_fields(victim: Victim, name: str, value: float) -> None:
    stderr = victim.bad_model(patch(victim.data, **{name: value}), name, "expected", "found")
    fits_alone = (name, value) in [("n_kv_heads", 3), ("head_dim", 7)]  # and goes wrong with others
    if isinstance(value, int) and not fits_alone:
        assert f"found {value}" in stderr


@pytest.mark.parametrize("name", [n for n in SIZES if n != "max_seq_len"])
@pytest.mark.parametrize("change", [-1, 1, 2, 1000])
def test_sizes_that_do_not_fit_the_file(victim: Victim, name: str, change: int) -> None:
    offset, _ = MODEL_FIELDS[name]
    value = struct.unpack_from("<I", victim.data, offset)[0] + change
    victim.bad_model(patch(victim.data, **{name: value}), "expected", "found")


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": 1 << 31, "vocab_size": 1 << 31},  # 2^63 bytes, 2^64 in all
        {"dim": 1 << 16, "vocab_size": 1 << 31, "n_layers": 1 << 16},
        {
            "dim": 1 << 20,
            "vocab_size": 1 << 24,
            "hidden_dim": 1 << 22,
            "n_layers": 1 << 12,
            "n_heads": 1 << 14,
        },
        {"n_heads": 1 << 16, "n_kv_heads": 1 << 16, "head_dim": 1 << 16},  # 2^32 each way
        {"n_heads": 1 << 14, "n_kv_heads": 1 << 14, "head_dim": 1 << 10, "dim": 1 << 20},
        {"n_layers": 1 << 31},
        dict.fromkeys(SIZES, HUGE - 1),
        dict.fromkeys(SIZES, 1 << 16),
    ],
)
def test_products_that_overflow(victim: Victim, fields: dict[str, int]) -> None:
    victim.bad_model(patch(victim.data, **fields), "expected", "found")


GOOD_LLAMA3 = {
    "rope_scaling": 2,
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_seq_len": 8192,
}


def test_good_rope_scaling(victim: Victim) -> None:
    for fields in [GOOD_LLAMA3, {"rope_scaling": 1, "rope_factor": 2.0}]:
        victim.path.write_bytes(patch(victim.data, **fields))
        victim.run.ok(victim.path, "-n", 3)


@pytest.mark.parametrize(
    "fields",
    [
        *[{"rope_scaling": 1, "rope_factor": v} for v in (0.0, -1.0, NAN, INF)],
        *[GOOD_LLAMA3 | {"rope_factor": v} for v in (0.0, -1.0, NAN, INF)],
        *[GOOD_LLAMA3 | {"rope_low_freq_factor": v} for v in (0.0, -1.0, NAN, INF, 4.0, 5.0)],
        *[GOOD_LLAMA3 | {"rope_high_freq_factor": v} for v in (0.0, -1.0, NAN, INF, 1.0)],
        GOOD_LLAMA3 | {"rope_original_max_seq_len": 0},
    ],
)
def test_bad_rope_scaling(victim: Victim, fields: dict[str, Any]) -> None:
    victim.bad_model(patch(victim.data, **fields), "rope", "expected", "found")


def test_padding_of_the_header(victim: Victim) -> None:
    for at in [96, 97, 127, 128, 1000, 4094, 4095]:
        data = bytearray(victim.data)
        data[at] = 1 + at % 255
        victim.bad_model(bytes(data), "header", "expected 0", f"found {1 + at % 255}")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["embedding", "0.attn_norm", "0.wqkv", "1.wo", "1.w_down", "final_norm", "classifier"])
def test_weights_that_are_not_finite(run: Program, tmp_path: Path, dtype: str, value: float, name: str) -> None:
    path = tmp_path / "m.bin"
    model = Model(dtype=dtype, max_seq_len=16).randomise()
    tensor = model.weights[name]
    if name == "embedding":
        tensor[1, 3] = value  # of bos
    else:
        tensor.reshape(-1)[5] = value
    model.write(path)
    commands: list[list[object]] = [["-t", 0], ["-t", 1], ["-k", 2], ["--json"]]
    for args in commands:
        result = run(path, "-n", 2, *args, leaks=False)
        assert result.status == 1, result
        assert result.stderr.startswith("run: ") and result.stderr.count("\n") == 1, result
        assert "not finite" in result.stderr and str(path) in result.stderr, result
        assert result.stdout.strip() == b"", result


def test_sums_that_overflow(run: Program, tmp_path: Path) -> None:
    model = Model(dtype="bf16", max_seq_len=16).randomise()
    model.weights["classifier"] *= np.float32(3e37)
    model.weights["final_norm"] *= np.float32(1e30)
    model.write(tmp_path / "m.bin")
    run.fails(1, tmp_path / "m.bin", "-n", 2, says=["not finite", tmp_path / "m.bin"])


# ---------------------------------------------------------------------------------------------------------
# The tokenizer file


def ends_of(vocabulary: Vocabulary, size: int) -> list[int]:
    """Where a file may be cut: in the header, at and near the ends of all arrays, and in the last bytes."""
    ends = {*range(TOKENS_START + 5), *range(size - 20, size)}
    places = [*vocabulary.offsets().values(), *vocabulary.entry_offsets()[:3]]
    ends |= {place + change for place in places for change in (-5, -4, -1, 0, 1, 4)}
    return sorted(end for end in ends if 0 <= end < size)


@pytest.mark.parametrize("fixed", [False, True], ids=["as it was", "with its size and hash"])
def test_truncated_tokenizers(victim: Victim, fixed: bool) -> None:
    args = ["-m", "tokenize", "-z", victim.tokenizer_path]
    for end in ends_of(victim.model.vocabulary, len(victim.tokens)):
        data = victim.tokens[:end]
        victim.tokenizer_path.write_bytes(fix(data) if fixed else data)
        says = ["file size", len(victim.tokens), f"found {end}"] if end >= TOKENS_START else ["found"]
        victim.run.fails(1, *args, says=[victim.tokenizer_path, "expected", *says])


def test_a_tokenizer_that_is_too_long(victim: Victim) -> None:
    for extra in [1, 4, 12, 13]:
        longer = victim.tokens + bytes(extra)
        victim.bad_tokenizer(longer, "expected", "found", len(victim.tokens), len(longer))
        victim.bad_tokenizer(fix(longer), "expected", "found", len(victim.tokens), len(longer))


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        *[("version", v, f"version: expected 3, found {v}") for v in (0, 1, 4, 0x03000000, HUGE)],
        *[("kind", v, f"kind: expected 1 to 2, found {v}") for v in (0, 3, HUGE)],
        *[("flags", v, f"flags: expected 0 to 127, found {v}") for v in (128, 1 << 31, HUGE)],
        *[("vocab_size", v, f"found {v}") for v in (0, (1 << 24) + 1, 1 << 31, HUGE)],
        *[("vocab_size", v, "found") for v in (1, 10**6, 1 << 24)],
        *[("bos_id", v, f"bos_id: expected 0 to 311, found {v}") for v in (-1, -2, 0x7FFFFFFF, -0x80000000)],
        *[("unk_id", v, f"unk_id: expected -1 to 311, found {v}") for v in (-2, 0x7FFFFFFF, -0x80000000)],
        *[("n_stops", v, f"n_stops: expected 0 to 7, found {v}") for v in (8, 1 << 31, HUGE)],
        *[("stop_ids", v, f"stop id: expected 0 to 311, found {v}") for v in (-1, -2, 10**6, 0x7FFFFFFF)],
        *[("n_by_text", v, f"n_by_text: expected 0 to 312, found {v}") for v in (313, 1 << 31, HUGE)],
        *[("n_by_text", v, "file size") for v in (0, 1, 312)],
        *[("n_merges", v, "n_merges: expected 0 to 16777216, found") for v in ((1 << 24) + 1, HUGE)],
        *[("n_merges", v, "file size") for v in (1, 1 << 24)],
        *[("n_dfas", v, f"n_dfas: expected 0 to 16, found {v}") for v in (17, HUGE)],
        *[("n_dfas", v, "n_classes: expected 2 to 256, found 0") for v in (1, 16)],
        *[("n_classes", v, f"n_classes: expected 0 to 256, found {v}") for v in (257, HUGE)],
        *[("n_classes", v, "n_class_blocks: expected 1 to 4353, found 0") for v in (1, 256)],
        *[("n_states", v, f"n_states: expected 0 to 1048576, found {v}") for v in ((1 << 20) + 1, HUGE)],
        *[("template_flags", v, f"template_flags: expected 0 to 32767, found {v}") for v in (32768, HUGE)],
        *[("template_ends", v, "a template's end: expected") for v in (1, HUGE)],
        *[("n_class_blocks", v, f"n_class_blocks: expected 0, found {v}") for v in (1, HUGE)],
        *[("n_text", v, "found") for v in (0, 1, 10**6, HUGE)],
        *[("file_size", v, "hash: expected") for v in (0, 80, 160, 2**32, 2**64 - 1)],
        *[("vocab_hash", v, "hash: expected") for v in (0, 1, 2**64 - 1)],
        *[("hash", v, "hash: expected") for v in (0, 1, 2**64 - 1)],
    ],
)
def test_tokenizer_header_fields(victim: Victim, name: str, value: int, found: str) -> None:
    assert len(victim.model.vocabulary) == 312
    victim.bad_tokenizer(patch(victim.tokens, **{name: value}), "expected", found)


def test_a_tokenizer_of_format_2(victim: Victim) -> None:
    victim.bad_tokenizer(patch(victim.tokens, version=2), "version", "expected 3", "found 2", "export.py again")


def test_the_size_in_the_header_of_a_tokenizer(victim: Victim) -> None:
    """It is part of what the hash covers, so with a hash of its own it may be anything: nothing depends on it."""
    for size in (0, 2**64 - 1):
        data = patch(victim.tokens, file_size=size)
        victim.tokenizer_path.write_bytes(patch(data, hash=file_hash(data)))
        victim.run.ok(victim.path, "-n", 2)


@pytest.mark.parametrize("name", ["bos_id", "unk_id", "stop id"])
def test_ids_one_past_the_end(victim: Victim, name: str) -> None:
    field = "stop_ids" if name == "stop id" else name
    n = len(victim.model.vocabulary)
    victim.bad_tokenizer(patch(victim.tokens, **{field: n}), name, f"to {n - 1}", f"found {n}")


def spoil(vocabulary: Vocabulary, array: str, *values: tuple[int, int | float]) -> bytes:
    """The file with other words at (index, value) in an array, and the hash that belongs to it."""
    data, start = bytearray(vocabulary.to_bytes()), vocabulary.offsets()[array]
    for index, value in values:
        struct.pack_into("<f" if isinstance(value, float) else "<I", data, start + 4 * index, value)
    return fix(bytes(data))


OFFSET, LENGTH, TYPE, SCORE = range(4)  # the words of a piece


@pytest.mark.parametrize("entry", [0, 2, 3, 130, 258, 259, 311])
def test_texts_of_tokens(victim: Victim, entry: int) -> None:
    v, n_text = victim.model.vocabulary, sum(victim.model.vocabulary.text_lengths())
    offset = sum(len(piece.text) for piece in v.pieces[:entry])
    for length in [0, n_text - offset + 1, 0x7FFFFFFF, 0x80000000, HUGE]:
        data = spoil(v, "pieces", (4 * entry + LENGTH, length))
        victim.bad_tokenizer(data, "a token's length", "expected 1", f"found {length}")
    for offset in [n_text + 1, 0x7FFFFFFF, 0x80000000, HUGE]:
        data = spoil(v, "pieces", (4 * entry + OFFSET, offset))
        victim.bad_tokenizer(data, "a token's offset", f"expected 0 to {n_text}", f"found {offset}")
    at_the_end = spoil(v, "pieces", (4 * entry + OFFSET, n_text))  # where no byte is left for it
    victim.bad_tokenizer(at_the_end, "a token's length", "expected", "found")
    past_it = spoil(v, "pieces", (4 * entry + OFFSET, n_text - 2), (4 * entry + LENGTH, 3))
    victim.bad_tokenizer(past_it, "a token's length", "expected 1", "found 3")


@pytest.mark.parametrize("type", [0, 8, 1 << 31, HUGE])
@pytest.mark.parametrize("entry", [0, 100, 270])
def test_types_of_tokens(victim: Victim, entry: int, type: int) -> None:
    data = spoil(victim.model.vocabulary, "pieces", (4 * entry + TYPE, type))
    victim.bad_tokenizer(data, "a token's type", "expected 1 to 7", f"found {type}")


def test_scores_that_are_no_numbers(victim: Victim) -> None:
    for entry in [0, 100, 270]:
        for bits in [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7F800000, 0xFF800000]:
            data = spoil(victim.model.vocabulary, "pieces", (4 * entry + SCORE, bits))
            victim.bad_tokenizer(data, "a token's score", "expected", "found")


def test_tokens_of_bytes(victim: Victim) -> None:
    v = victim.model.vocabulary
    for byte in (0, 97, 255):
        for id in (len(v), 0x7FFFFFFF, HUGE - 1):
            data = spoil(v, "byte_id", (byte, id))
            victim.bad_tokenizer(data, "a byte's token", "expected 0 to 311", f"found {id}")
        for id in (1, v.id(b" the")):  # a control token, a normal one
            data = spoil(v, "byte_id", (byte, id))
            victim.bad_tokenizer(data, "the type of a byte's token", "expected 6", f"found {v.pieces[id].type}")
        victim.bad_tokenizer(spoil(v, "byte_id", (byte, HUGE)), "a token for each byte", f"byte {byte}")
    victim.tokenizer_path.write_bytes(spoil(v, "byte_id", (255, v.unk_id)))
    args = ("-m", "tokenize", "-f", "-", "-z", victim.tokenizer_path)
    assert victim.run.ok(*args, stdin=b"\xfe\xff").text.split()[-2:] == ["257", "0"]


def test_the_order_of_texts(victim: Victim) -> None:
    v = victim.model.vocabulary
    ids = v.by_text()
    n = len(ids)
    for i in (0, 1, n // 2, n - 2):
        swapped = spoil(v, "by_text", (i, ids[i + 1]), (i + 1, ids[i]))
        victim.bad_tokenizer(swapped, "sorted by their bytes", f"token {ids[i]} after a larger one")
        twice = spoil(v, "by_text", (i + 1, ids[i]))
        victim.bad_tokenizer(twice, "sorted by their bytes", f"token {ids[i]} after a larger one")
    for i in (0, n - 1):
        for id in (len(v), 0x7FFFFFFF, HUGE):
            data = spoil(v, "by_text", (i, id))
            victim.bad_tokenizer(data, "a sorted token", "expected 0 to 311", f"found {id}")
        for id in (0, 1, 3 + 97):  # unknown, control, a byte's: no text becomes one of these
            data = spoil(v, "by_text", (i, id))
            victim.bad_tokenizer(data, "expected", f"found type {v.pieces[id].type}")
    unused = replace(v, pieces=(*v.pieces[:-1], Piece(b"zz", UNUSED)))
    data = spoil(unused, "by_text", (len(unused.by_text()) - 1, len(v) - 1))
    victim.bad_tokenizer(data, "expected", "found type 5")


@pytest.mark.parametrize("length", [0, 1, 9, 0x7FFFFFFF, HUGE])
def test_any_longest_token(victim: Victim, length: int) -> None:
    """How long to look for tokens says nothing about the text: too far is only slow."""
    base = victim.model.vocabulary
    v = replace(base, pieces=(*base.pieces, Piece(b"<think>", USER_DEFINED)))
    victim.tokenizer_path.write_bytes(spoil(v, "longest", *((i, length) for i in range(256))))
    args = ("-m", "tokenize", "-z", victim.tokenizer_path, "-i", "a<think>")
    found = victim.run.ok(*args).text.split()
    assert (found[-1] == str(len(base))) == (length >= 7)


def with_piece(vocabulary: Vocabulary, id: int, piece: Piece) -> bytes:
    pieces = list(vocabulary.pieces)
    pieces[id] = piece
    return Vocabulary(tuple(pieces)).to_bytes()


def test_byte_tokens(victim: Victim) -> None:
    vocabulary = victim.model.vocabulary
    victim.bad_tokenizer(with_piece(vocabulary, 100, Piece(b"ab", BYTE)), "a token's length", "expected 1", "found 2")
    lacking = Vocabulary((*vocabulary.pieces[:258], Piece(b"zz"), *vocabulary.pieces[259:]), unk_id=-1)
    victim.bad_tokenizer(lacking.to_bytes(), "a token for each byte", "unk_id", "none for byte 255")
    none = Vocabulary(tuple(p for p in vocabulary.pieces if p.type != BYTE), unk_id=-1)
    victim.bad_tokenizer(none.to_bytes(), "a token for each byte", "unk_id", "none for byte 0")
    victim.tokenizer_path.write_bytes(replace(lacking, unk_id=0).to_bytes())
    args = ("-m", "tokenize", "-f", "-", "-z", victim.tokenizer_path)
    assert victim.run.ok(*args, stdin=b"\xfe\xff").text.split()[-2:] == ["257", "0"]


def test_unused_tokens_may_be_empty_and_only_they(victim: Victim) -> None:
    vocabulary = victim.model.vocabulary
    for type in [NORMAL, UNKNOWN, CONTROL, BYTE]:
        victim.bad_tokenizer(with_piece(vocabulary, 270, Piece(b"", type)), "a token's length", "expected", "found 0")
    victim.tokenizer_path.write_bytes(with_piece(vocabulary, 270, Piece(b"", UNUSED)))
    victim.run.ok("-m", "tokenize", "-i", "the cat", "-z", victim.tokenizer_path)


def test_any_flipped_bit(victim: Victim) -> None:
    for at in [
        *range(12, TOKENS_START, 3),
        *np.random.default_rng(1).integers(TOKENS_START, len(victim.tokens), 40),
    ]:
        data = bytearray(victim.tokens)
        data[at] ^= 1 << int(at) % 8
        victim.tokenizer_path.write_bytes(data)
        victim.run.fails(1, "-m", "tokenize", "-z", victim.tokenizer_path, says=[victim.tokenizer_path, "expected"])


def test_another_models_tokenizer(victim: Victim) -> None:
    bigger = default_vocabulary(extra=[b"zz"])
    victim.tokenizer_path.write_bytes(bigger.to_bytes())
    n = len(bigger)
    says = [victim.tokenizer_path, victim.path, f"expected {n - 1}", f"found {n}"]
    victim.run.fails(1, victim.path, says=says)
    victim.run.fails(1, victim.path, "-m", "tokenize", "-i", "a", says=says)  # a model given is a model checked
    same_size = with_piece(victim.model.vocabulary, len(victim.model.vocabulary) - 1, Piece(b"\xc3\xa8"))
    victim.tokenizer_path.write_bytes(same_size)
    hashes = [f"{v:016x}" for v in (victim.model.vocabulary.hash, struct.unpack_from("<Q", same_size, 32)[0])]
    says = [victim.tokenizer_path, victim.path, f"hash {hashes[0]}", f"with {hashes[1]}"]
    victim.run.fails(1, victim.path, says=says)


def test_tokenizers_of_the_least_size(run: Program, tmp_path: Path) -> None:
    """One token is enough, if only to say <unk>."""
    path = tmp_path / "t.bin"
    path.write_bytes(Vocabulary((Piece(b"<unk>", UNKNOWN),), bos_id=-1, unk_id=0, stop_ids=(), flags=0).to_bytes())
    assert run.ok("-m", "tokenize", "-i", "some text", "-z", path).text == "0\n"
    path.write_bytes(Vocabulary((Piece(b"a"),), bos_id=0, unk_id=0, stop_ids=(), flags=ADD_BOS).to_bytes())
    assert run.ok("-m", "tokenize", "-i", "aba", "-z", path).text.split()[0] == "0"


# ---------------------------------------------------------------------------------------------------------
# Byte-level tokenizers


class ByteLevelVictim:
    def __init__(self, run: Program, folder: Path) -> None:
        self.run, self.path = run, folder / "t.bin"
        self.vocabulary = byte_level_vocabulary()
        assert self.tokens("the cat<think> the</s>") == self.expected()

    def expected(self) -> list[int]:
        v = self.vocabulary
        ids = [v.bos_id, v.id(b"the"), v.id(b" cat"), v.id(b"<think>", USER_DEFINED), v.id(b" the")]
        return ids + list(b"</s>")

    def tokens(self, text: str | bytes, **changes: Any) -> list[int]:
        self.path.write_bytes(replace(self.vocabulary, **changes).to_bytes())
        return [int(word) for word in self.run.ok("-m", "tokenize", "-i", text, "-z", self.path).text.split()]

    def bad(self, data: bytes | None = None, *says: object, **changes: Any) -> None:
        self.path.write_bytes(replace(self.vocabulary, **changes).to_bytes() if data is None else data)
        args = ("-m", "tokenize", "-i", "the cat<think> the</s>", "-z", self.path)
        self.run.fails(1, *args, says=[self.path, *says])


@pytest.fixture
def byte_level(run: Program, tmp_path: Path) -> ByteLevelVictim:
    return ByteLevelVictim(run, tmp_path)


@pytest.mark.parametrize("fixed", [False, True], ids=["as it was", "with its size and hash"])
def test_truncated_byte_level_tokenizers(byte_level: ByteLevelVictim, fixed: bool) -> None:
    data = byte_level.vocabulary.to_bytes()
    for end in ends_of(byte_level.vocabulary, len(data)):
        if end >= TOKENS_START:
            byte_level.bad(fix(data[:end]) if fixed else data[:end], "expected", "found")
    byte_level.bad(fix(data + b"\0"), "expected", len(data), f"found {len(data) + 1}")


def test_any_flipped_bit_of_an_array(byte_level: ByteLevelVictim) -> None:
    data = byte_level.vocabulary.to_bytes()
    starts = [*byte_level.vocabulary.offsets().values()]
    places = {*starts[:-1], *(start - 1 for start in starts[1:])}
    for at in sorted(places) + np.random.default_rng(2).integers(TOKENS_START, len(data), 20).tolist():
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << at % 8
        byte_level.bad(bytes(spoilt), "hash: expected", "found", "damaged")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n_by_text", [0, 6, 8, 1 << 24, HUGE]),
        ("n_merges", [0, 5, 7, 1 << 24, (1 << 24) + 1, HUGE]),
        ("n_classes", [0, 1, 2, 4, 256, 257, HUGE]),
        ("n_states", [0, 1, 3, 5, 1 << 20, (1 << 20) + 1, HUGE]),
        ("n_dfas", [0, 2, 3, 4, 16, 17, HUGE]),
        ("n_class_blocks", [0, 4, 6, 4353, 4354, 1 << 30, HUGE]),
        ("n_text", [0, 1, 1 << 20, HUGE]),
        ("template_ends", [3, 6, HUGE]),
        ("template_flags", [32768, HUGE]),
        ("hash", [0, 1, 2**64 - 1]),
    ],
)
def test_fields_of_byte_level_tokenizers(byte_level: ByteLevelVictim, name: str, values: list[int]) -> None:
    for value in values:
        byte_level.bad(patch(byte_level.vocabulary.to_bytes(), **{name: value}), "expected", "found")


def test_dfas_without_states_or_classes(byte_level: ByteLevelVictim) -> None:
    """With arrays of the sizes that the header says: each field must be wrong by itself."""
    v = byte_level.vocabulary
    for n_dfas in (4, 16):
        byte_level.bad(None, "n_states", f"expected {n_dfas + 1} to", "found 4", n_machines=n_dfas)
    byte_level.bad(None, "n_classes", "expected 2 to 256", "found 1", steps=((0,), (0,), (0,)), ranges=())
    none = patch(v.to_bytes(transitions=b"", class_block=b"", classes=b""), n_states=0, n_classes=0, n_class_blocks=0)
    byte_level.bad(fix(none), "n_classes", "expected 2 to 256", "found 0")


def test_bad_merges(byte_level: ByteLevelVictim) -> None:
    v = byte_level.vocabulary
    for bad in [(len(v), 0, 1), (0, len(v), 1), (0, 1, len(v)), (HUGE, 0, 1), (0, 0x7FFFFFFF, 1)]:
        byte_level.bad(None, "a merge", "expected 0 to", "found", merges=(*v.merges[:3], bad))
    # Odd, but harmless: a merge that makes something else, one that is there twice, none at all.
    odd = (*v.merges, (116, 256, 7), v.merges[0])
    assert byte_level.tokens("zthe", merges=odd)[1:] == [122, 7]
    assert byte_level.tokens("zthe", merges=())[1:] == list(b"zthe")


def test_the_order_of_merges(byte_level: ByteLevelVictim) -> None:
    v = byte_level.vocabulary
    rows = [v.arrays()["merges"][16 * i : 16 * i + 16] for i in range(6)]
    for i in range(5):
        swapped = [*rows[:i], rows[i + 1], rows[i], *rows[i + 2 :]]
        byte_level.bad(v.to_bytes(merges=b"".join(swapped)), f"merge {i + 1} is out of order")
        twice = [*rows[: i + 1], rows[i], *rows[i + 2 :]]
        byte_level.bad(v.to_bytes(merges=b"".join(twice)), f"merge {i + 1} is out of order")


def test_a_rank_that_a_float_cannot_hold(byte_level: ByteLevelVictim) -> None:
    v = byte_level.vocabulary
    first, *rest = [v.arrays()["merges"][16 * i : 16 * i + 16] for i in range(6)]
    for rank in (2**24 + 1, HUGE):
        data = v.to_bytes(merges=b"".join([first[:12] + rank.to_bytes(4, "little"), *rest]))
        byte_level.bad(data, "a merge's rank", f"expected 0 to {2**24}", f"found {rank}")


def test_bad_classes_of_characters(byte_level: ByteLevelVictim) -> None:
    v = byte_level.vocabulary
    classes = v.char_class()
    assert len(classes) == 0x110000 + 256
    for at in (0, 97, 0xFFFD, 0x10FFFF, 0x110000, len(classes) - 1):
        for bad in (3, 255):
            spoilt = class_blocks(classes[:at] + bytes([bad]) + classes[at + 1 :])
            data = fix(patch(v.to_bytes(**spoilt), n_class_blocks=len(spoilt["classes"]) // 256))
            byte_level.bad(data, "a character's class", "expected 0 to 2", f"found {bad}")
    pages = u32([*[0] * 4352, 1])
    for at in (0, 1, 4352):
        for page in (2, HUGE):
            bad_pages = pages[: 4 * at] + u32([page]) + pages[4 * at + 4 :]
            data = patch(v.to_bytes(class_block=bad_pages, classes=classes[:512]), n_class_blocks=2)
            byte_level.bad(fix(data), "a block of classes", "expected 0 to 1", f"found {page}")
    # Odd, but harmless: a character that counts as the end of the text; all of one class.
    byte_level.tokens("the cat", ranges=((97, 97, 0),))
    assert byte_level.tokens("the cat", ranges=((0, 0x10FFFF, 1),))[1:] == [257, 260]
    assert byte_level.tokens("the cat", ranges=()) == byte_level.tokens("the cat", ranges=((32, 32, 1),))


def test_bad_transitions(byte_level: ByteLevelVictim) -> None:
    for step in [8, 9, 0x7FFFFFFF, HUGE]:
        steps = ((0, 0, 0), (0, step, 4), (1, 6, 4), (1, 6, 1))
        byte_level.bad(None, "a transition", "expected 0 to 7", f"found {step}", steps=steps)
    for at in (0, 11):
        byte_level.bad(spoil(byte_level.vocabulary, "transitions", (at, 8)), "a transition", "found 8")


@pytest.mark.parametrize("seed", range(40))
def test_any_machines_come_to_an_end(byte_level: ByteLevelVictim, seed: int) -> None:
    """Whatever the steps, each byte of the text comes out once."""
    rng = np.random.default_rng(seed)
    n_machines, n_classes = int(rng.integers(1, 5)), int(rng.integers(2, 5))
    n_states = n_machines + int(rng.integers(1, 6))
    steps = tuple(tuple(map(int, row)) for row in rng.integers(0, 2 * n_states, (n_states, n_classes)))
    ranges = ((0x20, 0x60, int(rng.integers(1, n_classes))), (0x70, 0x3000, int(rng.integers(1, n_classes))))
    text = "the cat<think>  sat, \u00e9\u4e2d\U0001f600 the end".encode() + b"\xe9\x80"
    ids = byte_level.tokens(text, steps=steps, ranges=ranges, n_machines=n_machines)
    assert b"".join(byte_level.vocabulary.pieces[i].text for i in ids[1:]) == text


def test_bad_templates(byte_level: ByteLevelVictim) -> None:
    v = byte_level.vocabulary
    n_items, n_text = len(v.items()), sum(v.text_lengths())
    assert n_items == 5
    for item in range(n_items):
        token, offset, length = (3 * item + word for word in range(3))
        for bad in (len(v), 0x7FFFFFFF, HUGE - 1):
            data = spoil(v, "template_items", (token, bad))
            byte_level.bad(data, "a template's token", f"expected 0 to {len(v) - 1}", f"found {bad}")
        for bad in (n_text + 1, 0x7FFFFFFF, HUGE):
            data = spoil(v, "template_items", (offset, bad))
            byte_level.bad(data, "a template's offset", f"expected 0 to {n_text}", f"found {bad}")
            data = spoil(v, "template_items", (offset, n_text), (length, bad))
            byte_level.bad(data, "a template's text", "expected 0", f"found {bad}")
        data = spoil(v, "template_items", (token, HUGE), (offset, n_text - 4), (length, 5))
        byte_level.bad(data, "a template's text", "expected 0 to 4", "found 5")


def test_the_end_of_a_thought_is_a_text(byte_level: ByteLevelVictim) -> None:
    """It is searched for in what the model said: a token, or no text, would be found everywhere."""
    start, _ = TOKENIZER_FIELDS["template_ends"]
    data = bytearray(byte_level.vocabulary.to_bytes())
    *_, n_items = struct.unpack_from("<10I", data, start)
    struct.pack_into("<10I", data, start, *[0] * 9, n_items)  # now all items are those of the thought
    byte_level.bad(fix(bytes(data)), "a template's text", "expected 1 to", "found 0")


def test_ends_of_templates(byte_level: ByteLevelVictim) -> None:
    """They are the starts of the next ones, and must not go back."""
    data, (start, _) = byte_level.vocabulary.to_bytes(), TOKENIZER_FIELDS["template_ends"]
    ends = list(struct.unpack_from("<10I", data, start))
    for i in range(10):
        bad = [6, HUGE] if i == 9 else [ends[i + 1] + 1, HUGE]
        bad += [ends[i] - 1] if i and ends[i] == ends[i - 1] else []
        for end in bad:
            spoilt = bytearray(data)
            struct.pack_into("<I", spoilt, start + 4 * i, end % (1 << 32))
            says = "file size" if (i, end) == (9, 6) else "a template's end"  # the last is the number of items
            byte_level.bad(fix(bytes(spoilt)), says, "expected", "found")


def test_bytes_that_are_missing(byte_level: ByteLevelVictim) -> None:
    """They are left out, or unknown if there is a token for that."""
    v = byte_level.vocabulary
    pieces = (*v.pieces[:101], Piece(b"", UNUSED), *v.pieces[102:])  # no e
    assert byte_level.tokens("thee tete", pieces=pieces)[1:] == [116, 104, 32, 116, 116]
    assert byte_level.tokens("te", pieces=pieces, unk_id=7)[1:] == [116, 7]


# ---------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("megabytes", [150, 180, 200, 285, 290, 300, 310, 350, 600])
def test_no_memory_for_the_context(run: Program, tmp_path: Path, megabytes: int) -> None:
    """The message says how much memory is needed and a context of a size for which there is some works."""
    if run.sanitized:
        pytest.skip("a limit of the address space does not go with AddressSanitizer")
    context = 1 << 28
    # The wide feed-forward layer makes the rest of the memory more than a trifle.
    model = chain_model([1, 100, 101, 2], max_seq_len=context, n_kv_heads=2, head_dim=8, hidden_dim=8192)
    path = model.write(tmp_path / "long.bin")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    position = 2 * model.n_layers * model.n_kv_heads * model.head_dim * 2  # bytes
    stderr = run.fails(1, path, "-n", 0, "-j", 1, says=[path, "no memory", str(context)], preexec=limit).stderr
    amount = re.search(r"([\d.]+) (MB|GB)", stderr)
    assert amount, stderr
    needed = float(amount[1]) * {"MB": 1e6, "GB": 1e9}[amount[2]]
    assert math.isclose(needed, position * context, rel_tol=0.01), stderr
    assert "-c sets fewer" in stderr
    fits = ((megabytes - 100) << 20) // position
    assert run.ok(path, "-n", 0, "-j", 1, "-c", fits, preexec=limit).stdout == b"ab\n"


def test_a_context_beyond_all_memory(run: Program, tmp_path: Path) -> None:
    """Nearly the largest sizes that a header may declare, in a file of holes: the cache has 2^64 bytes."""
    if run.sanitized:
        pytest.skip("AddressSanitizer ends the program itself when it asks for so much")
    model = Model(dim=1, hidden_dim=1, n_layers=1 << 12, n_heads=1 << 12, n_kv_heads=1 << 12, head_dim=1 << 10)
    model.max_seq_len = 1 << 28
    path = tmp_path / "wide.bin"
    size = model.offsets()[-1][2]
    path.write_bytes(model.header(size))
    path.with_suffix(".tokenizer.bin").write_bytes(model.vocabulary.to_bytes())
    try:
        os.truncate(path, size)
    except OSError as error:
        pytest.skip(f"no room for a file with holes: {error}")
    try:
        stderr = run.fails(1, path, "-n", 0, says=[path, "no memory"]).stderr
    finally:
        path.unlink()
    assert not re.search(r"-c \d+", stderr), "no context fits, not even the shortest"
