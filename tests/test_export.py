"""Tests of export.py: the formats byte by byte, conversions, and what happens when something is wrong.

The files are parsed here from the formats' description, and not with export.py's own constants.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

import random_weights
from files import interrupt_export

import export

SHARED = TOP / ".." / "shared" / "models"


RANDOM = TOP / "models" / "random_weights.py"


def run_export(*args, program=TOP / "export.py", **kwargs):
    command = [sys.executable, str(program), *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, **kwargs)


def exported(tmp_path, *args, **kwargs):
    """Runs a successful export; returns the parsed weights file and tokenizer file."""
    out = tmp_path / "out.bin"
    result = run_export(*args, "-o", out, **kwargs)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.bin", "out.tokenizer.bin"]
    return Model(out.read_bytes()), Vocabulary((tmp_path / "out.tokenizer.bin").read_bytes())


def assert_refused(result, *words, status=1):
    """One line on standard error, with these words in it, and no traceback."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert re.match(r"(export|random_weights)\.py: error: ", lines[-1]), result.stderr
    assert len(lines) == 1 or status == 2
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[-1]


# ---------------------------------------------------------------------------------------------------------
# Readers of the two formats


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h ^= byte
        h = h * 0x100000001B3 % 2**64
    return h


class Model:
    """A weights file, parsed; `tensors` maps a name to its 16-bit values as uint16, `values` as float32."""

    def __init__(self, data):
        assert data[:8] == b"twofiles"
        self.version, self.dtype, self.flags = struct.unpack_from("<3I", data, 8)
        sizes = struct.unpack_from("<8I", data, 20)
        self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.vocab, self.seq = sizes
        self.norm_eps, self.rope_theta = struct.unpack_from("<2f", data, 52)
        self.rope_scaling = struct.unpack_from("<I", data, 60)[0]
        self.rope_factors = struct.unpack_from("<3f", data, 64)
        self.rope_original = struct.unpack_from("<I", data, 76)[0]
        self.file_size, self.vocab_hash = struct.unpack_from("<2Q", data, 80)
        assert self.version == 1 and self.dtype in (1, 2) and self.flags < 8
        assert self.file_size == len(data)
        assert not any(data[96:4096])
        self.tensors = {}
        end = 4096
        for name, shape in self.shapes():
            start = (end + 63) // 64 * 64
            assert not any(data[end:start])
            end = start + 2 * int(np.prod(shape))
            self.tensors[name] = np.frombuffer(data[start:end], "<u2").reshape(shape)
        assert end == len(data)

    def shapes(self):
        q_dim, kv_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "embedding", (self.vocab, self.dim)
        for i in range(self.layers):
            yield f"{i}.attn_norm", (self.dim,)
            yield f"{i}.wqkv", (q_dim + 2 * kv_dim, self.dim)
            if self.flags & 2:
                yield f"{i}.bqkv", (q_dim + 2 * kv_dim,)
            if self.flags & 4:
                yield f"{i}.q_norm", (self.head_dim,)
                yield f"{i}.k_norm", (self.head_dim,)
            yield f"{i}.wo", (self.dim, q_dim)
            yield f"{i}.ffn_norm", (self.dim,)
            yield f"{i}.w_gate_up", (2 * self.hidden, self.dim)
            yield f"{i}.w_down", (self.dim, self.hidden)
        yield "final_norm", (self.dim,)
        if not self.flags & 1:
            yield "classifier", (self.vocab, self.dim)

    def values(self, name):
        bits = self.tensors[name]
        if self.dtype == 2:
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)


class Vocabulary:
    """A tokenizer file, parsed; `tokens` are (bytes, type, score)."""

    def __init__(self, data):
        assert data[:8] == b"twotoken"
        assert struct.unpack_from("<2I", data, 8) == (3, 1)
        hash, file_size, self.hash = struct.unpack_from("<3Q", data, 16)
        assert (hash, file_size) == (
            fnv1a(struct.unpack_from(f"<{len(data) // 4 - 6}I", data, 24)),
            len(data),
        )
        self.flags, size, self.bos, self.unk, n_stop = struct.unpack_from("<2I2iI", data, 40)
        stop_ids = struct.unpack_from("<7i", data, 60)
        self.stop_ids = stop_ids[:n_stop]
        assert all(id == -1 for id in stop_ids[n_stop:])
        n_text = struct.unpack_from("<I", data, 116)[0]
        start = len(data) - (n_text + 3) // 4 * 4
        self.tokens = []
        hashed = b""
        for i in range(size):
            offset, length, type, score = struct.unpack_from("<3If", data, 160 + 2048 + 16 * i)
            text = data[start + offset : start + offset + length]
            self.tokens.append((text, type, score))
            hashed += struct.pack("<IIf", length, type, score) + text
        assert self.hash == fnv1a(hashed)


