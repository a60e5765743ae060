#!/usr/bin/env python3
"""Turns a checkpoint into the two files that run.c reads: OUT.bin (weights) and OUT.tokenizer.bin.

    export.py SOURCE -o OUT.bin [--tokenizer FILE] [--dtype auto|bf16|f16] [--lora DIR] [--verify] ...

`export.py --help` explains every kind of SOURCE; models/FORMAT.md documents both output files.

Sections, in the order in which data passes through them: 1. errors and kinds of files, 2. the model's
configuration, 3. the layout of the weights file, 4. tensors that are read piece by piece, 5. file formats,
6. checkpoints, 7. tokenizers, 8. pre-tokenizers, 9. chat templates, 10. writing, 11. the command line. A model is
never held in memory: tensors are read, converted and written in small pieces. Everything is little-endian.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"export.py: error: expected Python 3.11 or newer, found {sys.version.split()[0]}")

import argparse
import base64
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import astuple, dataclass, fields, replace
from datetime import datetime
from functools import cache, cached_property
from importlib.metadata import version
from itertools import accumulate, chain, pairwise
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]  # the standard library's parser of regular expressions
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

try:
    import ml_dtypes
    import numpy as np
    from numpy.typing import NDArray
    from safetensors import safe_open
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"export.py: error: {error} (pip install -r requirements.txt)")

Array = NDArray[Any]
T = TypeVar("T")

LLAMA2_TOKENIZER = Path(__file__).with_name("tokenizer.bin")  # in the same directory as this program

WRITE_BUFFER = 16 << 20  # bytes, see atomic()
PIECE = 1 << 19  # elements that are processed at a time; few enough to stay in the CPU's cache


# ---------------------------------------------------------------------------------------------------------
# 1. Errors and kinds of files


class ExportError(Exception):
    """A message for the user, in one line; `about` is the file or model at fault, once it is known."""

    def __init__(self, message: str, about: object = None) -> None:
        super().__init__(message)
        self.about = about

    def __str__(self) -> str:
        return f"{self.about}: {self.args[0]}" if self.about else str(self.args[0])


@contextmanager
def naming(about: object) -> Iterator[None]:
    """Turns errors in the block, even those of libraries, into ExportErrors that name their file, else `about`."""
    try:
        yield
    except ExportError as error:
        error.about = error.about or about
        raise
    except ImportError:  # exit_status() says how to install the package
        raise
    except OSError as error:
        message = error.strerror or str(error)
        raise ExportError(message, error.filename or about) from None
    except MemoryError:
        raise ExportError(BEYOND, about) from None
    except Exception as error:  # noqa: BLE001
        message = str(error).strip().partition("\n")[0]
        words = f"damaged, or in a form that is not supported ({type(error).__name__}: {message})"
        raise ExportError(words, about) from None


READ_SECONDS, READ_BYTES = 20, 800 << 20  # limits on CPU time and on memory, see limited()
BEYOND = f"takes more than {READ_SECONDS} s or {READ_BYTES >> 20} MB to read (--no-limits, if you trust it)"


def limited(work: Callable[[], T], room: int = 0) -> T:
    """Calls `work` in a child process that may take READ_SECONDS, and READ_BYTES + `room` of memory.

    A hostile template, regular expression, archive or count could make a library run or allocate without end.
    """
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    result: T

    def child() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # discards what libraries print when they abort
        resource.setrlimit(resource.RLIMIT_CPU, (READ_SECONDS, READ_SECONDS))
        with suppress(OSError):  # only Linux has this file; its sixth field is the memory for data, in pages
            pages = int(Path("/proc/self/statm").read_text().split()[5])
            memory = pages * resource.getpagesize() + READ_BYTES + room
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        with suppress(MemoryError), redirect_stderr(io.StringIO()) as said:
            try:
                sender.send((work(), None, said.getvalue()))
            except (ExportError, ImportError) as error:
                sender.send((None, error, said.getvalue()))

    process = forking.Process(target=child)
    process.start()
    sender.close()
    try:
        result, error, said = receiver.recv()
    except EOFError:
        raise ExportError(BEYOND) from None
    finally:
        process.kill()
        process.join()
    print(said, end="", file=sys.stderr)
    if error:
        raise error
    return result


def say(kind: str, message: object) -> None:
    """Prints one line to standard error; characters that cannot be printed are escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)[:1000])
    print(f"export.py: {kind}: {text}", file=sys.stderr)


MAGIC, VERSION = b"twofiles", 1  # MAGIC begins OUT.bin, TOKENIZER_MAGIC OUT.tokenizer.bin
TOKENIZER_MAGIC, TOKENIZER_VERSION = b"twotoken", 3

