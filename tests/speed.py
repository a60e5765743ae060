#!/usr/bin/env python3
"""Measures run against llama.cpp: the same bf16 weights, the same threads, one after the other in each round.

    make peers                      # or: python tests/speed.py --help

llama.cpp is PyPI's llama-cpp-python, built for this machine. It gets the weights as a GGUF file, which is written
here with the `gguf` package; that both compute the same is checked by the greedy token after a prompt.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import gguf
import llama_cpp
from random_weights import SHAPES, random_model

from export import Config, Model, fnv1a, specs_of, widened, write_model
from export import Tokenizer as Tokens

MOST, DECODE, CONTEXT = 512, 32, 1024  # tokens of a prompt, and of what follows
FEW = 12  # tokens of a model larger than memory

NAMES = {  # of a layer's tensors in GGUF, by the last part but one of their Hugging Face names
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
WHOLE_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES[parts[-2]]}.weight"
    return f"{WHOLE_MODEL[name.removesuffix('.weight')]}.weight"


def interleaved(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """The rows of q or k as GGUF has them for Llama: RoPE turns rows (2i, 2i + 1) there, (i, i + d/2) here."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(path: Path, config: Config, source: Model) -> None:
    kind = gguf.GGMLQuantizationType[source.dtype()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_tokenizer_model("none")
    for part in specs_of(config):
        values = np.concatenate([np.ravel(piece) for piece in source.tensors[part.name].pieces()]).reshape(part.shape)
        if len(part.shape) == 1:  # llama.cpp wants norms in f32
            writer.add_tensor(gguf_name(part.name), widened(values))
            continue
        if part.name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, config.head_dim)
        writer.add_tensor(gguf_name(part.name), values.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with a model and a number of threads, by its C interface."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(LOG, None)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, MOST, MOST
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp cannot run it")

    def feed(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch does not own it
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def greedy(self, n: int) -> int:
        return int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (n,))))

    def prefill(self, tokens: list[int]) -> float:
        """Tokens of a prompt a second."""
        self.clear()
        start = time.perf_counter()
        self.feed(tokens)
        return len(tokens) / (time.perf_counter() - start)

    def decode(self, tokens: list[int]) -> float:
        """Tokens a second, one by one; the first is not measured."""
        self.clear()
        self.feed(tokens[:1])
        start = time.perf_counter()
        for token in tokens[1:]:
            self.feed([token])
        return (len(tokens) - 1) / (time.perf_counter() - start)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def LOG(level: int, text: bytes, data: Any) -> None:
    """llama.cpp has much to say."""


def bench(program: Path, path: Path, threads: int, kind: str, sizes: str) -> float:
    flags = f"-m bench --json -c {CONTEXT} -j {threads} {sizes}"
    made = subprocess.run([program, path, *flags.split()], capture_output=True, text=True, check=True)
    return float(json.loads(made.stdout)[kind]["tok_s"])


