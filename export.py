#!/usr/bin/env python3
"""Turns a checkpoint into the two files that run.c reads: OUT.bin (weights) and OUT.tokenizer.bin.

    export.py SOURCE -o OUT.bin [--tokenizer FILE] [--dtype auto|bf16|f16] [--lora DIR] [--verify]

SOURCE is a directory as Hugging Face or Meta publish them, a GGUF file, a llama2.c `.bin` file, or
`random:SHAPE` for synthetic weights of a well-known shape.

The text follows the data: 1. the model's configuration, 2. the layout of the weights file, 3. numbers of
16 bits, 4. tensors that are read piece by piece, 5. formats of files, 6. checkpoints, 7. tokenizers,
8. writing, 9. the command line. A model is never held in memory: a source yields each tensor in pieces of a
few megabytes, which are converted, checked and written. Everything is little-endian, as are all machines
this is meant for. The README documents both formats.

Shape letters: V vocabulary, D dim, F hidden_dim, L layers, H head_dim.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import operator
import os
import pickle
import pickletools
import re
import signal
import struct
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from functools import cache, cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol, TypeVar

try:
    import numpy as np
    from numpy.typing import NDArray
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"export.py: error: {error} (pip install -r requirements.txt)")

Array = NDArray[Any]  # float32, float16, or uint16: the bits of a bf16, which numpy does not have

LLAMA2_TOKENIZER = Path(__file__).with_name("tokenizer.bin")  # stands beside this program

LONG_WRITE = 16 << 20  # bytes
PIECE = 1 << 19  # elements that are worked on at a time: few enough to stay in the cache


class ExportError(Exception):
    """What the user has to know, in one line."""


class UsageError(ExportError):
    """A command line that makes no sense."""


class ModelError(ExportError):
    """What is wrong with a model, wherever it comes from."""


@contextmanager
def about(what: object) -> Iterator[None]:
    """Says of which file a ModelError is."""
    try:
        yield
    except ModelError as error:
        raise ExportError(f"{what}: {error}") from None


def say(kind: str, message: object) -> None:
    """On one line of standard error, whatever names and control characters a file has brought into it."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)[:1000])
    print(f"export.py: {kind}: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# 1. Configuration


Limits = dict[str, tuple[float, float]]  # least and most, as run.c checks them
FLT_MIN, FLT_MAX = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
LIMITS: Limits = {
    "dim": (1, 1 << 20),
    "hidden_dim": (1, 1 << 22),
    "n_layers": (1, 1 << 12),
    "n_heads": (1, 1 << 14),
    "n_kv_heads": (1, 1 << 14),
    "head_dim": (2, 1024),
    "vocab_size": (1, 1 << 24),
    "max_seq_len": (1, 1 << 28),
    "norm_eps": (0, 1),
    "rope_theta": (1, FLT_MAX),
    "rope_scaling": (0, 2),
}
LINEAR_LIMITS: Limits = {"rope_factor": (1, FLT_MAX)}
LLAMA3_LIMITS: Limits = {
    "rope_low_freq_factor": (FLT_MIN, 1e6),
    "rope_high_freq_factor": (FLT_MIN, 1e7),
    "rope_original_max_seq_len": (1, 1 << 28),
}
ROPE_LIMITS: tuple[Limits, ...] = ({}, LINEAR_LIMITS, LINEAR_LIMITS | LLAMA3_LIMITS)  # by rope_scaling


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
        for name, (least, most) in LIMITS.items():
            self.check(name, least, most)
        for name, (least, most) in ROPE_LIMITS[self.rope_scaling].items():
            self.check(name, least, most)
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}, expected an even number")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        least = float(np.float32(low) * np.float32(1.001))  # as the header and run.c have it
        if self.rope_scaling == 2 and np.float32(high) < least:
            raise ModelError(
                f"rope_high_freq_factor is {high}, expected {least:g} (1.001 rope_low_freq_factor) at least"
            )

    def check(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not least <= value <= most:  # nor is it NaN
            raise ModelError(f"{name} is {value}, expected {least} to {most}")

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
        raise ModelError(f"tensor {name} has a value that is not finite: {largest}")
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
        raise ModelError(f"tensor {name} does not fit {dtype}: it has the magnitude {largest:g}")
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
# 4. Tensors that are read piece by piece


class Source(Protocol):
    """A checkpoint."""

    config: Config
    dtype: str  # "f32", "bf16" or "f16": what most of it is made of
    stop_ids: tuple[int, ...] = ()  # tokens that end a text, besides those that the tokenizer knows
    window: int | None = None  # positions that attention looks back, if that is limited
    tokenizer_file: Path | None = None  # that comes with it

    def pieces(self, part: Part) -> Iterator[Array]:
        """The tensor part.name of shape part.shape, row-major, cut into pieces of any shape."""


class ArraySource(Source):
    """Tensors in memory, by their Hugging Face names; uint16 stands for bf16."""

    def __init__(self, config: Config, arrays: dict[str, Array]) -> None:
        self.config, self.arrays = config, arrays
        kinds = {"float32": "f32", "float16": "f16", "uint16": "bf16"}
        self.dtype = kinds[arrays["model.embed_tokens.weight"].dtype.name]

    def pieces(self, part: Part) -> Iterator[Array]:
        array = self.arrays.get(part.name)
        if array is None or array.shape != part.shape:
            found = "nothing" if array is None else array.shape
            raise ModelError(f"tensor {part.name}: expected {part.shape}, found {found}")
        yield np.ascontiguousarray(array)


Rows = Callable[[int, int], Array]  # rows(start, stop) of a matrix; a vector's rows are its elements


class Tensor(NamedTuple):
    """A tensor in a file, which is read only when rows of it are asked for."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # "f32", "bf16" or "f16", as stored (or as dequantised)
    rows: Rows
    unit: int = 1  # rows that belong together: `start` has to be a multiple of it, and `stop`


def spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows that make a piece, and of the next."""
    height, *rest = tensor.shape
    step = max(1, PIECE // max(1, tensor.unit * math.prod(rest))) * tensor.unit
    for start in range(0, height, step):
        yield start, min(start + step, height)


def in_file(path: Path, offset: int, shape: tuple[int, ...], kind: type[np.generic]) -> Rows:
    """The rows of an array that lies in a file as it does in memory."""
    width = math.prod(shape[1:])
    stride = width * np.dtype(kind).itemsize

    def rows(start: int, stop: int) -> Array:
        count = (stop - start) * width
        try:
            found = np.fromfile(path, kind, count, offset=offset + start * stride)
        except OSError as error:
            raise ExportError(f"{path}: cannot read: {error.strerror}") from None
        if found.size != count:
            raise ExportError(f"{path}: ends within a tensor")
        return found.reshape(-1, *shape[1:])

    return rows


WIDTHS = {"f32": 4, "bf16": 2, "f16": 2}  # bytes


def stored(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    kind = np.float32 if dtype == "f32" else DTYPES[dtype].array
    return Tensor(path, shape, dtype, in_file(path, offset, shape, kind))


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """RoPE rotates rows (2i, 2i + 1) of a head in Meta's checkpoints, but (i, i + H/2) in Hugging Face's."""

    def rows(start: int, stop: int) -> Array:
        x = tensor.rows(start, stop)
        pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)

    return tensor._replace(rows=rows, unit=head_dim)


def stacked(shards: list[Tensor]) -> Tensor:
    """The rows of the first shard, then those of the next."""
    *firsts, height = accumulate((shard.shape[0] for shard in shards), initial=0)

    def rows(start: int, stop: int) -> Array:
        found = []
        for first, shard in zip(firsts, shards, strict=True):
            begin, end = max(start - first, 0), min(stop - first, shard.shape[0])
            if begin < end:
                found.append(shard.rows(begin, end))
        return np.concatenate(found)

    return shards[0]._replace(shape=(height, *shards[0].shape[1:]), rows=rows)


def side_by_side(shards: list[Tensor]) -> Tensor:
    """Each row begins in the first shard, and goes on in the next."""
    height, width = shards[0].shape[0], sum(shard.shape[1] for shard in shards)

    def rows(start: int, stop: int) -> Array:
        return np.concatenate([shard.rows(start, stop) for shard in shards], axis=1)

    return shards[0]._replace(shape=(height, width), rows=rows)


HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs")  # RoPE's angles, which run.c computes


@dataclass
class Checkpoint(Source):
    """Tensors in files, by their Hugging Face names: all that the model needs, and no other."""

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    stop_ids: tuple[int, ...] = ()
    window: int | None = None
    tokenizer_file: Path | None = None

    def __post_init__(self) -> None:
        others = dict(self.tensors)
        sizes: Counter[str] = Counter()
        for name, shape in (part for parts in tensors(self.config) for part in parts):
            tensor = others.pop(name, None)
            if tensor is None:
                raise ExportError(f"{self.path}: lacks the tensor {name} of the shape {shape}")
            if tensor.shape != shape:
                found = f"expected the shape {shape}, found {tensor.shape}"
                raise ExportError(f"{tensor.path}: tensor {name}: {found}")
            sizes[tensor.dtype] += math.prod(shape)
        for name, tensor in others.items():
            if not HARMLESS.fullmatch(name):
                raise ExportError(f"{tensor.path}: has a tensor that is not supported: {name}")
        self.dtype = sizes.most_common(1)[0][0]

    def pieces(self, part: Part) -> Iterator[Array]:
        tensor = self.tensors[part.name]
        for start, stop in spans(tensor):
            yield tensor.rows(start, stop)


def renamed(found: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """By Hugging Face's names, from a table that has {} for the number of a layer."""
    result = {}
    for name, tensor in found.items():
        if HARMLESS.fullmatch(name):
            continue
        layer = re.search(r"\.(\d+)\.", name)
        kind = name.replace(layer[0], ".{}.", 1) if layer else name
        if kind not in names:
            raise ExportError(f"{tensor.path}: has a tensor that is not supported: {name}")
        result[names[kind].format(layer and layer[1])] = tensor
    return result


T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """A JSON object of a file, or what is like it; fields are checked as they are read."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Settings:
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ExportError(f"{path}: expected a JSON object, found {values!r:.40}")
        return cls(path, values)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Of this very type, but for whole numbers where any will do; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ExportError(f"{self.path}: lacks {key}")
        if kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind:
            raise ExportError(f"{self.path}: {key}: expected {TYPES[kind]}, found {value!r:.40}")
        return value

    def one_of(self, key: str, *known: T, default: T | None = None) -> T:
        """A setting that has other values for what run.c does not know."""
        value = self.get(key, type(known[0]), default)
        if value not in known:
            expected = ", ".join(map(str, known))
            raise ExportError(f"{self.path}: {key} {value!r} is not supported, expected {expected}")
        return value

    def refuse(self, *keys: str) -> None:
        """Settings that change the result in ways that run.c does not know."""
        for key in keys:
            if self.values.get(key):
                raise ExportError(f"{self.path}: {key} {self.values[key]!r:.60} is not supported")

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, or a list of them, or none."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(id) is not int for id in ids):
            raise ExportError(f"{self.path}: {key}: expected a token id or a list, found {value!r:.40}")
        return tuple(ids)


TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}


# ---------------------------------------------------------------------------------------------------------
# 5. Formats of files


SAFETENSORS_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A length in 8 bytes, a JSON object of that length, and the tensors, one after another without a gap.

    The safetensors library reads and checks the header. It would map the tensors, which counts as memory in
    use, and has no bf16 without torch.
    """
    with open(path, "rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    found = {}
    try:
        with safe_open(path, "numpy") as header:
            for name in header.offset_keys():
                entry = header.get_slice(name)
                dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                if dtype not in SAFETENSORS_DTYPES:
                    expected = f"expected the type F32, F16 or BF16, found {dtype}"
                    raise ExportError(f"{path}: tensor {name}: {expected}")
                found[name] = stored(path, offset, shape, SAFETENSORS_DTYPES[dtype])
                offset += math.prod(shape) * WIDTHS[found[name].dtype]
    except SafetensorError as error:
        raise ExportError(f"{path}: not a safetensors file, or a damaged one: {error}") from None
    return found


TORCH_STORAGES = {"FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16"}
DAMAGES = (  # what a damaged archive or pickle may lead to
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError, pickle.UnpicklingError, struct.error, zlib.error,
)  # fmt: skip


class TensorUnpickler(pickle.Unpickler):
    """Reads the pickle of a PyTorch file without running anything that it names but these few functions.

    Weights stay in the file: torch.load() would map it, which counts as memory in use, and would need torch.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, pickled: str) -> None:
        data = archive.read(pickled)
        super().__init__(io.BytesIO(data))
        for code, argument, _ in pickletools.genops(data):
            # an object is kept under a number, and memory taken for all numbers below
            if code.name in ("PUT", "LONG_BINPUT") and not 0 <= int(str(argument)) <= len(data):
                raise ValueError(f"object number {argument} in a pickle of {len(data)} bytes")
        self.path, self.archive, self.folder = path, archive, pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_STORAGES:
            return TORCH_STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            expected = "expected tensors of float32, float16 or bfloat16 and nothing that could run code"
            raise ExportError(f"{self.path}: its pickle asks for {module}.{name}, {expected}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, int, int]:
        """(dtype, byte offset, number of elements) of what several tensors may share."""
        _, dtype, key, _, elements = pid
        info = self.archive.getinfo(f"{self.folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or elements * WIDTHS[dtype] > info.file_size:
            raise ValueError(f"storage {key}")
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<2H", file.read(4))
        return dtype, info.header_offset + 30 + name_length + extra_length, elements

    def tensor(self, storage: Any, first: int, shape: Any, strides: Any, *_: Any) -> Tensor:
        dtype, offset, elements = storage
        contiguous = tuple(accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]
        whole = all(type(n) is int and n >= 0 for n in (first, *shape))
        if not whole or first + math.prod(shape) > elements or strides != contiguous[: len(shape)]:
            raise ValueError(f"a tensor of the shape {shape} with the strides {strides}")
        return stored(self.path, offset + first * WIDTHS[dtype], tuple(shape), dtype)


def read_torch(path: Path) -> dict[str, Tensor]:
    """A zip archive of a pickled dictionary and the bytes of each tensor, uncompressed."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ExportError(f"{path}: expected a PyTorch file, found another zip archive")
            order = pickled.removesuffix("data.pkl") + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ExportError(f"{path}: expected little-endian tensors")
            found = TensorUnpickler(path, archive, pickled).load()
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile:
        raise ExportError(f"{path}: expected a zip archive, as torch.save() makes them since 1.6") from None
    except DAMAGES as error:
        raise ExportError(f"{path}: a damaged PyTorch file: {error!r:.80}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ExportError(f"{path}: expected a dictionary of tensors, found something else in its pickle")
    return {str(name): tensor for name, tensor in found.items()}


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_DTYPES = {0: "f32", 1: "f16", 30: "bf16"}
GGUF_SCALES = ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "rope.scale_linear")


class Gguf:
    """The metadata of a GGUF file, and its tensors by their names there.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package makes two numpy
    objects of every string: a vocabulary of 49,152 tokens takes 2 seconds and 150 MB there, 0.1 and 20 here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with open(path, "rb") as self.file:
            magic, version, n_tensors, n_fields = self.unpack("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ExportError(f"{path}: expected GGUF of version 2 or 3, found {magic!r}, {version}")
            values = {self.string(): self.value(*self.unpack("I")) for _ in range(n_fields)}
            self.settings = Settings(path, values)
            entries = [self.entry() for _ in range(n_tensors)]
            alignment = self.settings.get("general.alignment", int, 32)
            if alignment < 1:
                raise ExportError(f"{path}: general.alignment: expected 1 or more, found {alignment}")
            start = -(-self.file.tell() // alignment) * alignment
        self.tensors = {name: self.tensor(name, shape, kind, start + at) for name, shape, kind, at in entries}

    def unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        return struct.unpack("<" + form, self.read(size))

    def read(self, size: int) -> bytes:
        data = self.file.read(size) if size <= self.size else b""
        if len(data) != size:
            raise ExportError(f"{self.path}: ends within its header, or the header lies")
        return data

    def string(self) -> str:
        return self.read(*self.unpack("Q")).decode(errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.string()
        if kind in GGUF_NUMBERS:
            return self.unpack(GGUF_NUMBERS[kind])[0]
        if kind != GGUF_ARRAY:
            raise ExportError(f"{self.path}: a metadata value of the unknown type {kind}")
        element, count = self.unpack("IQ")
        if element == GGUF_STRING:
            return [self.string() for _ in range(count)]
        if element not in GGUF_NUMBERS or count > self.size:
            raise ExportError(f"{self.path}: a metadata array of {count} elements of the type {element}")
        return list(self.unpack(f"{count}{GGUF_NUMBERS[element]}"))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, byte offset); a shape has its innermost dimension first in the file."""
        name, (n_dims,) = self.string(), self.unpack("I")
        if not 1 <= n_dims <= 4:
            raise ExportError(f"{self.path}: tensor {name}: expected 1 to 4 dimensions, found {n_dims}")
        return name, self.unpack(f"{n_dims}Q")[::-1], *self.unpack("IQ")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        if kind in GGUF_DTYPES:
            tensor = stored(self.path, offset, shape, GGUF_DTYPES[kind])
            size = math.prod(shape) * WIDTHS[tensor.dtype]
        else:
            tensor, size = self.quantised(name, shape, kind, offset)
        if offset + size > self.size:
            raise ExportError(f"{self.path}: tensor {name} should end at byte {offset + size} of {self.size}")
        return tensor

    def quantised(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> tuple[Tensor, int]:
        """Blocks of numbers with a scale each, as float32; and the bytes that they take."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        try:
            quantisation = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantisation]
            dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
        except (ValueError, KeyError, NotImplementedError):
            raise ExportError(f"{self.path}: tensor {name}: type {kind} is not supported") from None
        if len(shape) != 2 or shape[1] % block:
            raise ExportError(f"{self.path}: tensor {name} of the shape {shape} is in blocks of {block}")
        row_bytes = shape[1] // block * block_bytes
        packed = in_file(self.path, offset, (shape[0], row_bytes), np.uint8)

        def rows(start: int, stop: int) -> Array:
            return dequantize(packed(start, stop), quantisation)

        return Tensor(self.path, shape, "f32", rows), shape[0] * row_bytes


# ---------------------------------------------------------------------------------------------------------
# 6. Checkpoints: Hugging Face, Meta, GGUF, llama2.c, LoRA adapters, and weights at random

FAMILIES = {  # what Hugging Face calls the architectures that run.c computes
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def open_hugging_face(folder: Path) -> Checkpoint:
    settings = Settings.read(folder / "config.json")
    with about(settings.path):
        config = hugging_face_config(settings)
    found = hugging_face_tensors(folder)
    classifier = found.pop("lm_head.weight", None) if config.tied else None
    if classifier and not same(classifier, found.get("model.embed_tokens.weight")):
        raise ExportError(f"{settings.path}: tie_word_embeddings is true, but lm_head.weight differs")
    stop_ids = settings.ids("eos_token_id")
    if (folder / "generation_config.json").exists():
        stop_ids += Settings.read(folder / "generation_config.json").ids("eos_token_id")
    window = sliding_window(settings, config)
    tokenizer = existing(folder / "tokenizer.json") and folder  # with the files beside it
    return Checkpoint(
        folder, config, found, stop_ids, window, tokenizer or existing(folder / "tokenizer.model")
    )


def existing(path: Path) -> Path | None:
    return path if path.exists() else None


def same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(np.array_equal(a.rows(*span), b.rows(*span)) for span in spans(a))


def hugging_face_config(s: Settings) -> Config:
    family = s.one_of("model_type", *FAMILIES)
    architectures = s.get("architectures", list, [FAMILIES[family]])
    if [str(name).lower() for name in architectures] != [FAMILIES[family].lower()]:
        raise ExportError(f"{s.path}: architectures {architectures} of {family!r} are not supported")
    s.refuse("mlp_bias", "quantization_config")
    s.one_of("hidden_act", "silu", "swish", default="silu")
    dim, n_heads = s.get("hidden_size", int), s.get("num_attention_heads", int)
    head_dim = s.get("head_dim", int, 128 if family == "qwen3" else 0)  # as in transformers
    return Config(
        dim=dim,
        hidden_dim=s.get("intermediate_size", int),
        n_layers=s.get("num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=s.get("num_key_value_heads", int, n_heads if family == "llama" else None),
        head_dim=head_dim or dim_of_heads(dim, n_heads),
        vocab_size=s.get("vocab_size", int),
        max_seq_len=s.get("max_position_embeddings", int),
        norm_eps=s.get("rms_norm_eps", float),
        tied=s.get("tie_word_embeddings", bool, False),
        qkv_bias=family == "qwen2" or s.get("attention_bias", bool, False),
        qk_norm=family == "qwen3",
        **hugging_face_rope(s),
    )


def height(found: dict[str, Tensor], name: str) -> int:
    """For what a checkpoint does not say otherwise."""
    if name not in found:
        raise ModelError(f"lacks the tensor {name}")
    return found[name].shape[0]


def dim_of_heads(dim: int, n_heads: int) -> int:
    """Where it is not said, heads share out the model's dimensions."""
    if n_heads < 1 or dim % n_heads:
        raise ModelError(f"dim {dim} is not a multiple of n_heads {n_heads}")
    return dim // n_heads


def hugging_face_rope(s: Settings) -> dict[str, Any]:
    """From rope_parameters, or, before transformers 5, from rope_theta and rope_scaling."""
    rope: dict[str, Any] = {}
    old, new = s.get("rope_scaling", dict, {}), s.get("rope_parameters", dict, {})
    for fields in ({"rope_theta": s.values.get("rope_theta")}, old, new):
        for key, value in fields.items():
            key = "rope_type" if key == "type" else key
            if isinstance(value, dict):
                raise ExportError(f"{s.path}: RoPE that differs from layer to layer ({key}) is not supported")
            if value is not None and rope.setdefault(key, value) != value:
                raise ExportError(f"{s.path}: contradicts itself: {key} is {rope[key]!r} and {value!r}")
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        rope.setdefault(key, s.values.get(key))
    r = Settings(s.path, rope)
    r.one_of("partial_rotary_factor", 1.0, default=1.0)
    kind = r.one_of("rope_type", "default", "linear", "llama3", default="default")
    found: dict[str, Any] = {"rope_theta": r.get("rope_theta", float, 10000.0)}
    if kind == "default":
        return found
    if kind == "linear":
        return found | {"rope_scaling": 1, "rope_factor": r.get("factor", float)}
    low, high = r.get("low_freq_factor", float), r.get("high_freq_factor", float)
    original = r.get("original_max_position_embeddings", int)
    return found | llama3_rope(r.get("factor", float), original, low, high)


def llama3_rope(factor: float, original: int = 8192, low: float = 1.0, high: float = 4.0) -> dict[str, Any]:
    """As Llama 3.1 stretches RoPE; only the factor has changed since."""
    return {
        "rope_scaling": 2,
        "rope_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_seq_len": original,
    }


def sliding_window(s: Settings, config: Config) -> int | None:
    """How far attention looks back, if in some layer it does not see everything."""
    family, layers = s.values["model_type"], s.get("layer_types", list, [])
    if other := set(map(str, layers)) - {"full_attention", "sliding_attention"}:
        raise ExportError(f"{s.path}: layer_types: {min(other)!r} is not supported")
    if family == "llama" or (family != "mistral" and not s.get("use_sliding_window", bool, False)):
        return None
    if layers and "sliding_attention" not in layers:
        return None
    if not layers and family != "mistral" and s.get("max_window_layers", int) >= config.n_layers:
        return None
    unsaid = family == "mistral" and "sliding_window" not in s.values
    window = s.get("sliding_window", int, 4096 if unsaid else 0)  # as in transformers
    if window < 0:
        raise ExportError(f"{s.path}: sliding_window is {window}, expected 1 or more")
    return window or None


def hugging_face_tensors(folder: Path) -> dict[str, Tensor]:
    """In one file, or in several that an index lists."""
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch}
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return read(folder / name)
        if index.exists():
            return indexed_tensors(index, read)
    expected = " or ".join(f"{name}[.index.json]" for name in readers)
    raise ExportError(f"{folder}: expected {expected}, found neither")


def indexed_tensors(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    names: dict[str, list[str]] = {}
    for name, shard in Settings.read(index).get("weight_map", dict).items():
        names.setdefault(str(shard), []).append(name)
    found = {}
    for shard in sorted(names):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():  # shards lie beside the index
            raise ExportError(f"{index}: lists {shard!r}, but such a file is missing beside it")
        tensors_there = read(path)
        for name in names[shard]:
            if name not in tensors_there:
                raise ExportError(f"{path}: lacks the tensor {name}, which {index.name} says it has")
            found[name] = tensors_there[name]
    return found


META_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    **{f"layers.{{}}.attention.w{x}.weight": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"},
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
META_SETTINGS = {  # all that is known in params.json; of others, nobody knows what they change
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    *("head_dim", "hidden_dim", "max_seq_len", "max_batch_size", "sliding_window"),
}


def open_meta(folder: Path) -> Checkpoint:
    """Llama as Meta publishes it: params.json, tokenizer.model, and a shard for each GPU of a group."""
    s = Settings.read(folder / "params.json")
    if unknown := sorted(s.values.keys() - META_SETTINGS):
        raise ExportError(f"{s.path}: {unknown[0]} is not supported")
    shards = meta_shards(folder)
    found = {name: meta_joined(s, name, [shard[name] for shard in shards]) for name in shards[0]}
    found = renamed(found, META_NAMES)
    with about(s.path):
        config = meta_config(s, found)
    check_meta_shards(folder, config, shards)
    found = {name: rotated_by_halves(name, tensor, config) for name, tensor in found.items()}
    window = s.get("sliding_window", int, 0) or None
    return Checkpoint(folder, config, found, (), window, existing(folder / "tokenizer.model"))


def rotated_by_halves(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Permutes what RoPE is applied to: queries and keys."""
    rotated = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    return half_split(tensor, config.head_dim) if name.endswith(rotated) else tensor


def meta_shards(folder: Path) -> list[dict[str, Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise ExportError(f"{folder}: expected consolidated.00.pth, found no such file")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02}.pth":
            raise ExportError(f"{folder}: consolidated.{i:02}.pth is missing, but there is {paths[-1].name}")
    shards = [read_torch(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise ExportError(f"{path}: {different[0]} is only in this or in {paths[0].name}")
    return shards


def meta_joined(s: Settings, name: str, shards: list[Tensor]) -> Tensor:
    """A tensor as it was before it was distributed; norms are in every shard."""
    if len({(shard.dtype, shard.shape) for shard in shards}) > 1:
        other = shards[0].path.name
        raise ExportError(f"{shards[-1].path}: tensor {name} differs in shape or type from {other}'s")
    if len(shards) == 1 or len(shards[0].shape) != 2:
        return shards[0]
    by_input = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    if name == "tok_embeddings.weight":  # by columns up to Llama 2, by rows since
        by_input = shards[0].shape[1] != s.get("dim", int)
    return side_by_side(shards) if by_input else stacked(shards)


def meta_config(s: Settings, found: dict[str, Tensor]) -> Config:
    """Of params.json, and of the tensors' shapes what it leaves out."""
    dim, n_heads = s.get("dim", int), s.get("n_heads", int)
    vocab_size = height(found, "model.embed_tokens.weight")
    return Config(
        dim=dim,
        hidden_dim=height(found, "model.layers.0.mlp.gate_proj.weight"),
        n_layers=s.get("n_layers", int),
        n_heads=n_heads,
        n_kv_heads=s.get("n_kv_heads", int, n_heads),
        head_dim=s.get("head_dim", int, 0) or dim_of_heads(dim, n_heads),
        vocab_size=vocab_size if s.get("vocab_size", int, -1) == -1 else s.get("vocab_size", int),
        max_seq_len=meta_context(s),
        norm_eps=s.get("norm_eps", float),
        tied="lm_head.weight" not in found,
        rope_theta=s.get("rope_theta", float, 10000.0),
        **meta_rope(s),
    )


def meta_rope(s: Settings) -> dict[str, Any]:
    """The factor is 8 in Llama 3.1, and 32 in the small models of 3.2, whose params.json do not say so."""
    if not s.get("use_scaled_rope", bool, False):
        return {}
    factor = s.get("rope_scaling_factor", float, 32.0 if s.get("dim", int) < 4096 else 8.0)
    return llama3_rope(factor, high=s.get("rope_high_freq_factor", float, 4.0))


def meta_context(s: Settings) -> int:
    """params.json does not say for how many positions a model was trained; other settings give it away."""
    if "max_seq_len" in s.values:
        return s.get("max_seq_len", int)
    if s.get("use_scaled_rope", bool, False):
        return 131072  # Llama 3.1 and later
    if "rope_theta" in s.values:
        return 8192  # Llama 3
    say(
        "warning",
        f"{s.path}: no context length; assuming 2048 as for Llama 1 (for Llama 2: --max-seq-len 4096)",
    )
    return 2048


def check_meta_shards(folder: Path, config: Config, shards: list[dict[str, Tensor]]) -> None:
    """Without the last shards, shapes would be wrong all over."""
    wo = shards[0].get("layers.0.attention.wo.weight")
    if wo is not None and len(wo.shape) == 2 and wo.shape[1] * len(shards) != config.q_dim:
        found = f"found {len(shards)} with {wo.shape[1]} each"
        raise ExportError(f"{folder}: expected consolidated.*.pth with {config.q_dim} columns of wo, {found}")


GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    **{f"blk.{{}}.attn_{x}.weight": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"},
    **{f"blk.{{}}.attn_{x}.bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"},
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def open_gguf(path: Path) -> Checkpoint:
    """A model of llama.cpp; quantised weights become 16 bits, which is exact or nearly so."""
    file = Gguf(path)
    s, found = file.settings, file.tensors
    for other in gguf_splits(s):
        found |= Gguf(other).tensors
    factors = found.pop("rope_freqs.weight", None)
    found = renamed(found, GGUF_NAMES)
    with about(path):
        config = gguf_config(s, found)
        if factors:
            config = replace(config, **rope_of_factors(config, factors))
    architecture = s.get("general.architecture", str)
    if architecture == "llama":  # the one that llama.cpp rotates by pairs
        found = {name: rotated_by_halves(name, tensor, config) for name, tensor in found.items()}
    stop_ids = s.ids("tokenizer.ggml.eos_token_id") + s.ids("tokenizer.ggml.eot_token_id")
    window = s.get(f"{architecture}.attention.sliding_window", int, 0) or None
    tokenizer = path if "tokenizer.ggml.tokens" in s.values else None
    return Checkpoint(path, config, found, stop_ids, window, tokenizer)


def gguf_splits(s: Settings) -> list[Path]:
    """The other files of a model that was split into several."""
    count = s.get("split.count", int, 1)
    if count < 2:
        return []
    name = re.fullmatch(rf"(.*)-00001-of-{count:05}\.gguf", s.path.name)
    if not name:
        first = f"NAME-00001-of-{count:05}.gguf"
        raise ExportError(f"{s.path}: one of {count} files, expected the first, {first}")
    paths = [s.path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    for path in paths:
        if not path.is_file():
            raise ExportError(f"{path}: missing, but {s.path.name} says there are {count} files")
    return paths


def gguf_config(s: Settings, found: dict[str, Tensor]) -> Config:
    architecture = s.one_of("general.architecture", "llama", "qwen2", "qwen3")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in s.values.items() if key.startswith(prefix)}
    a = Settings(s.path, own)
    a.refuse("expert_count", *GGUF_SCALES)
    dim, n_heads = a.get("embedding_length", int), a.get("attention.head_count", int)
    head_dim = a.get("attention.key_length", int, 0) or dim_of_heads(dim, n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if a.get(key, int, head_dim) != head_dim:
            raise ExportError(f"{s.path}: {prefix}{key} is {own[key]}, expected {head_dim} as all of a head")
    kind = a.one_of("rope.scaling.type", "none", "linear", default="none")
    return Config(
        dim=dim,
        hidden_dim=a.get("feed_forward_length", int),
        n_layers=a.get("block_count", int),
        n_heads=n_heads,
        n_kv_heads=a.get("attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        vocab_size=height(found, "model.embed_tokens.weight"),
        max_seq_len=a.get("context_length", int),
        norm_eps=a.get("attention.layer_norm_rms_epsilon", float),
        tied="lm_head.weight" not in found,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in found,
        qk_norm=architecture == "qwen3",
        rope_theta=a.get("rope.freq_base", float, 10000.0),
        rope_scaling=int(kind == "linear"),
        rope_factor=a.get("rope.scaling.factor", float) if kind == "linear" else 0.0,
    )


def rope_of_factors(c: Config, tensor: Tensor) -> dict[str, Any]:
    """llama.cpp stores what Llama 3's RoPE divides each frequency by: find what gave these numbers."""
    if c.rope_scaling == 0 and tensor.shape == (c.head_dim // 2,):
        stored_factors = widened(tensor.rows(0, c.head_dim // 2)).astype(np.float64)
        frequencies = c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        factor = float(stored_factors.max())
        for original in (2**i for i in range(5, 21)):
            turns = original * frequencies / (2 * np.pi)
            keep = np.clip((turns - 1) / (4 - 1), 0, 1)
            if np.allclose(stored_factors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
                return llama3_rope(factor, original)
    raise ExportError(f"{tensor.path}: rope_freqs.weight is not of Llama 3's kind, which alone is supported")


LLAMA2C_MAGIC = b"24ka"  # since version 1
LLAMA2C_LAYOUTS = {  # the kinds of tensors in order, each for all layers
    0: (
        "model.embed_tokens.weight",
        "model.layers.{}.input_layernorm.weight",
        *(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"),
        "model.layers.{}.post_attention_layernorm.weight",
        *(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "down", "up")),
        "model.norm.weight",
        "rope.freqs",
        "lm_head.weight",
    ),
    1: (
        "model.layers.{}.input_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        *(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "down", "up")),
        "lm_head.weight",
    ),
}


def open_llama2c(path: Path) -> Checkpoint:
    """A llama2.c checkpoint of float32, where texts are separated by bos alone (its run.c stops there)."""
    version, offset, config = llama2c_header(path)
    one_layer = (part for parts in tensors(replace(config, n_layers=1)) for part in parts)
    shapes = {part.name.replace(".0.", ".{}."): part.shape for part in one_layer}
    shapes["rope.freqs"] = (config.max_seq_len, config.head_dim)  # cosines and sines
    layout = [name for name in LLAMA2C_LAYOUTS[version] if name in shapes]
    kinds = [(name, config.n_layers if "{}" in name else 1) for name in layout]
    expected = offset + 4 * sum(count * math.prod(shapes[name]) for name, count in kinds)
    if (file_size := path.stat().st_size) != expected:
        raise ExportError(f"{path}: expected {expected} bytes by its header, found {file_size}")
    found = {}
    for kind, count in kinds:
        for name in (kind.format(layer) for layer in range(count)):
            found[name] = rotated_by_halves(name, stored(path, offset, shapes[kind], "f32"), config)
            offset += 4 * math.prod(shapes[kind])
    tokenizer_file = LLAMA2_TOKENIZER if config.vocab_size == 32000 else None
    return Checkpoint(path, config, found, stop_ids=(1,), tokenizer_file=tokenizer_file)


def llama2c_header(path: Path) -> tuple[int, int, Config]:
    """(version, offset of the first tensor, shape): 7 int32, before which version 1 has magic and version.

    An untied model has a negative vocab_size in version 0, and a byte for it in version 1.
    """
    with open(path, "rb") as file:
        start = file.read(256)
    version, at, length = 0, 0, 28
    if start.startswith(LLAMA2C_MAGIC):
        version, at, length = int.from_bytes(start[4:8], "little"), 8, 256
        if version != 1:
            expected = "expected 0 or 1, which are of float32 (2 is quantised to 8 bits)"
            raise ExportError(f"{path}: a llama2.c model of version {version}, {expected}")
    elif kind := known_format(start):
        raise ExportError(f"{path}: expected a model, found {kind}")
    if len(start) < length:
        raise ExportError(f"{path}: too short for a llama2.c model: {len(start)} bytes")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack_from("<7i", start, at)
    tied = bool(start[36]) if version else vocab_size > 0
    with about(f"{path}: neither a llama2.c model nor another known format"):
        head_dim = dim_of_heads(dim, n_heads)
        sizes = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, abs(vocab_size), seq_len)
        return version, length, Config(*sizes, tied=tied)


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint with a LoRA adapter of the PEFT library, merged in as weights are read."""
    s = Settings.read(folder / "adapter_config.json")
    rank, scale = lora_rank_and_scale(s)
    path = folder / "adapter_model.safetensors"
    found = read_safetensors(path) if path.exists() else read_torch(folder / "adapter_model.bin")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match or f"{match[1]}.weight" not in base.tensors:
            raise ExportError(f"{tensor.path}: has a tensor that does not belong to this model: {name}")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    if not pairs:
        raise ExportError(f"{path}: an adapter without tensors")
    merged = {name: adapted(base.tensors[name], name, pair, rank, scale) for name, pair in pairs.items()}
    return replace(base, tensors=base.tensors | merged)


LORA_SETTINGS = {  # all in adapter_config.json that does not change how weights are merged, or is looked at
    *("peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode"),
    *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


def lora_rank_and_scale(s: Settings) -> tuple[int, float]:
    s.one_of("peft_type", "LORA")
    s.refuse(*sorted(s.values.keys() - LORA_SETTINGS))
    s.one_of("bias", "none", default="none")
    init = s.values.get("init_lora_weights", True)  # some other ways change the model's own weights as well
    if init not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ExportError(f"{s.path}: init_lora_weights {init!r} is not supported")
    rank, alpha = s.get("r", int), s.get("lora_alpha", float)
    if rank < 1:
        raise ExportError(f"{s.path}: r is {rank}, expected 1 or more")
    return rank, alpha / (math.sqrt(rank) if s.get("use_rslora", bool, False) else rank)


def adapted(tensor: Tensor, name: str, pair: dict[str, Tensor], rank: int, scale: float) -> Tensor:
    """W + scale B A in float32 (https://arxiv.org/abs/2106.09685); A: (rank, in), B: (out, rank)."""
    path = next(iter(pair.values())).path
    shapes = {"A": (rank, *tensor.shape[1:]), "B": (tensor.shape[0], rank)}
    for x, shape in shapes.items():
        if x not in pair:
            raise ExportError(f"{path}: lacks lora_{x} of {name}")
        if pair[x].shape != shape:
            found = f"expected the shape {shape}, found {pair[x].shape}"
            raise ExportError(f"{path}: lora_{x} of {name}: {found}")
    a, b = (widened(pair[x].rows(0, pair[x].shape[0])) for x in "AB")
    scaled = np.float32(scale) * b

    def rows(start: int, stop: int) -> Array:
        return widened(tensor.rows(start, stop)) + scaled[start:stop] @ a

    return tensor._replace(rows=rows)


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


class RandomSource(Source):
    """Weights from N(0, 0.02), for measuring; as in GPT-2, those that add to the residual are / sqrt(2 L).

    They are made at a disk's speed: 16 random bits choose one of 65,536 quantiles of the distribution. A
    tensor's values follow from the seed and its name alone. They do not repeat, lest memory be shared.
    """

    tokenizer_file = LLAMA2_TOKENIZER

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
        b"GGUF": "a GGUF file",
        LLAMA2C_MAGIC: "a llama2.c model",
        b"PK\x03\x04": "a PyTorch checkpoint or another zip file (expected the directory that it belongs to)",
        b"{": "a JSON file (expected the directory that it belongs to)",
    }
    if not start:
        return "an empty file"
    if start[8:10] == b'{"':
        return "a safetensors file (expected the directory that it belongs to)"
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
    return open_checkpoint(Path(name))


def open_checkpoint(path: Path) -> Checkpoint:
    if path.is_dir():
        for settings, opener in (("config.json", open_hugging_face), ("params.json", open_meta)):
            if (path / settings).exists():
                return opener(path)
        expected = "config.json (as Hugging Face has it) or params.json (as Meta has it)"
        raise ExportError(f"{path}: a directory without {expected}")
    with open(path, "rb") as file:
        magic = file.read(4)
    return open_gguf(path) if magic == b"GGUF" else open_llama2c(path)


# ---------------------------------------------------------------------------------------------------------
# 7. Tokenizers

TOKENIZER_MAGIC, TOKENIZER_VERSION = b"twotoken", 3
TOKENIZER_HEADER = struct.Struct("<8s2I3Q2I2iI7i8I10I")  # 160 bytes, then the arrays
HASHED_FROM = 24  # the first byte that the file's hash covers
TOKEN = struct.Struct("<IIf")  # of a token in the hash of a vocabulary: length, type, score; then the bytes
SENTENCEPIECE_BPE, BYTE_LEVEL_BPE = 1, 2  # the kind of tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of tokens
LATE = 7  # user-defined, but sought when the text has been normalised
MAX_STOP_IDS = 7
NONE = 0xFFFFFFFF  # no token

# The bits of flags
SWITCHES = ["add_bos", "add_space", "space_anew", "no_second_space", "by_merges", "whole_words"]

Table = tuple[tuple[int, ...], ...]  # of numbers


class Token(NamedTuple):
    text: bytes  # what it prints: ' ' and not '▁', one byte of a byte token, the name of a control token
    type: int
    score: float = 0.0  # of the pairs that may be merged, that with the highest score is


class Merge(NamedTuple):
    left: int
    right: int
    made: int


class Machines(NamedTuple):
    """How text is cut into words: state machines, each for what the one before it has left, see `machines`."""

    classes: bytes = b""  # of each character, then of stray bytes
    steps: Table = ()  # (states, classes): twice the next state, + 1 at the end of a word
    n_machines: int = 0


NO_MACHINES = Machines()  # a text is one word


Piece = tuple[int | str, ...]  # of a chat template: the ids of tokens, and texts


class Template(NamedTuple):
    """What stands around the texts of a conversation, in the order of `PIECES`."""

    pieces: tuple[Piece, ...]
    flags: int  # 1, and 2 if it takes a system text; those of find_trimming


PIECES = (
    "before_user",  # the start of a conversation without a system text
    "before_system",
    "after_system",  # up to the user's first text
    "after_user",  # up to where the model starts to answer
    "before_answer",  # what stands there as well once there is an answer, mostly nothing
    "after_answer",
    "next_user",  # after that, up to the user's next text
    "opens_answer",  # in front of a new answer only, not in the history
    "opens_answer_no_think",  # that instead, if the model is asked not to think
    "end_of_thought",  # in an earlier answer, all up to the last one of this text goes
)


@dataclass(frozen=True)
class Tokenizer:
    tokens: list[Token]
    bos_id: int  # -1 = none
    unk_id: int  # -1 = none
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_space: bool  # in front of a text
    space_anew: bool = False  # and of a text that follows a control or user-defined token
    no_second_space: bool = False  # but not of one that begins with a space
    by_merges: bool = False  # the order of merging is that of `merges`, not that of the scores
    whole_words: bool = False  # a word that is a token is never cut
    kind: int = SENTENCEPIECE_BPE
    merges: tuple[Merge, ...] = ()
    machines: Machines = NO_MACHINES
    template: Template | None = None

    def __post_init__(self) -> None:
        for id, token in enumerate(self.tokens):
            if not NORMAL <= token.type <= LATE or not math.isfinite(token.score):
                raise ModelError(f"token {id} has the type {token.type} and the score {token.score}")
            if not token.text and token.type != UNUSED:
                raise ModelError(f"token {id} is empty")
        byte_tokens = sorted(token.text for token in self.tokens if token.type == BYTE)
        all_bytes = [bytes([b]) for b in range(256)]
        if self.kind == SENTENCEPIECE_BPE and byte_tokens not in ([], all_bytes):
            raise ModelError(f"expected a token for each of the 256 bytes, found {len(byte_tokens)}")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ModelError(f"expected at most {MAX_STOP_IDS} stop ids, found {len(self.stop_ids)}")
        ids = [id for id in (self.bos_id, self.unk_id) if id != -1] + list(self.stop_ids)
        if wrong := [id for id in ids if not 0 <= id < len(self.tokens)]:
            raise ModelError(f"id {wrong[0]} is out of range, there are {len(self.tokens)} tokens")
        if self.add_bos and self.bos_id == -1:
            raise ModelError("a bos token is to be added, but there is none")

    @cached_property
    def vocab_hash(self) -> int:
        """Tells one vocabulary from another, whatever format it is written in."""
        return fnv1a(b"".join(TOKEN.pack(len(t.text), t.type, t.score) + t.text for t in self.tokens))

    def to_bytes(self) -> bytes:
        """The tokenizer file: the header, then arrays that run.c uses as they are, each on 4 bytes."""
        by_text = self.by_text()
        longest = [0] * 256
        byte_id = [self.unk_id & NONE] * 256
        for id, token in enumerate(self.tokens):
            if token.type in (USER_DEFINED, LATE):
                longest[token.text[0]] = max(longest[token.text[0]], len(token.text))
            if token.type == BYTE:
                byte_id[token.text[0]] = id

        texts = bytearray()

        def placed(text: bytes) -> tuple[int, int]:
            texts.extend(text)
            return len(texts) - len(text), len(text)

        rows = [(*placed(t.text), t.type, t.score) for t in self.tokens]
        pieces = np.array(rows, np.dtype("<u4,<u4,<u4,<f4"))
        pairs = {(merge.left, merge.right): (merge.made, rank) for rank, merge in enumerate(self.merges)}
        merges = [(*pair, *made) for pair, made in sorted(pairs.items())]
        templates = self.template.pieces if self.template else ((),) * len(PIECES)
        items = [
            (NONE, *placed(item.encode())) if isinstance(item, str) else (item, 0, 0)
            for item in chain.from_iterable(templates)
        ]
        classes, steps, n_machines = self.machines
        arrays = [
            *(numbers(byte_id), numbers(longest), pieces.tobytes(), numbers(by_text), numbers(merges)),
            *(numbers(steps), numbers(items), classes, bytes(texts), bytes(-len(texts) % 4)),
        ]
        flags = sum(bool(getattr(self, name)) << bit for bit, name in enumerate(SWITCHES))
        header = TOKENIZER_HEADER.pack(
            *(TOKENIZER_MAGIC, TOKENIZER_VERSION, self.kind, 0),
            *(TOKENIZER_HEADER.size + sum(map(len, arrays)), self.vocab_hash, flags, len(self.tokens)),
            *(self.bos_id, self.unk_id, len(self.stop_ids)),
            *(self.stop_ids + (-1,) * (MAX_STOP_IDS - len(self.stop_ids))),
            *(len(by_text), len(merges), n_machines, len(steps[0]) if steps else 0, len(steps)),
            *(self.template.flags if self.template else 0, len(items), len(texts)),
            *accumulate(map(len, templates)),
        )
        data = b"".join([header, *arrays])
        hash = fnv1a(memoryview(data[HASHED_FROM:]).cast("I"))
        return data[:16] + struct.pack("<Q", hash) + data[HASHED_FROM:]

    def by_text(self) -> list[int]:
        """The tokens that text can become, by their bytes: the last user-defined one, else the first normal."""
        found: dict[bytes, int] = {}
        for id, token in enumerate(self.tokens):
            if token.type in (USER_DEFINED, LATE):
                found[token.text] = id
            elif token.type == NORMAL:
                found.setdefault(token.text, id)
        return [id for _, id in sorted(found.items())]

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Of a tokenizer file; raises ModelError unless to_bytes() would give the same again."""
        size = TOKENIZER_HEADER.size
        if len(data) < 12:
            raise ModelError(f"expected a header of {size} bytes, found {len(data)}")
        if (version := int.from_bytes(data[8:12], "little")) != TOKENIZER_VERSION:
            raise ModelError(f"a tokenizer file of version {version}, expected {TOKENIZER_VERSION}")
        if len(data) < size:
            raise ModelError(f"expected a header of {size} bytes, found {len(data)}")
        _, _, kind, _, _, _, flags, vocab_size, bos, unk, n_stop, *others = TOKENIZER_HEADER.unpack_from(data)
        stop_ids, ends = others[:n_stop], [0, *others[-len(PIECES) :]]
        n_by_text, n_merges, n_machines, n_classes, n_states, template_flags, n_items, n_text = others[7:15]
        if kind not in (SENTENCEPIECE_BPE, BYTE_LEVEL_BPE):
            raise ModelError(f"a tokenizer file of the unknown kind {kind}")
        at = size + 2 * 4 * 256

        def take(form: str, count: int, width: int = 1) -> Any:
            nonlocal at
            kind = np.dtype(form)
            end = at + count * width * kind.itemsize
            if end > len(data):
                raise ModelError("a damaged tokenizer file: it ends too early")
            found = np.frombuffer(data[at:end], kind).reshape(-1, width)
            at = end
            return found

        rows = take("<u4,<u4,<u4,<f4", vocab_size).reshape(-1).tolist()
        take("<u4", n_by_text)
        merges = take("<u4", n_merges, 4).tolist()
        steps = take("<u4", n_states, n_classes).tolist() if n_classes else []
        items = take("<u4", n_items, 3).tolist()
        classes = take("u1", N_CLASSES).tobytes() if n_classes else b""
        texts = take("u1", n_text).tobytes()

        def item(token: int, offset: int, length: int) -> int | str:
            return texts[offset : offset + length].decode(errors="replace") if token == NONE else token

        script = [item(*row) for row in items]
        switches: dict[str, Any] = {name: bool(flags >> bit & 1) for bit, name in enumerate(SWITCHES)}
        tokenizer = cls(
            [Token(texts[offset : offset + length], type, score) for offset, length, type, score in rows],
            bos,
            unk,
            tuple(stop_ids),
            **switches,
            kind=kind,
            merges=tuple(Merge(*row[:3]) for row in sorted(merges, key=lambda row: row[3])),
            machines=Machines(classes, tuple(map(tuple, steps)), n_machines),
            template=Template(tuple(tuple(script[a:b]) for a, b in pairwise(ends)), template_flags)
            if script
            else None,
        )
        if tokenizer.to_bytes() != data:
            raise ModelError(f"a damaged tokenizer file: {len(data)} bytes that do not fit together")
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
                raise ModelError(f"a llama2.c tokenizer that ends within token {len(tokens)}")
            text = data[start:position]
            special = len(tokens) < 3
            type = (UNKNOWN, CONTROL, CONTROL)[len(tokens)] if special else token_type(text)
            tokens.append(Token(text.strip(b"\n") if special else token_text(text, type), type, score))
        return cls(
            tokens, 1, 0, (2,), add_bos=True, add_space=True, machines=machines(words_at_spaces(tokens))
        )

    @classmethod
    def from_sentencepiece(cls, data: bytes) -> Tokenizer:
        """Of a SentencePiece .model, a protobuf message; only BPE that leaves the text as it is."""
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            model.ParseFromString(data)
        except DecodeError:
            raise ModelError("a SentencePiece model that cannot be decoded, or something else") from None
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if trainer.model_type != trainer.BPE:
            found = trainer.ModelType.Name(trainer.model_type)
            raise ModelError(f"expected a SentencePiece model of type BPE, found {found}")
        charsmaps = normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        if charsmaps or normalizer.remove_extra_whitespaces:
            raise ModelError(f"a SentencePiece model that changes the text (normalizer {normalizer.name!r})")
        if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
            raise ModelError("a SentencePiece model that treats spaces in an unknown way")
        tokens = []
        for id, piece in enumerate(model.pieces):
            if piece.type == BYTE and token_type(piece.piece.encode()) != BYTE:
                raise ModelError(f"token {id} {piece.piece!r} is no byte, but should be")
            type = LATE if piece.type == USER_DEFINED else piece.type
            tokens.append(Token(token_text(piece.piece.encode(), type), type, piece.score))
        return cls(
            tokens,
            bos_id=trainer.bos_id,
            unk_id=trainer.unk_id,
            stop_ids=(trainer.eos_id,) if trainer.eos_id >= 0 else (),
            add_bos=trainer.bos_id >= 0,
            add_space=normalizer.add_dummy_prefix,
            machines=machines(words_at_spaces(tokens)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Of a GGUF file's metadata, as Python values; arrays may be any sequences."""
        get = {key.removeprefix("tokenizer."): value for key, value in metadata.items()}.get
        model, names = get("ggml.model"), get("ggml.tokens")
        if model not in ("llama", "gpt2") or not names:
            raise ModelError(f"a GGUF tokenizer of an unknown model {model!r}, expected llama or gpt2")
        byte_level = model == "gpt2"
        types = [int(type) for type in get("ggml.token_type") or [NORMAL] * len(names)]
        scores = [0.0] * len(names) if byte_level else [float(score) for score in get("ggml.scores", ())]
        if not len(names) == len(types) == len(scores):
            raise ModelError(f"{len(names)} tokens with {len(types)} types and {len(scores)} scores")
        tokens = []
        for name, type, score in zip(names, types, scores, strict=True):
            if type != NORMAL or not byte_level:
                text = token_text(name.encode(), type)
                tokens.append(Token(text, type if text else UNUSED, score))
            else:
                tokens.append(byte_level_token(name))
        bos, eos = get("ggml.bos_token_id", -1), get("ggml.eos_token_id", -1)
        stop_ids = [eos, get("ggml.eot_token_id", -1), get("ggml.eom_token_id", -1)]
        for id in (bos, *stop_ids):  # control tokens, whatever type they are said to have
            if 0 <= id < len(tokens) and len(tokens[id].text) > 1:
                tokens[id] = tokens[id]._replace(type=CONTROL)
        ids = {name: id for id, name in enumerate(names)}
        pre = get("ggml.pre", "default") if byte_level else ""
        if byte_level and pre not in GGUF_PATTERNS:
            raise ModelError(f"a GGUF tokenizer with an unknown pre-tokenizer {pre!r}")
        add_space = bool(get("ggml.add_space_prefix", not byte_level))
        special_ids = {"bos_token": bos, "eos_token": eos, "unk_token": get("ggml.unknown_token_id", -1)}
        unk = -1 if byte_level else get("ggml.unknown_token_id", 0)  # llama.cpp leaves out unknown bytes
        tokenizer = cls(
            tokens,
            bos_id=bos,
            unk_id=unk,
            stop_ids=tuple(dict.fromkeys(int(id) for id in stop_ids if id >= 0)),
            add_bos=bool(get("ggml.add_bos_token", not byte_level)) and bos >= 0,
            add_space=add_space,
            space_anew=add_space,
            by_merges=byte_level,
            whole_words=pre in GGUF_WHOLE_WORDS,
            kind=BYTE_LEVEL_BPE if byte_level else SENTENCEPIECE_BPE,
            merges=to_merges(get("ggml.merges", ()), ids, tokens) if byte_level else (),
            machines=machines(GGUF_PATTERNS[pre] if byte_level else words_at_spaces(tokens)),
        )
        if pre in GGUF_NFC:
            note_nfc()
        added = {name: id for name, id in ids.items() if types[id] in (CONTROL, USER_DEFINED)}
        special = {key: names[id] for key, id in special_ids.items() if id >= 0}
        return tokenizer.with_template(get("chat_template"), special, added)

    def with_template(
        self, source: str | None, special: Mapping[str, str], added: Mapping[str, int]
    ) -> Tokenizer:
        """The same with the pieces of a chat template; its tokens, of those in `added`, become control tokens.

        So a user cannot type them. And that which ends an answer ends the model's text.
        """
        template = find_template(source, special, added) if source else None
        if template is None:
            return self
        used = {item for piece in template.pieces for item in piece if isinstance(item, int)}
        tokens = [t._replace(type=CONTROL) if id in used else t for id, t in enumerate(self.tokens)]
        ends = [item for item in template.pieces[PIECES.index("after_answer")] if isinstance(item, int)][:1]
        return replace(
            self, tokens=tokens, template=template, stop_ids=tuple(dict.fromkeys((*self.stop_ids, *ends)))
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
    return piece.replace("▁".encode(), b" ") if type in (NORMAL, USER_DEFINED, LATE) else piece


def fnv1a(numbers: Iterable[int]) -> int:
    """The 64-bit FNV-1a hash (Fowler, Noll, Vo), of bytes or of numbers of 32 bits."""
    hash = 0xCBF29CE484222325
    for number in numbers:
        hash = (hash ^ number) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return hash


def numbers(rows: Sequence[Any]) -> bytes:
    return np.array(rows, "<u4").tobytes()


def note_nfc() -> None:
    say("note", "this tokenizer expects text in NFC, which run does not make: uconv -x nfc does")


# ---- how words are cut: from regular expressions to the tables that run.c steps through

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
DIGITS = "[[:Digits:]]"  # the `tokenizers` library's own notion of a digit, which no expression names

GGUF_PATTERNS = {  # what llama.cpp calls pre-tokenizers
    name: patterns
    for names, patterns in [
        ("gpt-2 gpt2 phi-2 mpt olmo jais trillion granite-docling", [GPT2]),
        ("llama3 llama-v3 llama-bpe falcon3 pixtral dbrx smaug-bpe", [LLAMA3]),
        ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan", [QWEN2]),
        ("qwen35", [QWEN35]),
        ("tekken", [TEKKEN]),
        ("deepseek-coder", DEEPSEEK_CODER),
        ("smollm starcoder refact command-r codeshell minerva-7b", [DIGITS, GPT2]),
        ("default", [r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"]),
    ]
    for name in names.split()
}
GGUF_NFC = {"qwen2", "qwen35"}
GGUF_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}

PROPERTY = re.compile(r"\\[pP]\{\^?\w+\}|\\[sSdD]")
SURROGATES = slice(0xD800, 0xE000)  # code points that are no characters
N_CLASSES = 0x110000 + 256  # characters, and stray bytes, which are of U+FFFD's class


@cache
def all_characters() -> str:
    return "".join(map(chr, [*range(SURROGATES.start), *range(SURROGATES.stop, 0x110000)]))


@cache
def characters(expression: str) -> NDArray[np.bool_]:
    """(0x110000): whether an expression for one character matches it.

    The `tokenizers` library itself is asked, as Python's tables of Unicode may be older or newer.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    if expression == DIGITS:  # of the words, every other one is made of digits
        others = "".join(word for word, _ in pre_tokenizers.Digits().pre_tokenize_str(all_characters())[::2])
    else:
        others = normalizers.Replace(Regex(f"{expression}+"), "").normalize_str(all_characters())
    found = np.ones(0x110000, bool)
    found[np.frombuffer(others.encode("utf-32-le"), np.uint32)] = False
    found[SURROGATES] = found[-1] and PROPERTY.search(expression) is not None
    return found


@dataclass(frozen=True)
class Node:
    """Of a parsed regular expression."""

    type: str  # "set": a character, "all": parts in sequence, "any": of parts, "repeat": a part, "ahead": what follows
    parts: tuple[Node, ...] = ()
    expression: str = ""  # of a set, or what must follow
    least: int = 1  # of a repetition
    most: int | None = 1
    negative: bool = False  # of what follows: must not

    def optional(self) -> bool:
        return self.type == "repeat" and self.least == 0


class RegexParser:
    """Of the part of the language that pre-tokenizers are written in; raises ModelError for all else."""

    ESCAPED = r"\\[pP]\{\^?\w+\}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\[rntfvsSdD]|\\[^\w]"
    ATOM = re.compile(
        rf"{re.escape(DIGITS)}|\[(?:\^(?!\])|(?![\^\]]))(?:{ESCAPED}|[^\\\[\]&])+\]|{ESCAPED}|[^\\\[\](){{}}?*+|.^$]",
        re.DOTALL,
    )
    REPEAT = re.compile(r"([?*+])(\+?)|\{(\d+)(,?)(\d*)\}")

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def parse(self) -> Node:
        node = self.alternatives(False, whole=True)
        if self.at != len(self.text):
            self.refuse()
        return node

    def refuse(self) -> NoReturn:
        raise ModelError(f"a pre-tokenizer with an unknown pattern, from character {self.at} on: {self.text}")

    def taken(self, text: str) -> bool:
        found = self.text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def alternatives(self, any_case: bool, whole: bool = False) -> Node:
        """Parts between |; `whole`: nothing follows them."""
        parts = [self.sequence(any_case, whole)]
        while self.taken("|"):
            parts.append(self.sequence(any_case, whole))
        return Node("any", tuple(parts))

    def sequence(self, any_case: bool, whole: bool) -> Node:
        parts: list[Node] = []
        possessive: list[int] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            node = self.item(any_case)
            if repeat := self.REPEAT.match(self.text, self.at):
                self.at = repeat.end()
                sign, plus, least, comma, most = repeat.groups()
                if sign:
                    low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[sign]
                else:
                    low = int(least)
                    high = int(most) if most else None if comma else low
                if node.type == "ahead" or self.REPEAT.match(self.text, self.at) or (high or low) > 100:
                    self.refuse()
                if plus:
                    possessive.append(len(parts))
                node = Node("repeat", (node,), least=low, most=high)
            parts.append(node)
        # What keeps all it has taken is the same as what might give back, if that is of no use.
        for i in possessive:
            for other in parts[i + 1 :]:
                a, b = parts[i].parts[0], other.parts[0] if other.type == "repeat" else other
                if a.type != "set" or b.type != "set":
                    self.refuse()
                if np.any(characters(a.expression) & characters(b.expression)):
                    self.refuse()
                if not other.optional():
                    break
            else:
                if not whole:  # what follows the group may be what it would have to give back
                    self.refuse()
        return Node("all", tuple(parts))

    def item(self, any_case: bool) -> Node:
        for start in ("(?!", "(?="):
            if self.taken(start):
                inner = self.item(any_case)
                if inner.type != "set" or not self.taken(")"):
                    self.refuse()
                return Node("ahead", expression=inner.expression, negative=start == "(?!")
        if self.taken("$"):  # the end of a line or of the text
            return Node("ahead", expression=r"[^\n]", negative=True)
        for start in ("(?i:", "(?:", "("):
            if self.taken(start):
                if start == "(" and self.text.startswith("?", self.at):
                    self.refuse()
                inner = self.alternatives(any_case or "i" in start)
                if not self.taken(")"):
                    self.refuse()
                return inner
        atom = self.ATOM.match(self.text, self.at)
        if atom is None:
            self.refuse()
        if any_case and len(atom[0]) > 1:
            self.refuse()
        self.at = atom.end()
        return Node("set", expression=f"(?i:{atom[0]})" if any_case and atom[0].isalpha() else atom[0])


class Machine:
    """A regular expression as steps from state to state: what Perl's rules find, in one pass.

    The expression becomes a program of instructions, of which many are followed at a time, those that Perl would
    try first in front (Thompson 1968, Pike 1987). A state is a list of such places; what depends on the character
    that follows is decided when that is there, so a step tells whether a word ends before it.
    """

    def __init__(self, tree: Node, members: Mapping[str, tuple[bool, ...]]) -> None:
        self.members = members  # whether the class is in the set; class 0, the end of the text, is in none
        self.program: list[tuple[str, tuple[int, ...], Node | None]] = [("match", (), None)]
        self.start: tuple[int, ...] = (self.build(tree, 0),)

    def add(self, what: str, to: tuple[int, ...], node: Node | None = None) -> int:
        self.program.append((what, to, node))
        return len(self.program) - 1

    def build(self, node: Node, then: int) -> int:
        """Where the instructions start that match `node` and go on at `then`."""
        if node.type in ("set", "ahead"):
            return self.add(node.type, (then,), node)
        if node.type == "all":
            for part in reversed(node.parts):
                then = self.build(part, then)
            return then
        if node.type == "any":
            return self.add("split", tuple(self.build(part, then) for part in node.parts))
        (part,), at = node.parts, then
        if node.most is None:
            at = self.add("split", ())
            self.program[at] = ("split", (self.build(part, at), then), None)
        else:
            for _ in range(node.most - node.least):
                at = self.add("split", (self.build(part, at), then))
        for _ in range(node.least):
            at = self.build(part, at)
        return at

    def step(self, state: tuple[int, ...], kind: int) -> tuple[tuple[int, ...], bool]:
        """The state after a character of the class `kind`, and whether there was a match before it."""
        following: dict[int, None] = {}
        seen: set[int] = set()
        waiting = list(reversed(state))
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            what, to, node = self.program[at]
            if what == "match":
                return tuple(following), True
            inside = node is not None and self.members[node.expression][kind]
            if what == "split":
                waiting.extend(reversed(to))
            elif what == "ahead" and node is not None and inside != node.negative:
                waiting.append(to[0])
            elif what == "set" and inside:
                following[to[0]] = None
        return tuple(following), False


def words_at_spaces(tokens: Sequence[Token]) -> list[str]:
    """A word begins with its spaces, unless there is a token with a space after something else."""
    across = any(b" " in token.text.lstrip(b" ") for token in tokens if token.type == NORMAL)
    return [] if across else [" *[^ ]+| +"]


def machines(patterns: Sequence[str]) -> Machines:
    """The tables for several patterns: each cuts what the one before it has found, and what lies between."""
    if not patterns:
        return NO_MACHINES
    trees = [RegexParser(pattern).parse() for pattern in patterns]

    def sets(node: Node) -> Iterator[str]:
        yield from [node.expression] if node.expression else []
        for part in node.parts:
            yield from sets(part)

    # Characters that are in the same sets are of the same class; most are of class 1.
    names = sorted({name for tree in trees for name in sets(tree)})
    signature = np.stack([characters(name) for name in names], axis=1)
    packed = np.packbits(signature, axis=1)
    _, firsts, classes, counts = np.unique(
        packed, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(1, len(order) + 1)
    kinds = rank[classes.reshape(-1)]
    if len(order) > 255:
        raise ModelError(f"a pre-tokenizer that tells {len(order)} classes of characters apart")
    members = {name: (False, *signature[firsts[order], i].tolist()) for i, name in enumerate(names)}
    spread = kinds.astype(np.uint8).tobytes() + bytes([kinds[0xFFFD]]) * 256

    # State 0 is dead, then come the states in which the machines start.
    automata = [Machine(tree, members) for tree in trees]
    states: dict[tuple[int, tuple[int, ...]], int] = {(i, a.start): i + 1 for i, a in enumerate(automata)}
    steps: list[tuple[int, ...]] = [(0,) * (len(order) + 1)]
    for i, state in (todo := list(states)):
        row = []
        for kind in range(len(order) + 1):
            following, match = automata[i].step(state, kind)
            if following and (i, following) not in states:
                states[i, following] = len(states) + 1
                todo.append((i, following))
            row.append(2 * (states[i, following] if following else 0) + match)
        steps.append(tuple(row))
        if len(states) > 1 << 16:
            raise ModelError(f"a pre-tokenizer with too many states: {patterns}")
    return Machines(spread, tuple(steps), len(trees))


# ---- Hugging Face's tokenizer.json


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes: the printable ones of Latin-1 as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_token(name: str) -> Token:
    table = byte_of_character()
    if not name or any(c not in table for c in name):  # no text can become this
        return Token(name.encode(), UNUSED)
    return Token(bytes(table[c] for c in name), BYTE if len(name) == 1 else NORMAL)


def to_merges(
    named: Sequence[str | list[str]], ids: Mapping[str, int], tokens: Sequence[Token]
) -> tuple[Merge, ...]:
    """By the tokens' ids. Those that would make a control token of text are left out."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in named]
    try:
        merges = [Merge(ids[left], ids[right], ids[left + right]) for left, right in pairs]
    except (KeyError, ValueError):
        raise ModelError("a merge of tokens that are not in the vocabulary, or of other than two") from None
    last = {(merge.left, merge.right): i for i, merge in enumerate(merges)}  # of several the last one counts
    return tuple(merges[i] for i in sorted(last.values()) if tokens[merges[i].made].type != CONTROL)


class HuggingFace:
    """A tokenizer.json, and what stands beside it."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.json = Settings.read(path).values
        self.model = self.json["model"]
        if self.model.get("type", "BPE") != "BPE":
            found = self.model["type"]
            raise ModelError(f"a tokenizer.json with a model of type {found} (only BPE is supported)")
        self.vocab: dict[str, int] = dict(self.model["vocab"])
        self.added: list[dict[str, Any]] = list(self.json.get("added_tokens") or [])
        self.config = self.read("tokenizer_config.json")
        self.model_config = self.read("config.json")
        self.generation = self.read("generation_config.json")
        self.special_map = self.read("special_tokens_map.json")
        self.added_ids: dict[str, int] = {token["content"]: token["id"] for token in self.added}
        self.ids = self.vocab | self.added_ids

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return Settings.read(path).values if path.is_file() else {}

    def special(self) -> dict[str, str]:
        """bos_token, eos_token and so on, by their names."""
        found: dict[str, str] = {}
        for config in (self.special_map, self.config):
            for key, value in config.items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    found[key] = text
        return found

    def configured(self, key: str) -> list[int]:
        """Ids in the model's configuration that are added tokens: others are defaults that nobody has thought of."""
        found: list[Any] = []
        for config in (self.generation, self.model_config):
            value = config.get(key)
            found += value if isinstance(value, list) else [value]
        return [id for id in found if id in self.added_ids.values()]

    def stop_ids(self) -> list[int]:
        eos = self.ids.get(self.special().get("eos_token", ""))
        return list(dict.fromkeys([*([] if eos is None else [eos]), *self.configured("eos_token_id")]))

    def bos(self) -> tuple[int, bool]:
        """Its id, and whether a text begins with it."""
        bos = self.ids.get(self.special().get("bos_token", ""), -1)
        first: list[int] = []
        for processor in flattened(self.json.get("post_processor"), "processors"):
            if processor["type"] == "TemplateProcessing":
                for item in processor["single"]:
                    if "Sequence" in item:
                        break
                    first += processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            elif processor["type"] != "ByteLevel":
                raise ModelError(f"a tokenizer with an unknown post-processor: {json.dumps(processor)}")
        if len(first) > 1:
            raise ModelError(f"a tokenizer that begins a text with several tokens: {first}")
        add = self.config.get("add_bos_token")
        if first and add is not False:
            return first[0], True
        if bos < 0:
            bos = next(iter(self.configured("bos_token_id")), -1)
        return bos, add is True and bos >= 0

    def control(self) -> set[int]:
        """The ids of tokens that no text becomes."""
        special = {self.ids[name] for name in self.special().values() if name in self.ids}
        return special | set(self.stop_ids()) | {token["id"] for token in self.added if token.get("special")}

    def tokens(self, make: Callable[[str], Token]) -> list[Token]:
        if any(not isinstance(id, int) or not 0 <= id < 1 << 24 for id in self.ids.values()):
            raise ModelError("a tokenizer.json with an id out of range")
        size = max(self.ids.values(), default=-1) + 1
        sizes = [size, self.model_config.get("vocab_size")]  # a model may have more, for speed's sake
        tokens = [Token(b"", UNUSED)] * max(n for n in sizes if isinstance(n, int))
        for name, id in self.vocab.items():
            tokens[id] = make(name)
        control = self.control()
        for token in self.added:
            name, id = token["content"], token["id"]
            type = CONTROL if id in control else LATE if token.get("normalized") else USER_DEFINED
            strange = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
            if strange and type != CONTROL:  # it is not simply sought, the longest at each place of the text
                raise ModelError(f"the added token {name!r} is {strange[0]} (not supported)")
            if name:
                tokens[id] = Token(name.encode(), type)
        for id in control:
            if tokens[id].text:
                tokens[id] = tokens[id]._replace(type=CONTROL)
        return tokens

    def tokenizer(self) -> Tokenizer:
        model = self.model
        kinds = flattened(self.json.get("pre_tokenizer"), "pretokenizers")
        normalizers = flattened(self.json.get("normalizer"), "normalizers")
        if any(normalizer["type"] == "NFC" for normalizer in normalizers):
            note_nfc()
        normalizers = [normalizer for normalizer in normalizers if normalizer["type"] != "NFC"]
        byte_level = any(kind["type"] == "ByteLevel" for kind in kinds)
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ModelError(f"a tokenizer.json with {option} {model[option]!r} (not supported)")
        if byte_level:
            tokens = self.tokens(byte_level_token)
            patterns, spaces = self.byte_level(kinds, normalizers)
        else:
            tokens = self.tokens(self.piece)
            patterns, spaces = self.sentencepiece(kinds, normalizers, tokens)
        unk = self.ids.get(model.get("unk_token") or "", -1)
        if byte_level and unk >= 0 and model.get("fuse_unk") and sum(t.type == BYTE for t in tokens) < 256:
            raise ModelError("a byte-level tokenizer that lacks bytes and fuses unknown ones (not supported)")
        if not byte_level and unk >= 0:
            tokens[unk] = tokens[unk]._replace(type=UNKNOWN)
        bos, add_bos = self.bos()
        if unk in (bos, *self.stop_ids()):
            unk = -1  # an unknown byte is left out rather than the end of the text
        tokenizer = Tokenizer(
            tokens,
            bos_id=bos,
            unk_id=unk,
            stop_ids=tuple(self.stop_ids()),
            add_bos=add_bos,
            add_space=spaces in ("first", "always", "each"),
            space_anew=spaces in ("always", "each"),
            no_second_space=spaces in ("first", "always"),
            by_merges=True,
            whole_words=bool(model.get("ignore_merges")),
            kind=BYTE_LEVEL_BPE if byte_level else SENTENCEPIECE_BPE,
            merges=to_merges(model["merges"], self.vocab, tokens),
            machines=machines(patterns),
        )
        chatty = tokenizer.with_template(self.chat_template(), self.special(), self.added_ids)
        used = {item for piece in chatty.template.pieces for item in piece} if chatty.template else set()
        for token in self.added:
            if token["id"] in used and (token.get("lstrip") or token.get("rstrip")):
                say("note", f"no chat template is stored: {token['content']} takes spaces with it")
                return tokenizer
        return chatty

    def byte_level(self, kinds: list[Any], normalizers: list[Any]) -> tuple[list[str], str]:
        """The patterns that cut words, and where a space is put in front.

        That is at the "first" text, or "always", also after an added token, but not where there is a space; or
        before "each" text, even so.
        """
        if normalizers:
            raise ModelError(f"a tokenizer with an unknown normalizer: {json.dumps(normalizers[0])}")
        patterns = []
        space = False
        for kind in kinds:
            name = kind["type"]
            if name == "Digits":
                patterns.append(DIGITS if kind.get("individual_digits") else DIGITS + "+")
            elif name == "Split" and kind.get("behavior") == "Isolated" and not kind.get("invert"):
                pattern = kind["pattern"]
                patterns.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
            elif name == "ByteLevel" and not (kind.get("add_prefix_space", True) and patterns):
                space = bool(kind.get("add_prefix_space", True))
                patterns += [GPT2] if kind.get("use_regex", True) else []
            else:
                raise ModelError(f"a tokenizer with an unknown pre-tokenizer: {json.dumps(kind)}")
        return patterns, "always" if space else "never"

    def piece(self, name: str) -> Token:
        """Of a vocabulary like SentencePiece's."""
        type = token_type(name.encode())
        if type == BYTE and not self.model.get("byte_fallback"):
            type = UNUSED
        return Token(token_text(name.encode(), type), type)

    def sentencepiece(
        self, kinds: list[Any], normalizers: list[Any], tokens: list[Token]
    ) -> tuple[list[str], str]:
        """The same for a vocabulary that writes spaces as '▁'."""
        bar = "▁"
        spaces = "never"
        known = [
            {"type": "Prepend", "prepend": bar},
            {"type": "Replace", "pattern": {"String": " "}, "content": bar},
        ]
        if unknown := [normalizer for normalizer in normalizers if normalizer not in known]:
            raise ModelError(f"a tokenizer with an unknown normalizer: {json.dumps(unknown[0])}")
        if known[0] in normalizers:
            spaces = "each"
            if any(t.get("normalized") and not t.get("special") for t in self.added):
                raise ModelError("added tokens that are sought in text with a '▁' in front (not supported)")
        replaced, patterns = known[1] in normalizers, words_at_spaces(tokens)
        for kind in kinds:
            if kind["type"] == "Metaspace" and kind.get("replacement", bar) == bar and not replaced:
                replaced = True
                if spaces == "never":
                    before = "always" if kind.get("add_prefix_space", True) else "never"
                    spaces = kind.get("prepend_scheme", before)
                patterns = [" [^ ]*|[^ ]+"] if kind.get("split", True) else patterns
            elif not (kind["type"] == "Split" and kind["pattern"] == {"String": " "} and replaced):
                raise ModelError(f"a tokenizer with an unknown pre-tokenizer: {json.dumps(kind)}")
        if not replaced:
            raise ModelError("a tokenizer.json that is neither byte-level nor writes spaces as '▁'")
        if any(c in token.text for c in (b" ", bar.encode()) for token in tokens if token.type == LATE):
            raise ModelError("an added token with a space in it (not supported)")
        if not self.model.get("byte_fallback") and not self.model.get("fuse_unk"):
            raise ModelError("a tokenizer.json without byte_fallback and fuse_unk (not supported)")
        return patterns, spaces

    def chat_template(self) -> str | None:
        if (self.folder / "chat_template.jinja").is_file():
            return (self.folder / "chat_template.jinja").read_text("utf-8")
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several of them, by name
            found = next((t.get("template") for t in found if t.get("name") == "default"), None)
        return found if isinstance(found, str) else None


def flattened(step: Any, inside: str) -> list[Any]:
    """A step of the library's pipeline, or those that make up a sequence of them."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[inside] for inner in flattened(part, inside)]
    return [step]


# ---- chat templates


class TemplateError(Exception):
    """Why a chat template cannot be used."""


# Of turns, perhaps with a prompt for more, and a system text
Renderer = Callable[[list[str], bool, str | None], str]


def renderer(source: str, special: Mapping[str, str]) -> Renderer:
    """What makes one text of turns (the user's, an answer, the user's, ...), as transformers does."""
    from jinja2 import TemplateError as JinjaError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except JinjaError as error:
        raise TemplateError(str(error)) from None

    def render(turns: list[str], prompt: bool, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        try:
            return template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **special
            )
        except TemplateError:
            raise
        except Exception as error:  # noqa: BLE001 a template may do anything
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    return render


MARKS = ["zqsystemqz", "zquseraqz", "zqanswerbqz", "zquseradqz", "zqanswerfqz", "zquserghqz"]


def cut(text: str, marks: Sequence[str]) -> list[str]:
    """What lies before, between and after the marks."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise TemplateError("a text is left out, changed, or moved")
        pieces.append(before)
    if any(mark in piece for piece in [*pieces, text] for mark in MARKS):
        raise TemplateError("a text occurs twice, or out of turn")
    return [*pieces, text]


def find_template(source: str, special: Mapping[str, str], added: Mapping[str, int]) -> Template | None:
    """The plain pieces of a chat template, if it has any: if they give what it gives for several conversations."""
    try:
        render = renderer(source, special)
        system, *turns = MARKS
        before_user, after_user = cut(render(turns[:1], True, None), turns[:1])
        *_, tail = cut(render(turns[:2], False, None), turns[:2])
        _, whole, between, _ = cut(render(turns[:3], True, None), turns[:3])
        before_answer = whole.removeprefix(after_user)
        after_answer = tail if between.startswith(tail) else between
        next_user = between.removeprefix(after_answer)
        pieces = [before_user, "", "", after_user, before_answer, after_answer, next_user, "", "", ""]
        check_template(render, pieces, None)
        flags = 1
        try:
            pieces[1], pieces[2], _ = cut(render(turns[:1], True, system), MARKS[:2])
            check_template(render, pieces, system)
            flags |= 2
        except TemplateError as error:
            pieces[1] = pieces[2] = ""
            say("note", f"the chat template takes no system text: {error}")
        flags |= find_trimming(render, system if flags & 2 else None)
        if "strftime_now" in source:
            say("note", "the chat template holds today's date, which stays as it is")
        return Template(tuple(to_items(piece, added) for piece in pieces), flags)
    except TemplateError as error:
        say("note", f"no chat template is stored: {error}")
        return None


def find_trimming(render: Renderer, system: str | None) -> int:
    """Flags for the left and the right end of: the system text, the user's first text after it, others, answers."""
    flags = 0
    for bit in range(0 if system is not None else 4, 8):
        given = system if bit < 4 else None
        plain = render(MARKS[1:4], True, given)
        found = set()
        for place in ([0], [1], [1, 3], [2])[bit // 2]:  # in MARKS
            spaced = f"{MARKS[place]}\n " if bit % 2 else f" \n{MARKS[place]}"
            first, *turns = [spaced if i == place else mark for i, mark in enumerate(MARKS[:4])]
            text = render(turns, True, first if given else None)
            kept = text == plain.replace(MARKS[place], spaced) or bit >= 6  # whatever is done to an answer
            found.add("trimmed" if text == plain else "kept" if kept else "changed")
        if found == {"trimmed"}:
            flags |= 4 << bit
        elif found != {"kept"}:
            raise TemplateError("spaces around a text are treated in an unknown way")
    return flags


def check_template(render: Renderer, pieces: list[str], system: str | None) -> None:
    """Compares what the template makes of conversations with what the pieces do."""
    before_user, before_system, after_system, after_user, before_answer, after_answer, next_user = pieces[:7]
    for length in range(1, len(MARKS), 2):  # those that the user has the last word in
        text = before_user if system is None else before_system + system + after_system
        for i, turn in enumerate(MARKS[1 : length + 1]):
            before, after = (before_answer, after_answer) if i % 2 else (next_user if i else "", after_user)
            text += before + turn + after
        if render(MARKS[1 : length + 1], True, system) != text:
            raise TemplateError("it treats some turn of a conversation differently from others")


def to_items(text: str, added: Mapping[str, int]) -> Piece:
    """A text with the tokens that stand in it, the longest at each place."""
    if not added:
        return (text,) if text else ()
    names = sorted(added, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return tuple(added[part] if i % 2 else part for i, part in enumerate(parts) if part)


def read_tokenizer(path: Path) -> Tokenizer:
    """Recognises a tokenizer by its first bytes: llama2.c's begin with a small int32, protobuf with a tag."""
    try:
        if path.is_dir():
            return HuggingFace(path / "tokenizer.json").tokenizer()
        with open(path, "rb") as file:
            gguf = file.read(4) == b"GGUF"
        if gguf:
            return Tokenizer.from_gguf(Gguf(path).settings.values)
        data = path.read_bytes()
        if data.startswith(TOKENIZER_MAGIC):
            return Tokenizer.from_bytes(data)
        if data.lstrip()[:1] == b"{":
            return HuggingFace(path).tokenizer()
        if kind := known_format(data[:16]):
            raise ModelError(f"expected a tokenizer, found {kind}")
        if data[2:4] == b"\0\0":
            return Tokenizer.from_llama2c(data)
        if data[:1] == b"\n":
            return Tokenizer.from_sentencepiece(data)
        raise ModelError("not a tokenizer of a known format")
    except ModelError as error:
        raise ExportError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: a tokenizer of an unknown form ({error!r})") from None


def padded(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """With unused tokens at the end: embeddings may have a few rows more, for a round number (as Qwen's)."""
    missing = vocab_size - len(tokenizer.tokens)
    if not 0 < missing <= vocab_size // 16 or vocab_size % 64:
        return tokenizer
    say(
        "warning",
        f"the model has {vocab_size} tokens, the tokenizer {vocab_size - missing}: the others print nothing",
    )
    return replace(tokenizer, tokens=tokenizer.tokens + [Token(b"", UNUSED, 0.0)] * missing)


# ---------------------------------------------------------------------------------------------------------
# 8. Writing


def progress(what: str, total: int) -> tqdm[Any]:
    """A progress bar, where someone can see it."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when it is complete, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        # Long writes let the kernel keep the file in large pages, which are faster to read.
        with open(temporary, "wb", buffering=LONG_WRITE) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"{path}: cannot write: {error.strerror}") from None
    finally:
        with suppress(OSError):  # it has another name by now, or was never made
            temporary.unlink()


def tokenizer_path(path: Path) -> Path:
    """OUT.tokenizer.bin, where run.c looks for the tokenizer of OUT.bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".tokenizer.bin")


def write_model(
    path: Path, source: Source, tokenizer: Tokenizer, dtype: str = "auto", verify: bool = False
) -> str:
    """Writes OUT.bin as `path` and OUT.tokenizer.bin beside it; returns the dtype that was chosen.

    Raises ExportError, and leaves nothing behind, if one cannot be written or does not fit the other.
    """
    config = source.config
    tokenizer = padded(tokenizer, config.vocab_size)
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
            if verify:
                file.flush()
                compare(Path(file.name), source, dtype, tokenizer.vocab_hash)
    return dtype


def compare(path: Path, source: Source, dtype: str, vocab_hash: int) -> None:
    """Reads the weights file again, and makes it again from the source: all bits have to agree."""
    at = 0
    with open(path, "rb") as file, progress("verifying", file_size(source.config)) as bar:
        for chunk in ahead(contents(source, dtype, vocab_hash)):
            if file.read(len(chunk)) != chunk:
                raise ExportError(f"{path}: differs from its source between bytes {at} and {at + len(chunk)}")
            at += len(chunk)
            bar.update(len(chunk))
        if file.read(1):
            raise ExportError(f"{path}: expected {at} bytes, found more")


def contents(source: Source, dtype: str, vocab_hash: int) -> Iterator[bytes | memoryview]:
    """The weights file, from its first byte to its last."""
    end = TENSORS_START
    yield header(source.config, dtype, vocab_hash)
    for start, parts in layout(source.config):
        yield bytes(start - end)
        for part in parts:
            size = 0
            for piece in source.pieces(part):
                yield encode(piece, dtype, part.name).data.cast("B")
                size += piece.size
            if size != part.size:
                raise ModelError(f"tensor {part.name}: expected {part.size} elements, found {size}")
        end = start + 2 * sum(part.size for part in parts)


def ahead(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks; another thread makes the next while this one is written."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = worker.submit(next, chunks, None)
            yield chunk


# ---------------------------------------------------------------------------------------------------------
# 9. The command line


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


def context_length(source: Source, wanted: int | None) -> int:
    """run.c lets a token see all before it, so it has to stop where a sliding window would begin to slide."""
    length = wanted or source.config.max_seq_len
    if source.window is None or length <= source.window:
        return length
    cut = f"the context is cut from {length} to {source.window} positions"
    say("warning", f"{cut}, the sliding window of the attention: within it, results are exact")
    return source.window


def tokenizer_file(source: Source, wanted: Path | None) -> Path:
    found = wanted or source.tokenizer_file
    if found is None:
        size = source.config.vocab_size
        names = "tokenizer.json or tokenizer.model"
        raise ExportError(f"no tokenizer of {size} tokens ({names}) at hand, use --tokenizer FILE")
    return found


def inputs(source: Source, *names: str | Path | None) -> list[str | Path]:
    """The files that are read, or that lie beside them."""
    found: list[str | Path] = [name for name in names if name is not None]
    found += [file for name in found if os.path.isdir(name) for file in Path(name).iterdir()]
    if isinstance(source, Checkpoint):  # of which a GGUF file may have more
        found += {tensor.path for tensor in source.tensors.values()}
    return found


def export(args: argparse.Namespace) -> None:
    source = open_source(args.source, args.layers, args.seed, args.dtype)
    if args.lora:
        if not isinstance(source, Checkpoint):
            raise UsageError("--lora is for checkpoints")
        source = with_adapter(source, args.lora)
    source.config = replace(source.config, max_seq_len=context_length(source, args.max_seq_len))
    tokenizer = tokenizer_file(source, args.tokenizer)
    path = args.output.resolve()
    check_outputs(path, tokenizer, *inputs(source, args.source, args.lora))
    with about(args.source):
        dtype = write_model(path, source, read_tokenizer(tokenizer), args.dtype, args.verify)
    verified = ", verified" if args.verify else ""
    print(f"{args.output}: {dtype}, {file_size(source.config) / 1e6:,.1f} MB{verified}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser("export.py", description="Makes the two files of a model for run.c.")
    sources = f"Hugging Face or Meta directory, .gguf, llama2.c .bin, or random:{{{','.join(SHAPES)}}}"
    parser.add_argument("source", metavar="SOURCE", help=sources)
    parser.add_argument("-o", dest="output", metavar="OUT.bin", type=Path, required=True)
    kinds = "llama2.c's .bin, SentencePiece .model, tokenizer.json or its folder, or one made by this program"
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help=kinds)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights")
    parser.add_argument("--lora", metavar="DIR", type=Path, help="PEFT adapter to merge into the weights")
    parser.add_argument(
        "--verify", action="store_true", help="read the result again, compare with the source"
    )
    parser.add_argument("--layers", metavar="N", type=positive, help="fewer layers, for random:SHAPE")
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="for random:SHAPE")
    parser.add_argument("--max-seq-len", metavar="N", type=positive, help="instead of the checkpoint's")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # an end like any other, so that no half a file is left
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        export(args)
    except UsageError as error:
        parser.error(str(error))
    except ExportError as error:
        say("error", error)
    except ImportError as error:
        say("error", f"{error} (pip install -r requirements.txt)")
    except OSError as error:
        say("error", f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
