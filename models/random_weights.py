#!/usr/bin/env python3
"""Makes a model of a well-known shape with weights at random, to measure speed.

    models/random_weights.py SHAPE -o OUT.bin [--layers N] [--seed N] [--dtype bf16|f16]

SHAPE is 15m, 110m, 1b, 7b, 13b or 70b. The tokenizer is Llama 2's, tokenizer.bin.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export import (
    DTYPES,
    LLAMA2_TOKENIZER,
    Array,
    Config,
    Model,
    Spec,
    Tensor,
    exit_status,
    natural,
    positive,
    read_tokenizer,
    report,
    specs_of,
    write_model,
)


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


def random_model(config: Config, seed: int = 0, dtype: str = "bf16") -> Model:
    """Weights from N(0, 0.02); as in GPT-2, those that add to the residual are divided by sqrt(2 L).

    They are made at a disk's speed: 16 random bits choose one of 65,536 quantiles of the distribution. A tensor's
    values follow from the seed and its name alone. They do not repeat, lest memory be shared.
    """
    normal = NormalDist(sigma=0.02)
    quantiles = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)
    residual = quantiles / np.float32(math.sqrt(2 * config.n_layers))

    def tensor(spec: Spec) -> Tensor:
        adds = spec.name.endswith(("o_proj.weight", "down_proj.weight"))
        values = (residual if adds else quantiles).astype(DTYPES[dtype])
        return random_tensor(spec, seed, values, dtype)

    tensors = {spec.name: tensor(spec) for spec in specs_of(config)}
    return Model(Path("random"), config, tensors, tokenizer_file=LLAMA2_TOKENIZER)


def random_tensor(spec: Spec, seed: int, values: NDArray[Any], dtype: str) -> Tensor:
    """Its rows have to be asked for in their order, from the first one on."""
    width = math.prod(spec.shape[1:])
    assert len(spec.shape) == 1 or width % 4 == 0, "a draw of 64 bits is four values"
    bits = np.random.SFC64()

    def rows(start: int, stop: int) -> Array:
        nonlocal bits
        if len(spec.shape) == 1:  # a norm
            return np.ones(stop - start, DTYPES[dtype])
        if start == 0:
            bits = np.random.SFC64([seed, zlib.crc32(spec.name.encode())])
        draws = bits.random_raw((stop - start) * width // 4).view(np.uint16)
        return values[draws].reshape(-1, width)

    return Tensor(Path("random"), spec.shape, dtype.upper(), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes a model with weights at random.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", dest="output", metavar="OUT.bin", type=Path, required=True)
    parser.add_argument("--layers", metavar="N", type=positive, help="fewer layers (default: the shape's)")
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="(default: 0)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--verify", action="store_true", help="read the result again, compare")
    args = parser.parse_args()
    config = SHAPES[args.shape]

    def work() -> None:
        model = random_model(replace(config, n_layers=args.layers or config.n_layers), args.seed, args.dtype)
        write_model(args.output.resolve(), model, read_tokenizer(LLAMA2_TOKENIZER), args.dtype, args.verify)
        report(args.output, model, args.dtype, args.verify)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