# ---------------------------------------------------------------------------------------------------------
# Makers of tiny inputs

SIZES = {"dim": 16, "hidden": 12, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 300, "seq": 16}


def llama2c_arrays(rng, tied=True, **changes):
    """The arrays of a llama2.c file in its order, of numbers that f16 and bf16 both hold only rounded."""
    s = SIZES | changes
    D, F, L, V = s["dim"], s["hidden"], s["layers"], s["vocab"]
    kv = D // s["heads"] * s["kv_heads"]
    rope = s["seq"] * D // s["heads"] // 2
    shapes = {
        "embedding": (V, D),
        "attn_norm": (L, D),
        "wq": (L, D, D),
        "wk": (L, kv, D),
        "wv": (L, kv, D),
        "wo": (L, D, D),
        "ffn_norm": (L, D),
        "w_gate": (L, F, D),
        "w_down": (L, D, F),
        "w_up": (L, F, D),
        "final_norm": (D,),
        "freq_cis_real": (rope,),
        "freq_cis_imag": (rope,),
    }
    if not tied:
        shapes["classifier"] = (V, D)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def llama2c_file(path, arrays, tied=True, **changes):
    s = SIZES | changes
    vocab = s["vocab"] if tied else -s["vocab"]
    sizes = (s["dim"], s["hidden"], s["layers"], s["heads"], s["kv_heads"], vocab, s["seq"])
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(a.tobytes() for a in arrays.values()))
    return path


def llama2c_pieces(n=300):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [b"<0x%02X>" % b for b in range(256)]
    return pieces + [b" piece%d" % i for i in range(n - len(pieces))]


def llama2c_tokenizer(path, pieces):
    body = b"".join(struct.pack("<fi", -i / 4, len(p)) + p for i, p in enumerate(pieces))
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + body)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture
def tokenizer(tmp_path):
    return llama2c_tokenizer(tmp_path / "tokenizer300.bin", llama2c_pieces())


@pytest.fixture
def tiny(tmp_path, rng):
    return llama2c_file(tmp_path / "tiny.bin", llama2c_arrays(rng))


