#!/usr/bin/env python3
"""Turns a checkpoint into the two files that run.c reads: OUT.bin (weights) and OUT.tokenizer.bin.

    export.py SOURCE -o OUT.bin [--tokenizer FILE] [--dtype auto|bf16|f16]

SOURCE is a llama2.c `.bin` file, or `random:SHAPE` for synthetic weights of a well-known shape.

The text follows the data: 1. the model's configuration, 2. the layout of the weights file, 3. numbers of
16 bits, 4. sources of tensors, 5. tokenizers, 6. writing, 7. the command line. A model is never held in
memory: a source yields each tensor in pieces of a few megabytes, which are converted, checked and written.
Everything is little-endian, as are all machines this is meant for. The README documents both formats.

Shape letters: V vocabulary, D dim, F hidden_dim, L layers, H head_dim.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Array = NDArray[Any]  # float32, float16, or uint16: the bits of a bf16, which numpy does not have

PIECE = 1 << 19  # elements that are worked on at a time: few enough to stay in the cache


class ExportError(Exception):
    """What the user has to know, in one line."""


class UsageError(ExportError):
    """A command line that makes no sense."""


# ---------------------------------------------------------------------------------------------------------
# 1. Configuration


@dataclass(frozen=True)
class Config:
    """The shape of a Llama-like model; up to `tied`, in the order of the header."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: int = 0  # 0 none, 1 linear, 2 llama3; the next four are 0 where they have no meaning
    rope_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_max_seq_len: int = 0
    tied: bool = False  # the classifier is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field, value in list(vars(self).items())[:8]:  # the sizes
            if not 0 < value < 2**31:
                raise ExportError(f"{field} is {value}, expected 1 to 2^31 - 1")
        if self.n_heads % self.n_kv_heads:
            raise ExportError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ExportError(f"head_dim is {self.head_dim}, expected an even number")
        if not (0 < self.norm_eps < 1 and 1 <= self.rope_theta < math.inf):
            raise ExportError(f"norm_eps {self.norm_eps} or rope_theta {self.rope_theta} is out of range")
        if self.rope_scaling not in (0, 1, 2):
            raise ExportError(f"rope_scaling is {self.rope_scaling}, expected 0, 1 or 2")

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim


# ---------------------------------------------------------------------------------------------------------
# 2. The layout of the weights file

MAGIC, VERSION = b"twofiles", 1
HEADER = struct.Struct("<8s11I2fI3fI2Q")  # 96 bytes, then zeros up to TENSORS_START
TENSORS_START = 4096
ALIGNMENT = 64