def repeats(prompt: int) -> int:
    """How often a prompt is read in a round: one of a few tokens is done in no time."""
    return min(MOST // prompt, 10)


def make(shape: str, folder: Path) -> tuple[Path, Path]:
    """The same random weights in both formats."""
    ours, theirs = folder / f"{shape}.bin", folder / f"{shape}.gguf"
    source = random_model(SHAPES[shape])
    if not ours.exists():
        write_model(ours, source, Tokens.from_bytes((ROOT / "tokenizer.bin").read_bytes()))
    if not theirs.exists():
        write_gguf(theirs, SHAPES[shape], source)
    return ours, theirs


def next_token_of_ours(program: Path, path: Path, text: str) -> tuple[list[int], int]:
    """The ids of a text, and the greedy token after it."""
    ids = subprocess.run([program, path, "-m", "tokenize", "-i", text], capture_output=True, text=True, check=True)
    line = subprocess.run(
        [program, path, "-t", "0", "-i", text, "-n", str(len(ids.stdout.split())), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(i) for i in ids.stdout.split()], int(json.loads(line.stdout.splitlines()[0])["id"])


def compare(program: Path, shape: str, folder: Path, threads: int, rounds: int, prompts: list[int]) -> None:
    ours, theirs = make(shape, folder)
    vocabulary = SHAPES[shape].vocab_size
    peer = LlamaCpp(theirs, threads)
    ids, greedy = next_token_of_ours(program, ours, "Once upon a time, there was a little girl")
    peer.feed(ids)
    same = "the same" if peer.greedy(vocabulary) == greedy else "ANOTHER"
    tokens = [fnv1a(bytes([i % 256, i // 256])) % vocabulary for i in range(MOST)]
    peer.prefill(tokens)  # a warm-up
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for n in prompts:
            sizes = f"--prefill {n} --decode 1 --repeat {repeats(n)}"
            pair = (
                bench(program, ours, threads, "prefill", sizes),
                statistics.median(peer.prefill(tokens[:n]) for _ in range(repeats(n))),
            )
            results.setdefault(f"prefill {n}", []).append(pair)
        sizes = f"--prefill 1 --decode {DECODE} --repeat 1"
        pair = (bench(program, ours, threads, "decode", sizes), peer.decode(tokens[: DECODE + 1]))
        results.setdefault("decode", []).append(pair)
    peer.close()
    for work, pairs in results.items():
        print_row(shape, threads, work, pairs, same)


def print_row(shape: str, threads: int, work: str, pairs: list[tuple[float, float]], same: str) -> None:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(x / y for x, y in pairs)
    digits = 1 if theirs >= 10 else 2
    print(
        f"| {shape} | {threads} | {work} | {ours:.{digits}f} | {theirs:.{digits}f} | {ratio:.2f} | {same} |",
        flush=True,
    )


def generate_ours(program: Path, path: Path, threads: int) -> float:
    flags = f"-i Hello -t 0 -n {FEW + 2} -j {threads} -c {CONTEXT}"  # the prompt is two tokens, the first comes with it
    made = subprocess.run([program, path, *flags.split()], capture_output=True, text=True, check=True)
    found = re.search(r"decode: (\d+) tokens, ([0-9.]+) tok/s", made.stderr)
    assert found and int(found[1]) == FEW + 1, made.stderr
    return float(found[2])


def generate_theirs(path: Path, threads: int) -> float:
    peer = LlamaCpp(path, threads)
    peer.feed([1, 2])
    start = time.perf_counter()
    for token in range(FEW):
        peer.feed([token + 3])
    speed = FEW / (time.perf_counter() - start)
    peer.close()
    return speed


def compare_few(program: Path, shape: str, folder: Path, threads: int, rounds: int) -> None:
    """A few tokens, with nothing else read in between: for a model larger than memory."""
    ours, theirs = make(shape, folder)
    pairs = [(generate_ours(program, ours, threads), generate_theirs(theirs, threads)) for _ in range(rounds)]
    print_row(shape, threads, f"{FEW} tokens", pairs, "not asked")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures run against llama.cpp.")
    parser.add_argument("--run", type=Path, default=ROOT / "run")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "models", help="for the weights")
    parser.add_argument("--shapes", default="110m,1b")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", default=str(MOST), help=f"their tokens, {MOST} at most, as in 8,64,{MOST}")
    parser.add_argument("--few", action="store_true", help=f"{FEW} tokens only: for a model larger than memory")
    args = parser.parse_args()
    prompts = [int(n) for n in args.prompts.split(",")]
    if not all(1 <= n <= MOST for n in prompts):
        parser.error(f"--prompts: expected numbers from 1 to {MOST}, found {args.prompts}")
    args.folder.mkdir(parents=True, exist_ok=True)
    what = "no prompts" if args.few else f"prompts of {args.prompts} tokens, {DECODE} one by one"
    print(f"llama-cpp-python {llama_cpp.__version__}, {what}; ")
    print(f"median of {args.rounds} alternating rounds, tokens a second\n")
    print("| model | threads | work | run | llama.cpp | ratio | greedy token |")
    print("|---|--:|---|--:|--:|--:|---|")
    for shape in args.shapes.split(","):
        for threads in map(int, args.threads.split(",")):
            if args.few:
                compare_few(args.run, shape, args.folder, threads, args.rounds)
            else:
                compare(args.run, shape, args.folder, threads, args.rounds, prompts)


if __name__ == "__main__":
    main()