def to_bf16(x):
    """By comparing both neighbours, as a check of the arithmetic in export.py."""
    low = np.asarray(x, np.float32).view(np.uint32) >> 16
    values = [(k.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for k in (low, low + 1)]
    errors = [np.abs(v - x) for v in values]
    up = (errors[1] < errors[0]) | ((errors[1] == errors[0]) & (low % 2 == 1))
    return np.where(up, low + 1, low).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------------
# llama2.c models


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_model_has_every_tensor_in_its_place(tmp_path, rng, tokenizer, tied):
    arrays = llama2c_arrays(rng, tied)
    source = llama2c_file(tmp_path / "tiny.bin", arrays, tied)
    model, vocabulary = exported(tmp_path, source, "--tokenizer", tokenizer, "--dtype", "f16")
    assert (model.dim, model.hidden, model.layers, model.heads) == (16, 12, 2, 2)
    assert (model.kv_heads, model.head_dim, model.vocab, model.seq) == (1, 8, 300, 16)
    assert model.dtype == 2 and model.flags == int(tied)
    assert model.norm_eps == np.float32(1e-5) and model.rope_theta == 10000
    assert (model.rope_scaling, model.rope_factors, model.rope_original) == (0, (0, 0, 0), 0)
    assert model.vocab_hash == vocabulary.hash

    half = {name: a.astype(np.float16).astype(np.float32) for name, a in arrays.items()}
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of the rows of a head: first the first ones of the pairs
    for i in range(2):
        wq = half["wq"][i][order + [8 + k for k in order]]
        wk = half["wk"][i][order]
        expected = {
            "attn_norm": half["attn_norm"][i],
            "wqkv": np.concatenate([wq, wk, half["wv"][i]]),
            "wo": half["wo"][i],
            "ffn_norm": half["ffn_norm"][i],
            "w_gate_up": np.concatenate([half["w_gate"][i], half["w_up"][i]]),
            "w_down": half["w_down"][i],
        }
        for name, value in expected.items():
            np.testing.assert_array_equal(model.values(f"{i}.{name}"), value, err_msg=name)
    np.testing.assert_array_equal(model.values("embedding"), half["embedding"])
    np.testing.assert_array_equal(model.values("final_norm"), half["final_norm"])
    if not tied:
        np.testing.assert_array_equal(model.values("classifier"), half["classifier"])


def test_tensors_larger_than_a_piece(tmp_path, rng, tokenizer, monkeypatch):
    """The same bytes, whatever the size of the pieces; heads are never cut."""
    sizes = {"dim": 16, "heads": 4, "kv_heads": 2}
    path = llama2c_file(tmp_path / "tiny.bin", llama2c_arrays(rng, **sizes), **sizes)
    written = set()
    for piece in (1, 100, 1 << 20):
        monkeypatch.setattr(export, "PIECE", piece)
        out = tmp_path / f"{piece}.bin"
        export.write_model(out, export.open_source(path), export.read_tokenizer(tokenizer))
        written.add(out.read_bytes())
    assert len(written) == 1


def test_stories260k(tmp_path):
    source = SHARED / "stories260K.bin"
    if not source.exists():
        pytest.skip("stories260K.bin is not at hand")
    model, vocabulary = exported(tmp_path, source, "--tokenizer", SHARED / "tok512.bin")
    assert (model.dim, model.layers, model.heads, model.kv_heads, model.vocab) == (64, 5, 8, 4, 512)
    assert model.dtype == 2 and model.flags == 1
    floats = np.fromfile(source, "<f4", offset=28)
    embedding = floats[: 512 * 64].reshape(512, 64)
    np.testing.assert_array_equal(model.values("embedding"), embedding.astype(np.float16).astype(np.float32))
    wk = floats[512 * 64 + 5 * 64 + 5 * 64 * 64 :][: 32 * 64].reshape(32, 64)  # of layer 0, 4 heads of 8 rows
    rows = [8 * head + 2 * (i % 4) + i // 4 for head in range(4) for i in range(8)]
    stored = model.values("0.wqkv")[64 : 64 + 32]
    np.testing.assert_array_equal(stored, wk[rows].astype(np.float16).astype(np.float32))
    assert len(vocabulary.tokens) == 512
    assert vocabulary.tokens[3 + 10] == (b"\n", 6, 0.0)
    assert set(vocabulary.stop_ids) == {1, 2}  # llama2.c's models end a story with bos


def test_max_seq_len(tmp_path, tiny, tokenizer):
    model, _ = exported(tmp_path, tiny, "--tokenizer", tokenizer, "--max-seq-len", 99)
    assert model.seq == 99


# ---------------------------------------------------------------------------------------------------------
# dtypes


def tiny_with(tmp_path, rng, value=None, lossless=False):
    arrays = llama2c_arrays(rng)
    if lossless:
        arrays = {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in arrays.items()}
    if value is not None:
        arrays["w_down"][1, 2, 3] = value
    return llama2c_file(tmp_path / "tiny.bin", arrays), arrays


@pytest.mark.parametrize(
    "value, lossless, option, dtype",
    [
        (None, False, "auto", "f16"),
        (65504.0, False, "auto", "f16"),
        (-65505.0, False, "auto", "bf16"),
        (1e30, False, "auto", "bf16"),
        (None, True, "auto", "bf16"),
        (None, True, "f16", "f16"),
        (None, False, "bf16", "bf16"),
    ],
)
def test_choice_of_dtype(tmp_path, rng, tokenizer, value, lossless, option, dtype):
    source, arrays = tiny_with(tmp_path, rng, value, lossless)
    model, _ = exported(tmp_path, source, "--tokenizer", tokenizer, "--dtype", option)
    assert model.dtype == {"bf16": 1, "f16": 2}[dtype]
    for i in range(2):
        w_down = arrays["w_down"][i]
        expected = to_bf16(w_down) if dtype == "bf16" else w_down.astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(model.tensors[f"{i}.w_down"], expected)
        if lossless and dtype == "bf16":
            np.testing.assert_array_equal(model.values(f"{i}.w_down"), w_down)


def test_forced_f16_refuses_what_does_not_fit(tmp_path, rng, tokenizer):
    source, _ = tiny_with(tmp_path, rng, value=70000.0)
    result = run_export(source, "-o", tmp_path / "out.bin", "--tokenizer", tokenizer, "--dtype", "f16")
    assert_refused(result, "model.layers.1.mlp.down_proj.weight", "70000", "f16")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_not_finite_is_refused(tmp_path, rng, tokenizer, value, dtype):
    source, _ = tiny_with(tmp_path, rng, value)
    result = run_export(source, "-o", tmp_path / "out.bin", "--tokenizer", tokenizer, "--dtype", dtype)
    assert_refused(result, "model.layers.1.mlp.down_proj.weight", "expected finite values")
    assert not list(tmp_path.glob("out*"))


def test_rounding_to_bf16_is_to_nearest_even():
    cases = {0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0xBF80FFFF: 0xBF81, 0x00000001: 0}
    x = np.array(list(cases), np.uint32).view(np.float32)
    assert export.encode(x, "bf16", "x").view(np.uint16).tolist() == list(cases.values())
    many = np.random.default_rng(2).standard_normal(100_000).astype(np.float32)
    np.testing.assert_array_equal(export.encode(many, "bf16", "x").view(np.uint16), to_bf16(many))


def test_what_would_round_to_infinity_does_not_fit():
    with pytest.raises(export.ExportError, match="for bf16"):
        export.encode(np.array([3.4e38], np.float32), "bf16", "x")
    with pytest.raises(export.ExportError, match="expected values up to 65504 for f16, found 65505"):
        export.encode(np.array([65505.0], np.float32), "f16", "x")


# ---------------------------------------------------------------------------------------------------------
# Tensors in memory: all that the format has


def array_source(rng, dtype, **changes):
    shape = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 6}
    config = export.Config(**shape | {"vocab_size": 300, "max_seq_len": 16} | changes)
    arrays = {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in export.specs_of(config)}
    if dtype == "bf16":
        arrays = {name: to_bf16(array).view(export.DTYPES["bf16"]) for name, array in arrays.items()}
    else:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    return config, arrays


def in_memory(config, arrays):
    return export.Model(Path("memory"), config, {name: export.in_memory(a) for name, a in arrays.items()})


@pytest.mark.parametrize("dtype, code", [("bf16", 1), ("float16", 2)])
def test_16_bit_tensors_are_kept_bit_for_bit(tmp_path, rng, tokenizer, dtype, code):
    config, arrays = array_source(rng, dtype, qkv_bias=True, qk_norm=True)
    export.write_model(tmp_path / "out.bin", in_memory(config, arrays), export.read_tokenizer(tokenizer))
    model = Model((tmp_path / "out.bin").read_bytes())
    bits = {name: array.view(np.uint16) for name, array in arrays.items()}
    assert model.dtype == code and model.flags == 2 | 4 and model.head_dim == 6
    for i in range(2):
        attention = f"model.layers.{i}.self_attn."
        wqkv = [bits[f"{attention}{x}_proj.weight"] for x in "qkv"]
        bqkv = [bits[f"{attention}{x}_proj.bias"] for x in "qkv"]
        np.testing.assert_array_equal(model.tensors[f"{i}.wqkv"], np.concatenate(wqkv))
        np.testing.assert_array_equal(model.tensors[f"{i}.bqkv"], np.concatenate(bqkv))
        for x in "qk":
            np.testing.assert_array_equal(model.tensors[f"{i}.{x}_norm"], bits[f"{attention}{x}_norm.weight"])
        np.testing.assert_array_equal(model.tensors[f"{i}.wo"], bits[f"{attention}o_proj.weight"])
    np.testing.assert_array_equal(model.tensors["classifier"], bits["lm_head.weight"])


def test_not_finite_in_16_bits_is_refused(tmp_path, rng, tokenizer):
    for dtype, bits in [("bf16", 0x7FC0), ("bf16", 0xFF80), ("float16", 0x7C00), ("float16", 0xFE00)]:
        config, arrays = array_source(rng, dtype)
        arrays["model.norm.weight"].view(np.uint16)[3] = bits
        with pytest.raises(export.ExportError, match="model.norm.weight: expected finite values"):
            export.write_model(tmp_path / "out.bin", in_memory(config, arrays), export.read_tokenizer(tokenizer))
        assert not list(tmp_path.glob("out*"))


def test_missing_or_misshapen_tensor_is_refused(rng):
    name = "model.layers.1.mlp.down_proj.weight"
    for array, found in ((None, "the tensor"), (np.zeros((8, 13), np.float32), "found")):
        config, arrays = array_source(rng, "float32")
        arrays = {**arrays, name: array} if array is not None else {k: v for k, v in arrays.items() if k != name}
        with pytest.raises(export.ExportError, match=rf"{found}.*\(8, 1[23]\)") as caught:
            in_memory(config, arrays)
        assert name in str(caught.value) and "(8, 12)" in str(caught.value)


def test_header_with_rope_scaling(tmp_path, rng, tokenizer):
    scaling = {"rope_scaling": 2, "rope_factor": 8.0, "rope_low_freq_factor": 1.0}
    scaling |= {"rope_high_freq_factor": 4.0, "rope_original_max_seq_len": 8192}
    config, arrays = array_source(rng, "bf16", rope_theta=500000.0, norm_eps=1e-6, tied=True, **scaling)
    export.write_model(tmp_path / "out.bin", in_memory(config, arrays), export.read_tokenizer(tokenizer))
    model = Model((tmp_path / "out.bin").read_bytes())
    assert model.flags == 1 and model.norm_eps == np.float32(1e-6) and model.rope_theta == 500000
    assert (model.rope_scaling, model.rope_factors, model.rope_original) == (2, (8, 1, 4), 8192)


@pytest.mark.parametrize("change", [{"n_kv_heads": 4}, {"head_dim": 5}, {"dim": 0}, {"max_seq_len": 1 << 29}])
def test_impossible_configuration(change):
    with pytest.raises(export.ExportError):
        export.Config(**{**vars(random_weights.SHAPES["15m"]), **change})


# ---------------------------------------------------------------------------------------------------------
# Wrong inputs and outputs: one line, and nothing left behind


@pytest.fixture
def refuse(tmp_path, tokenizer):
    """Exports with a previous OUT.bin and OUT.tokenizer.bin in place, which have to survive."""

    def check(source, *words, options=("--tokenizer", tokenizer), status=1, **kwargs):
        folder = tmp_path / "out"
        folder.mkdir()
        names = ["out.bin", "out.tokenizer.bin"]
        for name in names:
            (folder / name).write_text(f"the previous {name}")
        result = run_export(source, "-o", folder / "out.bin", *options, **kwargs)
        assert_refused(result, *words, status=status)
        assert sorted(os.listdir(folder)) == names
        assert all((folder / name).read_text() == f"the previous {name}" for name in names)

    return check


def test_truncated_and_too_long(tmp_path, tiny, refuse):
    size = tiny.stat().st_size
    tiny.write_bytes(tiny.read_bytes()[:-4])
    refuse(tiny, f"expected {size} bytes", f"found {size - 4}")


def test_too_long(tmp_path, tiny, refuse):
    size = tiny.stat().st_size
    tiny.write_bytes(tiny.read_bytes() + b"\0")
    refuse(tiny, f"expected {size} bytes", f"found {size + 1}")


@pytest.mark.parametrize(
    "start, words",
    [
        (b"", "an empty file"),
        (b"GGUF\7\0\0\0" + bytes(100), "GGUF"),
        (b"twofiles" + bytes(100), "a weights file of this program"),
        (b"twotoken" + bytes(100), "a tokenizer file of this program"),
        (b"24ka" + bytes(300), "version 1 or later"),
        (b"PK\3\4" + bytes(100), "PyTorch"),
        (b'{"model_type": "llama"}           ', "JSON"),
        (struct.pack("<Q", 20) + b'{"a": 1}' + bytes(99), "safetensors"),
        (b"\1\0", "too short"),
        (struct.pack("<7i", 0, 12, 2, 2, 1, 300, 16), "dim"),
        (struct.pack("<7i", 8, 12, 2, 0, 1, 300, 16), "n_heads"),
        (struct.pack("<7i", 8, 12, 2, 3, 1, 300, 16), "not a multiple"),
        (struct.pack("<7i", 12, 12, 2, 3, 2, 300, 16), "not a multiple"),
        (struct.pack("<7i", 6, 12, 2, 2, 2, 300, 16), "head_dim"),
        (struct.pack("<7i", 8, -12, 2, 2, 1, 300, 16), "hidden_dim"),
        (struct.pack("<7i", 8, 12, 2, 2, 1, 0, 16), "vocab_size"),
        (struct.pack("<7i", 8, 12, 2, 2, 1, 300, -1), "max_seq_len"),
        (struct.pack("<7i", *[2**30, 2**30, 2**30, 2, 1, 2**30, 2**30]), "expected"),
        (b"Once upon a time, there was a text file that was no model at all.", "llama2.c"),
    ],
)
def test_not_a_llama2c_model(tmp_path, refuse, start, words):
    (tmp_path / "source").write_bytes(start)
    refuse(tmp_path / "source", words)


def test_directory(tmp_path, refuse):
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "in this directory")