class Part(NamedTuple):
    """A tensor of the checkpoint, by its Hugging Face name; its shape is (out, in) or (elements,)."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensors(c: Config) -> Iterator[list[Part]]:
    """The tensors of the weights file in its order; one of several parts holds their rows, one after another.

    q, k and v are one tensor, so that run.c has them from one matrix product; so are gate and up.
    """
    yield [Part("model.embed_tokens.weight", (c.vocab_size, c.dim))]
    for layer in range(c.n_layers):
        attention = f"model.layers.{layer}.self_attn"
        mlp = f"model.layers.{layer}.mlp"
        qkv = [("q", c.q_dim), ("k", c.kv_dim), ("v", c.kv_dim)]
        yield [Part(f"model.layers.{layer}.input_layernorm.weight", (c.dim,))]
        yield [Part(f"{attention}.{x}_proj.weight", (rows, c.dim)) for x, rows in qkv]
        if c.qkv_bias:
            yield [Part(f"{attention}.{x}_proj.bias", (rows,)) for x, rows in qkv]
        if c.qk_norm:
            yield [Part(f"{attention}.q_norm.weight", (c.head_dim,))]
            yield [Part(f"{attention}.k_norm.weight", (c.head_dim,))]
        yield [Part(f"{attention}.o_proj.weight", (c.dim, c.q_dim))]
        yield [Part(f"model.layers.{layer}.post_attention_layernorm.weight", (c.dim,))]
        yield [Part(f"{mlp}.{x}_proj.weight", (c.hidden_dim, c.dim)) for x in ("gate", "up")]
        yield [Part(f"{mlp}.down_proj.weight", (c.dim, c.hidden_dim))]
    yield [Part("model.norm.weight", (c.dim,))]
    if not c.tied:
        yield [Part("lm_head.weight", (c.vocab_size, c.dim))]


def layout(config: Config) -> Iterator[tuple[int, list[Part]]]:
    """(byte offset in the file, parts) of each tensor."""
    offset = TENSORS_START
    for parts in tensors(config):
        offset += -offset % ALIGNMENT
        yield offset, parts
        offset += 2 * sum(part.size for part in parts)


def file_size(config: Config) -> int:
    """The weights file ends with the last byte of its last tensor."""
    *_, (offset, parts) = layout(config)
    return offset + 2 * sum(part.size for part in parts)


def header(c: Config, dtype: str, vocab_hash: int) -> bytes:
    """The first 4096 bytes of the weights file."""
    *fields, tied, qkv_bias, qk_norm = astuple(c)
    flags = tied | qkv_bias << 1 | qk_norm << 2
    packed = HEADER.pack(MAGIC, VERSION, DTYPES[dtype].code, flags, *fields, file_size(c), vocab_hash)
    return packed.ljust(TENSORS_START, b"\0")


# ---------------------------------------------------------------------------------------------------------
# 3. Numbers of 16 bits


class Dtype(NamedTuple):
    code: int  # in the header
    array: type[np.generic]  # how numpy holds it
    exponent: int  # the bits of the exponent: all of them are set in inf and NaN
    largest: float


DTYPES = {
    "bf16": Dtype(1, np.uint16, 0x7F80, float.fromhex("0x1.fep127")),
    "f16": Dtype(2, np.float16, 0x7C00, 65504.0),
}


def widened(piece: Array) -> NDArray[np.float32]:
    """The same numbers in 32 bits; a bf16 is the upper half of a float32."""
    if piece.dtype == np.uint16:
        return (piece.astype(np.uint32) << 16).view(np.float32)
    return piece.astype(np.float32, copy=False)


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even: add just under half of the last place, and one more if that is odd."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def largest_magnitude(x: NDArray[np.float32], name: str) -> float:
    largest = float(np.abs(x).max())
    if not math.isfinite(largest):
        raise ExportError(f"tensor {name} has a value that is not finite: {largest}")
    return largest


def encode(piece: Array, dtype: str, name: str) -> NDArray[np.uint16]:
    """The bits of a piece of the tensor `name` in `dtype`, untouched if it has that type already."""
    kind = DTYPES[dtype]
    if piece.dtype == kind.array:
        bits: NDArray[np.uint16] = piece.view(np.uint16)
        if np.any(bits & kind.exponent == kind.exponent):
            largest_magnitude(widened(piece), name)
        return bits
    x = widened(piece)
    largest = largest_magnitude(x, name)
    if largest > kind.largest:
        raise ExportError(f"tensor {name} does not fit {dtype}: it has the magnitude {largest:g}")
    return to_bf16(x) if dtype == "bf16" else x.astype(np.float16).view(np.uint16)


def choose_dtype(source: Source) -> str:
    """16 bits stay what they are; 32 become bf16 if none is lost, else f16 (finer), else bf16 (wider)."""
    if source.dtype != "f32":
        return source.dtype
    exact, largest = True, 0.0
    with progress("reading", file_size(source.config) - TENSORS_START) as bar:
        for part in (part for parts in tensors(source.config) for part in parts):
            for piece in source.pieces(part):
                x = widened(piece)
                largest = max(largest, largest_magnitude(x, part.name))
                exact = exact and not np.any(x.view(np.uint32) & 0xFFFF)
                bar.update(2 * x.size)
    return "bf16" if exact or largest > DTYPES["f16"].largest else "f16"


# ---------------------------------------------------------------------------------------------------------
# 4. Sources of tensors


class Source(Protocol):
    """A checkpoint."""

    config: Config
    dtype: str  # "f32", "bf16" or "f16": what most of it is made of
    stop_ids: tuple[int, ...]  # tokens that end a text, besides those that the tokenizer knows

    def pieces(self, part: Part) -> Iterator[Array]:
        """The tensor part.name of shape part.shape, row-major, cut into pieces of any shape."""


class ArraySource:
    """Tensors in memory, by their Hugging Face names; uint16 stands for bf16."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, config: Config, arrays: dict[str, Array]) -> None:
        self.config, self.arrays = config, arrays
        kinds = {"float32": "f32", "float16": "f16", "uint16": "bf16"}
        self.dtype = kinds[arrays["model.embed_tokens.weight"].dtype.name]

    def pieces(self, part: Part) -> Iterator[Array]:
        array = self.arrays.get(part.name)
        if array is None or array.shape != part.shape:
            found = "nothing" if array is None else array.shape
            raise ExportError(f"tensor {part.name}: expected {part.shape}, found {found}")
        yield np.ascontiguousarray(array)