FILE_KINDS = [  # (pattern of the first bytes, description)
    (rb"\Z", "an empty file"),
    (rb"version https://git-lfs", "a Git LFS pointer instead of the file (run `git lfs pull`)"),
    (rb"GGUF\0\0\0|FUGG", "a big-endian GGUF file (convert the model again without --bigendian)"),
    (rb"GGUF", "a GGUF file"),
    (rb"lmgg|fmgg|tjgg|algg", "a GGML file, older than GGUF (convert the original model to GGUF)"),
    (re.escape(MAGIC), "a weights file of this program"),
    (re.escape(TOKENIZER_MAGIC), "a tokenizer file of this program"),
    (rb"24ka", "a llama2.c model of version 1 or later (export it with --version 0)"),
    (rb".{7}\0\{", "a safetensors file"),
    (rb"PK\x03\x04", "a zip archive, as written by PyTorch or Keras"),
    (rb"\x80[\x02-\x05]", "a pickle, as written by PyTorch before 1.6"),
    (rb"\x89HDF\r\n", "an HDF5 file, as written by Keras or TensorFlow"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x08[\x01-\x20][\x12\x1a\x3a\x42].", "an ONNX model"),
    (rb".{4}TFL3", "a TensorFlow Lite model"),
    (rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh|7z\xbc\xaf|Rar!", "a compressed archive (unpack it)"),
    (rb".{257}ustar", "a tar archive (unpack it)"),
    (rb"%PDF|\x89PNG|\xff\xd8\xff", "a document or an image"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page instead of the file (the download failed)"),
    (rb"\s*\{\s*\"config\":\s*\{\s*\"pattern\"", "a tekken vocabulary, as written by Mistral"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[}\]]", "a JSON file"),
    (rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", "a tiktoken vocabulary"),
    (rb"\n.\n", "a SentencePiece model"),
    (rb"[\t\n\r -~]{16,}", "a text file"),
]


def kind_of(path: Path) -> str | None:
    """Tells what a file is by its first bytes; None if they are unknown, as with llama2.c's files."""
    if path.exists() and not path.is_file():  # a device may have no end, and a pipe may make us wait forever
        raise ExportError("expected a regular file, found another kind", path)
    with open(path, "rb") as file:
        start = file.read(512)
    for pattern, kind in FILE_KINDS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return f"{kind}: {start[:40].decode(errors='replace')!r}" if kind == "a text file" else kind
    return None


def expect(path: Path, *kinds: str) -> None:
    """Refuses a file that is known to be of another kind, because a parser's message would be less clear."""
    found = kind_of(path)
    if found is not None and not found.startswith(kinds):
        raise ExportError(f"expected {' or '.join(kinds)}, found {found}", path)


# ---- settings, which come as JSON or as the metadata of a GGUF file

Settings = Mapping[str, Any]
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}
TYPES[list] = "a list"


def read_json(path: Path) -> dict[str, Any]:
    with naming(path):
        kind = kind_of(path)
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            found = error if kind in (None, "a JSON file") else kind
            raise ExportError(f"expected JSON, found {found}") from None
        if not isinstance(values, dict):
            raise ExportError(f"expected a JSON object, found {values!r:.40}")
        return values


def read_text(path: Path) -> str:
    kind_of(path)  # refuses all but regular files
    return path.read_text("utf-8")


def setting(s: Settings, key: str, kind: type, *default: Any) -> Any:
    """The setting `key`, which must be of the type `kind` (a float may be an int); null counts as absent."""
    value = s.get(key)
    if value is None:
        if not default:
            raise ExportError(f"{key} is missing")
        return default[0]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ExportError(f"{key}: expected {TYPES[kind]}, found {value!r:.40}")
    return value


def known_setting(s: Settings, key: str, known: Sequence[Any], *default: Any) -> Any:
    """A setting for which run.c supports only the values in `known`."""
    value = setting(s, key, type(known[0]), *default)
    if value not in known:
        expected = ", ".join(map(str, known))
        raise ExportError(f"{key}: expected {expected}, found {value!r}")
    return value


def refuse(s: Settings, *keys: str) -> None:
    """Refuses settings that run.c does not implement, unless they are absent, null, 0, false or empty."""
    for key in keys:
        if s.get(key):
            raise ExportError(f"{key} is not supported, found {s[key]!r:.60}")


def ids_in(s: Settings, key: str) -> tuple[int, ...]:
    """One token id, or a list of them, or none."""
    value = s.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(id) is not int for id in ids):
        raise ExportError(f"{key}: expected a token id or a list of them, found {value!r:.40}")
    return tuple(ids)


# ---------------------------------------------------------------------------------------------------------
# 2. Configuration


@dataclass(frozen=True)
class Config:
    """The shape of a Llama-like model. The fields before `tied` have the order of the file's header."""

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
    rope_scaling: int = 0  # 0 none, 1 linear, 2 llama3; the next four are 0 if they are not used
    rope_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_max_seq_len: int = 0
    tied: bool = False  # the embedding is also the classifier, lm_head
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Checks what the layout of the file and RoPE need; run.c has more limits, such as for memory."""
        limits: dict[str, tuple[float, float]] = dict.fromkeys(list(vars(self))[:7], (1, 1 << 24))  # dim to vocab_size
        limits |= {"max_seq_len": (1, 1 << 28), "norm_eps": (0, 1), "rope_theta": (1, 1e38)}
        if self.rope_scaling:
            limits["rope_factor"] = (1, 1e38)
        if self.rope_scaling == 2:
            limits["rope_low_freq_factor"] = (1e-37, 1e6)
            limits["rope_high_freq_factor"] = (self.rope_low_freq_factor * 1.01, 1e7)
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ExportError(f"{name}: expected {low:.10g} to {high:.10g}, found {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ExportError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ExportError(f"head_dim is {self.head_dim}, expected an even number")

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim


# ---------------------------------------------------------------------------------------------------------
# 3. The layout of the weights file

HEADER = struct.Struct("<8s11I2fI3fI2Q")  # 96 bytes, then zeros up to TENSORS_START
TENSORS_START = 4096
ALIGNMENT = 64


class Spec(NamedTuple):
    """A tensor that is needed: its Hugging Face name, and its shape, (out, in) or (elements,)."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def file_order(c: Config) -> Iterator[list[Spec]]:
    """The tensors of the weights file, in its order; several specs are stacked by rows into one tensor.

    So run.c computes q, k and v with one matrix product; likewise gate and up.
    """
    yield [Spec("model.embed_tokens.weight", (c.vocab_size, c.dim))]
    for layer in range(c.n_layers):
        attention = f"model.layers.{layer}.self_attn"
        mlp = f"model.layers.{layer}.mlp"
        qkv = [("q", c.q_dim), ("k", c.kv_dim), ("v", c.kv_dim)]
        yield [Spec(f"model.layers.{layer}.input_layernorm.weight", (c.dim,))]
        yield [Spec(f"{attention}.{x}_proj.weight", (rows, c.dim)) for x, rows in qkv]
        if c.qkv_bias:
            yield [Spec(f"{attention}.{x}_proj.bias", (rows,)) for x, rows in qkv]
        if c.qk_norm:
            yield [Spec(f"{attention}.q_norm.weight", (c.head_dim,))]
            yield [Spec(f"{attention}.k_norm.weight", (c.head_dim,))]
        yield [Spec(f"{attention}.o_proj.weight", (c.dim, c.q_dim))]
        yield [Spec(f"model.layers.{layer}.post_attention_layernorm.weight", (c.dim,))]
        yield [Spec(f"{mlp}.{x}_proj.weight", (c.hidden_dim, c.dim)) for x in ("gate", "up")]
        yield [Spec(f"{mlp}.down_proj.weight", (c.dim, c.hidden_dim))]
    yield [Spec("model.norm.weight", (c.dim,))]
    if not c.tied:
        yield [Spec("lm_head.weight", (c.vocab_size, c.dim))]


def specs_of(config: Config) -> Iterator[Spec]:
    return chain.from_iterable(file_order(config))


def layout(config: Config) -> Iterator[tuple[int, list[Spec]]]:
    """(byte offset in the file, specs) of each tensor."""
    offset = TENSORS_START
    for specs in file_order(config):
        offset += -offset % ALIGNMENT
        yield offset, specs
        offset += 2 * sum(spec.size for spec in specs)


def file_size(config: Config) -> int:
    """The size of the weights file in bytes; it ends with its last tensor."""
    *_, (offset, specs) = layout(config)
    return offset + 2 * sum(spec.size for spec in specs)


def header(c: Config, dtype: str, vocab_hash: int) -> bytes:
    """The first 4096 bytes of the weights file."""
    *numbers, tied, qkv_bias, qk_norm = astuple(c)
    flags = tied | qkv_bias << 1 | qk_norm << 2
    code = list(DTYPES).index(dtype) + 1
    packed = HEADER.pack(MAGIC, VERSION, code, flags, *numbers, file_size(c), vocab_hash)
    return packed.ljust(TENSORS_START, b"\0")


# ---------------------------------------------------------------------------------------------------------
# 4. Tensors that are read piece by piece

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}  # of the weights file
LARGEST = {"bf16": float.fromhex("0x1.fep127"), "f16": 65504.0}  # finite number
STORED = {  # types that can be read, by safetensors' names
    "BF16": DTYPES["bf16"],
    "F16": DTYPES["f16"],
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def widened(piece: Array) -> NDArray[np.float32]:
    return piece.astype(np.float32, copy=False)


def largest_magnitude(piece: Array, name: str) -> float:
    largest = float(np.abs(widened(piece)).max())
    if not math.isfinite(largest):
        raise ExportError(f"tensor {name}: expected finite values, found {largest}")
    return largest


def encode(piece: Array, dtype: str, name: str) -> Array:
    """Converts a piece of the tensor `name`, rounds to nearest even, and checks that all of it is finite."""
    kind = DTYPES[dtype]
    if piece.dtype == kind:
        bits = piece.view(np.uint16) & 0x7FFF  # without the sign; infinity and NaN are the largest
        if bits.max() >= np.array(np.inf, kind).view(np.uint16):
            largest_magnitude(piece, name)  # raises an error
        return piece
    largest = largest_magnitude(piece, name)
    if largest > LARGEST[dtype]:
        expected = f"expected values up to {LARGEST[dtype]:g} for {dtype}"
        raise ExportError(f"tensor {name}: {expected}, found {largest:g} (another --dtype may work)")
    return widened(piece).astype(kind)


Rows = Callable[[int, int], Array]  # rows(start, stop) of a matrix; a vector's rows are its elements


class Tensor(NamedTuple):
    """A tensor in a file, which is read only when rows of it are asked for."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # of STORED, or a type that cannot be read
    rows: Rows
    unit: int = 1  # `start` and `stop` of rows() must be multiples of this

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows of each piece."""
        height, *rest = self.shape
        step = max(1, PIECE // max(1, self.unit * math.prod(rest))) * self.unit
        for start in range(0, height, step):
            yield start, min(start + step, height)

    def pieces(self) -> Iterator[Array]:
        return (self.rows(*span) for span in self.spans())

    def whole(self) -> NDArray[np.float32]:
        return widened(self.rows(0, self.shape[0]))


def in_memory(array: Array) -> Tensor:
    """A tensor of an array; used by other programs."""
    dtype = next(name for name, kind in STORED.items() if kind == array.dtype)
    return Tensor(Path("memory"), array.shape, dtype, lambda a, b: np.ascontiguousarray(array[a:b]))


def in_file(path: Path, offset: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> Rows:
    """A function that reads rows of an array, which lies in a file from `offset` on, row after row."""
    width = math.prod(shape[1:]) * kind.itemsize

    def rows(start: int, stop: int) -> Array:
        found = np.fromfile(path, np.uint8, (stop - start) * width, offset=offset + start * width)
        if found.size != (stop - start) * width:
            raise ExportError("ends within a tensor: incomplete or damaged", path)
        return found.view(kind).reshape(-1, *shape[1:])

    return rows


def stored(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor in a file; one of another type than STORED's passes as bytes, and Model refuses it if it is needed."""
    return Tensor(path, shape, dtype, in_file(path, offset, shape, STORED.get(dtype, np.dtype(np.uint8))))


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorders each head's rows from Meta's RoPE pairs (2i, 2i + 1) to Hugging Face's (i, i + head_dim / 2)."""

    def rows(start: int, stop: int) -> Array:
        x = tensor.rows(start, stop)
        pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(x.shape)

    return tensor._replace(rows=rows, unit=head_dim)


def concatenated(shards: list[Tensor], axis: int) -> Tensor:
    """Joins shards of the same shape by rows (axis 0) or by columns (axis 1)."""
    height, *width = shards[0].shape
    *firsts, total = accumulate((shard.shape[axis] for shard in shards), initial=0)

    def rows(start: int, stop: int) -> Array:
        if axis == 1:
            return np.concatenate([shard.rows(start, stop) for shard in shards], axis=1)
        spans = [np.clip((start - first, stop - first), 0, height) for first in firsts]
        return np.concatenate([shard.rows(*span) for shard, span in zip(shards, spans, strict=True)])

    return shards[0]._replace(shape=(height, total) if axis == 1 else (total, *width), rows=rows)


# Tensors to leave out, because run.c computes them itself: RoPE's angles and masks of attention
BUFFER = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|rope\.freqs)")


@dataclass
class Model:
    """A checkpoint: its tensors by Hugging Face's names, all that the configuration needs and no others of effect."""

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    stop_ids: tuple[int, ...] = ()  # tokens that end a text, in addition to the tokenizer's own
    window: int | None = None  # how many positions attention looks back; None: all
    tokenizer_file: Path | None = None  # the checkpoint's own tokenizer, a file or a folder

    def __post_init__(self) -> None:
        others = dict(self.tensors)
        for name, shape in specs_of(self.config):
            tensor = others.pop(name, None)
            if tensor is None:
                raise ExportError(f"the tensor {name} of the shape {shape} is missing", self.path)
            if tensor.dtype not in STORED:
                found = f"expected the type {', '.join(STORED)}, found {tensor.dtype}"
                raise ExportError(f"tensor {name}: {found}", tensor.path)
            if tensor.shape != shape:
                raise ExportError(f"tensor {name}: expected the shape {shape}, found {tensor.shape}", tensor.path)
        for name, tensor in others.items():
            is_bias = name.endswith(".bias") and tensor.shape and tensor.dtype in STORED  # zeros have no effect
            zeros = is_bias and not any(map(np.any, tensor.pieces()))
            if not zeros and not BUFFER.fullmatch(name):
                raise ExportError(f"the tensor {name} is not supported", tensor.path)

    def dtype(self) -> str:
        """The type, of STORED, that most of the model's elements have."""
        sizes: Counter[str] = Counter()
        for spec in specs_of(self.config):
            sizes[self.tensors[spec.name].dtype] += spec.size
        return sizes.most_common(1)[0][0]


def choose_dtype(model: Model) -> str:
    """16-bit types stay; others become bf16 if that is exact, else f16 (more precise) if the values fit, else bf16."""
    stored_as = model.dtype()
    if stored_as.lower() in DTYPES:
        return stored_as.lower()
    exact, largest = True, 0.0
    with progress("reading", file_size(model.config) - TENSORS_START) as bar:
        for spec in specs_of(model.config):
            for piece in model.tensors[spec.name].pieces():
                x = widened(piece)
                largest = max(largest, largest_magnitude(x, spec.name))
                exact = exact and not np.any(x.view(np.uint32) & 0xFFFF)  # bf16 is the upper half
                bar.update(2 * x.size)
    return "bf16" if exact or largest > LARGEST["f16"] else "f16"


# ---------------------------------------------------------------------------------------------------------
# 5. Formats of files


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A length in 8 bytes, a JSON object of this length, and the tensors.

    The safetensors library is used only to check the header: it maps the file, which would count as memory in use.
    """
    expect(path, "a safetensors file")
    with naming(path), safe_open(path, "numpy"):
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: stored(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in entries.items()
    }


def read_torch(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors that torch.save() has written; its pickle may call only what makes tensors."""
    expect(path, "a zip archive", "a pickle")
    try:
        import torch
    except ImportError as error:
        hint = "pip install torch, or take the model's .safetensors or .gguf files"
        raise ExportError(f"reading PyTorch files requires torch: {error} ({hint})", path) from None
    in_zip = zipfile.is_zipfile(path)
    with naming(path):
        try:
            found = torch.load(path, map_location="cpu", mmap=in_zip, weights_only=True)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                raise
            raise ExportError(f"expected only tensors in its pickle, found {asked[1]}, which could run code") from None
        if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
            raise ExportError("expected a dictionary of tensors in its pickle, found something else")
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        # a stride of 0 makes a large tensor of a tiny storage; tensors that share one stay below 4 times
        if size > 4 * path.stat().st_size:
            raise ExportError(f"a damaged PyTorch file: its tensors would take {size} bytes, more than 4 times its own")
        if in_zip:
            check_records(path, found.values())
    return {str(name): tensor_of_torch(path, tensor.detach()) for name, tensor in found.items()}


def check_records(path: Path, tensors: Iterable[Any]) -> None:
    """Checks that no record is too short: torch.load(mmap=True) reads past its end without an error."""
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if re.search(r"/data/\d+$", info.filename)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    sizes = [info.file_size for info in sorted(records, key=lambda info: info.header_offset)]
    compressed = any(info.compress_type != zipfile.ZIP_STORED for info in records)
    if compressed or [n for n in sizes if n] != [n for _, n in sorted(storages.items()) if n]:
        raise ExportError("a damaged PyTorch file: expected records as long as its tensors, found others")


def tensor_of_torch(path: Path, tensor: Any) -> Tensor:
    """A tensor of any strides, so perhaps transposed. torch converts no bfloat16 to numpy, so its bytes are viewed."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    dtype = next((key for key, kind in STORED.items() if kind.name == name), name)

    def rows(start: int, stop: int) -> Array:
        part = tensor[start:stop].contiguous()
        return np.asarray(part.view(torch.uint8).numpy()).view(name).reshape(part.shape)

    return Tensor(path, tuple(tensor.shape), dtype, rows)


# types of metadata, and what struct calls them
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata of a GGUF file, and its tensors by their GGUF names.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf.GGUFReader is not used: it makes two
    numpy objects of every string, which takes 8 seconds and 600 MB for Llama 3's vocabulary.
    """
    expect(path, "a GGUF file")
    size = path.stat().st_size

    def read(n: int) -> bytes:
        data = file.read(n) if n <= size else b""
        if len(data) != n:
            raise ExportError("ends within its header, or a length in the header is wrong")
        return data

    def unpack(form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, read(struct.calcsize("<" + form)))

    def string() -> str:
        return read(*unpack("Q")).decode(errors="surrogateescape")

    def value(kind: int) -> Any:
        if kind == GGUF_STRING:
            return string()
        if kind in GGUF_NUMBERS:
            return unpack(GGUF_NUMBERS[kind])[0]
        if kind != GGUF_ARRAY:
            raise ExportError(f"metadata: expected types from 0 to 12, found {kind}")
        element, count = unpack("IQ")
        if element in GGUF_NUMBERS:
            return list(unpack(f"{count}{GGUF_NUMBERS[element]}"))
        return [value(element) for _ in range(count)]

    with naming(path), open(path, "rb") as file:
        magic, version, n_tensors, n_fields = unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ExportError(f"expected GGUF of version 2 or 3, found {magic!r}, {version}")
        metadata = {string(): value(*unpack("I")) for _ in range(n_fields)}
        # name, shape (the innermost dimension first), type, byte offset
        entries = [(string(), unpack(f"{unpack('I')[0]}Q"), *unpack("IQ")) for _ in range(n_tensors)]
        alignment = setting(metadata, "general.alignment", int, 32)
        if alignment < 1:
            raise ExportError(f"general.alignment: expected 1 or more, found {alignment}")
        start = -(-file.tell() // alignment) * alignment
        found = {}
        for name, shape, kind, at in entries:
            found[name], end = gguf_tensor(path, start + at, shape[::-1], kind, name)
            if end > size:
                raise ExportError(f"tensor {name} ends at byte {end}, but the file at {size}: incomplete or damaged")
    return metadata, found


def gguf_tensor(path: Path, offset: int, shape: tuple[int, ...], kind: int, name: str) -> tuple[Tensor, int]:
    """The tensor, dequantised to float32 if it is quantised, and the byte in the file where it ends."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        form = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[form]
        if form.name in STORED:
            return stored(path, offset, shape, form.name), offset + math.prod(shape) * block_bytes
        dequantize(np.zeros((1, block_bytes), np.uint8), form)  # fails for what the package cannot read
    except (ValueError, KeyError, NotImplementedError):
        raise ExportError(f"tensor {name}: GGML type {kind} is not supported") from None
    if len(shape) != 2 or shape[1] % block:
        raise ExportError(f"tensor {name}: expected a matrix with a multiple of {block} columns, found {shape}")
    row_bytes = shape[1] // block * block_bytes
    packed = in_file(path, offset, (shape[0], row_bytes), np.dtype(np.uint8))
    tensor = Tensor(path, shape, "F32", lambda start, stop: dequantize(packed(start, stop), form))
    return tensor, offset + shape[0] * row_bytes


# ---------------------------------------------------------------------------------------------------------
# 6. Checkpoints: Hugging Face, Meta, GGUF, llama2.c, LoRA adapters

HUGGING_FACE, META, GGUF = range(3)  # columns of SETTINGS
SETTINGS = {  # a field of Config: its name in Hugging Face's, Meta's and GGUF's settings
    "dim": ("hidden_size", "dim", "embedding_length"),
    "hidden_dim": ("intermediate_size", "hidden_dim", "feed_forward_length"),
    "n_layers": ("num_hidden_layers", "n_layers", "block_count"),
    "n_heads": ("num_attention_heads", "n_heads", "attention.head_count"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "head_dim", "attention.key_length"),
    "vocab_size": ("vocab_size", "vocab_size", ""),  # llama.cpp counts the tokens
    "max_seq_len": ("max_position_embeddings", "max_seq_len", "context_length"),
    "norm_eps": ("rms_norm_eps", "norm_eps", "attention.layer_norm_rms_epsilon"),
}


def config_of(source: int, s: Settings, found: dict[str, Tensor], **others: Any) -> Config:
    """The configuration from settings and the tensors' shapes; `others` are fields that the caller knows.

    Settings take precedence over `others`, and these over shapes; Model checks that the tensors fit the result.
    """
    layer = "model.layers.0."
    rows, dim, *_ = shape_of(found, "model.embed_tokens.weight")
    hidden_dim = shape_of(found, f"{layer}mlp.gate_proj.weight")[0]
    values: dict[str, Any] = {"vocab_size": rows, "dim": dim, "hidden_dim": hidden_dim}
    values["qkv_bias"] = f"{layer}self_attn.q_proj.bias" in found
    values["qk_norm"] = f"{layer}self_attn.q_norm.weight" in found
    values["tied"] = "lm_head.weight" not in found
    values |= others
    for field, keys in SETTINGS.items():
        default = [None] if field in values or field in ("n_kv_heads", "head_dim") else []
        value = setting(s, keys[source], float if field == "norm_eps" else int, *default)
        unset = field == "vocab_size" and value == -1  # in Meta's params.json: as the tokenizer has it
        if value is not None and not unset:
            values[field] = value
    if "head_dim" not in values:
        dim, n_heads = values["dim"], values["n_heads"]
        if n_heads < 1 or dim % n_heads:
            raise ExportError(f"dim {dim} is not a multiple of n_heads {n_heads}")
        values["head_dim"] = dim // n_heads
    if "n_kv_heads" not in values:
        rows = shape_of(found, f"{layer}self_attn.k_proj.weight")[0]
        values["n_kv_heads"] = max(1, rows // max(1, values["head_dim"]))
    return Config(**values)


def shape_of(found: dict[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor that is needed, with two zeros appended, so that a vector, too, has a second number."""
    if name not in found:
        raise ExportError(f"the tensor {name} is missing")
    return (*found[name].shape, 0, 0)


FAMILIES = {  # model types that run.c computes, with transformers' defaults for settings that are absent
    "llama": {"max_seq_len": 2048},
    "mistral": {"max_seq_len": 131072},
    "qwen2": {"max_seq_len": 32768},
    "qwen3": {"max_seq_len": 32768, "head_dim": 128},
}


def open_hugging_face(folder: Path) -> Model:
    path = folder / "config.json"
    s = read_json(path)
    found = hugging_face_tensors(folder)
    with naming(path):
        name = known_setting(s, "model_type", list(FAMILIES))
        architectures = [str(one).lower() for one in setting(s, "architectures", list, [])]
        if architectures not in ([], [f"{name}forcausallm"], [f"{name}model"]):
            raise ExportError(f"architectures: expected {name.title()}ForCausalLM, found {s['architectures']}")
        refuse(s, "mlp_bias", "quantization_config", "quantization", "per_layer_config")
        if not s.get("is_causal", True):
            raise ExportError(f"is_causal: expected true, found {s['is_causal']!r}")
        known_setting(s, "hidden_act", ["silu", "swish"], "silu")
        tied = setting(s, "tie_word_embeddings", bool, False)
        if tied:
            share_embedding(found)
        others: dict[str, Any] = {"tied": tied, "norm_eps": 1e-6, **FAMILIES[name]}
        others["qkv_bias"] = name == "qwen2" or (name != "mistral" and setting(s, "attention_bias", bool, False))
        others["qk_norm"] = name == "qwen3"
        config = config_of(HUGGING_FACE, s, found, **others, **hugging_face_rope(s))
        window = sliding_window(name, s, config)
        stop_ids = ids_in(s, "eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        with naming(generation):
            stop_ids += ids_in(read_json(generation), "eos_token_id")
    tokenizer = folder if any((folder / name).exists() for name in TOKENIZER_FILES) else None
    return Model(folder, config, found, stop_ids, window, tokenizer)


def share_embedding(found: dict[str, Tensor]) -> None:
    """Keeps one of two tied tensors, as the embedding; a file may have either, or both."""
    classifier = found.pop("lm_head.weight", None)
    if classifier is None:
        return
    embedding = found.setdefault("model.embed_tokens.weight", classifier)
    if (classifier.shape, classifier.dtype) != (embedding.shape, embedding.dtype):
        raise ExportError("tie_word_embeddings is true, but lm_head.weight has another shape or type")
    spans = () if embedding is classifier else classifier.spans()
    if not all(np.array_equal(classifier.rows(*span), embedding.rows(*span)) for span in spans):
        raise ExportError("tie_word_embeddings is true, but lm_head.weight differs from the embedding")


def hugging_face_rope(s: Settings) -> dict[str, Any]:
    """From rope_parameters, or, before transformers 5, from rope_theta and rope_scaling."""
    rope: dict[str, Any] = {}
    old, new = setting(s, "rope_scaling", dict, {}), setting(s, "rope_parameters", dict, {})
    for given in ({"rope_theta": s.get("rope_theta")}, old, new):
        for key, value in given.items():
            key = "rope_type" if key == "type" else key
            if isinstance(value, dict):
                raise ExportError(f"RoPE that differs from layer to layer ({key}) is not supported")
            if value is not None and rope.setdefault(key, value) != value:
                raise ExportError(f"{key} is given twice, as {rope[key]!r} and as {value!r}")
    rope.setdefault("partial_rotary_factor", s.get("partial_rotary_factor"))
    original = "original_max_position_embeddings"  # outside, it takes precedence
    rope[original] = s.get(original) or rope.get(original) or s.get("max_position_embeddings")
    known_setting(rope, "partial_rotary_factor", [1.0], 1.0)
    kind = known_setting(rope, "rope_type", ["default", "linear", "llama3"], "default")
    theta = {"rope_theta": setting(rope, "rope_theta", float, 10000.0)}
    if kind == "default":
        return theta
    factor = setting(rope, "factor", float)
    if kind == "linear":
        return theta | {"rope_scaling": 1, "rope_factor": factor}
    low, high = setting(rope, "low_freq_factor", float), setting(rope, "high_freq_factor", float)
    return theta | llama3_rope(factor, round(setting(rope, original, float)), low, high)


def llama3_rope(factor: float, original: int = 8192, low: float = 1.0, high: float = 4.0) -> dict[str, Any]:
    """RoPE of Llama 3.1; later versions changed only the factor."""
    return {
        "rope_scaling": 2,
        "rope_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_seq_len": original,
    }


def sliding_window(family: str, s: Settings, config: Config) -> int | None:
    """How many positions attention looks back; None if all layers look back to the first."""
    layers = setting(s, "layer_types", list, [])
    if other := set(map(str, layers)) - {"full_attention", "sliding_attention"}:
        raise ExportError(f"layer_types: {min(other)!r} is not supported")
    if family == "llama" or (family != "mistral" and not setting(s, "use_sliding_window", bool, False)):
        return None
    full = setting(s, "max_window_layers", int, 28) >= config.n_layers
    if family != "mistral" and (full if not layers else "sliding_attention" not in layers):
        return None
    window: int = setting(s, "sliding_window", int, 0 if "sliding_window" in s else 4096)  # transformers' default
    if window < 0:
        raise ExportError(f"sliding_window: expected 0 or more, found {window}")
    return window or None


def hugging_face_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the one file, else of the shards in the index or, if one of these is missing, of all *-of-*."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        one, index = folder / name, folder / f"{name}.index.json"
        paths = [one] if one.exists() else sorted(folder.glob(f"*-of-*{one.suffix}"))
        if not one.exists() and index.exists():
            names = setting(read_json(index), "weight_map", dict).values()
            named = sorted({folder / Path(str(file)).name for file in names})
            paths = named if all(path.exists() for path in named) else paths
        found: dict[str, Tensor] = {}
        for path in paths:
            part = read(path)
            if twice := sorted(part.keys() & found.keys()):
                raise ExportError(f"the tensor {twice[0]} is also in {found[twice[0]].path.name}", path)
            found |= part
        if paths:
            prefix = "" if any(name.startswith("model.") for name in found) else "model."  # a bare LlamaModel
            return {name if name.startswith("lm_head.") else prefix + name: t for name, t in found.items()}
    raise ExportError("expected model.safetensors, pytorch_model.bin, or their shards, found none", folder)


META_SETTINGS = """
    dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope
    rope_scaling_factor rope_high_freq_factor head_dim hidden_dim max_seq_len max_batch_size sliding_window model_type
    max_position_embeddings tied_embeddings
""".split()  # noqa: SIM905 the settings of params.json that are known; others are refused


def open_meta(folder: Path) -> Model:
    """A checkpoint in Meta's format, which Mistral also uses: params.json, and a shard for each GPU."""
    path = folder / "params.json"
    s = read_json(path)
    with naming(path):
        if unknown := sorted(s.keys() - set(META_SETTINGS)):
            raise ExportError(f"the setting {unknown[0]} is not supported")
        n_layers = setting(s, "n_layers", int)
    shards = meta_shards(folder)
    whole = {name: joined(name, [shard[name] for shard in shards]) for name in shards[0]}
    # Llama 1 and 2 split the embedding by columns, Llama 3 by rows, as joined() assumes.
    columns = shape_of(whole, "tok_embeddings.weight")[1]
    if "norm.weight" in whole and columns != whole["norm.weight"].shape[0]:
        whole["tok_embeddings.weight"] = concatenated([shard["tok_embeddings.weight"] for shard in shards], 1)
    found = by_hugging_face_names(whole, n_layers)
    with naming(path):
        rope = {"rope_theta": setting(s, "rope_theta", float, 10000.0)}
        if setting(s, "use_scaled_rope", bool, False):
            # the factor is 8 in Llama 3.1, and 32 in the small models of 3.2, whose params.json do not say so
            factor = 32.0 if shape_of(found, "model.norm.weight")[0] < 4096 else 8.0
            high = setting(s, "rope_high_freq_factor", float, 4.0)
            rope |= llama3_rope(setting(s, "rope_scaling_factor", float, factor), high=high)
        length = {} if "max_seq_len" in s else {"max_seq_len": meta_context(s)}
        config = config_of(META, s, found, **length, **rope)
        window = setting(s, "sliding_window", int, 0) or None
    columns = shape_of(found, "model.layers.0.self_attn.o_proj.weight")[1]
    if columns != config.q_dim:  # reports missing shards here, before every shape is found to be wrong
        found_columns = f"found {columns} in {len(shards)} (are shards missing?)"
        raise ExportError(f"expected {config.q_dim} columns of wo in all shards, {found_columns}", folder)
    found = {name: rotated_by_halves(name, tensor, config) for name, tensor in found.items()}
    tokenizers = [*sorted(folder.glob("tokenizer.model*")), *folder.glob("tekken.json")]
    return Model(folder, config, found, (), window, next(iter(tokenizers), None))


def rotated_by_halves(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Reorders the rows of what RoPE is applied to, queries and keys; other tensors stay."""
    rotated = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    return half_split(tensor, config.head_dim) if name.endswith(rotated) else tensor


def by_hugging_face_names(found: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Renames tensors of llama.cpp or Meta to Hugging Face's names, by the gguf package's tables."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    n_layers = min(n_layers, len(found))  # the file may claim any number
    names, suffixes = get_tensor_name_map(MODEL_ARCH.QWEN3, n_layers), (".weight", ".bias")
    every = Config(1, 1, max(1, n_layers), 1, 1, 2, 1, 1, qkv_bias=True, qk_norm=True)  # has all tensors
    known = {names.get_name(spec.name, suffixes): spec.name for spec in specs_of(every)}
    return {known.get(names.get_name(name, suffixes), name): tensor for name, tensor in found.items()}


def meta_shards(folder: Path) -> list[dict[str, Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    if not paths:
        raise ExportError("expected consolidated.00.pth or consolidated.safetensors, found neither", folder)
    read = read_torch if paths[0].suffix == ".pth" else read_safetensors
    for i, path in enumerate(paths):
        if path.suffix == ".pth" and path.name != f"consolidated.{i:02}.pth":
            raise ExportError(f"consolidated.{i:02}.pth is missing, but there is {paths[-1].name}", folder)
    shards = [read(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if different := sorted(shard.keys() ^ shards[0].keys()):
            raise ExportError(f"the tensor {different[0]} is only in one of {paths[0].name} and this file", path)
    return shards


def joined(name: str, shards: list[Tensor]) -> Tensor:
    """Joins the shards of a tensor that was split among GPUs; norms are whole in every shard."""
    if len({(shard.dtype, shard.shape) for shard in shards}) > 1:
        other = shards[0].path.name
        raise ExportError(f"tensor {name}: expected the same shape and type as in {other}", shards[-1].path)
    if len(shards) == 1 or len(shards[0].shape) != 2:
        return shards[0]
    by_columns = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    return concatenated(shards, int(by_columns))


def meta_context(s: Settings) -> int:
    """Guesses the context length, which params.json does not state, from settings that only some versions have."""
    if "max_position_embeddings" in s:
        return int(setting(s, "max_position_embeddings", int))  # Mistral
    if setting(s, "use_scaled_rope", bool, False):
        return 131072  # Llama 3.1 and later
    if "rope_theta" in s:
        return 8192  # Llama 3
    say("warning", "params.json has no context length: assuming 2048, as in Llama 1 (Llama 2: --max-seq-len 4096)")
    return 2048


# Settings that are absent from a GGUF file have llama.cpp's defaults, except these (in brackets, llama.cpp's):
#
#   ARCH.feed_forward_length       the rows of ffn_gate [0]
#   ARCH.attention.head_count_kv   the rows of attn_k divided by head_dim [head_count: an error if the rows differ]
#   bos and eos of "gpt2"          none [11, a comma in GPT-2]
#   tokenizer.ggml.pre             refused for "gpt2" ["default", which warns of degraded quality]


def open_gguf(path: Path) -> Model:
    """A model of llama.cpp; quantised weights are converted to 16 bits, exactly or nearly so."""
    s, found = read_gguf(path)
    with naming(path):
        others = gguf_splits(path, s)
    for other in others:
        found |= read_gguf(other)[1]
    with naming(path):
        architecture = known_setting(s, "general.architecture", ["llama", "qwen2", "qwen3"])
        own = {key.removeprefix(f"{architecture}."): same_in_all_layers(value) for key, value in s.items()}
        known_setting(own, "attention.causal", [True], True)
        known_setting(own, "rope.scaling.attn_factor", [1.0], 1.0)
        refuse(own, "expert_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale")
        factors = found.pop("rope_freqs.weight", None)
        found = by_hugging_face_names(found, setting(own, "block_count", int))
        if "model.embed_tokens.weight" not in found:
            share_embedding(found)  # a tied model that has only output.weight
        config = config_of(GGUF, own, found, **gguf_rope(own), qk_norm=architecture == "qwen3")
        for key in ("attention.value_length", "rope.dimension_count"):
            if setting(own, key, int, config.head_dim) != config.head_dim:
                raise ExportError(f"{architecture}.{key}: expected {config.head_dim}, the whole head, found {own[key]}")
        if factors:
            config = replace(config, **rope_of_factors(config, factors))
        if architecture == "llama":  # only here, llama.cpp rotates pairs (2i, 2i + 1)
            found = {name: rotated_by_halves(name, tensor, config) for name, tensor in found.items()}
        stop_ids = ids_in(s, "tokenizer.ggml.eos_token_id") + ids_in(s, "tokenizer.ggml.eot_token_id")
        window = setting(own, "attention.sliding_window", int, 0) or None
        return Model(path, config, found, stop_ids, window, path if "tokenizer.ggml.tokens" in s else None)


def same_in_all_layers(value: Any) -> Any:
    """A list of equal numbers, one for each layer, becomes that number."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def gguf_splits(path: Path, s: Settings) -> list[Path]:
    """The other files of a model that was split into several."""
    count = setting(s, "split.count", int, 1)
    if count < 2:
        return []
    name = re.fullmatch(rf"(.*)-00001-of-{count:05}\.gguf", path.name)
    if not name:
        raise ExportError(f"expected the first of {count} files, NAME-00001-of-{count:05}.gguf, found another")
    paths = []
    for i in range(2, count + 1):
        paths.append(path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf"))
        if not paths[-1].is_file():
            raise ExportError(f"missing, but {path.name} says there are {count} files", paths[-1])
    return paths


def gguf_rope(own: Settings) -> dict[str, Any]:
    kind = known_setting(own, "rope.scaling.type", ["none", "linear"], "linear")
    factor = setting(own, "rope.scaling.factor", float, setting(own, "rope.scale_linear", float, 0.0))
    rope = {"rope_theta": setting(own, "rope.freq_base", float, 10000.0)}
    return rope if kind == "none" or factor in (0, 1) else rope | {"rope_scaling": 1, "rope_factor": factor}


def rope_of_factors(c: Config, tensor: Tensor) -> dict[str, Any]:
    """Finds Llama 3's RoPE settings that give these numbers, by which frequencies are divided."""
    if c.rope_scaling == 0 and tensor.shape == (c.head_dim // 2,):
        stored_factors = tensor.whole().astype(np.float64)
        frequencies = c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        factor = float(stored_factors.max())
        for original in (2**i for i in range(5, 21)):
            turns = original * frequencies / (2 * np.pi)
            keep = np.clip((turns - 1) / (4 - 1), 0, 1)  # low_freq_factor 1, high_freq_factor 4
            if np.allclose(stored_factors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
                return llama3_rope(factor, original)
    raise ExportError("rope_freqs.weight: expected the numbers of Llama 3's RoPE, found others", tensor.path)


LLAMA2C_ORDER = (  # the order of the file; {} stands for all layers, one after another
    "model.embed_tokens.weight",
    "model.layers.{}.input_layernorm.weight",
    *(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"),
    "model.layers.{}.post_attention_layernorm.weight",
    *(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "down", "up")),
    "model.norm.weight",
    "rope.freqs",
    "lm_head.weight",
)


def open_llama2c(path: Path) -> Model:
    """A llama2.c checkpoint of float32. Its texts are separated by bos alone, so bos (id 1) ends a text.

    Seven int32, then the tensors; a negative vocab_size means that the classifier is not tied.
    """
    with open(path, "rb") as file:
        start = file.read(28)
    if len(start) < 28:
        raise ExportError(f"too short for a llama2.c model: {len(start)} bytes", path)
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = struct.unpack("<7i", start)
    with naming(f"{path}: neither a llama2.c model nor another known format"):
        if n_heads < 1 or dim % n_heads:
            raise ExportError(f"dim {dim} is not a multiple of n_heads {n_heads}")
        sizes = (dim, hidden_dim, n_layers, n_heads, n_kv_heads, dim // n_heads, abs(vocab_size), seq_len)
        config = Config(*sizes, tied=vocab_size > 0)
    shapes = {spec.name.replace(".0.", ".{}."): spec.shape for spec in specs_of(replace(config, n_layers=1))}
    shapes["rope.freqs"] = (seq_len, config.head_dim)  # cosines and sines
    kinds = [(name, n_layers if "{}" in name else 1) for name in LLAMA2C_ORDER if name in shapes]
    expected = len(start) + 4 * sum(count * math.prod(shapes[name]) for name, count in kinds)
    if (found_size := path.stat().st_size) != expected:
        raise ExportError(f"expected {expected} bytes by its header, found {found_size}: incomplete or damaged", path)
    found, offset = {}, len(start)
    for kind, count in kinds:
        for name in (kind.format(layer) for layer in range(count)):
            found[name] = rotated_by_halves(name, stored(path, offset, shapes[kind], "F32"), config)
            offset += 4 * math.prod(shapes[kind])
    tokenizer_file = LLAMA2_TOKENIZER if config.vocab_size == 32000 else None
    return Model(path, config, found, stop_ids=(1,), tokenizer_file=tokenizer_file)


LORA_SETTINGS = """
    peft_type r lora_alpha use_rslora bias init_lora_weights target_modules base_model_name_or_path revision
    peft_version auto_mapping task_type inference_mode lora_dropout exclude_modules layers_to_transform layers_pattern
    eva_config megatron_config megatron_core qalora_group_size runtime_config ensure_weight_tying
""".split()  # noqa: SIM905 settings that are read below, or do not change the merged weights; others must be unset


def with_adapter(base: Model, folder: Path) -> Model:
    """A checkpoint with a LoRA adapter of the PEFT library, merged in as weights are read."""
    settings_file = folder / "adapter_config.json"
    s = read_json(settings_file)
    with naming(settings_file):
        known_setting(s, "peft_type", ["LORA"])
        refuse(s, *sorted(s.keys() - set(LORA_SETTINGS)))
        known_setting(s, "bias", ["none"], "none")
        init = s.get("init_lora_weights", True)  # other ways also change the base model's weights
        if init not in (True, False, None, "gaussian", "orthogonal", "eva"):
            raise ExportError(f"init_lora_weights: expected one that leaves the base model unchanged, found {init!r}")
        rank, alpha = setting(s, "r", int), setting(s, "lora_alpha", float)
        if rank < 1:
            raise ExportError(f"r: expected 1 or more, found {rank}")
        scale = alpha / (math.sqrt(rank) if setting(s, "use_rslora", bool, False) else rank)
    path = folder / "adapter_model.safetensors"
    found = read_safetensors(path) if path.exists() else read_torch(folder / "adapter_model.bin")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match or f"{match[1]}.weight" not in base.tensors:
            raise ExportError(f"expected lora_A and lora_B of the model's weights, found {name}", tensor.path)
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    if not pairs:
        raise ExportError("expected tensors of an adapter, found none", path)
    merged = {name: adapted(base.tensors[name], name, pair, rank, scale) for name, pair in pairs.items()}
    return replace(base, tensors=base.tensors | merged)


def adapted(tensor: Tensor, name: str, pair: dict[str, Tensor], rank: int, scale: float) -> Tensor:
    """W + scale B A in float32 (https://arxiv.org/abs/2106.09685); A: (rank, in), B: (out, rank)."""
    path = next(iter(pair.values())).path
    shapes = {"A": (rank, *tensor.shape[1:]), "B": (tensor.shape[0], rank)}
    for x, shape in shapes.items():
        if x not in pair:
            raise ExportError(f"lora_{x} of {name} is missing", path)
        if pair[x].dtype not in STORED:
            raise ExportError(f"lora_{x} of {name}: expected the type {', '.join(STORED)}, found {pair[x].dtype}", path)
        if pair[x].shape != shape:
            raise ExportError(f"lora_{x} of {name}: expected the shape {shape}, found {pair[x].shape}", path)
    a, scaled = pair["A"].whole(), np.float32(scale) * pair["B"].whole()

    def rows(start: int, stop: int) -> Array:
        return widened(tensor.rows(start, stop)) + scaled[start:stop] @ a

    return tensor._replace(rows=rows)


def open_source(path: Path) -> Model:
    if path.is_dir():
        for settings, opener in (("config.json", open_hugging_face), ("params.json", open_meta)):
            if (path / settings).exists():
                return opener(path)
        if (path / "adapter_config.json").exists():
            raise ExportError("found a LoRA adapter, expected its base model (and this directory after --lora)", path)
        expected = "config.json (Hugging Face) or params.json (Meta) in this directory"
        raise ExportError(f"expected {expected}, found neither", path)
    kind = kind_of(path)
    if kind is None:
        return open_llama2c(path)
    if kind == "a GGUF file":
        return open_gguf(path)
    belongs = kind.startswith(("a safetensors", "a zip", "a pickle", "a JSON"))
    hint = " (give the directory that it is in)" if belongs else ""
    raise ExportError(f"expected a directory, a GGUF file or a llama2.c .bin, found {kind}{hint}", path)


# ---------------------------------------------------------------------------------------------------------
# 7. Tokenizers

TOKENIZER_HEADER = struct.Struct("<8s2I3Q2I2iI7i8I10I")  # 160 bytes, then the arrays
HASHED_FROM = 24  # the first byte that the file's hash covers
TOKEN = struct.Struct("<IIf")  # what vocab_hash covers of each token: the text's length, type, score; then the text
SENTENCEPIECE_BPE, BYTE_LEVEL_BPE = 1, 2  # the kind of tokenizer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of tokens
USER_DEFINED_NORMALIZED = 7  # matched after the text has been normalised
MAX_STOP_IDS = 7
NONE = 0xFFFFFFFF  # no token


class Token(NamedTuple):
    text: bytes  # what it prints: ' ' instead of '▁', the byte of a byte token; of a control token, the name
    type: int
    score: float = 0.0  # SentencePiece merges the pair whose merged token has the highest score


class Merge(NamedTuple):
    """Ids of tokens."""

    left: int
    right: int
    merged: int


class WordTables(NamedTuple):
    """How text is cut into words, by automata; each cuts what the one before it has left, see `word_tables`."""

    char_class: bytes = b""  # of each code point, then of bytes that are not UTF-8
    # (states, classes): twice the next state, + 1 if a word ends before this character
    transitions: tuple[tuple[int, ...], ...] = ()
    n_dfas: int = 0


NO_WORDS = WordTables()  # the whole text is one word

Script = tuple[int | str, ...]  # ids of tokens, and texts, in order


class Template(NamedTuple):
    """What a chat template puts around messages, in the order of TEMPLATE_PARTS."""

    parts: tuple[Script, ...]
    flags: int


@dataclass(frozen=True)
class Tokenizer:
    tokens: list[Token]
    bos_id: int  # -1 = none
    unk_id: int  # -1 = none
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_dummy_prefix: bool  # puts a space in front of a text
    prefix_after_special: bool = False  # also in front of a text that follows a control or user-defined token
    no_prefix_before_space: bool = False  # but never in front of a text that begins with a space
    merges_by_rank: bool = False  # merges in the order of `merges`, not by scores
    ignore_merges: bool = False  # a word that is a token becomes that token, without merging
    remove_extra_spaces: bool = False  # all but one space between words
    kind: int = SENTENCEPIECE_BPE
    merges: tuple[Merge, ...] = ()
    words: WordTables = NO_WORDS
    template: Template | None = None

    def __post_init__(self) -> None:
        for id, token in enumerate(self.tokens):
            if not NORMAL <= token.type <= USER_DEFINED_NORMALIZED or not math.isfinite(token.score):
                found = f"found {token.type} and {token.score}"
                raise ExportError(f"token {id}: expected a type from 1 to 7 and a finite score, {found}")
            if not token.text and token.type != UNUSED:
                raise ExportError(f"token {id}: expected a text, found none")
        byte_tokens = sorted(token.text for token in self.tokens if token.type == BYTE)
        all_bytes = [bytes([b]) for b in range(256)]
        if self.kind == SENTENCEPIECE_BPE and byte_tokens not in ([], all_bytes):
            raise ExportError(f"expected a token for each of the 256 bytes, or for none, found {len(byte_tokens)}")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ExportError(f"expected at most {MAX_STOP_IDS} stop ids, found {len(self.stop_ids)}")
        ids = [id for id in (self.bos_id, self.unk_id) if id != -1] + list(self.stop_ids)
        if wrong := [id for id in ids if not 0 <= id < len(self.tokens)]:
            raise ExportError(f"bos, unk and eos: expected ids below {len(self.tokens)}, found {wrong[0]}")
        if self.add_bos and self.bos_id == -1:
            raise ExportError("expected a bos token, as texts begin with it, found none")

    @cached_property
    def vocab_hash(self) -> int:
        """A hash of the tokens, whatever file they are from; OUT.bin has it, too, so that run.c sees if both fit."""
        return fnv1a(b"".join(TOKEN.pack(len(t.text), t.type, t.score) + t.text for t in self.tokens))

    def to_bytes(self) -> bytes:
        """The tokenizer file: the header, then arrays that run.c uses as they are, each aligned to 4 bytes."""
        # the token of each text: the last user-defined one, else the first normal one
        by_text: dict[bytes, int] = {}
        longest, byte_id = [0] * 256, [self.unk_id & NONE] * 256  # by first byte
        for id, (text, type, _) in enumerate(self.tokens):
            if type in (USER_DEFINED, USER_DEFINED_NORMALIZED):
                longest[text[0]] = max(longest[text[0]], len(text))
                by_text[text] = id
            elif type == NORMAL:
                by_text.setdefault(text, id)
            elif type == BYTE:
                byte_id[text[0]] = id
        texts = bytearray()

        def placed(text: bytes) -> tuple[int, int]:
            texts.extend(text)
            return len(texts) - len(text), len(text)

        pieces = [(*placed(text), type, score) for text, type, score in self.tokens]
        merges = sorted((*merge, rank) for rank, merge in enumerate(self.merges))
        scripts = self.template.parts if self.template else ((),) * len(TEMPLATE_PARTS)
        script = chain.from_iterable(scripts)
        items = [(NONE, *placed(item.encode())) if isinstance(item, str) else (item, 0, 0) for item in script]
        char_class, transitions, n_dfas = self.words
        n_classes = len(transitions[0]) if transitions else 0
        pages = np.frombuffer(char_class, np.uint8).reshape(-1, 256)  # most are alike, so each is kept once
        classes, class_block = np.unique(pages, axis=0, return_inverse=True)
        sorted_ids = [id for _, id in sorted(by_text.items())]
        arrays = [
            *(u32(byte_id), u32(longest), np.array(pieces, "<u4,<u4,<u4,<f4").tobytes(), u32(sorted_ids)),
            *(u32(merges), u32(transitions), u32(items), u32(class_block), classes.tobytes()),
            *(bytes(texts), bytes(-len(texts) % 4)),
        ]
        flags = sum(bool(getattr(self, name)) << bit for bit, name in enumerate(FLAGS))
        head = TOKENIZER_HEADER.pack(
            *(TOKENIZER_MAGIC, TOKENIZER_VERSION, self.kind, 0),
            *(TOKENIZER_HEADER.size + sum(map(len, arrays)), self.vocab_hash, flags, len(self.tokens)),
            *(self.bos_id, self.unk_id, len(self.stop_ids)),
            *(self.stop_ids + (-1,) * (MAX_STOP_IDS - len(self.stop_ids))),
            *(len(sorted_ids), len(merges), n_dfas, n_classes, len(transitions)),
            *(self.template.flags if self.template else 0, len(classes), len(texts)),
            *accumulate(map(len, scripts)),
        )
        data = b"".join([head, *arrays])
        hash = fnv1a(memoryview(data[HASHED_FROM:]).cast("I"))
        return data[:16] + struct.pack("<Q", hash) + data[HASHED_FROM:]

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """From a tokenizer file; refuses it unless to_bytes() gives the same bytes again."""
        version, size = int.from_bytes(data[8:12], "little"), TOKENIZER_HEADER.size
        if version != TOKENIZER_VERSION or len(data) < size:
            expected = f"expected version {TOKENIZER_VERSION} and a header of {size} bytes"
            raise ExportError(f"a tokenizer file: {expected}, found version {version}, {len(data)} bytes")
        _, _, kind, _, _, _, flags, vocab_size, bos, unk, n_stop, *others = TOKENIZER_HEADER.unpack_from(data)
        stop_ids, ends = others[:n_stop], [0, *others[15:]]
        n_by_text, n_merges, n_dfas, n_classes, n_states, template_flags, n_blocks, n_text = others[7:15]
        if kind not in (SENTENCEPIECE_BPE, BYTE_LEVEL_BPE):
            raise ExportError(f"a tokenizer file: expected kind 1 or 2, found {kind}")
        at = size + 2 * 4 * 256  # after byte_id and longest

        def take(form: str, count: int, width: int = 1) -> Any:
            nonlocal at
            found = np.frombuffer(data, form, count * width, at).reshape(-1, width)
            at += found.nbytes
            return found

        pieces = take("<u4,<u4,<u4,<f4", vocab_size).reshape(-1).tolist()
        take("<u4", n_by_text)
        merges = take("<u4", n_merges, 4).tolist()
        transitions = take("<u4", n_states, n_classes).tolist() if n_classes else []
        items = take("<u4", ends[-1], 3).tolist()
        class_block = take("<u4", N_CODES // 256 if n_classes else 0).reshape(-1)
        char_class = take("u1", n_blocks, 256)[class_block].tobytes()
        texts = take("u1", n_text).tobytes()

        def text_at(offset: int, length: int) -> bytes:
            return bytes(texts[offset : offset + length])

        script = [text_at(*place).decode(errors="replace") if id == NONE else id for id, *place in items]
        parts = tuple(tuple(script[start:end]) for start, end in pairwise(ends))
        found = cls(
            [Token(text_at(offset, length), type, score) for offset, length, type, score in pieces],
            bos,
            unk,
            tuple(stop_ids),
            **{name: bool(flags >> bit & 1) for bit, name in enumerate(FLAGS)},
            kind=kind,
            merges=tuple(Merge(*row[:3]) for row in sorted(merges, key=lambda row: row[3])),
            words=WordTables(char_class, tuple(map(tuple, transitions)), n_dfas),
            template=Template(parts, template_flags) if script else None,
        )
        if found.to_bytes() != data:
            raise ExportError(f"a damaged tokenizer file: its {len(data)} bytes contradict each other")
        return found

    def with_template(self, source: str | None, special: dict[str, str], added: dict[str, int]) -> Tokenizer:
        """Adds a chat template. Its tokens, if they are in `added`, become control tokens, so nobody can type them.

        The first token after an answer ends the model's text.
        """
        # whitespace stays text, because it may form one token with the whitespace of a message beside it
        added = {name: id for name, id in added.items() if not name.isspace()}
        template = find_template(source, special, added) if source else None
        if template is None:
            return self
        opens = TEMPLATE_PARTS.index("opens_answer")  # from here on, the model may say these tokens itself
        used = {item for script in template.parts[:opens] for item in script if isinstance(item, int)}
        tokens = [t._replace(type=CONTROL) if id in used else t for id, t in enumerate(self.tokens)]
        after_answer = template.parts[TEMPLATE_PARTS.index("after_answer")]
        end, ids = [item for item in after_answer if isinstance(item, int)][:1], self.stop_ids
        stop_ids = unique((*ids[: MAX_STOP_IDS - 1], *end, *ids[MAX_STOP_IDS - 1 :]))[:MAX_STOP_IDS]
        return replace(self, tokens=tokens, template=template, stop_ids=stop_ids)


FLAGS = [field.name for field in fields(Tokenizer) if field.type == "bool"]  # bits of the file's flags


def unique(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


def fnv1a(numbers: Iterable[int]) -> int:
    """The 64-bit FNV-1a hash (Fowler, Noll, Vo) of bytes, or of 32-bit numbers."""
    hash = 0xCBF29CE484222325
    for number in numbers:
        hash = (hash ^ number) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return hash


def u32(rows: Sequence[Any] | Array) -> bytes:
    return np.array(rows, "<u4").tobytes()


# ---- SentencePiece: llama2.c's tokenizer.bin, .model files, and GGUF's "llama"


BAR = "▁"  # a space, in the names of tokens


def sentencepiece(pieces: Iterable[tuple[bytes, int, float]], **settings: Any) -> Tokenizer:
    """A tokenizer, from the (name, type, score) of each token."""
    tokens = [token_of(*piece) for piece in pieces]
    return Tokenizer(tokens, words=word_tables(words_at_spaces(tokens)), **settings)


def bytes_of(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # some files have names that are not UTF-8


def token_type(name: bytes) -> int:
    """The type of a token by its name: <0x0A> is a byte token, other names are normal."""
    return BYTE if re.fullmatch(rb"<0x[0-9A-F]{2}>", name) else NORMAL


def token_of(name: bytes, type: int, score: float = 0.0) -> Token:
    """A token by its name in a vocabulary, where '▁' is a space and <0x0A> a byte."""
    if not name:
        return Token(b"", UNUSED, score)
    if type == BYTE:
        return Token(bytes([int(name[3:5], 16)]), BYTE, score)
    spaced = type in (NORMAL, USER_DEFINED, USER_DEFINED_NORMALIZED)
    return Token(name.replace(BAR.encode(), b" ") if spaced else name, type, score)


def words_at_spaces(tokens: Sequence[Token]) -> list[str]:
    """The pattern of a word with the spaces before it; none if a token has a space after another character."""
    across = any(b" " in token.text.lstrip(b" ") for token in tokens if token.type == NORMAL)
    return [] if across else [" *[^ ]+| +"]


def tokenizer_of_llama2c(data: bytes) -> Tokenizer:
    """From llama2.c's tokenizer.bin: int32 max_token_length; for each token float32 score, int32 length, text.

    Texts contain spaces, not '▁'. Types are not stored, but ids 0 to 2 are <unk>, bos and eos as in Llama's.
    """
    pieces: list[tuple[bytes, int, float]] = []
    position = 4
    while position < len(data):
        start = position + 8
        score, length = struct.unpack("<fi", data[position:start].ljust(8, b"\0"))
        position = start + length
        if length < 0 or position > len(data):
            raise ExportError(f"a llama2.c tokenizer: ends within token {len(pieces)}: incomplete or damaged")
        text = data[start:position]
        special = len(pieces) < 3
        type = (UNKNOWN, CONTROL, CONTROL)[len(pieces)] if special else token_type(text)
        pieces.append((text.strip(b"\n") if special else text, type, score))  # bos is stored as "\n<s>\n"
    return sentencepiece(pieces, bos_id=1, unk_id=0, stop_ids=(2,), add_bos=True, add_dummy_prefix=True)


def tokenizer_of_model(data: bytes) -> Tokenizer:
    """From a SentencePiece .model, a protobuf message; only BPE without normalisation of anything but spaces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(data)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        found = trainer.ModelType.Name(trainer.model_type)
        raise ExportError(f"expected a SentencePiece model of type BPE, found {found}")
    if normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap:
        raise ExportError(f"expected a SentencePiece model without a normalizer, found {normalizer.name!r}")
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise ExportError("a SentencePiece model: expected escape_whitespaces, and no treat_whitespace_as_suffix")
    pieces = []
    for id, piece in enumerate(model.pieces):
        if piece.type == BYTE and token_type(piece.piece.encode()) != BYTE:
            raise ExportError(f"token {id} of the type BYTE: expected a name like <0x0A>, found {piece.piece!r}")
        type = USER_DEFINED_NORMALIZED if piece.type == USER_DEFINED else piece.type
        pieces.append((piece.piece.encode(), type, piece.score))
    return sentencepiece(
        pieces,
        bos_id=trainer.bos_id,
        unk_id=trainer.unk_id,
        stop_ids=(trainer.eos_id,) if trainer.eos_id >= 0 else (),
        add_bos=trainer.bos_id >= 0,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_spaces=normalizer.remove_extra_whitespaces,
    )


# ---- byte-level BPE: tokenizer.json, GGUF's "gpt2", tiktoken


def ranked_bpe(tokens: list[Token], merges: tuple[Merge, ...], patterns: Sequence[str], **settings: Any) -> Tokenizer:
    """A tokenizer that merges in the order of `merges`, within the words that the patterns find."""
    settings = {"kind": BYTE_LEVEL_BPE, **settings}
    return Tokenizer(tokens, merges=merges, merges_by_rank=True, words=word_tables(patterns), **settings)


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: the printable ones of Latin-1 stand for themselves, others are from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_token(name: str) -> Token:
    table = byte_of_character()
    if not name or any(c not in table for c in name):  # not written in these characters: no text becomes this
        return Token(bytes_of(name), UNUSED)
    return Token(bytes(table[c] for c in name), BYTE if len(name) == 1 else NORMAL)


def merges_of(named: Iterable[Any], ids: Mapping[str, int], tokens: Sequence[Token]) -> tuple[Merge, ...]:
    """Merges as ids, without those into control tokens, which no text becomes; of several for a pair, the last."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in named]
    try:
        merges = [Merge(ids[left], ids[right], ids[left + right]) for left, right in pairs]
    except (KeyError, ValueError):
        raise ExportError("merges: expected two tokens that make a third, found others") from None
    last = {(merge.left, merge.right): i for i, merge in enumerate(merges)}
    return tuple(merges[i] for i in sorted(last.values()) if tokens[merges[i].merged].type != CONTROL)


LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
LLAMA3_SPECIAL |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}


def tokenizer_of_tiktoken(data: bytes) -> Tokenizer:
    """From Meta's tokenizer.model for Llama 3: lines of base64 and a rank. 256 special tokens follow the others."""
    lines = [line.split() for line in data.splitlines() if line]
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    special = [f"<|{LLAMA3_SPECIAL.get(i) or next(reserved)}|>" for i in range(256)]
    n = len(lines)
    settings = {"bos_id": n, "stop_ids": (n + 1, n + 9, n + 8)}
    return tiktoken([(line[0], int(line[1])) for line in lines], [], special, LLAMA3, **settings)


TEKKEN_SPECIAL = """
    <unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG]
    <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]
""".split()  # noqa: SIM905 of files that do not list them


def tokenizer_of_tekken(s: Settings) -> Tokenizer:
    """From Mistral's tekken.json. Its special tokens come before the others; more of these are listed than are used."""
    config = setting(s, "config", dict)
    n_special = setting(config, "default_num_special_tokens", int)
    n = setting(config, "default_vocab_size", int) - n_special
    given = [token["token_str"] for token in s.get("special_tokens") or ()] or TEKKEN_SPECIAL
    special = given + [f"<SPECIAL_{i}>" for i in range(len(given), n_special)]
    ranked = [(token["token_bytes"], token["rank"]) for token in setting(s, "vocab", list)[:n]]
    return tiktoken(ranked, special, [], setting(config, "pattern", str), bos_id=1, stop_ids=(2,))


def tiktoken(
    ranked: list[tuple[str | bytes, int]], before: list[str], after: list[str], pattern: str, **settings: Any
) -> Tokenizer:
    """From a token for each rank, in base64, and the special tokens that come before and after these.

    tiktoken merges any two tokens that form a token, the lowest rank first. So each way to cut a token is a merge.
    """
    if [rank for _, rank in ranked] != list(range(len(ranked))):
        raise ExportError("a tiktoken vocabulary: expected the ranks 0, 1, 2 and so on, found others")
    texts = [base64.b64decode(text) for text, _ in ranked]
    ids = {text: id for id, text in enumerate(texts, len(before))}
    merges = []
    for text, merged in ids.items():
        halves = [(ids.get(text[:i], NONE), ids.get(text[i:], NONE)) for i in range(1, len(text))]
        merges += [Merge(*pair, merged) for pair in sorted(halves) if NONE not in pair]
    first, last = ([Token(name.encode(), CONTROL) for name in names] for names in (before, after))
    tokens = first + [Token(text, BYTE if len(text) == 1 else NORMAL) for text in texts] + last
    settings |= {"unk_id": -1, "add_bos": True, "add_dummy_prefix": False, "ignore_merges": True}
    return ranked_bpe(tokens, tuple(merges), [pattern], **settings)


# Names of tokens that end the model's text, as in llama.cpp, whatever type a GGUF file gives them
GGUF_ENDS = """
    <|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <|eom_id|> <｜end▁of▁sentence｜> </s>
    <EOT> _<EOT> [EOT] [EOS] <eos> <end_of_utterance> <|return|> <|call|> <|flush|> <|calls|> <turn|>
    <|tool_response> [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO>
    <reponame> <|file_sep|>
""".split()  # noqa: SIM905


def tokenizer_of_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """From a GGUF file's metadata; for what is absent, see the comment before open_gguf."""
    s = {key.removeprefix("tokenizer."): value for key, value in metadata.items()}
    model, names = s.get("ggml.model"), s.get("ggml.tokens")
    if model not in ("llama", "gpt2") or not names:
        found_names = f"{model!r} with {len(names or ())} tokens"
        raise ExportError(f"tokenizer.ggml.model: expected llama or gpt2 with tokens, found {found_names}")
    byte_level = model == "gpt2"
    types = [int(type) for type in s.get("ggml.token_type") or [token_type(bytes_of(name)) for name in names]]
    given = [] if byte_level else s.get("ggml.scores")
    scores = [float(score) for score in given or [0.0] * len(names)]
    if not len(names) == len(types) == len(scores):
        raise ExportError(f"expected {len(names)} types and scores of tokens, found {len(types)} and {len(scores)}")
    ids = {name: id for id, name in enumerate(names)}
    bos, eos, unk = (
        setting(s, f"ggml.{name}_token_id", int, -1 if byte_level or id >= len(names) else id)
        for name, id in (("bos", 1), ("eos", 2), ("unknown", 0))
    )
    ends = [eos, s.get("ggml.eot_token_id", -1), s.get("ggml.eom_token_id", -1)]
    ends += [ids[name] for name in GGUF_ENDS if name in ids]
    stop_ids = unique(id for id in ends if id >= 0)[:MAX_STOP_IDS]
    for id in (bos, *stop_ids):  # control tokens whatever their type, but not GPT-2's comma
        if 0 <= id < len(names) and len(names[id]) > 1:
            types[id] = CONTROL
    prefix, pre = not byte_level and setting(s, "ggml.add_space_prefix", bool, True), s.get("ggml.pre", "")
    add_bos = bos >= 0 and setting(s, "ggml.add_bos_token", bool, not byte_level or pre in GGUF_ADDS_BOS)
    settings: dict[str, Any] = {"bos_id": bos, "stop_ids": stop_ids, "add_bos": add_bos}
    settings |= {"add_dummy_prefix": prefix, "prefix_after_special": prefix}
    if not byte_level:
        found = sentencepiece(zip(map(bytes_of, names), types, scores, strict=True), unk_id=unk, **settings)
    elif pre not in GGUF_PATTERNS:
        raise ExportError(f"tokenizer.ggml.pre: the pre-tokenizer {pre!r} is not supported")
    else:
        if pre == "qwen2":
            note_nfc()
        named = zip(names, types, strict=True)
        tokens = [byte_level_token(x) if t == NORMAL else token_of(bytes_of(x), t) for x, t in named]
        merges = merges_of(dict.fromkeys(setting(s, "ggml.merges", list)), ids, tokens)  # the first of equal ones
        # as in llama.cpp, bytes without a token are left out
        settings |= {"unk_id": -1, "ignore_merges": pre in GGUF_IGNORES_MERGES}
        found = ranked_bpe(tokens, merges, GGUF_PATTERNS[pre], **settings)
    added = {name: id for name, id in ids.items() if types[id] in (CONTROL, USER_DEFINED)}
    special_ids = {"bos_token": bos, "eos_token": eos, "unk_token": s.get("ggml.unknown_token_id", -1)}
    special = {key: names[id] for key, id in special_ids.items() if 0 <= id < len(names)}
    return found.with_template(s.get("chat_template"), special, added)


# ---- the files of a Hugging Face tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")  # one has the vocabulary
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # lists in the settings files
PLAIN_DECODERS = ("ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip")  # need no note


def note_nfc() -> None:
    say("note", "this tokenizer expects text in Unicode's NFC; run does not convert it, but uconv -x nfc does")


class TokenizerFolder:
    """tokenizer.json, tokenizer.model, or vocab.json with merges.txt; and all that transformers reads beside it."""

    def __init__(self, folder: Path, main: Path | None = None) -> None:
        self.folder = folder
        self.config = self.read("tokenizer_config.json")
        self.model_config = self.read("config.json")
        self.generation = self.read("generation_config.json")
        self.special_map = self.read("special_tokens_map.json")
        self.json: dict[str, Any] = {}
        self.base: Tokenizer | None = None  # tokenizer.model or tekken.json, if that has the vocabulary
        present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        main = main or next(iter(present), folder / TOKENIZER_FILES[0])
        if main.name in ("tokenizer.model", "tekken.json"):
            self.base = read_tokenizer(main)
            texts = [token.text.decode(errors="replace") for token in self.base.tokens]
            self.vocab = {text: id for id, text in reversed(list(enumerate(texts)))}  # the first of equal texts
        else:
            self.json = self.of_plain_files() if main.name == "vocab.json" else read_json(main)
            if "model" not in self.json:
                raise ExportError("expected a tokenizer.json, found JSON without a model")
            if (kind := setting(self.json, "model", dict).get("type", "BPE")) != "BPE":
                raise ExportError(f"the tokenizer's model: expected the type BPE, found {kind}")
            self.vocab = dict(self.json["model"]["vocab"])
        self.added: dict[int, dict[str, Any]] = self.added_tokens()
        self.added_ids = {token["content"]: id for id, token in self.added.items()}
        self.ids = self.vocab | self.added_ids

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def class_name(self) -> str:
        """The tokenizer's class in transformers."""
        name = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        qwen = not name and self.model_config.get("model_type") in ("qwen2", "qwen3")
        return "Qwen2Tokenizer" if qwen else name

    def of_plain_files(self) -> dict[str, Any]:
        """GPT-2's and Qwen's vocab.json and merges.txt, as a tokenizer.json would have them."""
        name = self.class_name()
        if name not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
            expected = "expected GPT2Tokenizer or Qwen2Tokenizer"
            raise ExportError(f"tokenizer_class: {expected} with vocab.json, found {name!r}")
        qwen = name == "Qwen2Tokenizer"
        lines = read_text(self.folder / "merges.txt").split("\n")
        prefix = bool(self.config.get("add_prefix_space", False))
        encoder = {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": not qwen}
        split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}
        merges = [line for line in lines if line and not line.startswith("#version")]
        return {
            "model": {"vocab": self.read("vocab.json"), "merges": merges},
            "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, encoder] if qwen else [encoder]},
        }

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """By their ids: tokenizer.json's, tokenizer_config.json's and added_tokens.json's."""
        found = {token["id"]: token for token in self.json.get("added_tokens") or []}
        for id, token in (self.config.get("added_tokens_decoder") or {}).items():
            found.setdefault(int(id), token)
        for entry in chain.from_iterable(
            c.get(key) or () for c in (self.special_map, self.config) for key in MORE_SPECIAL
        ):
            text = entry.get("content") if isinstance(entry, dict) else entry
            if text in self.vocab:
                found.setdefault(self.vocab[text], {"content": text, "special": True})
        special = self.special().values()
        for name, id in self.read("added_tokens.json").items():
            found.setdefault(id, {"content": name, "special": name in special})
        if any(type(id) is not int or not 0 <= id < 1 << 22 for id in (*found, *self.vocab.values())):
            raise ExportError(f"expected token ids from 0 to {(1 << 22) - 1}, found others")
        return found

    def special(self) -> dict[str, str]:
        """The texts of bos_token, eos_token and so on."""
        found: dict[str, str] = {}
        if self.base:
            ids = {"bos_token": self.base.bos_id, "unk_token": self.base.unk_id}
            ids["eos_token"] = (*self.base.stop_ids, -1)[0]
            found = {key: self.base.tokens[id].text.decode() for key, id in ids.items() if id >= 0}
        elif self.class_name() in ("GPT2Tokenizer", "Qwen2Tokenizer"):
            names = {*self.vocab, *(token["content"] for token in self.json.get("added_tokens") or ())}
            found = {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in names else {}  # their default
        for config in (self.special_map, self.config):
            for key, value in config.items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    found[key] = text
        return found

    def configured(self, key: str) -> list[int]:
        """Ids in the model's configuration, but only of added tokens: an ordinary one is there by mere default."""
        found = [id for config in (self.generation, self.model_config) for id in ids_in(config, key)]
        return [id for id in found if id in self.added]

    def stop_ids(self) -> tuple[int, ...]:
        eos = self.special().get("eos_token")
        if eos is not None and eos not in self.ids:
            raise ExportError(f"the eos_token {eos!r} is not in the vocabulary, so no text would ever end")
        ends = [] if eos is None else [self.ids[eos]]
        ends += [*self.configured("eos_token_id"), *(self.base.stop_ids if self.base else ())]
        return unique(ends)[:MAX_STOP_IDS]

    def bos(self) -> tuple[int, bool]:
        """The id of the bos token, -1 if there is none, and whether it is put in front of a text."""
        bos = self.ids.get(self.special().get("bos_token", ""), -1)
        first: list[int] = []
        for processor in flattened(self.json.get("post_processor"), "processors"):
            if processor["type"] == "TemplateProcessing":
                for item in processor["single"]:
                    if "Sequence" in item:
                        break
                    first += processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            elif processor["type"] != "ByteLevel":
                raise ExportError(f"this step of post_processor is not supported: {json.dumps(processor):.200}")
        if len(first) > 1:
            raise ExportError(f"post_processor: expected at most one token in front of a text, found {first}")
        add = self.config.get("add_bos_token", True if self.base else None)
        if first and add is not False:
            return first[0], True
        if bos < 0:
            bos = next(iter(self.configured("bos_token_id")), -1)
        return bos, add is True and bos >= 0

    def tokens(self, vocabulary: Mapping[int, Token]) -> list[Token]:
        """The vocabulary and the added tokens; special tokens and those that end a text become control tokens."""
        rows = self.model_config.get("vocab_size")  # the model may have more tokens, as padding for speed
        size = max([*vocabulary, *self.added, -1]) + 1
        tokens = [Token(b"", UNUSED)] * max(size, rows if isinstance(rows, int) and rows < 1 << 22 else 0)
        for id, token in vocabulary.items():
            tokens[id] = token
        control = {*self.stop_ids(), *(id for id, token in self.added.items() if token.get("special"))}
        control |= {self.ids[name] for name in self.special().values() if name in self.ids}
        for id, entry in self.added.items():
            name = entry["content"]
            type = USER_DEFINED_NORMALIZED if entry.get("normalized") else USER_DEFINED
            # run.c searches for the longest added token at each place of a text, and knows none of these options
            strange = [key for key in ("lstrip", "rstrip", "single_word") if entry.get(key)]
            if strange and id not in control:
                raise ExportError(f"{strange[0]} of the added token {name!r} is not supported")
            if name:
                tokens[id] = Token(name.encode(), type)
        for id in control:
            if tokens[id].text:
                tokens[id] = tokens[id]._replace(type=CONTROL)
        return tokens

    def tokenizer(self) -> Tokenizer:
        plain = self.of_model(self.base) if self.base else self.of_json()
        special = {name: self.ids[name] for name in self.special().values() if name in self.ids}
        if self.base:
            special |= {t.text.decode(): id for id, t in enumerate(self.base.tokens) if t.type == CONTROL}
        chat = plain.with_template(self.chat_template(), self.special(), special | self.added_ids)
        used = {item for script in chat.template.parts for item in script} if chat.template else set()
        for id, token in self.added.items():
            if id in used and (token.get("lstrip") or token.get("rstrip")):
                say("note", f"no chat template is stored: its token {token['content']} has lstrip or rstrip")
                return plain
        return chat

    def of_model(self, base: Tokenizer) -> Tokenizer:
        """tokenizer.model, with spaces put in front of texts where transformers puts them."""
        tokens = self.tokens(dict(enumerate(base.tokens)))
        if base.unk_id >= 0:
            tokens[base.unk_id] = base.tokens[base.unk_id]  # self.tokens() has made it a control token
        bos, add_bos = self.bos()
        found = replace(base, tokens=tokens, bos_id=bos, add_bos=add_bos, stop_ids=self.stop_ids())
        if not self.config or not base.add_dummy_prefix:
            return found
        llama = str(self.config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
        legacy = bool(self.config.get("legacy", not llama))
        prefix = self.config.get("add_prefix_space") is not False
        return replace(
            found,
            add_dummy_prefix=prefix,
            prefix_after_special=prefix and legacy,
            no_prefix_before_space=llama or not legacy,
        )

    def of_json(self) -> Tokenizer:
        model = self.json["model"]
        refuse(model, "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        for step in flattened(self.json.get("decoder"), "decoders"):
            if step["type"] not in PLAIN_DECODERS and step.get("content") != " ":  # that of a Replace of '▁'
                step = f"{json.dumps(step):.200}"
                say("note", f"this step of the tokenizer's decoder is left out: {step}")
        normalizer = flattened(self.json.get("normalizer"), "normalizers")
        if any(step["type"] == "ByteLevel" for step in normalizer):
            raise ExportError("a normalizer of the type ByteLevel is not supported, only a pre_tokenizer")
        steps = normalizer + flattened(self.json.get("pre_tokenizer"), "pretokenizers")
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        make = byte_level_token if byte_level else self.sentencepiece_token
        tokens = self.tokens({id: make(name) for name, id in self.vocab.items()})
        patterns, prefix = self.words(steps, byte_level, tokens)
        unk = self.ids.get(model.get("unk_token") or "", -1)
        if byte_level and unk >= 0 and model.get("fuse_unk") and sum(t.type == BYTE for t in tokens) < 256:
            raise ExportError("fuse_unk is not supported for a byte-level tokenizer without a token for each byte")
        if not byte_level and unk >= 0:
            tokens[unk] = tokens[unk]._replace(type=UNKNOWN)
        bos, add_bos = self.bos()
        if unk in (bos, *self.stop_ids()):
            unk = -1  # unknown bytes are left out rather than become the start or the end of a text
        return ranked_bpe(
            tokens,
            merges_of(model["merges"], self.vocab, tokens),
            patterns,
            bos_id=bos,
            unk_id=unk,
            stop_ids=self.stop_ids(),
            add_bos=add_bos,
            add_dummy_prefix=prefix in ("first", "always", "each"),
            prefix_after_special=prefix in ("always", "each"),
            no_prefix_before_space=prefix in ("first", "always"),
            ignore_merges=bool(model.get("ignore_merges")),
            kind=BYTE_LEVEL_BPE if byte_level else SENTENCEPIECE_BPE,
        )

    def sentencepiece_token(self, name: str) -> Token:
        type = token_type(name.encode())
        lost = type == BYTE and not self.json["model"].get("byte_fallback")
        return token_of(name.encode(), UNUSED if lost else type)

    def words(self, steps: list[Any], byte_level: bool, tokens: list[Token]) -> tuple[list[str], str]:
        """The patterns of words, and when a text gets a space in front; `steps` normalise, then cut.

        "never"; "first": only the first text; "always": also a text after an added token; neither of these two if it
        begins with a space; "each": all texts, even if they begin with a space.
        """
        patterns: list[str] = [] if byte_level else words_at_spaces(tokens)
        prefix, bars = "never", False  # bars: spaces have become '▁'
        for step in steps:
            kind, pattern, space = step["type"], step.get("pattern"), step.get("add_prefix_space", True)
            isolated = step.get("behavior") == "Isolated" and not step.get("invert")
            if step.get("behavior") == "Removed" and step.get("invert"):  # the same if the pattern leaves nothing out
                isolated = bool(np.all(characters(f"(?:{step['pattern'].get('Regex', '(?!)')})")[: SURROGATES.start]))
            if kind == "NFC":
                note_nfc()
            elif byte_level and kind == "Digits":
                patterns.append(DIGITS if step.get("individual_digits") else DIGITS + "+")
            elif byte_level and kind == "Split" and isolated:
                patterns.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
            elif kind == "ByteLevel" and not (patterns and space):  # else each word would get a space
                prefix = "always" if space else "never"
                patterns += [GPT2] if step.get("use_regex", True) else []
            elif not byte_level and step == {"type": "Prepend", "prepend": BAR}:
                prefix = "each"
            elif not byte_level and step == {"type": "Replace", "pattern": {"String": " "}, "content": BAR}:
                bars = True
            elif not (byte_level or bars) and kind == "Metaspace" and step.get("replacement", BAR) == BAR:
                bars = True
                if prefix == "never":
                    prefix = step.get("prepend_scheme", "always" if space else "never")
                patterns = [" [^ ]*|[^ ]+"] if step.get("split", True) else patterns
            elif not (bars and kind == "Split" and pattern == {"String": " "}):  # no space is left to split at
                raise ExportError(f"this step of normalizer or pre_tokenizer is not supported: {json.dumps(step):.200}")
        if byte_level:
            return patterns, prefix
        if not bars:
            raise ExportError("expected a tokenizer.json that is byte-level or writes spaces as '▁', found neither")
        sought_in_normalised = any(t.get("normalized") and not t.get("special") for t in self.added.values())
        if prefix == "each" and sought_in_normalised:
            raise ExportError("\"normalized\" added tokens are not supported if each text gets a '▁' in front")
        late = [token.text for token in tokens if token.type == USER_DEFINED_NORMALIZED]
        if any(c in text for c in (b" ", BAR.encode()) for text in late):
            raise ExportError('an added token with "normalized" and a space in it is not supported')
        if not self.json["model"].get("byte_fallback") and not self.json["model"].get("fuse_unk"):
            raise ExportError("expected byte_fallback or fuse_unk in tokenizer.json, found neither")
        return patterns, prefix

    def chat_template(self) -> str | None:
        if (self.folder / "chat_template.jinja").is_file():
            return read_text(self.folder / "chat_template.jinja")
        found = self.config.get("chat_template") or self.read("chat_template.json").get("chat_template")
        if isinstance(found, (list, dict)):  # several of them, by name
            names = found if isinstance(found, dict) else {str(t.get("name")): t.get("template") for t in found}
            found = names.get("default")
            if found is None:
                say("note", f"no chat template is stored: none is named default, found {', '.join(names)}")
        return found if isinstance(found, str) else None


def flattened(step: Any, inside: str) -> list[Any]:
    """A step of the library's pipeline as a list; a sequence has its steps under the key `inside`."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[inside] for inner in flattened(part, inside)]
    return [step]


def read_tokenizer(path: Path) -> Tokenizer:
    """From a folder, or from a file that is recognised by its first bytes; llama2.c's begin with a small int32."""
    with naming(path):
        if path.is_dir():
            return TokenizerFolder(path).tokenizer()
        kind = kind_of(path)
        if kind == "a JSON file":
            return TokenizerFolder(path.parent, path).tokenizer()
        if kind == "a GGUF file":
            return tokenizer_of_gguf(read_gguf(path)[0])
        data = path.read_bytes()
        if kind == "a tokenizer file of this program":
            return Tokenizer.from_bytes(data)
        if kind == "a tiktoken vocabulary":
            return tokenizer_of_tiktoken(data)
        if kind == "a tekken vocabulary, as written by Mistral":
            return tokenizer_of_tekken(read_json(path))
        if kind == "a SentencePiece model":
            return tokenizer_of_model(data)
        if kind is None and data[2:4] == b"\0\0":
            return tokenizer_of_llama2c(data)
        raise ExportError(f"expected a tokenizer, found {kind or 'a file of an unknown kind'}")


# ---------------------------------------------------------------------------------------------------------
# 8. Pre-tokenizers: from regular expressions that cut text into words to the tables that run.c steps through

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
CASED = (  # letters that have a case, as in DeepSeek-LLM's tokenizer
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ"
    r"-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    r"ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = [
    r"[\r\n]",
    rf"\s?[{CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    DEEPSEEK_CODER[3],
    r"\p{N}+",
]
DIGITS = "[[:Digits:]]"  # stands for what the pre-tokenizer Digits finds; no regular expression finds just that

GGUF_PATTERNS = {  # by llama.cpp's names of pre-tokenizers, tokenizer.ggml.pre
    name: patterns
    for names, patterns in [
        ("gpt-2 gpt2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4", [GPT2]),
        ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe", [LLAMA3]),
        ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan kormo f2llmv2 solar-open", [QWEN2]),
        ("tekken", [TEKKEN]),
        ("deepseek-coder", DEEPSEEK_CODER),
        ("deepseek-llm", DEEPSEEK_LLM),
        ("smollm starcoder refact command-r codeshell minerva-7b exaone mellum2", [DIGITS, GPT2]),
    ]
    for name in names.split()
}
GGUF_ADDS_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
GGUF_IGNORES_MERGES = GGUF_ADDS_BOS

PROPERTY = re.compile(r"\\[pP]\{\^?\w+\}|\\[sSdD]")
SURROGATES = slice(0xD800, 0xE000)  # code points that are no characters
N_CODES = 0x110000 + 256  # entries of char_class: code points, then bytes that are not UTF-8 (U+FFFD's class)


@cache
def all_characters() -> str:
    return "".join(map(chr, [*range(SURROGATES.start), *range(SURROGATES.stop, 0x110000)]))


@cache
def characters(expression: str) -> NDArray[np.bool_]:
    """A mask (0x110000): the code points that an expression for one character matches.

    Asks the `tokenizers` library itself, because Python's tables of Unicode may be older or newer.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    if expression == DIGITS:  # words: others, digits, others, and so on
        others = "".join(word for word, _ in pre_tokenizers.Digits().pre_tokenize_str(all_characters())[::2])
    else:
        others = normalizers.Replace(Regex(f"{expression}+"), "").normalize_str(all_characters())
    found = np.ones(0x110000, bool)
    found[np.frombuffer(others.encode("utf-32-le"), np.uint32)] = False
    # Surrogates cannot be asked for. A property or a class has them if it has the last code point.
    found[SURROGATES] = found[-1] and PROPERTY.search(expression) is not None
    return found


ESCAPED = r"\\[pP]\{\^?\w+\}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\[rntfvsSdD]|\\[^\w]"
SET = (
    rf"{re.escape(DIGITS)}|\[(?:\^(?!\])|(?![\^\]]))(?:{ESCAPED}|[^\\\[\]&]|&(?!&))+\]|{ESCAPED}|[^\\\[\](){{}}?*+|.^$]"
)
# `{1,3}+` means other things to other engines
STRUCTURE = r"\(\?(?:i?:|[!=])|\{\d+(?:,\d*)?\}(?!\+)|[()|?*+$]"
PRIVATE = 0xF0000  # private-use characters, each of which stands for a set
MATCHED = 0  # the index of the instruction that reports a match


class Automaton:
    """A regular expression as a state machine, which finds in one pass what Perl would find.

    Each set of characters becomes one private-use character, so that the standard library can parse the
    expression. It is compiled to a program. Many of its instructions are followed at a time, in the order in which
    Perl would try them (Thompson 1968, Pike 1987); a state is the tuple of these. A look-ahead is decided when the
    next character is known, so a step reports whether a word ends before that character.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.sets: list[str] = []  # expressions for one character
        text = re.sub(rf"(?P<structure>{STRUCTURE})|(?P<set>{SET})|.", self.letter, pattern, flags=re.DOTALL)
        try:
            tree = _parser.parse(text)
        except (re.error, RecursionError, OverflowError):
            self.refuse()
        # (operation, next instructions, set that is tested)
        self.program: list[tuple[str, tuple[int, ...], str]] = [("match", (), "")]
        self.start: tuple[int, ...] = (self.build(tree, MATCHED),)

    def refuse(self) -> NoReturn:
        raise ExportError(f"this pattern of the pre-tokenizer is not supported: {self.pattern:.200}")

    def letter(self, match: re.Match[str]) -> str:
        if match["set"] is None:
            return match[0] if match["structure"] else self.refuse()
        if match[0] not in self.sets:
            self.sets.append(match[0])
        return chr(PRIVATE + self.sets.index(match[0]))

    def set_of(self, items: Any, any_case: bool) -> str | None:
        """The set of characters that a part of the tree matches, None if it is more than one set."""
        if len(items) != 1 or str(items[0][0]) != "LITERAL":
            return None
        found = self.sets[items[0][1] - PRIVATE]
        if any_case and len(found) > 1:
            self.refuse()
        return f"(?i:{found})" if any_case and found.isalpha() else found

    def add(self, what: str, to: tuple[int, ...], of: str = "") -> int:
        if len(self.program) > 1 << 16:
            self.refuse()
        self.program.append((what, to, of))
        return len(self.program) - 1

    def build(self, items: Any, then: int, any_case: bool = False) -> int:
        """Compiles `items`, a sequence that goes on at `then`; returns its first instruction."""
        last = then == MATCHED
        for i in reversed(range(len(items))):
            what, value = str(items[i][0]), items[i][1]
            if what == "LITERAL":
                then = self.add("set", (then,), self.set_of(items[i : i + 1], any_case) or "")
            elif what in ("IN", "BRANCH"):  # the parser makes IN of alternatives of one character
                branches = value[1] if what == "BRANCH" else [[item] for item in value]
                then = self.add("split", tuple(self.build(branch, then, any_case) for branch in branches))
            elif what == "SUBPATTERN" and value[1] in (0, re.IGNORECASE) and not value[2]:
                then = self.build(value[3], then, any_case or bool(value[1]))
            elif what == "MAX_REPEAT" or (what == "POSSESSIVE_REPEAT" and self.acts_greedy(items, i, any_case, last)):
                then = self.build_repeat(value, then, any_case)
            elif what in ("ASSERT", "ASSERT_NOT") and value[0] == 1 and self.set_of(value[1], any_case):
                then = self.add(what, (then,), self.set_of(value[1], any_case) or "")
            elif what == "AT" and str(value) == "AT_END":  # the end of a line or of the text
                then = self.add("ASSERT_NOT", (then,), r"[^\n]")
            else:
                self.refuse()
        return then

    def build_repeat(self, repeat: Any, then: int, any_case: bool) -> int:
        (least, most, part), at = repeat, then
        if most == _parser.MAXREPEAT:
            at = self.add("split", ())
            self.program[at] = ("split", (self.build(part, at, any_case), then), "")
        elif most > 100:
            self.refuse()
        else:
            for _ in range(most - least):
                at = self.add("split", (self.build(part, at, any_case), then))
        for _ in range(least):
            at = self.build(part, at, any_case)
        return at

    def acts_greedy(self, items: Any, i: int, any_case: bool, last: bool) -> bool:
        """Whether a possessive repetition is like a greedy one: what may follow it matches none of its characters."""
        own = self.set_of(items[i][1][2], any_case)
        for other in items[i + 1 :]:
            repeat = str(other[0]).endswith("_REPEAT")
            follows = self.set_of(other[1][2] if repeat else [other], any_case)
            if own is None or follows is None or np.any(characters(own) & characters(follows)):
                return False
            if not (repeat and other[1][0] == 0):
                return True
        return last and own is not None  # inside a group, what follows the group is not known here

    def step(self, state: tuple[int, ...], inside: Callable[[str], bool]) -> tuple[tuple[int, ...], bool]:
        """The state after a character (`inside` tells if a set has it), and whether a match ends before it."""
        following: dict[int, None] = {}
        seen: set[int] = set()
        waiting = list(reversed(state))
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            what, to, of = self.program[at]
            if what == "match":
                return tuple(following), True
            if what == "split":
                waiting.extend(reversed(to))
            elif what == "set":
                following |= {to[0]: None} if inside(of) else {}
            elif inside(of) == (what == "ASSERT"):
                waiting.append(to[0])
        return tuple(following), False


def word_tables(patterns: Sequence[str]) -> WordTables:
    """The tables for several patterns: each cuts the matches of the one before it, and the text between these."""
    if not patterns:
        return NO_WORDS
    automata = [Automaton(pattern) for pattern in patterns]

    # Characters in the same sets share a class. Class 0 is the end of the text, class 1 has the most characters.
    names = sorted({of for automaton in automata for _, _, of in automaton.program if of})
    signature = np.stack([characters(name) for name in names], axis=1)
    packed = np.packbits(signature, axis=1)
    _, firsts, classes, counts = np.unique(packed, True, True, True, axis=0)  # first rows, inverse, counts
    order = np.argsort(-counts, kind="stable")
    if len(order) > 255:
        raise ExportError(f"the pre-tokenizer: expected up to 255 classes of characters, found {len(order)}")
    rank = np.argsort(order) + 1
    kinds = rank[classes.reshape(-1)].astype(np.uint8)
    members = {name: (False, *signature[firsts[order], i].tolist()) for i, name in enumerate(names)}

    # State 0 is dead, then come the states in which the automata start.
    states: dict[tuple[int, tuple[int, ...]], int] = {(i, a.start): i + 1 for i, a in enumerate(automata)}
    transitions: list[tuple[int, ...]] = [(0,) * (len(order) + 1)]
    for i, state in (todo := list(states)):  # todo grows meanwhile
        row = []
        for kind in range(len(order) + 1):
            following, match = automata[i].step(state, lambda name, kind=kind: members[name][kind])  # type: ignore[misc]
            if following and (i, following) not in states:
                states[i, following] = len(states) + 1
                todo.append((i, following))
            row.append(2 * (states[i, following] if following else 0) + match)
        transitions.append(tuple(row))
        if len(states) > 1 << 16:
            raise ExportError(f"the pre-tokenizer: expected up to {1 << 16} states, found more: {patterns}")
    char_class = kinds.tobytes() + kinds[0xFFFD:0xFFFE].tobytes() * 256
    return WordTables(char_class, tuple(transitions), len(automata))


# ---------------------------------------------------------------------------------------------------------
# 9. Chat templates

TEMPLATE_PARTS = (
    "before_user",  # the start of a conversation without a system text
    "before_system",
    "after_system",  # up to the user's first text
    "after_user",  # up to where an answer starts
    "before_answer",  # text between after_user and an earlier answer, mostly none
    "after_answer",
    "next_user",  # after after_answer, up to the user's next text
    "opens_answer",  # in front of a new answer only, not in the history
    "opens_answer_no_think",  # replaces opens_answer if the model is asked not to think
    "end_of_thought",  # a mark: an earlier answer loses everything up to its last occurrence
)
HAS_TEMPLATE, HAS_SYSTEM = 1, 2
SYSTEM_LAST, NO_EMPTY_SYSTEM = 1 << 13, 1 << 14  # the system text stands in the last turn; an empty one is left out
TRIMS = 4  # the lowest of the 8 flags of find_trimming
NEWLINES_AFTER_THOUGHT, SPACES_AFTER_THOUGHT, HAS_NO_THINK = 1 << 10, 1 << 11, 1 << 12

THOUGHTS = [  # how models mark the start and the end of what they think
    *((f"<{word}>", f"</{word}>") for word in ("think", "thinking", "thought", "seed:think", "mm:think", "reasoning")),
    *(("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")),
]
# Messages that no template contains: the parts of a template are what is rendered around them.
ANY_SYSTEM, *ANY_TURNS = ["zqsystemqz", "zquseraqz", "zqanswerbqz", "zqusercqz", "zqanswerdqz", "zquserezqz"]
ANY_THOUGHT = "zqthoughtqz"


class ChatTemplate:
    """A checkpoint's own chat template, rendered as transformers does it."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

        # templates can get out of the sandbox of older versions
        if [int(n) for n in re.findall(r"\d+", version("jinja2"))] < [3, 1, 6]:
            raise ImportError(f"expected jinja2 3.1.6 or newer, found {version('jinja2')}")

        def raise_exception(message: str) -> NoReturn:
            raise ExportError(message)

        def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source, self.special = source, special
        # {% generation %} marks what training counts; here it becomes a plain block, {% with %}.
        known = re.sub(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})", r"\1\2with", source)
        with naming(None):
            self.template = environment.from_string(known)

    def render(self, turns: Sequence[str], system: str | None = None, **options: Any) -> str:
        """Renders turns (the user's, an answer, the user's, ...); after the user's, up to where the model answers."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        given: dict[str, Any] = {"messages": messages, "tools": None, "documents": None}
        given["add_generation_prompt"] = len(turns) % 2 == 1
        try:
            text = self.template.render(**given, **self.special, **options)
            text.encode()  # fails for half a surrogate pair, which is no text
            return text
        except ExportError:
            raise
        except MemoryError:
            raise ExportError(BEYOND) from None
        except Exception as error:  # noqa: BLE001
            message = str(error).partition("\n")[0]
            raise ExportError(f"it fails for plain messages ({type(error).__name__}: {message})") from None


def cut(text: str, marks: Sequence[str]) -> list[str]:
    """Cuts a text at marks, each of which must occur once and in this order."""
    between = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ExportError("it leaves out, changes or moves a message")
        between.append(before)
    if any(mark in part for part in [*between, text] for mark in (ANY_SYSTEM, *ANY_TURNS)):
        raise ExportError("it repeats a message, or moves one")
    return [*between, text]


def find_template(source: str, special: Mapping[str, str], added: Mapping[str, int]) -> Template | None:
    """The parts of a chat template; None unless they give what the template gives for several conversations."""
    try:
        chat = ChatTemplate(source, special)
        turns = ANY_TURNS
        before_user, opened = cut(chat.render(turns[:1]), turns[:1])
        *_, tail = cut(chat.render(turns[:2]), turns[:2])  # what ends a conversation after an answer
        _, answered, between, _ = cut(chat.render(turns[:3]), turns[:3])
        after_user = common_start(opened, answered, added)
        after_answer = tail if between.startswith(tail) else between
        parts = dict.fromkeys(TEMPLATE_PARTS, "")
        parts |= {"before_user": before_user, "after_user": after_user, "after_answer": after_answer}
        parts["before_answer"] = answered.removeprefix(after_user)
        parts["next_user"] = between.removeprefix(after_answer)
        parts["opens_answer"] = opened.removeprefix(after_user)
        flags = HAS_TEMPLATE
        check_template(chat, parts, turns)
        try:
            before_system, after_system, _ = cut(chat.render(turns[:1], ANY_SYSTEM), [ANY_SYSTEM, turns[0]])
            with_system = parts | {"before_system": before_system, "after_system": after_system}
            three = chat.render(turns[:3], ANY_SYSTEM)
            last = before_system == before_user and three.startswith(before_user + turns[0])
            check_template(chat, with_system, turns, ANY_SYSTEM, system_last=last)
            left_out = chat.render(turns[:3], "") == chat.render(turns[:3])
            parts, flags = with_system, flags | HAS_SYSTEM | SYSTEM_LAST * last | NO_EMPTY_SYSTEM * left_out
        except ExportError as error:
            say("note", f"the chat template takes no system message: {error}")
        flags |= find_trimming(chat, ANY_SYSTEM if flags & HAS_SYSTEM else None, bool(flags & SYSTEM_LAST))
        flags |= find_thoughts(chat, parts)
        flags |= find_no_think(chat, parts)
        if "strftime_now" in source:
            say("note", "the chat template inserts the date; today's is stored")
        # run.c searches for end_of_thought in text, so it is not replaced by the ids of tokens
        scripts = (script_of(text, {} if x == "end_of_thought" else added) for x, text in parts.items())
        return Template(tuple(scripts), flags)
    except ExportError as error:
        say("note", f"no chat template is stored: {error}")
        return None


def common_start(a: str, b: str, added: Mapping[str, int]) -> str:
    """The longest common start of two texts that does not cut a token in two."""
    symbol = re.compile("|".join([*map(re.escape, sorted(added, key=len, reverse=True)), "."]), re.DOTALL)
    return "".join(os.path.commonprefix([symbol.findall(a), symbol.findall(b)]))


def check_template(
    chat: ChatTemplate, parts: dict[str, str], turns: list[str], system: str | None = None, **options: Any
) -> None:
    """Checks that the parts, joined as run.c joins them, give what the template renders.

    The option `kept` is what should be left of each turn in the history; by default, all of it. With `system_last`,
    the system text stands in the last turn instead of the first.
    """
    kept, last = options.pop("kept", turns), options.pop("system_last", False)
    for length in range(1, len(turns) + 1, 2):  # conversations that end with the user's turn
        expected = parts["before_user" if system is None else "before_system"]
        ends = []
        for i, turn in enumerate(kept[:length]):
            before = "before_answer" if i % 2 else "next_user" if i else ""
            expected += parts.get(before, "")
            if system is not None and i == (length - 1 if last else 0):
                expected += system + parts["after_system"]
            expected += turn + parts["after_answer" if i % 2 else "after_user"]
            ends.append(len(expected))
        expected += parts["opens_answer"]
        found = chat.render(turns[:length], system, **options)
        if found != expected:
            same = len(os.path.commonprefix([expected, found]))
            turn_number = next((i + 1 for i, end in enumerate(ends) if same < end), length)
            whose = "the user's" if turn_number % 2 else "an answer"
            where = f"turn {turn_number} of {length}, {whose}"
            raise ExportError(f"it does not treat all turns of a conversation alike: {where}")


def find_trimming(chat: ChatTemplate, system: str | None, last: bool) -> int:
    """Flags for what is trimmed at the start and at the end: system, user after system, other user, answer."""
    flags = 0
    texts = [ANY_SYSTEM, *ANY_TURNS[:3]]
    for bit in range(0 if system is not None else 4, 8):
        given = system if bit < 4 else None
        plain = chat.render(ANY_TURNS[:3], given)
        found = set()
        for place in ([0], [3] if last else [1], [1, 3], [2])[bit // 2]:
            spaced = f"{texts[place]}\n " if bit % 2 else f" \n{texts[place]}"
            first, *turns = [spaced if i == place else text for i, text in enumerate(texts)]
            text = chat.render(turns, first if given else None)
            kept = text == plain.replace(texts[place], spaced) or bit >= 6  # other changes of an answer do not count
            found.add("trimmed" if text == plain else "kept" if kept else "changed")
        if found == {"trimmed"}:
            flags |= TRIMS << bit
        elif found != {"kept"}:
            raise ExportError("it neither keeps nor trims all spaces around a message")
    return flags


def find_thoughts(chat: ChatTemplate, parts: dict[str, str]) -> int:
    """Sets end_of_thought if earlier answers lose what the model thought; returns flags for spaces lost with it."""
    for begin, end in THOUGHTS:
        if end not in chat.source:
            continue
        _, opened, inside = (parts["after_user"] + parts["opens_answer"]).rpartition(begin)
        said = ("" if opened and end not in inside else begin) + ANY_THOUGHT + end

        def with_thoughts(gap: str, said: str = said) -> list[str]:
            return [said + gap + turn if i % 2 else turn for i, turn in enumerate(ANY_TURNS)]

        if ANY_THOUGHT in chat.render(with_thoughts("\n\n")):  # then it must keep all of it as it is
            check_thoughts(chat, parts, with_thoughts("\n\n"))
            continue
        plain = chat.render(ANY_TURNS[:3])
        newlines, spaces = (chat.render(with_thoughts(gap)[:3]) == plain for gap in ("\n\n", " \n\t"))
        parts["end_of_thought"] = end
        gap = "" if spaces or newlines else "\n\n"
        kept = [gap + turn if i % 2 else turn for i, turn in enumerate(ANY_TURNS)]
        check_thoughts(chat, parts, with_thoughts("\n\n"), kept=kept)
        return SPACES_AFTER_THOUGHT * spaces | NEWLINES_AFTER_THOUGHT * (spaces or newlines)
    return 0


def check_thoughts(chat: ChatTemplate, parts: dict[str, str], turns: list[str], **options: Any) -> None:
    try:
        check_template(chat, parts, turns, **options)
    except ExportError as error:
        raise ExportError(f"it changes what the model has thought: {error}") from None


def find_no_think(chat: ChatTemplate, parts: dict[str, str]) -> int:
    """Sets opens_answer_no_think and returns its flag if the template knows enable_thinking=False."""
    if "enable_thinking" not in chat.source:
        return 0
    try:
        before_user, opened = cut(chat.render(ANY_TURNS[:1], enable_thinking=False), ANY_TURNS[:1])
        if before_user != parts["before_user"] or not opened.startswith(parts["after_user"]):
            raise ExportError("enable_thinking changes more than the start of an answer")
        opens = opened.removeprefix(parts["after_user"])
        check_template(chat, parts | {"opens_answer": opens}, ANY_TURNS, enable_thinking=False)
    except ExportError as error:
        say("note", f"the model cannot be asked not to think: {error}")
        return 0
    parts["opens_answer_no_think"] = opens
    return HAS_NO_THINK


def script_of(text: str, added: Mapping[str, int]) -> Script:
    """Cuts a text into the ids of tokens, the longest at each place, and the text between them."""
    names = [*map(re.escape, sorted(added, key=len, reverse=True)), "(?!)"]  # (?!) matches nowhere
    parts = re.split(f"({'|'.join(names)})", text)
    return tuple(added[part] if i % 2 else part for i, part in enumerate(parts) if part)


# ---------------------------------------------------------------------------------------------------------
# 10. Writing


def progress(what: str, total: int) -> tqdm[Any]:
    """A progress bar, on a terminal only."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when it is complete, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp-{os.urandom(8).hex()}")
    try:
        # "x" creates a new file and follows no link. Long writes let the kernel keep it in large pages, which are
        # faster to read.
        with open(temporary, "xb", buffering=WRITE_BUFFER) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):  # one of the inputs
            raise
        raise ExportError(f"cannot write: {error.strerror}", path) from None
    finally:
        with suppress(OSError):  # it has been renamed, or was never created
            temporary.unlink()


def tokenizer_path(path: Path) -> Path:
    """OUT.tokenizer.bin, where run.c looks for the tokenizer of OUT.bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".tokenizer.bin")


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Adds or removes tokens at the end, which no text needs, until there are as many as the model has.

    Embeddings may have more rows, to make a round number (as Qwen's), or lack that of an added padding token.
    """
    tokens, missing = tokenizer.tokens, vocab_size - len(tokenizer.tokens)
    counts = f"the model has {vocab_size} tokens, the tokenizer {len(tokens)}"
    if 0 < missing <= vocab_size // 16 and vocab_size % 64 == 0:
        say("warning", f"{counts}: those that only the model has print nothing")
        return replace(tokenizer, tokens=tokens + [Token(b"", UNUSED)] * missing)
    if missing < 0 and not any(token.type in (NORMAL, BYTE) for token in tokens[vocab_size:]):
        first = tokens[vocab_size].text.decode(errors="replace")
        say("warning", f"{counts}, of which those from {first!r} on are left out")
        stop_ids = tuple(id for id in tokenizer.stop_ids if id < vocab_size)
        used = tokenizer.template.parts if tokenizer.template else ()
        lost = any(isinstance(item, int) and item >= vocab_size for item in chain.from_iterable(used))
        template = None if lost else tokenizer.template
        return replace(tokenizer, tokens=tokens[:vocab_size], stop_ids=stop_ids, template=template)
    if missing:
        raise ExportError(f"{counts}: expected the model's own (--tokenizer)")
    return tokenizer


def write_model(path: Path, model: Model, tokenizer: Tokenizer, dtype: str = "auto", verify: bool = False) -> str:
    """Writes OUT.bin as `path` and OUT.tokenizer.bin beside it; returns the dtype that was chosen.

    Leaves neither file behind if one cannot be written, or does not fit the other.
    """
    config = model.config
    tokenizer = fitted(tokenizer, config.vocab_size)
    tokenizer = replace(tokenizer, stop_ids=unique(tokenizer.stop_ids + model.stop_ids)[:MAX_STOP_IDS])
    if dtype == "auto":
        dtype = choose_dtype(model)
    with atomic(tokenizer_path(path)) as tokenizer_file:
        tokenizer_file.write(tokenizer.to_bytes())
        tokenizer_file.flush()
        with atomic(path) as file, progress("writing", file_size(config)) as bar:
            for chunk in prefetched(weights_file(model, dtype, tokenizer.vocab_hash)):
                bar.update(file.write(chunk))
            if verify:
                file.flush()
                compare(Path(file.name), model, dtype, tokenizer.vocab_hash)
    return dtype


def compare(path: Path, model: Model, dtype: str, vocab_hash: int) -> None:
    """Makes the weights file again from the source, and compares it with the file that was written, byte by byte."""
    at = 0
    with open(path, "rb") as file, progress("verifying", file_size(model.config)) as bar:
        for chunk in prefetched(weights_file(model, dtype, vocab_hash)):
            if file.read(len(chunk)) != chunk:
                raise ExportError(f"differs from its source between bytes {at} and {at + len(chunk)}", path)
            at += len(chunk)
            bar.update(len(chunk))
        if file.read(1):
            raise ExportError(f"expected {at} bytes, found more", path)


def weights_file(model: Model, dtype: str, vocab_hash: int) -> Iterator[bytes | memoryview]:
    """The weights file, from its first byte to its last."""
    end = TENSORS_START
    yield header(model.config, dtype, vocab_hash)
    for start, specs in layout(model.config):
        yield bytes(start - end)
        for spec in specs:
            size = 0
            for piece in model.tensors[spec.name].pieces():
                yield encode(piece, dtype, spec.name).view(np.uint8).data.cast("B")
                size += piece.size
            if size != spec.size:
                raise ExportError(f"tensor {spec.name}: expected {spec.size} elements, found {size}")
        end = start + 2 * sum(spec.size for spec in specs)


def prefetched(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same chunks; another thread makes the next while this one is written."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = worker.submit(next, chunks, None)
            yield chunk


# ---------------------------------------------------------------------------------------------------------
# 11. The command line

HELP = """\
SOURCE is one of
  DIRECTORY in Hugging Face's format: config.json; model.safetensors, pytorch_model.bin or their shards;
      tokenizer.json, tokenizer.model, tekken.json, or vocab.json with merges.txt; and the other settings files
        export.py SmolLM2-135M-Instruct -o smollm2.bin
  DIRECTORY in Meta's format, or Mistral's: params.json, consolidated.*.pth or consolidated.safetensors, tokenizer.model
      or tekken.json
        export.py Llama3.2-1B -o llama3.bin
  FILE.gguf of llama.cpp, quantised or not; if it is split, the first file
        export.py Qwen3-0.6B-Q8_0.gguf -o qwen3.bin
  FILE.bin of llama2.c, version 0
        export.py stories260K.bin --tokenizer tok512.bin -o stories.bin

PyTorch's files (.bin, .pth) require the package torch. Random weights, to measure speed: models/random_weights.py.
"""


def natural(text: str, least: int = 0) -> int:
    number = int(text)
    if not least <= number < 2**31:
        raise argparse.ArgumentTypeError(f"expected {least} to {2**31 - 1}, found {text}")
    return number


def positive(text: str) -> int:
    return natural(text, least=1)


def check_outputs(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses, before a long export, outputs that are not regular files, or that are inputs as well."""
    for output in (path, tokenizer_path(path)):
        if output.exists() and not output.is_file():
            raise ExportError("expected a new or a regular file, found another kind", output)
        if any(file.exists() and output.exists() and output.samefile(file) for file in inputs):
            raise ExportError("would overwrite a file that it is made from", output)


def context_length(model: Model, wanted: int | None) -> int:
    """The length of the context: at most the sliding window, because run.c lets a token see all before it."""
    length = wanted or model.config.max_seq_len
    if model.window is None or length <= model.window:
        return length
    shorter = f"the context is cut from {length} to {model.window} positions, the sliding window"
    say("warning", f"{shorter}: run has full attention, which is the same within the window")
    return model.window


def open_model(args: argparse.Namespace) -> Model:
    model = open_source(args.source)
    return with_adapter(model, args.lora) if args.lora else model


def read_inputs(args: argparse.Namespace) -> tuple[Path, Tokenizer]:
    """The tokenizer and its file; opens the model to find them, and to see that it can be opened."""
    with naming(args.source):
        with redirect_stderr(io.StringIO()):  # export() opens the model again and prints its warnings
            model = open_model(args)
        tokenizer = args.tokenizer or model.tokenizer_file
        if tokenizer is None:
            size = f"of {model.config.vocab_size} tokens ({', '.join(TOKENIZER_FILES)})"
            raise ExportError(f"found no tokenizer {size}: use --tokenizer FILE")
        return tokenizer, read_tokenizer(tokenizer)


def export(args: argparse.Namespace) -> None:
    with naming(args.source):
        folders = [folder for folder in (args.source, args.lora) if folder and folder.is_dir()]
        beside = [file for folder in folders for file in folder.iterdir()]
        if args.no_limits:
            tokenizer_file, tokenizer = read_inputs(args)
        else:  # torch maps its files, which counts as memory
            room = sum(file.stat().st_size for file in beside if file.suffix in (".bin", ".pth"))
            tokenizer_file, tokenizer = limited(lambda: read_inputs(args), room)
        model = open_model(args)
        model.config = replace(model.config, max_seq_len=context_length(model, args.max_seq_len))
        path = Path(os.path.realpath(args.output))
        beside += tokenizer_file.iterdir() if tokenizer_file.is_dir() else []
        check_outputs(path, [args.source, tokenizer_file, *beside, *{t.path for t in model.tensors.values()}])
        dtype = write_model(path, model, tokenizer, args.dtype, args.verify)
    report(args.output, model, dtype, args.verify)


def report(path: Path, model: Model, dtype: str, verified: bool = False) -> None:
    size = f"{file_size(model.config) / 1e6:,.1f} MB"
    print(f"{path}: {dtype}, {size}{', verified' if verified else ''}", file=sys.stderr)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    about = "Converts a model to the two files that run reads."
    parser = argparse.ArgumentParser("export.py", description=about, epilog=HELP, formatter_class=raw)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a checkpoint, see below")
    beside = "weights file; OUT.tokenizer.bin is written beside it"
    parser.add_argument("-o", dest="output", metavar="OUT.bin", type=Path, required=True, help=beside)
    kinds = "tokenizer.json, tekken.json, .model (SentencePiece or tiktoken), .gguf, llama2.c's .bin, or a folder"
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help=kinds)
    loses_least = "type of the weights (default: auto, which loses least)"
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=loses_least)
    parser.add_argument("--lora", metavar="DIR", type=Path, help="PEFT adapter to merge into the weights")
    parser.add_argument("--verify", action="store_true", help="compare the result with the source")
    parser.add_argument("--max-seq-len", metavar="N", type=positive, help="context length (default: the checkpoint's)")
    limits = f"take any time and memory to open the inputs, not only {READ_SECONDS} s and {READ_BYTES >> 20} MB"
    parser.add_argument("--no-limits", action="store_true", help=limits)
    args = parser.parse_args()
    return exit_status(lambda: export(args))


def exit_status(work: Callable[[], None]) -> int:
    """Does the work, and prints what is wrong in one line; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # exit as usual, so that temporary files are removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        work()
    except ExportError as error:
        say("error", error)
    except ImportError as error:
        say("error", f"{error} (pip install -r requirements.txt)")
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