def test_missing_source(tmp_path, refuse):
    refuse(tmp_path / "nowhere.bin", "nowhere.bin", "No such file")


def test_wrong_usage(tmp_path, tiny, refuse):
    refuse("2m", "2m", "15m", "70b", options=(), status=2, program=RANDOM)


@pytest.mark.parametrize("option", [("--layers", "0"), ("--seed", "-1"), ("--dtype", "f32"), ("--layers", "x")])
def test_wrong_options(refuse, option):
    refuse("15m", option[0], options=option, status=2, program=RANDOM)


def test_vocabularies_differ(tiny, refuse):
    refuse(tiny, "32000", "300", options=("--tokenizer", TOP / "tokenizer.bin"))


def test_no_tokenizer(tiny, refuse):
    refuse(tiny, "300", "--tokenizer", options=())


def test_missing_tokenizer(tmp_path, tiny, refuse):
    refuse(tiny, "absent.bin", options=("--tokenizer", tmp_path / "absent.bin"))


@pytest.mark.parametrize("cut", [1, 7, 14])
def test_truncated_llama2c_tokenizer(tmp_path, tiny, refuse, tokenizer, cut):
    tokenizer.write_bytes(tokenizer.read_bytes()[:-cut])
    refuse(tiny, "ends within token 299")


