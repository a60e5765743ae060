"""Writes the two file formats anew, from their documentation alone, and runs the program.

Nothing here comes from export.py or run.c: tests that feed these files to run.c hold the two together. A third
opinion is `reference_logits`, the Transformer in numpy.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------
# The tokenizer file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, LATE = 1, 2, 3, 4, 5, 6, 7
ADD_BOS, ADD_SPACE, SPACE_ANEW, NO_SECOND_SPACE, BY_MERGES, WHOLE_WORDS, NFC = 1, 2, 4, 8, 16, 32, 64
SENTENCEPIECE_BPE, BYTE_LEVEL_BPE = 1, 2

TOKENIZER_HEADER = "<8s4I2iI7i2Q6IQ"
TOKENS_START = 112
TOKENIZER_FIELDS = {  # name: (offset, struct format)
    "magic": (0, "8s"),
    "version": (8, "I"),
    "kind": (12, "I"),
    "flags": (16, "I"),
    "vocab_size": (20, "I"),
    "bos_id": (24, "i"),
    "unk_id": (28, "i"),
    "n_stop_ids": (32, "I"),
    "stop_ids": (36, "i"),  # the first of seven
    "file_size": (64, "Q"),
    "vocab_hash": (72, "Q"),
    "n_merges": (80, "I"),
    "n_ranges": (84, "I"),
    "n_classes": (88, "I"),
    "n_states": (92, "I"),
    "n_machines": (96, "I"),
    "template_flags": (100, "I"),
    "rest_hash": (104, "Q"),
}
assert struct.calcsize(TOKENIZER_HEADER) == TOKENS_START


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


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
    flags: int = ADD_BOS | ADD_SPACE
    kind: int = SENTENCEPIECE_BPE
    merges: tuple[tuple[int, int, int], ...] = ()  # left, right, made
    ranges: tuple[tuple[int, int, int], ...] = ()  # first, last, class
    steps: tuple[tuple[int, ...], ...] = ()  # (states, classes)
    n_machines: int = 0
    nfc: tuple[
        tuple[tuple[int, ...], ...], ...
    ] = ()  # rows of decompositions, compositions, combining classes
    templates: tuple[bytes, ...] = (b"",) * 7
    template_flags: int = 0

    def body(self) -> bytes:
        return b"".join(piece.pack() for piece in self.pieces)

    @property
    def hash(self) -> int:
        return fnv1a(self.body())

    def __len__(self) -> int:
        return len(self.pieces)

    def id(self, text: bytes, type: int = NORMAL) -> int:
        return next(i for i, p in enumerate(self.pieces) if p.text == text and p.type == type)

    def rest(self) -> bytes:
        """What follows the vocabulary."""
        rows: list[tuple[int, ...]] = [*self.merges, *self.ranges, *self.steps]
        if self.nfc:
            rows += [tuple(map(len, self.nfc)), *(row for kind in self.nfc for row in kind)]
        parts = [bytes(-len(self.body()) % 4), *(struct.pack(f"<{len(row)}I", *row) for row in rows)]
        return b"".join([*parts, *(struct.pack("<I", len(text)) + text for text in self.templates)])

    def to_bytes(self) -> bytes:
        body, rest = self.body(), self.rest()
        stops = [*self.stop_ids, *[-1] * (7 - len(self.stop_ids))]
        head = struct.pack(
            TOKENIZER_HEADER,
            *(b"twotoken", 2, self.kind, self.flags, len(self.pieces), self.bos_id, self.unk_id),
            *(len(self.stop_ids), *stops, TOKENS_START + len(body) + len(rest), fnv1a(body)),
            *(len(self.merges), len(self.ranges), len(self.steps[0]) if self.steps else 0, len(self.steps)),
            *(self.n_machines, self.template_flags, fnv1a(rest)),
        )
        return head + body + rest

    def entry_offsets(self) -> list[int]:
        """Where in the file each piece's entry starts, and the end."""
        offsets = [TOKENS_START]
        for piece in self.pieces:
            offsets.append(offsets[-1] + 12 + len(piece.text))
        return offsets


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
    text = struct.pack("<I", 0x80000000 | 5) + b"user\n"
    templates = (
        struct.pack("<I", start) + text,
        b"",
        b"",
        struct.pack("<I", end),
        b"",
        struct.pack("<I", end),
        text,
    )
    fields: dict[str, Any] = {
        "bos_id": start,
        "unk_id": -1,
        "stop_ids": (end,),
        "flags": ADD_BOS | BY_MERGES | WHOLE_WORDS,
        "kind": BYTE_LEVEL_BPE,
        "merges": tuple(merges),
        "ranges": ((0x20, 0x20, 2), (0x3000, 0x3000, 2)),
        "steps": steps,
        "n_machines": 1,
        "templates": templates,
        "template_flags": 1,
    }
    return Vocabulary(tuple(pieces), **fields | changes)


