"""Writes the two file formats anew, from their documentation alone, and runs the program.

Nothing here comes from export.py or run.c: tests that feed these files to run.c hold the two together. A third
opinion is `reference_logits`, the Transformer in numpy.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------
# The tokenizer file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, LATE = 1, 2, 3, 4, 5, 6, 7
ADD_BOS, ADD_DUMMY_PREFIX, PREFIX_AFTER_SPECIAL, NO_PREFIX_BEFORE_SPACE = 1, 2, 4, 8
MERGES_BY_RANK, IGNORE_MERGES, REMOVE_EXTRA_SPACES = 16, 32, 64
SENTENCEPIECE_BPE, BYTE_LEVEL_BPE = 1, 2

TOKENIZER_HEADER = "<8s2I3Q2I2iI7i8I10I"
TOKENS_START = 160  # the first byte that is not of the header
TOKENIZER_FIELDS = {  # name: (offset, struct format)
    "magic": (0, "8s"),
    "version": (8, "I"),
    "kind": (12, "I"),
    "hash": (16, "Q"),
    "file_size": (24, "Q"),
    "vocab_hash": (32, "Q"),
    "flags": (40, "I"),
    "vocab_size": (44, "I"),
    "bos_id": (48, "i"),
    "unk_id": (52, "i"),
    "n_stops": (56, "I"),
    "stop_ids": (60, "i"),  # the first of seven
    "n_by_text": (88, "I"),
    "n_merges": (92, "I"),
    "n_dfas": (96, "I"),
    "n_classes": (100, "I"),
    "n_states": (104, "I"),
    "template_flags": (108, "I"),
    "n_class_blocks": (112, "I"),
    "n_text": (116, "I"),
    "template_ends": (120, "I"),  # the first of ten
}
assert struct.calcsize(TOKENIZER_HEADER) == TOKENS_START
NONE = 0xFFFFFFFF  # no token
CHARACTERS = 0x110000
TEMPLATES = 10


def fnv1a(numbers: Iterable[int]) -> int:
    """Of bytes, or of numbers of 32 bits."""
    value = 0xCBF29CE484222325
    for number in numbers:
        value = (value ^ number) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def file_hash(data: bytes) -> int:
    """Of a tokenizer file: all words of 32 bits from byte 24 on."""
    return fnv1a(np.frombuffer(data[24 : len(data) // 4 * 4], "<u4").tolist())


def u32(numbers: Iterable[int]) -> bytes:
    numbers = list(numbers)
    return struct.pack(f"<{len(numbers)}I", *numbers)


def class_blocks(classes: bytes) -> dict[str, bytes]:
    """The class of each character, as the file has it: a block for each 256 characters, equal blocks once."""
    pages = [classes[at : at + 256] for at in range(0, len(classes), 256)]
    blocks = sorted(set(pages))
    return {"class_block": u32(map(blocks.index, pages)), "classes": b"".join(blocks)}


@dataclass(frozen=True)
class Piece:
    text: bytes
    type: int = NORMAL
    score: float = 0.0

    def pack(self) -> bytes:
        return struct.pack("<IIf", len(self.text), self.type, self.score) + self.text


@dataclass(frozen=True)
class Vocabulary:
    pieces: tuple[Piece, ...]
    bos_id: int = 1
    unk_id: int = 0
    stop_ids: tuple[int, ...] = (2,)
    flags: int = ADD_BOS | ADD_DUMMY_PREFIX
    kind: int = SENTENCEPIECE_BPE
    merges: tuple[tuple[int, int, int], ...] = ()  # left, right, made
    ranges: tuple[tuple[int, int, int], ...] = ()  # first, last, class
    steps: tuple[tuple[int, ...], ...] = ()  # (states, classes)
    n_machines: int = 0
    templates: tuple[tuple[int | str, ...], ...] = ((),) * TEMPLATES  # tokens and texts; what is left out is empty
    template_flags: int = 0

    @property
    def hash(self) -> int:
        return fnv1a(b"".join(piece.pack() for piece in self.pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def id(self, text: bytes, type: int = NORMAL) -> int:
        return next(i for i, p in enumerate(self.pieces) if p.text == text and p.type == type)

    def items(self) -> list[int | str]:
        """Of all templates."""
        return [item for template in self.templates for item in template]

    def by_text(self) -> list[int]:
        """Tokens that text can become, sorted by their bytes: the last user-defined one, else the first normal."""
        best: dict[bytes, int] = {}
        for id, piece in enumerate(self.pieces):
            wanted = piece.type in (USER_DEFINED, LATE)
            if wanted or (piece.type == NORMAL and piece.text not in best):
                best[piece.text] = id
        return [best[text] for text in sorted(best)]

    def char_class(self) -> bytes:
        """The class of each character: 1, but for those in `ranges`; then U+FFFD's, for stray bytes."""
        if not self.steps:
            return b""
        classes = np.ones(CHARACTERS, np.uint8)
        for first, last, kind in self.ranges:
            classes[first : last + 1] = kind
        return classes.tobytes() + bytes([classes[0xFFFD]]) * 256

    def arrays(self) -> dict[str, bytes]:
        """What follows the header, in the order of the file."""
        byte_id, longest = [self.unk_id & NONE] * 256, [0] * 256
        texts: list[bytes] = []
        places: list[int] = [0]

        def place(text: bytes) -> tuple[int, int]:
            texts.append(text)
            places.append(places[-1] + len(text))
            return places[-2], len(text)

        rows: list[bytes] = []
        for id, piece in enumerate(self.pieces):
            rows.append(struct.pack("<3If", *place(piece.text), piece.type, piece.score))
            if piece.text and piece.type == BYTE:
                byte_id[piece.text[0]] = id
            if piece.text and piece.type in (USER_DEFINED, LATE):
                longest[piece.text[0]] = max(longest[piece.text[0]], len(piece.text))
        last = {(left, right): (made, rank) for rank, (left, right, made) in enumerate(self.merges)}
        merges = [(*pair, *last[pair]) for pair in sorted(last)]
        items = [(NONE, *place(i.encode())) if isinstance(i, str) else (i, 0, 0) for i in self.items()]
        text = b"".join(texts)
        return {
            "byte_id": u32(byte_id),
            "longest": u32(longest),
            "pieces": b"".join(rows),
            "by_text": u32(self.by_text()),
            "merges": u32(number for row in merges for number in row),
            "transitions": u32(number for row in self.steps for number in row),
            "template_items": u32(number for row in items for number in row),
            **class_blocks(self.char_class()),
            "text": text + bytes(-len(text) % 4),
        }

    def to_bytes(self, **changed: bytes) -> bytes:
        """The file, with some of its arrays replaced; then counts may have to be patched."""
        arrays = self.arrays()
        templates = [*self.templates, *[()] * (TEMPLATES - len(self.templates))]
        head = struct.pack(
            TOKENIZER_HEADER,
            *(b"twotoken", 3, self.kind, 0, 0, self.hash, self.flags, len(self.pieces)),
            *(self.bos_id, self.unk_id, len(self.stop_ids), *self.stop_ids),
            *([-1] * (7 - len(self.stop_ids))),
            *(len(arrays["by_text"]) // 4, len(arrays["merges"]) // 16, self.n_machines),
            *(len(self.steps[0]) if self.steps else 0, len(self.steps), self.template_flags),
            *(len(arrays["classes"]) // 256, sum(self.text_lengths())),
            *np.cumsum([len(template) for template in templates]).tolist(),
        )
        return fix(head + b"".join((arrays | changed).values()))

    def text_lengths(self) -> list[int]:
        return [len(p.text) for p in self.pieces] + [len(i.encode()) for i in self.items() if isinstance(i, str)]

    def offsets(self) -> dict[str, int]:
        """Where in the file each array starts; "end": where the last one ends."""
        found, at = {}, TOKENS_START
        for name, array in self.arrays().items():
            found[name] = at
            at += len(array)
        return found | {"end": at}

    def entry_offsets(self) -> list[int]:
        """Where in the file each piece's 16 bytes start (offset, length, type, score), and the end."""
        start = self.offsets()["pieces"]
        return [start + 16 * i for i in range(len(self.pieces) + 1)]


def default_vocabulary(extra: Sequence[bytes] = (), **changes: Any) -> Vocabulary:
    """<unk> <s> </s>, the 256 bytes, and a few pieces, the earlier the better their score."""
    words = [
        b" t",
        b"he",
        b" a",
        b"in",
        b" the",
        b"on",
        b"er",
        b" s",
        b"re",
        b"  ",
        b"    ",
        b"an",
        b" c",
        b"at",
    ]
    words += [b" cat", b"st", b"ing", b" O", b"ce", b"nce", b" Once"]
    single = [b" ", *(bytes([c]) for c in range(ord("a"), ord("z") + 1)), b"O", b"T", b".", b",", b"\xc3\xa9"]
    texts = [*words, *extra, *single]
    pieces = [Piece(b"<unk>", UNKNOWN), Piece(b"<s>", CONTROL), Piece(b"</s>", CONTROL)]
    pieces += [Piece(bytes([b]), BYTE) for b in range(256)]
    pieces += [Piece(text, NORMAL, -float(i)) for i, text in enumerate(texts)]
    return Vocabulary(tuple(pieces), **changes)


def byte_level_vocabulary(**changes: Any) -> Vocabulary:
    """The 256 bytes and a few merges, a user-defined and two control tokens, a machine and a template.

    The machine cuts before each space that follows something else. Its classes: 0 the end, 1 letters, 2 spaces.
    """
    texts = [bytes([b]) for b in range(256)]
    pieces = [Piece(text, BYTE) for text in texts]
    pairs = [(b"h", b"e"), (b"t", b"he"), (b" ", b"the"), (b"a", b"t"), (b" ", b"c"), (b" c", b"at")]
    for left, right in [*pairs[:4], pairs[5], pairs[4]]:  # ids in another order than the merges, which counts
        texts.append(left + right)
        pieces.append(Piece(left + right))
    merges = [(texts.index(left), texts.index(right), texts.index(left + right)) for left, right in pairs]
    pieces += [Piece(b"<think>", USER_DEFINED), Piece(b"<s>", CONTROL), Piece(b"</s>", CONTROL)]
    start, end = len(pieces) - 2, len(pieces) - 1
    # state 1 is the start, 2 within spaces, 3 within letters; an odd step says that a word ends before the character
    steps = ((0, 0, 0), (0, 6, 4), (1, 6, 4), (1, 6, 1))
    templates = ((start, "user\n"), (), (), (end,), (), (end,), ("user\n",), (), (), ())
    fields: dict[str, Any] = {
        "bos_id": start,
        "unk_id": -1,
        "stop_ids": (end,),
        "flags": ADD_BOS | MERGES_BY_RANK | IGNORE_MERGES,
        "kind": BYTE_LEVEL_BPE,
        "merges": tuple(merges),
        "ranges": ((0x20, 0x20, 2), (0x3000, 0x3000, 2)),
        "steps": steps,
        "n_machines": 1,
        "templates": templates,
        "template_flags": 1,
    }
    return Vocabulary(tuple(pieces), **fields | changes)


def write_tokenizer(path: Path, vocabulary: Vocabulary | None = None) -> Vocabulary:
    vocabulary = vocabulary or default_vocabulary()
    path.write_bytes(vocabulary.to_bytes())
    return vocabulary


def read_tokenizer(data: bytes) -> Vocabulary:
    """Of a file that to_bytes() makes again, to the byte."""
    head = struct.unpack_from(TOKENIZER_HEADER, data)
    magic, version, kind, hash, file_size, vocab_hash, flags, vocab_size, bos_id, unk_id, n_stops = head[:11]
    n_by_text, n_merges, n_dfas, n_classes, n_states, template_flags, n_blocks, n_text = head[18:26]
    assert (magic, version, file_size, hash) == (b"twotoken", 3, len(data), file_hash(data))
    at = TOKENS_START + 8 * 256

    def rows(count: int, form: str) -> list[tuple[Any, ...]]:
        nonlocal at
        size = struct.calcsize("<" + form)
        found = [struct.unpack_from("<" + form, data, at + i * size) for i in range(count)]
        at += count * size
        return found

    entries = rows(vocab_size, "3If")
    rows(n_by_text, "I")
    merges = rows(n_merges, "4I")
    steps = rows(n_states, f"{n_classes}I")
    items = rows(head[-1], "3I")
    class_block = [block for (block,) in rows(CHARACTERS // 256 + 1 if n_classes else 0, "I")]
    blocks = np.frombuffer(data, np.uint8, 256 * n_blocks, at).reshape(-1, 256)
    at += 256 * n_blocks
    classes = blocks[class_block].reshape(-1)[:CHARACTERS]
    text = data[at : at + n_text]
    edges = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), len(classes)] if n_classes else [0]
    ranges = [(a, b - 1, int(classes[a])) for a, b in itertools.pairwise(edges) if classes[a] != 1]
    script = [text[start : start + n].decode() if token == NONE else token for token, start, n in items]
    ends = [0, *head[26:]]
    found = Vocabulary(
        tuple(Piece(text[start : start + n], type, score) for start, n, type, score in entries),
        *(bos_id, unk_id, tuple(head[11 : 11 + n_stops]), flags, kind),
        tuple((left, right, made) for left, right, made, _ in sorted(merges, key=lambda row: row[3])),
        tuple(ranges),
        tuple(steps),
        n_dfas,
        tuple(tuple(script[start:end]) for start, end in itertools.pairwise(ends)),
        template_flags,
    )
    assert found.to_bytes() == data and found.hash == vocab_hash
    return found


# ---------------------------------------------------------------------------------------------------------
# The weights file

MODEL_HEADER = "<8s11I2fI3fI2Q"
MODEL_FIELDS = {
    "magic": (0, "8s"),
    "version": (8, "I"),
    "dtype": (12, "I"),
    "flags": (16, "I"),
    "dim": (20, "I"),
    "hidden_dim": (24, "I"),
    "n_layers": (28, "I"),
    "n_heads": (32, "I"),
    "n_kv_heads": (36, "I"),
    "head_dim": (40, "I"),
    "vocab_size": (44, "I"),
    "max_seq_len": (48, "I"),
    "norm_eps": (52, "f"),
    "rope_theta": (56, "f"),
    "rope_scaling": (60, "I"),
    "rope_factor": (64, "f"),
    "rope_low_freq_factor": (68, "f"),
    "rope_high_freq_factor": (72, "f"),
    "rope_original_max_seq_len": (76, "I"),
    "file_size": (80, "Q"),
    "vocab_hash": (88, "Q"),
}
assert struct.calcsize(MODEL_HEADER) == 96

DTYPES = {"bf16": 1, "f16": 2}
TIED, QKV_BIAS, QK_NORM = 1, 2, 4


@dataclass
class Model:
    """A tiny model; its sizes in the order of the header, and its weights, as 32-bit floats, by name."""

    dim: int = 32
    hidden_dim: int = 48
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 8
    vocab_size: int = 0  # the vocabulary's
    max_seq_len: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: int = 0
    rope_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_max_seq_len: int = 0
    flags: int = 0
    dtype: str = "f16"
    vocabulary: Vocabulary = field(default_factory=default_vocabulary)
    weights: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vocab_size = self.vocab_size or len(self.vocabulary)

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every tensor, in the order of the file."""
        q, kv, d = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.dim
        shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (self.vocab_size, d))]
        for i in range(self.n_layers):
            layer: list[tuple[str, tuple[int, ...]]] = [("attn_norm", (d,)), ("wqkv", (q + 2 * kv, d))]
            if self.flags & QKV_BIAS:
                layer.append(("bqkv", (q + 2 * kv,)))
            if self.flags & QK_NORM:
                layer += [("q_norm", (self.head_dim,)), ("k_norm", (self.head_dim,))]
            layer += [("wo", (d, q)), ("ffn_norm", (d,))]
            layer += [("w_gate_up", (2 * self.hidden_dim, d)), ("w_down", (d, self.hidden_dim))]
            shapes += [(f"{i}.{name}", shape) for name, shape in layer]
        shapes.append(("final_norm", (d,)))
        if not self.flags & TIED:
            shapes.append(("classifier", (self.vocab_size, d)))
        return shapes

    def offsets(self) -> list[tuple[str, int, int]]:
        """Name, first byte and end of every tensor in the file."""
        at, result = 4096, []
        for name, shape in self.shapes():
            start = (at + 63) // 64 * 64
            at = start + 2 * int(np.prod(shape))
            result.append((name, start, at))
        return result

    def randomise(self, seed: int = 0) -> Model:
        rng = np.random.default_rng(seed)
        for name, shape in self.shapes():
            values = rng.standard_normal(shape)
            if name.endswith("norm"):
                values = 1 + values * 0.1
            elif name not in ("embedding", "classifier"):
                values *= shape[-1] ** -0.5
            self.weights[name] = self.rounded(values)
        return self

    def zero(self) -> Model:
        for name, shape in self.shapes():
            self.weights[name] = (np.ones if name.endswith("norm") else np.zeros)(shape, np.float32)
        return self

    def rounded(self, values: NDArray[Any]) -> Floats:
        """The values as the file will hold them."""
        bits = self.bits(values.astype(np.float32))
        if self.dtype == "f16":
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def bits(self, values: Floats) -> NDArray[np.uint16]:
        if self.dtype == "f16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), np.uint64(0x7FC0), rounded).astype(np.uint16)

    def header(self, file_size: int) -> bytes:
        sizes = (self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim)
        scaling = (self.rope_scaling, self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor)
        return struct.pack(
            MODEL_HEADER,
            *(b"twofiles", 1, DTYPES[self.dtype], self.flags, *sizes, self.vocab_size, self.max_seq_len),
            *(self.norm_eps, self.rope_theta, *scaling, self.rope_original_max_seq_len),
            *(file_size, self.vocabulary.hash),
        )

    def to_bytes(self) -> bytes:
        offsets = self.offsets()
        data = bytearray(offsets[-1][2])
        data[:96] = self.header(len(data))
        for name, start, end in offsets:
            data[start:end] = self.bits(self.weights[name]).tobytes()
        return bytes(data)

    def write(self, path: Path, tokenizer: bool = True) -> Path:
        """The model as `path`, a .bin, and its tokenizer beside it."""
        path.write_bytes(self.to_bytes())
        if tokenizer:
            path.with_suffix(".tokenizer.bin").write_bytes(self.vocabulary.to_bytes())
        return path


def write_model(
    path: Path, *, dtype: str = "f16", tokenizer: Vocabulary | None = None, seed: int = 0, **dims: Any
) -> Model:
    """A random model and its tokenizer, as PATH.bin and PATH.tokenizer.bin."""
    model = Model(dtype=dtype, vocabulary=tokenizer or default_vocabulary(), **dims).randomise(seed)
    model.write(path)
    return model


def chain_model(chain: Sequence[int], vocabulary: Vocabulary | None = None, loop: bool = False, **dims: Any) -> Model:
    """A model that after each token of `chain` all but surely says the next one: layers that add nothing, a
    dimension for each token, and classifier rows that point along the dimension of the token before."""
    assert len(set(chain)) == len(chain), "a token can have one successor only"
    dim = max(16, len(chain))
    model = Model(**{"dim": dim, "n_layers": 1, "vocabulary": vocabulary or default_vocabulary(), **dims}).zero()
    for i, token in enumerate(chain):
        model.weights["embedding"][token, i] = 1
        if i + 1 < len(chain) or loop:
            model.weights["classifier"][chain[(i + 1) % len(chain)], i] = 20
    return model


def patch(data: bytes, **fields: Any) -> bytes:
    """The file with some fields of its header replaced; the kind of file is known by its magic."""
    known = TOKENIZER_FIELDS if data[:8] == b"twotoken" else MODEL_FIELDS
    out = bytearray(data)
    for name, value in fields.items():
        offset, form = known[name]
        struct.pack_into("<" + form, out, offset, value)
    return bytes(out)


def fix(data: bytes) -> bytes:
    """The file with the size, and a tokenizer's hash, that belong to what it now holds."""
    if len(data) < (TOKENS_START if data[:8] == b"twotoken" else 96):
        return data
    data = patch(data, file_size=len(data))
    return patch(data, hash=file_hash(data)) if data[:8] == b"twotoken" else data


# ---------------------------------------------------------------------------------------------------------
# The Transformer in numpy


def rms(x: Floats, weight: Floats, eps: float) -> Floats:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def frequencies(m: Model) -> NDArray[np.float64]:
    freq: NDArray[np.float64] = m.rope_theta ** -(np.arange(0, m.head_dim, 2) / m.head_dim)
    if m.rope_scaling == 1:
        return freq / m.rope_factor
    if m.rope_scaling == 2:
        turns = m.rope_original_max_seq_len * freq / (2 * np.pi)
        keep = (turns - m.rope_low_freq_factor) / (m.rope_high_freq_factor - m.rope_low_freq_factor)
        keep = np.clip(keep, 0, 1)
        return keep * freq + (1 - keep) * freq / m.rope_factor
    return freq


def reference_logits(m: Model, tokens: Iterable[int]) -> Floats:
    """(len(tokens), vocab_size): the scores of what may come after each token."""
    ids = list(tokens)
    w, eps, n, d = m.weights, m.norm_eps, len(ids), m.head_dim
    q_dim, kv_dim = m.n_heads * d, m.n_kv_heads * d
    angle = np.arange(n)[:, None] * frequencies(m)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(heads: Floats) -> Floats:
        a, b = heads[..., : d // 2], heads[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["embedding"][ids]
    for i in range(m.n_layers):
        qkv = rms(x, w[f"{i}.attn_norm"], eps) @ w[f"{i}.wqkv"].T
        if m.flags & QKV_BIAS:
            qkv = qkv + w[f"{i}.bqkv"]
        q = qkv[:, :q_dim].reshape(n, m.n_heads, d)
        k = qkv[:, q_dim : q_dim + kv_dim].reshape(n, m.n_kv_heads, d)
        v = qkv[:, q_dim + kv_dim :].reshape(n, m.n_kv_heads, d)
        if m.flags & QK_NORM:
            q, k = rms(q, w[f"{i}.q_norm"], eps), rms(k, w[f"{i}.k_norm"], eps)
        group = m.n_heads // m.n_kv_heads
        k, v = np.repeat(rope(k), group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", rope(q), k) / np.sqrt(d)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(n, q_dim) @ w[f"{i}.wo"].T
        gate, up = np.split(rms(x, w[f"{i}.ffn_norm"], eps) @ w[f"{i}.w_gate_up"].T, 2, axis=-1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{i}.w_down"].T
    classifier = w["embedding"] if m.flags & TIED else w["classifier"]
    logits: Floats = rms(x, w["final_norm"], eps) @ classifier.T
    return logits


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def windows_of(
    ids: list[int], context: int, stride: int | None, bos: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Windows for a perplexity, and of each the positions that it scores: one after the other with bos in front of
    each, which `ids` begin with, or else the last token of the one before; or as the guide of transformers has it."""
    if stride is None:
        for begin in range(0, len(ids) - 1, context - 1):
            window = ids[begin : begin + context]
            yield [*([] if bos is None else [bos]), *window[bos is not None :]], list(range(1, len(window)))
        return
    previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        target_length = end - previous_end
        labels = [-100] * (end - begin - target_length) + [0] * target_length
        yield ids[begin:end], [i for i in range(1, end - begin) if labels[i] != -100]
        previous_end = end
        if end == len(ids):
            break


# ---------------------------------------------------------------------------------------------------------
# The program


@dataclass(frozen=True)
class Result:
    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()


class Program:
    """The program under test: $RUN, or ./run at the top of the repository."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path or os.environ.get("RUN") or ROOT / "run").resolve()
        # Threads that wait must not take the processor from other tests.
        self.env = os.environ | {"OMP_WAIT_POLICY": "passive"}

    @property
    def sanitized(self) -> bool:
        return b"__asan_init" in self.path.read_bytes()

    def __call__(
        self,
        *args: object,
        stdin: bytes = b"",
        cwd: Path | None = None,
        timeout: float = 120,
        preexec: Callable[[], None] | None = None,
        leaks: bool = True,
    ) -> Result:
        """Runs it. With `leaks`, memory that was not given back fails the test, if the program is built to tell."""
        command: list[str | bytes | Path] = [
            self.path,
            *(a if isinstance(a, bytes | Path) else str(a) for a in args),
        ]
        done = subprocess.run(
            command,
            check=False,
            input=stdin,
            cwd=cwd,
            env=self.env if leaks else self.env | {"ASAN_OPTIONS": "detect_leaks=0"},
            capture_output=True,
            timeout=timeout,
            preexec_fn=preexec,
        )
        result = Result(done.returncode, done.stdout, done.stderr.decode(errors="replace"))
        check_sanitizers(result.stderr)
        return result

    def ok(self, *args: object, **options: Any) -> Result:
        result = self(*args, **options)
        assert result.status == 0, result
        return result

    def fails(
        self,
        status: int,
        *args: object,
        says: Sequence[object] = (),
        **options: Any,
    ) -> Result:
        """Runs what must fail: with this status, nothing on standard output, and one line that says all this."""
        result = self(*args, leaks=False, **options)  # the one error path ends the program where it is
        assert result.status == status, result
        assert result.stdout == b"", result
        check_one_line(result.stderr)
        # Paths first, and then without them: the names of temporary folders hold many a word.
        rest = result.stderr
        for path in (word for word in says if isinstance(word, Path)):
            assert str(path) in result.stderr, f"{path} is not in: {result.stderr}"
            rest = rest.replace(str(path), "PATH")
        for word in (word for word in says if not isinstance(word, Path)):
            assert str(word) in rest, f"{word!r} is not in: {rest}"
        return result


def check_sanitizers(stderr: str) -> None:
    assert "Sanitizer" not in stderr and "runtime error" not in stderr, stderr


def check_one_line(stderr: str) -> None:
    assert stderr.startswith("run: ") and stderr.endswith("\n") and stderr.count("\n") == 1, repr(stderr)


def read_terminal(process: subprocess.Popen[bytes], master: int, slave: int) -> bytes:
    """What it writes until it ends. The slave stays open, because Linux may lose output when the last one closes it."""
    output = b""
    ended = False
    while True:
        if select.select([master], [], [], 0.1)[0]:
            output += os.read(master, 65536)
        elif ended:
            break
        else:
            ended = process.poll() is not None
    os.close(slave)
    os.close(master)
    return output


def on_terminal(run: Program, *args: object, columns: int = 0, stderr_too: bool = False) -> tuple[str, str]:
    """What it writes to a terminal, of so many columns, and to standard error."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    command, other = [str(run.path), *map(str, args)], slave if stderr_too else subprocess.PIPE
    process = subprocess.Popen(command, stdout=slave, stderr=other, env=run.env)
    output = read_terminal(process, master, slave)
    stderr = (process.communicate()[1] or b"").decode()
    check_sanitizers(stderr + output.decode(errors="replace"))
    assert process.returncode == 0, stderr
    return output.decode(), stderr


def interrupt_export(
    folder: Path, *args: str | Path, number: int = signal.SIGINT, program: Path = ROOT / "export.py"
) -> None:
    """A signal in the middle of writing `folder`/out.bin: silent, its status, and nothing is left behind."""
    command = [sys.executable, program, *args, "-o", folder / "out.bin"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size > 10_000_000 for p in folder.glob("out.bin.tmp*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, stdout, stderr) == (128 + number, "", "")
    assert os.listdir(folder) == []