def test_llama2c_tokenizer_with_too_few_tokens(tiny, refuse, tokenizer):
    llama2c_tokenizer(tokenizer, llama2c_pieces()[:299])
    refuse(tiny, "300", "299")


def test_llama2c_tokenizer_without_some_bytes(tiny, refuse, tokenizer):
    pieces = llama2c_pieces()
    pieces[77] = b"x"
    llama2c_tokenizer(tokenizer, pieces)
    refuse(tiny, "256 bytes", "255")


@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(99), b'{"version": "1.0"}', b"\n\x80\x80", b"some text"])
def test_not_a_tokenizer(tiny, refuse, tokenizer, data):
    tokenizer.write_bytes(data)
    refuse(tiny, "tokenizer300.bin")


@pytest.mark.parametrize("position", [9, 12, 16, 20, 32, 50, 65, 75, 80, 84, 100, -1])
def test_damaged_tokenizer_file(tmp_path, tiny, refuse, tokenizer, position):
    data = bytearray(export.read_tokenizer(tokenizer).to_bytes())
    data[position] ^= 0x44
    tokenizer.write_bytes(data)
    refuse(tiny, "tokenizer300.bin")


def test_output_folder_that_does_not_exist(tmp_path, tiny, tokenizer):
    result = run_export(tiny, "-o", tmp_path / "nowhere" / "out.bin", "--tokenizer", tokenizer)
    assert_refused(result, "nowhere", "No such file")
    assert not (tmp_path / "nowhere").exists()