def nfc_vocabulary(**changes: Any) -> Vocabulary:
    """The same with a little of NFC: e and an acute accent, the Angstrom sign, classes of two marks."""
    nfc = (
        ((0xE9, 0x65, 0x301, 0, 0), (0x212B, 0x41, 0x30A, 0, 0)),
        ((0x65, 0x301, 0xE9),),
        ((0x301, 0x301, 230), (0x323, 0x323, 220)),
    )
    base = byte_level_vocabulary()
    return replace(base, flags=base.flags | NFC, **{"nfc": nfc, **changes})


def write_tokenizer(path: Path, vocabulary: Vocabulary | None = None) -> Vocabulary:
    vocabulary = vocabulary or default_vocabulary()
    path.write_bytes(vocabulary.to_bytes())
    return vocabulary


def read_tokenizer(data: bytes) -> Vocabulary:
    head = struct.unpack_from(TOKENIZER_HEADER, data)
    assert head[:2] == (b"twotoken", 2) and head[15] == len(data)
    at = TOKENS_START

    def rows(count: int, width: int) -> tuple[tuple[int, ...], ...]:
        nonlocal at
        at += 4 * count * width
        return tuple(
            struct.unpack_from(f"<{width}I", data, at - 4 * width * (count - i)) for i in range(count)
        )

    pieces: list[Piece] = []
    for _ in range(head[4]):
        length, type, score = struct.unpack_from("<IIf", data, at)
        pieces.append(Piece(data[at + 12 : at + 12 + length], type, score))
        at += 12 + length
    assert head[16] == fnv1a(data[TOKENS_START:at]) and head[23] == fnv1a(data[at:])
    at += -at % 4
    merges, ranges, steps = rows(head[17], 3), rows(head[18], 3), rows(head[20], head[19])
    counts = rows(1, 3)[0] if head[3] & NFC else ()
    nfc = tuple(rows(count, width) for count, width in zip(counts, (5, 3, 3), strict=False))
    templates = []
    for _ in range(7):
        ((length,),) = rows(1, 1)
        templates.append(data[at : at + length])
        at += length
    assert at == len(data)
    return Vocabulary(
        *(tuple(pieces), head[5], head[6], tuple(head[8 : 8 + head[7]]), head[3], head[2]),
        *(merges, ranges, steps, head[21], nfc, tuple(templates), head[22]),  # type: ignore[arg-type]
    )


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


def chain_model(
    chain: Sequence[int], vocabulary: Vocabulary | None = None, loop: bool = False, **dims: Any
) -> Model:
    """A model that after each token of `chain` all but surely says the next one: layers that add nothing, a
    dimension for each token, and classifier rows that point along the dimension of the token before."""
    assert len(set(chain)) == len(chain), "a token can have one successor only"
    dim = max(16, len(chain))
    model = Model(
        **{"dim": dim, "n_layers": 1, "vocabulary": vocabulary or default_vocabulary(), **dims}
    ).zero()
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


def end_of_tokens(data: bytes) -> int:
    """Where the vocabulary of a tokenizer file ends, as far as one can tell of a damaged one."""
    if len(data) < TOKENS_START:
        return len(data)
    at = TOKENS_START
    for _ in range(min(struct.unpack_from("<I", data, 20)[0], len(data))):
        if at + 12 > len(data):
            break
        at += 12 + struct.unpack_from("<I", data, at)[0]
    return min(at, len(data))


def fix(data: bytes) -> bytes:
    """The file with the size, and a tokenizer's hashes, that belong to what it now holds."""
    if len(data) < TOKENS_START:
        return data
    if data[:8] == b"twotoken":
        at = end_of_tokens(data)
        hashes = {"vocab_hash": fnv1a(data[TOKENS_START:at]), "rest_hash": fnv1a(data[at:])}
        return patch(data, file_size=len(data), **hashes)
    return patch(data, file_size=len(data))


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


def on_terminal(run: Program, *args: object, columns: int = 0, stderr_too: bool = False) -> tuple[str, str]:
    """What it writes to a terminal, of so many columns, and to standard error."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    command, other = [str(run.path), *map(str, args)], slave if stderr_too else subprocess.PIPE
    process = subprocess.Popen(command, stdout=slave, stderr=other, env=run.env)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # EIO: the other side is closed
            break
        output += chunk
        if not chunk:
            break
    os.close(master)
    stderr = (process.communicate()[1] or b"").decode()
    check_sanitizers(stderr + output.decode(errors="replace"))
    assert process.returncode == 0, stderr
    return output.decode(), stderr


def interrupt_export(folder: Path, *args: str | Path, number: int = signal.SIGINT) -> None:
    """A signal in the middle of writing `folder`/out.bin: silent, its status, and nothing is left behind."""
    command = [sys.executable, ROOT / "export.py", *args, "-o", folder / "out.bin"]
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