class Llama2cSource:
    """A llama2.c checkpoint, version 0 (its export.py, `legacy_export`): 7 int32, then float32 tensors.

    It has each kind of tensor for all layers, then the next kind. The negative vocab_size of an untied model
    is a llama2.c habit, and so is to separate texts by bos alone (run.c there stops at it).
    """

    HEADER = struct.Struct("<7i")
    dtype = "f32"
    stop_ids: tuple[int, ...] = (1,)

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            start = file.read(self.HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if kind := known_format(start):
            raise ExportError(f"{path}: expected a llama2.c model, found {kind}")
        if len(start) < self.HEADER.size:
            raise ExportError(f"{path}: too short for a llama2.c model: {len(start)} bytes")
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = self.HEADER.unpack(start)
        try:
            if n_heads <= 0 or dim % n_heads:
                raise ExportError(f"dim {dim} is not a multiple of n_heads {n_heads}")
            sizes = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, dim // n_heads, abs(vocab_size), seq_len)
            self.config = Config(*sizes, tied=vocab_size > 0)
        except ExportError as error:
            raise ExportError(f"{path}: neither a llama2.c model nor another known format: {error}") from None
        self.offsets = self.find_tensors(size)

    def find_tensors(self, file_size: int) -> dict[str, int]:
        """The byte offset of each tensor, by its Hugging Face name, if the file has the length for them."""
        c = self.config
        kinds = [  # name, how many, elements of each
            ("model.embed_tokens", 1, c.vocab_size * c.dim),
            ("model.layers.{}.input_layernorm", c.n_layers, c.dim),
            ("model.layers.{}.self_attn.q_proj", c.n_layers, c.q_dim * c.dim),
            ("model.layers.{}.self_attn.k_proj", c.n_layers, c.kv_dim * c.dim),
            ("model.layers.{}.self_attn.v_proj", c.n_layers, c.kv_dim * c.dim),
            ("model.layers.{}.self_attn.o_proj", c.n_layers, c.dim * c.q_dim),
            ("model.layers.{}.post_attention_layernorm", c.n_layers, c.dim),
            ("model.layers.{}.mlp.gate_proj", c.n_layers, c.hidden_dim * c.dim),
            ("model.layers.{}.mlp.down_proj", c.n_layers, c.dim * c.hidden_dim),
            ("model.layers.{}.mlp.up_proj", c.n_layers, c.hidden_dim * c.dim),
            ("model.norm", 1, c.dim),
            ("cosines and sines of RoPE", 2, c.max_seq_len * c.head_dim // 2),
            ("lm_head", 0 if c.tied else 1, c.vocab_size * c.dim),
        ]
        expected = self.HEADER.size + 4 * sum(count * size for _, count, size in kinds)
        if file_size != expected:
            raise ExportError(f"{self.path}: expected {expected} bytes by its header, found {file_size}")
        offsets = {}
        offset = self.HEADER.size
        for name, count, size in kinds:
            for layer in range(count):
                offsets[f"{name.format(layer)}.weight"] = offset
                offset += 4 * size
        return offsets

    def pieces(self, part: Part) -> Iterator[Array]:
        offset = self.offsets[part.name]
        cols = part.shape[-1]
        head = self.config.head_dim if len(part.shape) == 2 else 1  # pieces are of whole heads
        step = max(1, PIECE // (head * cols)) * head * cols
        for start in range(0, part.size, step):
            count = min(step, part.size - start)
            piece = np.fromfile(self.path, np.float32, count, offset=offset + 4 * start)
            if piece.size != count:
                raise ExportError(f"{self.path}: ends within {part.name}")
            if part.name.endswith(("q_proj.weight", "k_proj.weight")):
                # RoPE rotates rows (2i, 2i + 1) of a head in llama2.c, but (i, i + H/2) here
                pairs = piece.reshape(-1, head // 2, 2, cols)
                piece = np.ascontiguousarray(pairs.swapaxes(1, 2))
            yield piece


def llama(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, length: int, tied: bool) -> Config:
    return Config(dim, hidden, layers, heads, kv_heads, dim // heads, 32000, length, tied=tied)


SHAPES = {
    "15m": llama(288, 768, 6, 6, 6, 256, True),  # 15m and 110m: Karpathy's TinyStories models
    "110m": llama(768, 2048, 12, 12, 12, 1024, True),
    "1b": llama(2048, 5632, 22, 32, 4, 2048, False),  # TinyLlama
    "7b": llama(4096, 11008, 32, 32, 32, 4096, False),  # 7b, 13b and 70b: Llama 2
    "13b": llama(5120, 13824, 40, 40, 40, 4096, False),
    "70b": llama(8192, 28672, 80, 64, 8, 4096, False),
}


class RandomSource:
    """Weights from N(0, 0.02), for measuring; as in GPT-2, those that add to the residual are / sqrt(2 L).

    They are made at a disk's speed: 16 random bits choose one of 65,536 quantiles of the distribution. A
    tensor's values follow from the seed and its name alone. They do not repeat, lest memory be shared.
    """

    stop_ids: tuple[int, ...] = ()

    def __init__(self, config: Config, seed: int = 0, dtype: str = "bf16") -> None:
        self.config, self.seed, self.dtype = config, seed, dtype
        normal = NormalDist(sigma=0.02)
        quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)
        self.quantiles = self.encoded(quantiles)
        self.residual_quantiles = self.encoded(quantiles / np.float32(math.sqrt(2 * config.n_layers)))

    def encoded(self, x: NDArray[np.float32]) -> Array:
        return encode(x, self.dtype, "random").view(DTYPES[self.dtype].array)

    def pieces(self, part: Part) -> Iterator[Array]:
        if len(part.shape) == 1:  # a norm
            yield self.encoded(np.ones(part.shape, np.float32))
            return
        residual = part.name.endswith(("o_proj.weight", "down_proj.weight"))
        quantiles = self.residual_quantiles if residual else self.quantiles
        bits = np.random.SFC64([self.seed, zlib.crc32(part.name.encode())])
        for start in range(0, part.size, PIECE):
            count = min(PIECE, part.size - start)
            draws = bits.random_raw(-(-count // 4)).view(np.uint16)  # 64 bits are four draws
            yield quantiles[draws[:count]]


def known_format(start: bytes) -> str | None:
    """What a file is by its first bytes, of the formats that may be given by mistake."""
    names = {
        MAGIC: "a twofiles weights file",
        TOKENIZER_MAGIC: "a twofiles tokenizer file",
        b"GGUF": "a GGUF file (not supported yet)",
        b"24ka": "a llama2.c model of version 1 or later (only version 0 is supported)",
        b"PK\x03\x04": "a zip file or PyTorch checkpoint",
        b"{": "a JSON file",
    }
    if not start:
        return "an empty file"
    if start[8:10] == b'{"':
        return "a safetensors file (not supported yet)"
    return next((name for magic, name in names.items() if start.startswith(magic)), None)


def open_source(name: str, layers: int | None = None, seed: int = 0, dtype: str = "auto") -> Source:
    """Recognises SOURCE; `layers` and `seed` are for random weights, which are drawn in `dtype`."""
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape not in SHAPES:
            raise UsageError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")
        config = replace(SHAPES[shape], n_layers=layers or SHAPES[shape].n_layers)
        return RandomSource(config, seed, "bf16" if dtype == "auto" else dtype)
    if layers is not None:
        raise UsageError("--layers is for random:SHAPE")
    if os.path.isdir(name):
        raise ExportError(f"{name}: a directory (not supported yet), expected a llama2.c model")
    return Llama2cSource(Path(name))


# ---------------------------------------------------------------------------------------------------------
# 5. Tokenizers

TOKENIZER_MAGIC, TOKENIZER_VERSION = b"twotoken", 1
TOKENIZER_HEADER = struct.Struct("<8s4I2iI7i2Q")  # 80 bytes, then the vocabulary
TOKEN = struct.Struct("<IIf")  # length, type, score; then the bytes
SENTENCEPIECE_BPE = 1  # the kind of tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of tokens
MAX_STOP_IDS = 7


class Token(NamedTuple):
    text: bytes  # what it prints: ' ' and not '▁', one byte of a byte token, the name of a control token
    type: int
    score: float  # of the pairs that may be merged, that with the highest score is


@dataclass(frozen=True)
class Tokenizer:
    tokens: list[Token]
    bos_id: int  # -1 = none
    unk_id: int  # -1 = none
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_space: bool

    def __post_init__(self) -> None:
        for id, token in enumerate(self.tokens):
            if not NORMAL <= token.type <= BYTE or not math.isfinite(token.score):
                raise ExportError(f"token {id} has the type {token.type} and the score {token.score}")
            if not token.text and token.type != UNUSED:
                raise ExportError(f"token {id} is empty")
        byte_tokens = sorted(token.text for token in self.tokens if token.type == BYTE)
        if byte_tokens and byte_tokens != [bytes([b]) for b in range(256)]:
            raise ExportError(f"expected a token for each of the 256 bytes, found {len(byte_tokens)}")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ExportError(f"expected at most {MAX_STOP_IDS} stop ids, found {len(self.stop_ids)}")
        ids = [id for id in (self.bos_id, self.unk_id) if id != -1] + list(self.stop_ids)
        if wrong := [id for id in ids if not 0 <= id < len(self.tokens)]:
            raise ExportError(f"id {wrong[0]} is out of range, there are {len(self.tokens)} tokens")
        if self.add_bos and self.bos_id == -1:
            raise ExportError("a bos token is to be added, but there is none")

    @cached_property
    def vocabulary(self) -> bytes:
        return b"".join(TOKEN.pack(len(t.text), t.type, t.score) + t.text for t in self.tokens)

    @cached_property
    def vocab_hash(self) -> int:
        return fnv1a(self.vocabulary)

    def to_bytes(self) -> bytes:
        """The tokenizer file."""
        stop_ids = self.stop_ids + (-1,) * (MAX_STOP_IDS - len(self.stop_ids))
        flags = self.add_bos | self.add_space << 1
        size = TOKENIZER_HEADER.size + len(self.vocabulary)
        ids = (self.bos_id, self.unk_id, len(self.stop_ids), *stop_ids)
        start = (TOKENIZER_MAGIC, TOKENIZER_VERSION, SENTENCEPIECE_BPE, flags, len(self.tokens))
        return TOKENIZER_HEADER.pack(*start, *ids, size, self.vocab_hash) + self.vocabulary

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Of a tokenizer file; raises ExportError unless to_bytes() would give the same again."""
        if len(data) < TOKENIZER_HEADER.size:
            raise ExportError(f"expected a header of {TOKENIZER_HEADER.size} bytes, found {len(data)}")
        _, version, kind, flags, size, bos, unk, n_stop, *stop_ids, _, _ = TOKENIZER_HEADER.unpack_from(data)
        if (version, kind) != (TOKENIZER_VERSION, SENTENCEPIECE_BPE):
            raise ExportError(f"a tokenizer file of unknown version {version} or kind {kind}")
        tokens = []
        position = TOKENIZER_HEADER.size
        while position + TOKEN.size <= len(data):
            length, type, score = TOKEN.unpack_from(data, position)
            position += TOKEN.size + length
            tokens.append(Token(data[position - length : position], type, score))
        tokenizer = cls(tokens, bos, unk, tuple(stop_ids[:n_stop]), bool(flags & 1), bool(flags & 2))
        if tokenizer.to_bytes() != data:
            raise ExportError(f"a damaged tokenizer file: {size} tokens by its header, {len(tokens)} found")
        return tokenizer

    @classmethod
    def from_llama2c(cls, data: bytes) -> Tokenizer:
        """Of llama2.c's tokenizer.bin: int32 max_token_length, then float32 score, int32 length and the text.

        Texts have spaces for '▁'. Types are not stored, but ids 0 to 2 are <unk>, bos and eos as in Llama's.
        """
        tokens: list[Token] = []
        position = 4
        while position < len(data):
            start = position + 8
            score, length = struct.unpack("<fi", data[position:start].ljust(8, b"\0"))
            position = start + length
            if length < 0 or position > len(data):
                raise ExportError(f"a llama2.c tokenizer that ends within token {len(tokens)}")
            text = data[start:position]
            special = len(tokens) < 3
            type = (UNKNOWN, CONTROL, CONTROL)[len(tokens)] if special else token_type(text)
            tokens.append(Token(text.strip(b"\n") if special else token_text(text, type), type, score))
        return cls(tokens, bos_id=1, unk_id=0, stop_ids=(2,), add_bos=True, add_space=True)

    @classmethod
    def from_sentencepiece(cls, data: bytes) -> Tokenizer:
        """Of a SentencePiece .model, a protobuf message; only BPE that leaves the text as it is."""
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            model.ParseFromString(data)
        except DecodeError:
            raise ExportError("a SentencePiece model that cannot be decoded, or something else") from None
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if trainer.model_type != trainer.BPE:
            found = trainer.ModelType.Name(trainer.model_type)
            raise ExportError(f"expected a SentencePiece model of type BPE, found {found}")
        charsmaps = normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        if charsmaps or normalizer.remove_extra_whitespaces:
            raise ExportError(f"a SentencePiece model that changes the text (normalizer {normalizer.name!r})")
        if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
            raise ExportError("a SentencePiece model that treats spaces in an unknown way")
        tokens = []
        for id, piece in enumerate(model.pieces):
            if piece.type == USER_DEFINED:
                raise ExportError(f"token {id} {piece.piece!r} is user-defined (not supported yet)")
            if piece.type == BYTE and token_type(piece.piece.encode()) != BYTE:
                raise ExportError(f"token {id} {piece.piece!r} is no byte, but should be")
            tokens.append(Token(token_text(piece.piece.encode(), piece.type), piece.type, piece.score))
        return cls(
            tokens,
            bos_id=trainer.bos_id,
            unk_id=trainer.unk_id,
            stop_ids=(trainer.eos_id,) if trainer.eos_id >= 0 else (),
            add_bos=trainer.bos_id >= 0,
            add_space=normalizer.add_dummy_prefix,
        )


def token_type(text: bytes) -> int:
    """By its text alone: a byte token is named like <0x0A>."""
    if not text:
        return UNUSED
    return BYTE if re.fullmatch(rb"<0x[0-9A-F]{2}>", text) else NORMAL


def token_text(piece: bytes, type: int) -> bytes:
    """What a token prints, from its name in a vocabulary."""
    if type == BYTE:
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁".encode(), b" ") if type == NORMAL else piece


def fnv1a(data: bytes) -> int:
    """The 64-bit FNV-1a hash (Fowler, Noll, Vo)."""
    hash = 0xCBF29CE484222325
    for byte in data:
        hash = (hash ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return hash


def read_tokenizer(path: Path) -> Tokenizer:
    """Recognises a tokenizer by its first bytes: llama2.c's begin with a small int32, protobuf with a tag."""
    data = path.read_bytes()
    try:
        if data.startswith(TOKENIZER_MAGIC):
            return Tokenizer.from_bytes(data)
        if kind := known_format(data[:16]):
            raise ExportError(f"expected a tokenizer, found {kind}")
        if data[2:4] == b"\0\0":
            return Tokenizer.from_llama2c(data)
        if data[:1] == b"\n":
            return Tokenizer.from_sentencepiece(data)
        raise ExportError("not a tokenizer of a known format")
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from None


def default_tokenizer(config: Config) -> Path:
    """Llama 2's, which stands beside this program, for models that have as many tokens."""
    if config.vocab_size != 32000:
        raise ExportError(f"no tokenizer of {config.vocab_size} tokens at hand, use --tokenizer FILE")
    return Path(__file__).with_name("tokenizer.bin")


# ---------------------------------------------------------------------------------------------------------
# 6. Writing


def progress(what: str, total: int) -> tqdm[Any]:
    """A progress bar, where someone can see it."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when it is complete, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def tokenizer_path(path: Path) -> Path:
    """OUT.tokenizer.bin, where run.c looks for the tokenizer of OUT.bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".tokenizer.bin")


def write_model(path: Path, source: Source, tokenizer: Tokenizer, dtype: str = "auto") -> str:
    """Writes OUT.bin as `path` and OUT.tokenizer.bin beside it; returns the dtype that was chosen.

    Raises ExportError, and leaves nothing behind, if one cannot be written or does not fit the other.
    """
    config = source.config
    if len(tokenizer.tokens) != config.vocab_size:
        raise ExportError(f"the model has {config.vocab_size} tokens, the tokenizer {len(tokenizer.tokens)}")
    stop_ids = tuple(dict.fromkeys(tokenizer.stop_ids + source.stop_ids))
    tokenizer = replace(tokenizer, stop_ids=stop_ids)
    if dtype == "auto":
        dtype = choose_dtype(source)
    with atomic(tokenizer_path(path)) as tokenizer_file:
        tokenizer_file.write(tokenizer.to_bytes())
        tokenizer_file.flush()
        with atomic(path) as file, progress("writing", file_size(config)) as bar:
            for chunk in ahead(contents(source, dtype, tokenizer.vocab_hash)):
                bar.update(file.write(chunk))
    return dtype


def contents(source: Source, dtype: str, vocab_hash: int) -> Iterator[bytes | memoryview]:
    """The weights file, from its first byte to its last."""
    end = TENSORS_START
    yield header(source.config, dtype, vocab_hash)
    for start, parts in layout(source.config):
        yield bytes(start - end)
        for part in parts:
            size = 0
            for piece in source.pieces(part):
                yield encode(piece, dtype, part.name).data
                size += piece.size
            if size != part.size:
                raise ExportError(f"tensor {part.name}: expected {part.size} elements, found {size}")
        end = start + 2 * sum(part.size for part in parts)


def ahead(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks; another thread makes the next while this one is written."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = worker.submit(next, chunks, None)
            yield chunk


# ---------------------------------------------------------------------------------------------------------
# 7. The command line


def natural(text: str, least: int = 0) -> int:
    number = int(text)
    if not least <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is out of range")
    return number


def positive(text: str) -> int:
    return natural(text, least=1)


def check_outputs(path: Path, *inputs: str | Path) -> None:
    """Early, what would come to light only after a long export, or be regretted."""
    for output in (path, tokenizer_path(path)):
        if output.exists() and not output.is_file():
            raise ExportError(f"{output}: exists and is not a regular file")
        if any(os.path.exists(name) and output.exists() and output.samefile(name) for name in inputs):
            raise ExportError(f"{output}: would overwrite what it is made from")


def export(args: argparse.Namespace) -> None:
    source = open_source(args.source, args.layers, args.seed, args.dtype)
    if args.max_seq_len:
        source.config = replace(source.config, max_seq_len=args.max_seq_len)
    tokenizer_file = args.tokenizer or default_tokenizer(source.config)
    path = args.output.resolve()
    check_outputs(path, args.source, tokenizer_file)
    dtype = write_model(path, source, read_tokenizer(tokenizer_file), args.dtype)
    print(f"{args.output}: {dtype}, {file_size(source.config) / 1e6:,.1f} MB", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser("export.py", description="Makes the two files of a model for run.c.")
    parser.add_argument("source", metavar="SOURCE", help=f"llama2.c .bin, or random:{{{','.join(SHAPES)}}}")
    parser.add_argument("-o", dest="output", metavar="OUT.bin", type=Path, required=True)
    kinds = "llama2.c's .bin, SentencePiece .model, or one made by this program"
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help=kinds)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights")
    parser.add_argument("--layers", metavar="N", type=positive, help="fewer layers, for random:SHAPE")
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="for random:SHAPE")
    parser.add_argument("--max-seq-len", metavar="N", type=positive, help="instead of the checkpoint's")
    args = parser.parse_args()
    try:
        export(args)
    except UsageError as error:
        parser.error(str(error))
    except ExportError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"export.py: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