def test_output_folder_that_cannot_be_written(tmp_path, tiny, tokenizer):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("root can write anywhere")
    assert_refused(run_export(tiny, "-o", folder / "out.bin", "--tokenizer", tokenizer), "Permission denied")


@pytest.mark.parametrize("name", ["out.bin", "out.tokenizer.bin"])
def test_output_is_a_directory(tmp_path, tiny, tokenizer, name):
    (tmp_path / name).mkdir()
    result = run_export(tiny, "-o", tmp_path / "out.bin", "--tokenizer", tokenizer)
    assert_refused(result, name, "expected a new or a regular file")
    assert [p.name for p in tmp_path.glob("out*")] == [name]


def test_output_is_an_input(tmp_path, tiny, tokenizer):
    before = tiny.read_bytes()
    assert_refused(run_export(tiny, "-o", tiny, "--tokenizer", tokenizer), "overwrite")
    assert tiny.read_bytes() == before
    before = tokenizer.read_bytes()
    assert_refused(run_export(tiny, "-o", tokenizer, "--tokenizer", tokenizer), "overwrite")
    assert tokenizer.read_bytes() == before


def test_disk_full(refuse):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    refuse("15m", "/out.bin", "cannot write", options=(), preexec_fn=limit, program=RANDOM)


def test_existing_outputs_are_replaced(tmp_path, tiny, tokenizer):
    (tmp_path / "out.bin").write_text("old")
    (tmp_path / "out.tokenizer.bin").write_text("old")
    exported(tmp_path, tiny, "--tokenizer", tokenizer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_nothing(tmp_path, number):
    interrupt_export(tmp_path, "7b", number=number, program=RANDOM)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def test_llama2c_tokenizer(tmp_path, tiny, tokenizer):
    _, vocabulary = exported(tmp_path, tiny, "--tokenizer", tokenizer)
    assert (vocabulary.bos, vocabulary.unk, vocabulary.flags) == (1, 0, 3)
    assert vocabulary.tokens[:3] == [(b"<unk>", 2, 0.0), (b"<s>", 3, -0.25), (b"</s>", 3, -0.5)]
    assert vocabulary.tokens[3:259] == [(bytes([b]), 6, -(b + 3) / 4) for b in range(256)]
    assert vocabulary.tokens[259:] == [(b" piece%d" % i, 1, -(i + 259) / 4) for i in range(41)]


def test_llama2c_tok512():
    path = SHARED / "tok512.bin"
    if not path.exists():
        pytest.skip("tok512.bin is not at hand")
    tokenizer = export.read_tokenizer(path)
    assert len(tokenizer.tokens) == 512
    assert [t.type for t in tokenizer.tokens] == [2, 3, 3] + [6] * 256 + [1] * 253
    assert tokenizer.tokens[259:262] == [(b" t", 1, 0.0), (b"he", 1, -1.0), (b" a", 1, -2.0)]


def test_tokenizer_file_is_taken_as_it_is(tmp_path, tiny, tokenizer):
    top = TOP / "tokenizer.bin"
    exported(tmp_path, "15m", "--layers", 1, program=RANDOM)
    assert (tmp_path / "out.tokenizer.bin").read_bytes() == top.read_bytes()
    copy = tmp_path / "copy.bin"
    made = export.read_tokenizer(tokenizer)
    copy.write_bytes(export.replace(made, stop_ids=(2, 1)).to_bytes())
    exported(tmp_path, tiny, "--tokenizer", copy)
    assert (tmp_path / "out.tokenizer.bin").read_bytes() == copy.read_bytes()
    for path in (top, tokenizer):
        read = export.read_tokenizer(path)
        assert export.Tokenizer.from_bytes(read.to_bytes()) == read


def test_llama2_tokenizer():
    vocabulary = Vocabulary((TOP / "tokenizer.bin").read_bytes())
    tokens = vocabulary.tokens
    assert len(tokens) == 32000
    assert (vocabulary.bos, vocabulary.unk, vocabulary.stop_ids, vocabulary.flags) == (1, 0, (2,), 3)
    assert tokens[:3] == [(b"<unk>", 2, 0.0), (b"<s>", 3, 0.0), (b"</s>", 3, 0.0)]
    assert tokens[3:259] == [(bytes([b]), 6, 0.0) for b in range(256)]
    # ids that are known from Llama 2's tokenizer
    known = {
        260: b" t",
        278: b" the",
        306: b" I",
        338: b" is",
        3186: b" world",
        15043: b" Hello",
        29871: b" ",
    }
    for id, text in known.items():
        assert tokens[id][0] == text
    spaces = {id for id in range(259, 32000) if not tokens[id][0].strip(b" ")}
    assert len(spaces) == 16 and {259, 268, 29871} <= spaces
    for id in range(259, 32000):
        assert tokens[id][1:] == (1, -1e9 if id in spaces else -(id - 259))
    assert len({text for text, type, _ in tokens if type == 1}) == 32000 - 259


TEXT = "The quick brown fox jumps over the lazy dog, again and again. Where is the dog? It sleeps.\n"


def sentencepiece_model(folder, **options):
    import sentencepiece

    text = folder / "text.txt"
    text.write_text(TEXT * 20)
    settings = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"hard_vocab_limit": False, "num_threads": 1} | options
    prefix = str(folder / "trained")
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=prefix, **settings)
    return folder / "trained.model"


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_model(tmp_path, rng, dummy_prefix):
    import sentencepiece

    path = sentencepiece_model(tmp_path, add_dummy_prefix=dummy_prefix)
    real = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = real.vocab_size()
    source = llama2c_file(tmp_path / "tiny.bin", llama2c_arrays(rng, vocab=vocab), vocab=vocab)
    _, vocabulary = exported(tmp_path, source, "--tokenizer", path)
    assert (vocabulary.bos, vocabulary.unk) == (1, 0) and 2 in vocabulary.stop_ids
    assert vocabulary.flags == 1 | dummy_prefix << 1
    assert len(vocabulary.tokens) == vocab
    for id, (text, type, score) in enumerate(vocabulary.tokens):
        assert score == real.get_score(id)
        if real.is_byte(id):
            assert (text, type) == (bytes([id - 3]), 6)
        elif real.is_control(id) or real.is_unknown(id):
            assert text.decode() == real.id_to_piece(id) and type == (2 if real.is_unknown(id) else 3)
        else:
            assert text.decode() == real.id_to_piece(id).replace("\u2581", " ") and type == 1


