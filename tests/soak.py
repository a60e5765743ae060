"""A soak: the shipped model processes many tokens in changing modes; memory stays flat, and outputs do not change.

    python tests/soak.py [--tokens N] [--round N]      # or: make soak

Each round runs the same works, each of them a process, two at a time. While a process runs, its resident memory is
read ten times a second: after the first quarter of the readings it may grow by at most 1 %. The most that a process
needs may grow by at most 1 % from the first round to the last, and each output must be that of the first round, to the
byte.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from files import ROOT, read_tokenizer

MODEL = ROOT / "models" / "stories.bin"
TEXT = ROOT / "tests" / "heldout.txt"
LIMIT = 1.01
INTERVAL = 0.1  # seconds
FEWEST = 20  # readings that say something: a story takes only a few
SPEED = re.compile(rb'"?tok_s"?:?.*')
MESSAGES = ["The dragon was sad.", "Why?", "Tom had a red ball. He lost it\\\nin the park.", "And then?"]


@dataclass(frozen=True)
class Work:
    name: str
    options: list[str]
    input: bytes


@dataclass(frozen=True)
class Done:
    output: str  # its hash
    tokens: int
    most: int  # resident memory, KB; 0 if the process ended too early to tell
    growth: float  # of resident memory, after the first quarter of the time


def resident(process: int) -> int:
    """KB, or 0 when the process has ended or not yet begun."""
    try:
        if Path(f"/proc/{process}/exe").resolve() != ROOT / "run":
            return 0
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmRSS:\s*(\d+)", status)
    return int(found[1]) if found else 0


def tokens_of(output: bytes, messages: bytes) -> int:
    """As generation and chat report them on standard error, or as perplexity prints them."""
    if found := re.search(rb"prefill: (\d+) tokens.*decode: (\d+) tokens", messages, re.DOTALL):
        return int(found[1]) + int(found[2])
    if found := re.search(rb"^tokens +(\d+)", output):
        return int(found[1])
    raise ValueError(f"no number of tokens in {messages!r}")


def run(work: Work, folder: Path) -> Done:
    source, out, err = (folder / f"{work.name}.{kind}" for kind in ("input", "output", "messages"))
    source.write_bytes(work.input)
    with source.open("rb") as stdin, out.open("wb") as stdout, err.open("wb") as stderr:
        command = [str(ROOT / "run"), str(MODEL), *work.options]
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
        readings = []
        while process.poll() is None:
            readings.append(resident(process.pid))
            time.sleep(INTERVAL)
    if process.returncode:
        sys.exit(f"soak: {work.name}: status {process.returncode}: {err.read_text()}")
    output = SPEED.sub(b"", out.read_bytes())
    digest, tokens = hashlib.sha256(output).hexdigest(), tokens_of(output, err.read_bytes())
    readings = [reading for reading in readings if reading]
    if len(readings) < FEWEST:
        return Done(digest, tokens, 0, 1.0)
    settled = readings[len(readings) // 4 :]
    return Done(digest, tokens, max(readings), max(settled) / settled[0])


def works(size: int, folder: Path) -> list[Work]:
    """About four times `size` tokens."""
    text = TEXT.read_bytes()
    template = (1, "He said: "), (), (), (2,), (), (2,), (1, "He said: "), (), (), ()
    plain = read_tokenizer(MODEL.with_suffix(".tokenizer.bin").read_bytes())
    tokenizer = folder / "chat.tokenizer.bin"
    tokenizer.write_bytes(replace(plain, templates=template, template_flags=1).to_bytes())
    chat = ["-m", "chat", "-z", str(tokenizer), "-n", "64", "-s", "3"]
    conversation = "".join(f"{message}\n" for message in MESSAGES).encode()
    found = [
        Work("perplexity", ["-m", "perplexity", "-f", "-"], text * max(1, 4 * size // len(text))),
        Work(
            "perplexity --stride 128",
            ["-m", "perplexity", "--stride", "128", "-f", "-"],
            text * max(1, size // len(text)),
        ),
        Work("chat", chat, conversation * max(1, size // 1000)),
        Work("chat --draft 5", [*chat, "-t", "0", "--draft", "5"], conversation * max(1, size // 1000)),
    ]
    for seed in range(max(1, size // 20_000)):
        options = ["-n", "0", "-s", str(seed), "-t", "1.1", "-i", MESSAGES[0]]
        found.append(Work(f"generate -s {seed}", options, b""))
        found.append(Work(f"generate --draft 5 --probs -s {seed}", [*options, "--draft", "5", "--probs"], b""))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="in all")
    parser.add_argument("--round", type=int, default=500_000, help="about a quarter of the tokens of a round")
    args = parser.parse_args()
    tokens = n_rounds = 0
    growth = between = 1.0
    first: dict[str, Done] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        todo = works(args.round, folder)
        while n_rounds < 2 or tokens < args.tokens:
            for work, done in zip(todo, pool.map(run, todo, repeat(folder)), strict=True):
                before = first.setdefault(work.name, done)
                tokens += done.tokens
                growth = max(growth, done.growth)
                if done.most and before.most:
                    between = max(between, done.most / before.most)
                if n_rounds == 0 and done.most:
                    grew = f"{done.growth - 1:.2%}"
                    print(f"soak: {work.name}: {done.tokens:,} tokens, {done.most:,} KB, +{grew}", flush=True)
                if done.output != before.output:
                    sys.exit(f"soak: {work.name}: round {n_rounds + 1} printed something else than the first")
                if growth > LIMIT or between > LIMIT:
                    sys.exit(f"soak: {work.name}: round {n_rounds + 1}: memory grew: {done} after {before}")
            n_rounds += 1
    print(
        f"soak: {tokens:,} tokens in {n_rounds} rounds of {len(todo)} processes: the outputs are those of the first "
        f"round; memory grew by at most {growth - 1:.2%} in a process and {between - 1:.2%} between rounds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
