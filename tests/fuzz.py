"""Feeds the program damaged models, tokenizers, prompts and flags, and looks for anything but a clean end.

    python tests/fuzz.py [--run PATH] [--seconds N] [--seed S]

Best with the sanitizers' build (make debug). A case must end with status 0, 1 or 2, and where it fails say so in
one line. What went wrong is kept in build/fuzz, with the command that does it again.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from files import (
    MODEL_FIELDS,
    QK_NORM,
    QKV_BIAS,
    ROOT,
    TIED,
    TOKENIZER_FIELDS,
    TOKENS_START,
    Model,
    Program,
    byte_level_vocabulary,
    fix,
    patch,
)

KEEP = ROOT / "build" / "fuzz"
INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    63,
    64,
    65,
    127,
    255,
    256,
    1000,
    4095,
    4096,
    65535,
    65536,
    1 << 20,
]
INTERESTING += [
    1 << 24,
    (1 << 24) + 1,
    1 << 28,
    0x7F800000,
    0x7FC00000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFF0,
    0xFFFFFFFF,
]
TEXTS = [
    b"the cat",
    b" ",
    b"",
    b"Once upon a time",
    "caf\u00e9 \u2581 \U0001f600".encode(),
    "e\u0323\u0301 \u1112\u1161\u11ab\ud558".encode(),
    b"<s></s><unk><0x0A>",
    b"<think> the <think",
    b"\n",
]


def base_models() -> list[Model]:
    llama3 = {
        "rope_scaling": 2,
        "rope_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
    }
    return [
        Model(dim=16, hidden_dim=20, n_layers=1).randomise(1),
        Model(dim=33, hidden_dim=17, n_kv_heads=4, dtype="bf16", flags=TIED | QKV_BIAS).randomise(2),
        Model(dim=20, head_dim=6, flags=QK_NORM, rope_original_max_seq_len=32, **llama3).randomise(3),  # type: ignore[arg-type]
        Model(
            dim=64, hidden_dim=96, head_dim=16, n_kv_heads=1, dtype="bf16", rope_scaling=1, rope_factor=2.0
        ).randomise(4),
        Model(dim=16, hidden_dim=20, n_layers=1, vocabulary=byte_level_vocabulary()).randomise(5),
    ]


def spoil_bytes(rng: random.Random, data: bytes, start: int = 0) -> bytes:
    """One damage somewhere from `start` on, near it more often than not."""
    out = bytearray(data)
    span = max(1, len(out) - start)
    if rng.random() < 0.6:
        span = min(span, 400)
    at = start + rng.randrange(span)
    match rng.randrange(7):
        case 0 if at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(out):
            out[at] = rng.choice([0, 1, 0x20, 0x7F, 0x80, 0xE2, 0xF0, 0xFF])
        case 2 if at + 4 <= len(out):
            struct.pack_into("<I", out, at, rng.choice(INTERESTING))
        case 3:
            del out[at : at + rng.choice([1, 2, 4, 12, 64])]
        case 4:
            out[at:at] = rng.randbytes(rng.choice([1, 2, 4, 12, 64]))
        case 5:
            del out[at:]
        case _:
            out += rng.randbytes(rng.choice([1, 2, 64, 4096]))
    return bytes(out)


def spoil_header(rng: random.Random, data: bytes) -> bytes:
    fields = TOKENIZER_FIELDS if data[:8] == b"twotoken" else MODEL_FIELDS
    name = rng.choice([n for n in fields if n != "magic"])
    offset, form = fields[name]
    if offset + struct.calcsize("<" + form) > len(data):
        return data
    old = struct.unpack_from("<" + form, data, offset)[0]
    if form == "f":
        return patch(
            data, **{name: rng.choice([0.0, -1.0, 1.0, 1e-30, 1e30, float("nan"), float("inf"), old * 2])}
        )
    value = rng.choice([*INTERESTING, old + 1, old - 1, old * 2, old // 2])
    bits = 64 if form == "Q" else 32
    value %= 1 << bits
    if form == "i" and value >= 1 << 31:
        value -= 1 << 32
    return patch(data, **{name: value})


def spoil_number(rng: random.Random, data: bytes) -> bytes:
    """A number after the header: the start of a random array, or anywhere."""
    starts, at = [], TOKENS_START
    if len(data) < TOKENS_START:
        return data
    n_by_text, n_merges, _, n_classes, n_states, _, n_items, _ = struct.unpack_from("<8I", data, 88)
    vocab_size = struct.unpack_from("<I", data, 44)[0]
    for size in (
        1024,
        1024,
        16 * vocab_size,
        4 * n_by_text,
        16 * n_merges,
        4 * n_classes * n_states,
        12 * n_items,
    ):
        starts.append((at, size))
        at += size
    start, size = rng.choice([*starts, (TOKENS_START, len(data) - TOKENS_START)])
    at = start + 4 * rng.randrange(max(1, size // 4))
    if at + 4 > len(data):
        return data
    out = bytearray(data)
    old = struct.unpack_from("<I", data, at)[0]
    value = rng.choice([*INTERESTING, *range(12), old + 1, old - 1]) % (1 << 32)
    struct.pack_into("<I", out, at, value)
    return bytes(out)


def flags(rng: random.Random) -> list[str]:
    """Flags that a user may give, most of them good. The text is never longer than some tokens."""
    chosen = ["-n", str(rng.choice([2, 20, 40, 60])), "-j", str(rng.choice([1, 1, 2]))]
    choices = {
        "-t": ["0", "0.5", "1", "1e-30", "1e6", "nan"],
        "-p": ["0", "0.1", "0.9", "1", "2"],
        "-k": ["0", "1", "5", "1000000", "2147483647", "-1"],
        "-s": ["0", "1", "9223372036854775807", "x"],
        "-c": ["2", "33", "50", "64", "65"],
        "-m": ["tokenize", "tokenize", "generate", "x"],
    }
    for flag, values in choices.items():
        if rng.random() < 0.3:
            weights = [8] * (len(values) - 1) + [1]
            chosen += [flag, rng.choices(values, weights)[0]]
    if rng.random() < 0.3:
        chosen.append("--json")
    if rng.random() < 0.03:
        chosen.insert(
            rng.randrange(len(chosen)), rng.choice(["-x", "--", "-", "", "extra", "--help", "--version"])
        )
    return chosen


def make_case(rng: random.Random, models: list[tuple[bytes, bytes]], folder: Path) -> list[str]:
    """Writes the files of one case and returns its arguments."""
    model, tokenizer = rng.choice(models)
    prompt = b"".join(rng.choices(TEXTS, k=rng.randint(1, 4)))
    target = rng.choices(["model", "tokenizer", "prompt", "flags"], [5, 5, 2, 1])[0]
    if target == "model":
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            model = rng.choice([spoil_header, spoil_header, spoil_bytes])(rng, model)
            if rng.random() < 0.3:
                model = spoil_bytes(rng, model, 4096)
        if rng.random() < 0.8:
            model = fix(model)
    elif target == "tokenizer":
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            tokenizer = rng.choice([spoil_header, spoil_number, spoil_number, spoil_bytes])(rng, tokenizer)
            if rng.random() < 0.3:
                tokenizer = spoil_bytes(rng, tokenizer, TOKENS_START)
        if rng.random() < 0.9 and len(tokenizer) >= TOKENS_START:
            tokenizer = fix(tokenizer)
            if rng.random() < 0.8 and tokenizer[:8] == b"twotoken":  # and a model that agrees
                model = patch(model, vocab_hash=struct.unpack_from("<Q", tokenizer, 32)[0])
    elif target == "prompt":
        for _ in range(rng.randint(1, 8)):
            prompt = spoil_bytes(rng, prompt)[:5000]
    (folder / "m.bin").write_bytes(model)
    (folder / "m.tokenizer.bin").write_bytes(tokenizer)
    (folder / "prompt").write_bytes(prompt)
    return ["m.bin", "-f", "prompt", *flags(rng)]


def fault(done: subprocess.CompletedProcess[bytes]) -> str:
    """What is wrong with how the program ended; empty if nothing is."""
    stderr = done.stderr.decode(errors="replace")
    if "Sanitizer" in stderr or "runtime error" in stderr:
        return "a sanitizer's report"
    if done.returncode not in (0, 1, 2):
        return f"status {done.returncode}"
    if done.returncode and not (stderr.startswith("run: ") and stderr.count("\n") == 1):
        return "not one line of error"
    if done.returncode == 2 and done.stdout:
        return "output in spite of wrong usage"
    return ""


def keep(folder: Path, number: int, args: list[str], what: str, stderr: bytes, program: Path) -> Path:
    kept = KEEP / f"case-{number}"
    kept.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    (kept / "stderr").write_bytes(stderr)
    (kept / "command").write_text(f"# {what}\n{shlex.join([str(program), *args])}\n")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description="Feeds the program damaged files.")
    parser.add_argument("--run", type=Path, help="the program (default: $RUN, build/run-debug or ./run)")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    debug = ROOT / "build" / "run-debug"
    program = Program(args.run or os.environ.get("RUN") or (debug if debug.exists() else None))
    if not program.path.exists():
        parser.error(f"{program.path} is not there: run make or make debug first")
    models = [(m.to_bytes(), m.vocabulary.to_bytes()) for m in base_models()]
    # The one error path ends the program where it is, with memory still in use.
    env = program.env | {"ASAN_OPTIONS": "detect_leaks=0"}
    cases, failures, statuses = 0, 0, [0, 0, 0]
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while time.monotonic() < end and cases != args.cases:
            rng = random.Random(f"{args.seed} {cases}")
            command = make_case(rng, models, folder)
            try:
                done = subprocess.run(
                    [program.path, *command],
                    cwd=folder,
                    env=env,
                    capture_output=True,
                    timeout=60,
                    check=False,
                )
                what, stderr = fault(done), done.stderr
                if not what:
                    statuses[done.returncode] += 1
            except subprocess.TimeoutExpired as expired:
                what, stderr = "no end after 60 s", expired.stderr or b""
            if what:
                failures += 1
                kept = keep(folder, cases, command, what, stderr, program.path)
                print(f"fuzz: case {cases}: {what}: see {kept}", file=sys.stderr)
            cases += 1
    ends = ", ".join(f"{n} with status {status}" for status, n in enumerate(statuses))
    print(f"fuzz: {cases} cases, {failures} failures ({ends})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