def test_sentencepiece_model_without_bos_and_eos(tmp_path):
    path = sentencepiece_model(tmp_path, bos_id=-1, eos_id=-1)
    tokenizer = export.read_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.add_bos) == (-1, (), False)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model_type": "unigram"}, "UNIGRAM"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"treat_whitespace_as_suffix": True}, "spaces"),
    ],
)
def test_sentencepiece_models_that_are_refused(tmp_path, tiny, refuse, options, words):
    refuse(tiny, "trained.model", words, options=("--tokenizer", sentencepiece_model(tmp_path, **options)))


# ---------------------------------------------------------------------------------------------------------
# Random weights


def test_random_weights(tmp_path):
    model, _ = exported(tmp_path, "15m", "--layers", 2, program=RANDOM)
    assert model.dtype == 1 and model.flags == 1
    assert (model.dim, model.hidden, model.layers, model.heads, model.kv_heads) == (288, 768, 2, 6, 6)
    assert (model.head_dim, model.vocab, model.seq) == (48, 32000, 256)
    for name, bits in model.tensors.items():
        values = model.values(name)
        if name.endswith("norm"):
            assert np.all(values == 1)
            continue
        std = 0.01 if name.endswith(("wo", "w_down")) else 0.02  # 0.02 / sqrt(2 * 2 layers)
        assert abs(values.std() / std - 1) < 0.02, name
        assert abs(values.mean()) < std / 50, name
        rows = {row.tobytes() for row in bits}
        assert len(rows) == len(bits), f"{name} repeats"
    wqkv = model.tensors["0.wqkv"]
    assert not np.array_equal(wqkv[:288], wqkv[288:576])
    assert not np.array_equal(wqkv, model.tensors["1.wqkv"])


