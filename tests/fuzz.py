"""Runs the fuzz targets of tests/fuzz.c one after the other, and counts executions and the lines of run.c they reach.

    python tests/fuzz.py [--seconds N] [--jobs N] [--no-coverage] [TARGET...]   # or: make fuzz SECONDS=N
    python tests/fuzz.py --seeds                                     # writes the seeds in tests/corpus anew

New inputs that reach more go to build/fuzz/TARGET; findings to build/fuzz/findings, each a file that
`build/fuzz-checked TARGET FILE` runs again. tests/corpus has the seeds, and inputs that reach all that was reached
when they were chosen: `build/fuzz-checked TARGET -merge=1 ...`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from files import (
    ADD_BOS,
    BYTE,
    CONTROL,
    LATE,
    MERGES_BY_RANK,
    QK_NORM,
    QKV_BIAS,
    ROOT,
    TIED,
    USER_DEFINED,
    Model,
    Piece,
    Vocabulary,
    byte_level_vocabulary,
    default_vocabulary,
)

CORPUS = ROOT / "tests" / "corpus"
WORK = ROOT / "build" / "fuzz"
# The longest input of each target, in bytes.
TARGETS = {"weights": 12288, "tokenizer": 28672, "text": 160, "cli": 300, "chat": 48}
TOOLS = ["clang", "llvm-profdata", "llvm-cov"]


def chat_vocabulary(*templates: tuple[int | str, ...], template_flags: int) -> Vocabulary:
    """A few letters, so that a model of it is tiny. Its ids: 0 <s>, 1 </s>, 2 <system>."""
    names = [Piece(b"<s>", CONTROL), Piece(b"</s>", CONTROL), Piece(b"<system>", CONTROL)]
    letters = [Piece(bytes([c]), BYTE) for c in b"\n <>/abehiknt\x1b\x7f\xc3\xa9\xe2\xff"]
    merged = [Piece(b"he"), Piece(b"the"), Piece(b" the"), Piece(b"\xc3\xa9")]
    special = [Piece(b"<think>", USER_DEFINED), Piece(b"</think>", USER_DEFINED), Piece(b"  ", LATE)]
    pieces = (*names, *letters, *merged, *special)
    texts = [piece.text for piece in pieces]
    pairs = [(b"h", b"e"), (b"t", b"he"), (b" ", b"the"), (b"\xc3", b"\xa9")]
    return Vocabulary(
        pieces,
        bos_id=0,
        unk_id=-1,
        stop_ids=(1,),
        flags=ADD_BOS | MERGES_BY_RANK,
        kind=2,
        merges=tuple((texts.index(a), texts.index(b), texts.index(a + b)) for a, b in pairs),
        templates=templates,
        template_flags=template_flags,
    )


def tokenizer_seeds() -> dict[str, Vocabulary]:
    system, user, end, next_user = (0, 2), (0, "he\n"), (1,), ("\n", 0, "he\n")
    usual = (user, system, (1, 0), (1, "\n"), (), end, next_user, (), (), ())
    thinks = (*usual[:7], ("<think>\n",), ("<think></think>\n",), ("</think>",))
    return {
        "byte-level": byte_level_vocabulary(),
        "sentencepiece": default_vocabulary(),
        "chat": chat_vocabulary(*usual, template_flags=3),
        "chat-thinks": chat_vocabulary(*thinks, template_flags=4099 + 1024 + 2048 + 4 + 8 + 512),
        "chat-bare": chat_vocabulary(*[()] * 10, template_flags=1),
    }


def weights_seeds() -> dict[str, Model]:
    chat = tokenizer_seeds()["chat"]
    tiny: dict[str, Any] = {
        "dim": 4,
        "hidden_dim": 6,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 2,
        "vocabulary": chat,
    }
    llama3: dict[str, Any] = {"rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    return {
        "chat": Model(**tiny, n_layers=1, max_seq_len=24, dtype="bf16").randomise(1),
        "llama3": Model(
            **tiny, n_layers=2, flags=QK_NORM | TIED, rope_scaling=2, rope_original_max_seq_len=32, **llama3
        ).randomise(2),
        "wide": Model(
            dim=34, hidden_dim=9, n_layers=1, head_dim=6, vocab_size=5, flags=QKV_BIAS, vocabulary=chat
        ).randomise(3),
        "vector": Model(
            dim=8,
            hidden_dim=8,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            head_dim=8,
            max_seq_len=24,
            dtype="bf16",
            vocabulary=chat,
        ).randomise(1),
    }


CLI_SEEDS = [
    "p-n\n9\n-t\n0\n-i\nhe the",
    "pm.bin\n--json\n--probs\n-k\n3\n-n\n8\n-s\n1\n-f\ntext\nhe <think>",
    "t--probs\n-m\nnext\n-i\nthe",
    "pm.bin\n-m\nperplexity\n--stride\n3\n-f\ntext\nhe the he the the the he the the ha",
    "p-m\ntokenize\n-z\ntokenizer.bin\n--json\n-i\nthe \x1b<s>",
    "p-m\nbench\n--repeat\n2\n--prefill\n4\n--decode\n3\n-j\n2",
    "t-m\nchat\n-y\nthe\n--draft\n5\n-n\n7\n-f\n-\nhe the",
    "p--help",
    "pCOLUMNS=30\nNO_COLOR=1\n--version",
]
CHAT_SEEDS = [
    b"\0\0\0\0\7\0\1\0he the\nhe\\\nthe\n",
    b"\1\0\0\x3a\x2f\0\2\0<think>the</think>\n\x03he\n\nthe",
    b"\2\0\0\xc5\x4c\x0c\3\0the the the the the the\nhe\n",
]
TEXT_SEEDS = [
    "Once upon a time",
    "\u2581caf\u00e9 \U0001f600 e\u0323",
    "the  <think> cat</think> 123",
    "<s></s>",
]


def write_seeds() -> None:
    for name, vocabulary in tokenizer_seeds().items():
        (CORPUS / "tokenizer" / f"seed-{name}").write_bytes(vocabulary.to_bytes())
    for name, model in weights_seeds().items():
        (CORPUS / "weights" / f"seed-{name}").write_bytes(model.to_bytes())
    texts = [bytes([i]) + text.encode() for i, text in enumerate(TEXT_SEEDS)]
    for target, seeds in (("cli", [s.encode() for s in CLI_SEEDS]), ("chat", CHAT_SEEDS), ("text", texts)):
        for i, seed in enumerate(seeds):
            (CORPUS / target / f"seed-{i}").write_bytes(seed)


def fuzz(target: str, seconds: int) -> tuple[int, int]:
    """Executions, and whether there was a finding."""
    for folder in (WORK / target, WORK / "findings"):
        folder.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        ROOT / "build" / "fuzz-checked",
        target,
        f"-max_total_time={seconds}",
        f"-max_len={TARGETS[target]}",
        f"-artifact_prefix={WORK / 'findings'}/{target}-",
        *("-print_final_stats=1", "-timeout=20", "-rss_limit_mb=1024", "-verbosity=1", "-len_control=0"),
        *(("-entropic=0",) if target == "chat" else ()),  # its many features make weighing inputs slow
        *(WORK / target, CORPUS / target),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    counted = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
    executions = int(counted[1]) if counted else 0
    print(
        f"fuzz: {target}: {executions:,} executions in {seconds} s, {executions // max(seconds, 1):,} a second",
        flush=True,
    )
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-60:]), file=sys.stderr)
        print(f"fuzz: {target}: a finding: see build/fuzz/findings", file=sys.stderr)
    return executions, int(done.returncode != 0)


def covered_lines(folders: list[Path]) -> tuple[int, int]:
    """The lines of run.c that the inputs of all targets reach, and all lines that this build has."""
    data = [WORK / f"{target}.profraw" for target in TARGETS]
    for target, profile in zip(TARGETS, data, strict=True):
        inputs = [folder / target for folder in folders if (folder / target).exists()]
        command: list[str | Path] = [ROOT / "build" / "fuzz-covered", target, "-runs=0", *inputs]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env={"LLVM_PROFILE_FILE": str(profile)})
    merged = WORK / "all.profdata"
    subprocess.run(["llvm-profdata", "merge", "-o", merged, *data], check=True)
    export = ["llvm-cov", "export", "-summary-only", f"-instr-profile={merged}", "build/fuzz-covered"]
    report = json.loads(subprocess.run(export, cwd=ROOT, capture_output=True, check=True).stdout)
    lines = next(f["summary"]["lines"] for f in report["data"][0]["files"] if f["filename"].endswith("run.c"))
    return lines["covered"], lines["count"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the fuzz targets of tests/fuzz.c.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="(default: all)")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--no-coverage", action="store_true", help="do not count the lines of run.c")
    parser.add_argument("--seeds", action="store_true", help="write the seeds in tests/corpus")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"{unknown.pop()}: expected {', '.join(TARGETS)}")
    if args.seeds:
        write_seeds()
        return 0
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        print(f"SKIPPED: fuzzing needs {', '.join(missing)}")
        return 0
    wanted = ["fuzz-checked"] + ([] if args.no_coverage else ["fuzz-covered"])
    make = ["make", "-s", *(f"build/{name}" for name in wanted)]
    made = subprocess.run(make, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if "libclang_rt" in made.stderr:
        print("SKIPPED: fuzzing needs libclang-rt-dev")
        return 0
    if made.returncode:
        sys.exit(made.stderr)
    results = [fuzz(target, args.seconds) for target in args.targets or TARGETS]
    findings = sum(found for _, found in results)
    print(f"fuzz: {sum(n for n, _ in results):,} executions, {findings} targets with a finding")
    if not args.no_coverage:
        covered, lines = covered_lines([CORPUS, WORK])
        print(f"fuzz: {covered} of {lines} lines of run.c reached ({covered / lines:.1%})")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
