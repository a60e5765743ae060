#!/usr/bin/env python3
"""Measures models of six sizes, random weights in the shapes of real ones, beside the limits of the machine
(tests/roofline.c), and prints a table.

    make bench                      # or: python3 tests/bench.py --help

A model that does not fit is measured with fewer layers, and its speed scaled by the bytes of weights that a token
needs; such rows are marked with ~ as the estimates that they are. The files are removed unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOFLINE = ROOT / "build" / "roofline-native"  # `run -m bench`, and the limits
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from random_weights import SHAPES, random_model

from export import Config, file_size, read_tokenizer, write_model

HEAD = [
    "| model | file GB | prompt tok/s | GFLOPS | of peak | tok/s | GB/s | of a plain read | times 7b |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
]


def bytes_read(config: Config) -> int:
    """Of weights, for a token: all but the embedding, of which it needs a row, unless that is the classifier."""
    return file_size(config) - (0 if config.tied else 2 * config.vocab_size * config.dim)


def available_memory() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def that_fits(config: Config, room: int) -> Config:
    """As many of its layers as fit."""
    layers = config.n_layers
    while layers > 1 and file_size(replace(config, n_layers=layers)) > room:
        layers -= 1
    return replace(config, n_layers=layers)


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    whole = SHAPES[shape]
    room = min(int(0.7 * available_memory()), int(0.9 * shutil.disk_usage(args.folder).free))
    config = that_fits(whole, args.room or room)
    path = args.folder / f"{shape}-{config.n_layers}.bin"
    if not path.exists():
        write_model(path, random_model(config, dtype=args.dtype), read_tokenizer(ROOT / "tokenizer.bin"))
    prefill = min(args.prefill, config.max_seq_len)
    sizes = ["--prefill", prefill, "--decode", args.decode, "--repeat", args.repeat]
    threads = ["-j", args.threads] if args.threads else []
    command = [ROOFLINE, path, "--json", *sizes, *threads]
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if not args.keep:
        path.unlink()
        path.with_name(f"{path.stem}.tokenizer.bin").unlink()
    if found.returncode:
        raise SystemExit(found.stderr)
    result: dict[str, Any] = json.loads(found.stdout)
    scale = bytes_read(config) / bytes_read(whole)
    result |= {"shape": shape, "layers": config.n_layers, "whole": config == whole}
    result["file_bytes"] = file_size(whole)
    for kind in ("prefill", "decode"):
        result[kind]["tok_s"] *= scale
    return result


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def row(r: dict[str, Any], decode_7b: float | None) -> str:
    prefill, decode = r["prefill"], r["decode"]
    about = "" if r["whole"] else "~"
    factor = number(decode["tok_s"] / decode_7b) if decode_7b else ""
    cells = [
        r["shape"] + ("" if r["whole"] else f" ({r['layers']} of {SHAPES[r['shape']].n_layers} layers)"),
        f"{r['file_bytes'] / 1e9:.3g}",
        about + number(prefill["tok_s"]),
        f"{prefill['gflops']:.0f}",
        f"{prefill['ratio']:.2f}",
        about + number(decode["tok_s"]),
        f"{decode['gb_s']:.1f}",
        f"{decode['ratio']:.2f}",
        about + factor if factor else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures models of several sizes.")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models", help="for the weights")
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--room", type=int, help="bytes that a file may have (default: what memory can hold)")
    parser.add_argument("--keep", action="store_true", help="the files with the weights")
    parser.add_argument("--json", action="store_true", help="print an object for each model, and no table")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        print(f"{shape} ...", file=sys.stderr)
        results.append(measure(args, shape))
        if args.json:
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        return
    first = results[0]
    print(f"{first['isa']}, {first['threads']} threads, {args.dtype}, {os.cpu_count()} processors;", end=" ")
    print(
        f"median of {args.repeat}: a prompt of {args.prefill} tokens (15m: 256), then {args.decode} tokens one by one\n"
    )
    decode_7b = next((r["decode"]["tok_s"] for r in results if r["shape"] == "7b"), None)
    print("\n".join([*HEAD, *(row(r, decode_7b) for r in results)]))


if __name__ == "__main__":
    main()