def test_random_weights_follow_from_the_seed(tmp_path, monkeypatch):
    def embedding(piece=1 << 19, layers=6, **options):
        monkeypatch.setattr(export, "PIECE", piece)
        config = export.replace(random_weights.SHAPES["15m"], n_layers=layers)
        tensors = random_weights.random_model(config, **options).tensors
        specs = list(export.specs_of(config))[:3]
        return b"".join(piece.tobytes() for spec in specs for piece in tensors[spec.name].pieces())

    assert embedding() == embedding(seed=0) == embedding(piece=1 << 12) == embedding(layers=1)
    assert embedding(seed=1) != embedding()
    assert embedding(dtype="f16") != embedding()


@pytest.mark.parametrize(
    "shape, parameters",
    [
        ("15m", 15_191_712),
        ("110m", 109_529_856),
        ("1b", 1_100_048_384),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("70b", 68_976_648_192),
    ],
)
def test_shapes_have_their_known_number_of_parameters(shape, parameters):
    config = random_weights.SHAPES[shape]
    assert sum(spec.size for spec in export.specs_of(config)) == parameters
    assert config.tied == (shape in ("15m", "110m"))


def test_random_in_f16(tmp_path):
    model, _ = exported(tmp_path, "15m", "--layers", 1, "--dtype", "f16", program=RANDOM)
    assert model.dtype == 2
    assert abs(model.values("embedding").std() / 0.02 - 1) < 0.02


def test_memory_stays_small(tmp_path):
    """A tensor of 131 MB is in the file, but not in memory; the number is of all children, in KB (Linux)."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [
        sys.executable,
        str(RANDOM),
        "1b",
        "--layers",
        "1",
        "-o",
        str(tmp_path / "out.bin"),
    ]
    result = subprocess.run([sys.executable, "-c", program, *command], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert (tmp_path / "out.bin").stat().st_size > 350_000_000
    assert kilobytes < 150_000
    (tmp_path / "out.bin").unlink()


def test_no_progress_bar_unless_a_terminal_looks(tmp_path):
    result = run_export("15m", "-o", tmp_path / "out.bin", program=RANDOM)
    assert re.fullmatch(r"\S*out\.bin: bf16, 30\.4 MB\n", result.stderr)


def test_progress_on_a_terminal(tmp_path):
    """A bar with the bytes that are done, all of them, and how fast that goes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [
        sys.executable,
        str(RANDOM),
        "110m",
        "-o",
        str(tmp_path / "out.bin"),
        "--verify",
    ]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process.wait() == 0, shown
    for what in ("writing", "verifying"):
        assert re.search(rf"{what}: +\d+%.*\d+(\.\d+)?M?/219M? .*[kMG]?B/s", shown.decode()), shown
    (tmp_path / "out.bin").unlink()
