"""The command line as its users meet it."""

from __future__ import annotations

import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import (
    ADD_BOS,
    ADD_DUMMY_PREFIX,
    QK_NORM,
    QKV_BIAS,
    TIED,
    Model,
    Program,
    chain_model,
    check_one_line,
    check_sanitizers,
    default_vocabulary,
    log_softmax,
    on_terminal,
    reference_logits,
    write_model,
    write_tokenizer,
)

BOS, STOP = 1, 2
STATISTICS = re.compile(r"prefill: (\d+) tokens, [\d.]+ tok/s; decode: (\d+) tokens, [\d.]+ tok/s; seed (\d+)\n\Z")

# The beginning is what llama2.c's own test expects of this model.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, Lily. We can help you.
"""


def byte_ids(text: bytes) -> list[int]:
    return [3 + b for b in text]


def json_lines(stdout: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in stdout.splitlines()]


def ids_of(stdout: bytes) -> list[int]:
    return [int(str(line["id"])) for line in json_lines(stdout)]


def endless_model(text: bytes, **dims: Any) -> Model:
    """Says `text`, of different bytes, over and over."""
    ids = byte_ids(text)
    model = chain_model([BOS, *ids], **dims)
    model.weights["classifier"][ids[0], len(ids)] = 20
    return model


def tokens(run: Program, path: Path, text: str) -> list[int]:
    return [int(word) for word in run.ok(path, "-m", "tokenize", "-i", text).text.split()]


# ---------------------------------------------------------------------------------------------------------
# Usage


WRONG = [
    (["-x"], ["'-x'"]),
    (["--frobnicate"], ["'--frobnicate'"]),
    (["--jsonx"], ["'--jsonx'"]),
    (["-"], ["'-'"]),
    (["--"], ["'--'"]),
    (["-tt", "1"], ["'-tt'"]),
    (["-t0.5"], ["'-t0.5'"]),
    *[([flag], [flag, "expected", "found"]) for flag in ["-t", "-p", "-k", "-n", "-s", "-i", "-f", "-y", "-z"]],
    *[([flag], [flag, "expected", "found"]) for flag in ["-m", "-c", "-j"]],
    *[
        ([flag, value], [f"{flag}: expected", f"found '{value}'"])
        for flag, values in {
            "-t": ["nan", "-1", "abc", "", "inf", "1x", "1e99", "0x"],
            "-p": ["2", "-0.1", "nan", "x", "", "1.0001"],
            "-k": ["-1", "x", "1.5", "", "99999999999"],
            "-n": ["-5", "1e99", "3x", "", "99999999999999999999", "2.0", "nan"],
            "-s": ["x", "-1", "", "99999999999999999999", "1.5"],
            "-c": ["0", "-1", "x", "", "4294967296"],
            "-j": ["0", "-1", "x", "", "99999"],
            "--draft": ["-1", "16", "x", "", "1.5"],
            "-m": ["unknown", "", "Generate", "generate "],
        }.items()
        for value in values
    ],
    (["-i", "a", "-f", "b"], ["-i", "-f", "expected", "found"]),
]


@pytest.mark.parametrize(("args", "says"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_wrong_usage(run: Program, tiny_path: Path, args: list[str], says: list[str]) -> None:
    run.fails(2, tiny_path, *args, says=[*says, "--help"])


def test_two_models(run: Program, tiny_path: Path) -> None:
    run.fails(2, tiny_path, "other.bin", says=["expected one MODEL", f"'{tiny_path}'", "'other.bin'"])


def test_a_context_longer_than_the_models(run: Program, tiny_path: Path) -> None:
    run.fails(2, tiny_path, "-c", 65, says=["-c: expected at most 64", tiny_path, "found 65"])


def test_flags_after_and_before_the_model(run: Program, tiny: Model, tiny_path: Path) -> None:
    assert run.ok("-t", 0, tiny_path).stdout == run.ok(tiny_path, "-t", "0").stdout
    assert run.ok(tiny_path, "-t", 1, "-t", 0).stdout == run.ok(tiny_path, "-t", "0").stdout  # the last one counts


def test_no_model_means_the_shipped_one(run: Program, tmp_path: Path) -> None:
    run.fails(1, says=["models/stories.bin", "expected"], cwd=tmp_path)


FLAGS = "-m -i -f -y -c -j -z -n -t -p -k -s --draft --probs --json --stride --prefill --decode --repeat --help"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(run: Program, flag: str) -> None:
    result = run.ok(flag)
    assert result.stderr == ""
    lines = result.text.splitlines()
    assert lines[0].startswith("usage: run")
    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 80] == []
    for option in [*FLAGS.split(), "--version"]:
        described = [line for line in lines if re.match(rf"  {option} ", line)]
        assert len(described) == 1, f"{option}: expected a line of its own, found {described}"
    for mode in ["generate", "chat", "next", "perplexity", "tokenize", "bench"]:
        assert f"{mode}: " in result.text
    assert result.text.count("default") >= 12
    for value in ["default 256", "default 1.0", "default 0.9", "default 512", "default 64", "default 5"]:
        assert f"({value}" in result.text, value
    assert "default models/stories.bin" in result.text


def test_help_ends_with_three_examples(run: Program, root: Path, tmp_path: Path) -> None:
    *_, head, first, second, third = run.ok("--help").text.splitlines()
    assert re.match("examples?:?$", head, re.IGNORECASE)
    for example in (first, second, third):
        assert re.match(r" +(\./)?run ", example), example
        # What they say is understood: only their files are not there.
        words = shlex.split(example)[1:]
        done = run(*words, cwd=tmp_path)
        assert done.status == 1 and "expected a weights file" in done.stderr, (example, done)


def test_version(run: Program) -> None:
    result = run.ok("--version")
    assert re.fullmatch(r"twofiles \d+\.\d+\.\d+\b.+\n", result.text)
    assert result.stderr == ""


# ---------------------------------------------------------------------------------------------------------
# Generation


def test_text_and_statistics_are_kept_apart(run: Program, tiny: Model, tiny_path: Path) -> None:
    result = run.ok(tiny_path, "-i", "the cat", "-t", 0, "-n", 20, "-s", 7)
    match = STATISTICS.search(result.stderr)
    assert match, result.stderr
    prompt = tokens(run, tiny_path, "the cat")
    assert int(match[1]) == len(prompt)
    assert match[3] == "7"
    assert result.stdout.startswith(b"the cat") and result.stdout.endswith(b"\n")
    assert b"tok/s" not in result.stdout


def test_greedy_is_deterministic_and_needs_no_seed(run: Program, tiny: Model, tiny_path: Path) -> None:
    assert len({run.ok(tiny_path, "-t", 0, "-s", seed, "-n", 50).stdout for seed in range(4)}) == 1
    assert run.ok(tiny_path, "-t", 0, "-n", 50).stdout == run.ok(tiny_path, "-k", 1, "-n", 50).stdout


def test_seeds(run: Program, tiny: Model, tiny_path: Path) -> None:
    texts = [run.ok(tiny_path, "-s", seed).stdout for seed in range(8)]
    assert len(set(texts)) == 8
    assert texts == [run.ok(tiny_path, "-s", seed).stdout for seed in range(8)]


def test_without_a_seed_each_run_has_another(run: Program, tiny_path: Path) -> None:
    seeds = [re.search(r"seed (\d+)", run.ok(tiny_path, "-n", 2).stderr) for _ in range(3)]
    assert len({seed[1] for seed in seeds if seed}) == 3


def test_the_seed_is_shown_and_gives_the_text_again(run: Program, tiny: Model, tiny_path: Path) -> None:
    result = run.ok(tiny_path, "-n", 30)
    match = STATISTICS.search(result.stderr)
    assert match
    assert run.ok(tiny_path, "-n", 30, "-s", match[3]).stdout == result.stdout


def write_wide_model(path: Path, **dims: Any) -> None:
    """Large enough for three threads, of no round sizes."""
    write_model(
        path,
        dim=250,
        hidden_dim=1570,
        n_heads=6,
        n_kv_heads=3,
        head_dim=10,
        max_seq_len=200,
        n_layers=2,
        **dims,
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_threads_do_not_change_the_text(run: Program, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.bin"
    write_wide_model(path, dtype=dtype)
    args = [path, "-i", "the cat in on at the cat, once " * 3, "-s", 5, "-p", 1]
    outputs = {run.ok(*args, "-j", j, "--json").stdout for j in (1, 2, 3)}
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) > 10


@pytest.mark.parametrize("draft", [1, 2, 7, 15])
def test_guesses_change_nothing_but_the_time(run: Program, root: Path, draft: int) -> None:
    """The bits of a guess's logits are those of a token alone; and as many random numbers are used up."""
    text = "One, two, three. One, two, three. One, two, three. One, two, three. One, two"
    saved = 0
    for args in (["-t", 0.5], ["-t", 1, "-p", 0.5], ["-t", 0, "-j", 2], ["-k", 3, "-n", 70, "-j", 2]):
        command = [root / "models" / "stories.bin", "-i", text, "-s", 3, "--json", "--probs", *args]
        slow, fast = run.ok(*command), run.ok(*command, "--draft", draft)
        assert fast.stdout == slow.stdout
        found = re.search(r"draft: (\d+) of (\d+) decoded tokens had been guessed\n", fast.stderr)
        assert found and int(found[2]) == len(fast.stdout.splitlines()) - 1
        saved += int(found[1])
    assert saved > 20


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 63, 64])
def test_guesses_end_with_the_text(run: Program, tmp_path: Path, steps: int) -> None:
    path = endless_model(b"abc").write(tmp_path / "loop.bin")
    args = [path, "-n", steps, "-t", 0, "--json"]
    done = run.ok(*args, "--draft", 9)
    assert done.stdout == run.ok(*args).stdout
    known = max(0, steps - 6)  # for a guess, the text has to end with two tokens that it had before
    assert f"draft: {known - known // 10} of {steps - 1} decoded tokens had been guessed\n" in done.stderr


@pytest.mark.parametrize("steps", [1, 2, 10, 63, 64])
def test_steps_count_the_prompt(run: Program, tmp_path: Path, steps: int) -> None:
    path = endless_model(b"catz").write(tmp_path / "loop.bin")
    result = run.ok(path, "-n", steps, "-t", 0, "--json")
    # As llama2.c counts: a step is a token that goes in, bos is the first; -n steps thus yield n tokens.
    assert len(ids_of(result.stdout)) == steps
    if steps == 10:
        result = run.ok(path, "-n", steps, "-t", 0, "--json", "-i", "cat")
        assert len(ids_of(result.stdout)) == steps - len(tokens(run, path, "cat")) + 1


@pytest.mark.parametrize("bos", [0, ADD_BOS])
def test_steps_do_not_count_bos(run: Program, tmp_path: Path, bos: int) -> None:
    path = endless_model(b"QXZJ", vocabulary=default_vocabulary(flags=bos)).write(tmp_path / "loop.bin")
    for steps in (4, 9, 63):
        result = run.ok(path, "-n", steps, "-t", 0, "--json", "-i", "QXZ")
        assert len(ids_of(result.stdout)) == steps - 3
    assert run.ok(path, "-n", 9, "-t", 0, "-i", "QXZ").stdout == b"QXZJQXZJQ\n"
    run.fails(1, path, "-n", 3, "-i", "QXZ", says=["expected fewer than 3 tokens (-n", "found 3"])


def test_steps_default_to_256(run: Program, tmp_path: Path) -> None:
    path = endless_model(b"abc", max_seq_len=300).write(tmp_path / "loop.bin")
    assert len(ids_of(run.ok(path, "-t", 0, "--json").stdout)) == 256
    assert len(ids_of(run.ok(path, "-t", 0, "--json", "-n", 0).stdout)) == 300
    assert len(ids_of(run.ok(path, "-t", 0, "--json", "-n", 0, "-c", 17).stdout)) == 17


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """a b c a b c ..., in a context of 64"""
    return endless_model(b"abc").write(tmp_path / "endless.bin")


def test_a_full_context_is_told(run: Program, endless: Path) -> None:
    for args, full in [
        (["-n", 0], 64),
        (["-n", 100], 64),
        (["-n", 0, "-c", 20], 20),
        (["-n", 50, "-c", 20], 20),
    ]:
        result = run.ok(endless, "-t", 0, *args)
        assert f"the context of {full} tokens is full" in result.stderr
        assert len(result.stdout) == full + 1
    for args in [["-n", 10], ["-n", 20, "-c", 20], ["-n", 64]]:
        assert "is full" not in run.ok(endless, "-t", 0, *args).stderr


def test_a_prompt_that_does_not_fit(run: Program, tiny: Model, tiny_path: Path) -> None:
    long = "cat " * 80
    n = len(tokens(run, tiny_path, long))
    assert n > 64
    run.fails(1, tiny_path, "-i", long, says=["prompt", "expected at most 64", "context", f"found {n}"])
    run.fails(1, tiny_path, "-i", long, "-n", 0, says=["expected at most 64", "context", f"found {n}"])
    run.fails(1, tiny_path, "-i", long, "-c", 9, says=["expected at most 9", "context", f"found {n}"])
    run.fails(1, tiny_path, "-i", long, "-n", 5, says=["expected at most 64", "context", f"found {n}"])
    n = len(tokens(run, tiny_path, "the cat"))
    run.ok(tiny_path, "-i", "the cat", "-n", n)
    run.fails(1, tiny_path, "-i", "the cat", "-n", n - 1, says=[f"expected fewer than {n - 1}", f"found {n - 1}"])


def test_prompt_from_a_file_or_standard_input(run: Program, tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"the cat\nin")
    expected = run.ok(tiny_path, "-i", "the cat\nin", "-t", 0, "-n", 30).stdout
    assert expected.startswith(b"the cat\nin")
    assert run.ok(tiny_path, "-f", file, "-t", 0, "-n", 30).stdout == expected
    assert run.ok(tiny_path, "-f", "-", "-t", 0, "-n", 30, stdin=b"the cat\nin").stdout == expected
    assert run.ok(tiny_path, "-t", 0, "-n", 30, stdin=b"not read").stdout == run.ok(tiny_path, "-t", 0, "-n", 30).stdout


def test_prompt_files_that_cannot_be_read(run: Program, tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    run.fails(1, tiny_path, "-f", tmp_path / "none.txt", says=[tmp_path / "none.txt", "No such file"])
    run.fails(1, tiny_path, "-f", tmp_path, says=[tmp_path, "directory"])
    run.fails(1, tiny_path, "-f", "", says=["No such file"])


@pytest.mark.parametrize("args", [[], ["-i", ""], ["-f", "-"]])
def test_an_empty_prompt_starts_from_bos(run: Program, tmp_path: Path, args: list[str]) -> None:
    path = chain_model([BOS, *byte_ids(b"hey"), STOP]).write(tmp_path / "hey.bin")
    assert run.ok(path, *args).stdout == b"hey\n"


def test_an_empty_prompt_without_bos(run: Program, tmp_path: Path) -> None:
    vocabulary = default_vocabulary(bos_id=-1, flags=ADD_DUMMY_PREFIX)
    path = chain_model([BOS, *byte_ids(b"hey"), STOP], vocabulary).write(tmp_path / "hey.bin")
    run.fails(1, path, says=["empty prompt", "expected", "bos"])
    assert run.ok(path, "-m", "tokenize").stdout == b"\n"


@pytest.mark.parametrize("stop", ["stop", "bos", "another stop"])
def test_a_stop_ends_the_text(run: Program, tmp_path: Path, stop: str) -> None:
    vocabulary = default_vocabulary(stop_ids=(STOP, 200, 201))
    chain = [BOS, *byte_ids(b"abc"), {"stop": STOP, "bos": 0, "another stop": 201}[stop]]
    model = chain_model([*chain[:-1], 202] if stop == "bos" else chain, vocabulary)
    if stop == "bos":
        model.weights["classifier"][202] = 0
        model.weights["classifier"][BOS, 3] = 20
    path = model.write(tmp_path / "stops.bin")
    result = run.ok(path, "-t", 0)
    assert result.stdout == b"abc\n"
    assert "is full" not in result.stderr
    assert len(ids_of(run.ok(path, "-t", 0, "--json").stdout)) in (3, 4)  # the stop itself may be among them


def test_the_leading_space_is_printed_once_and_not_lost(run: Program, tmp_path: Path) -> None:
    vocabulary = default_vocabulary()
    chain = [BOS, vocabulary.id(b" the"), vocabulary.id(b" cat"), vocabulary.id(b"s"), STOP]
    path = chain_model(chain, vocabulary).write(tmp_path / "cats.bin")
    assert run.ok(path, "-t", 0).stdout == b"the cats\n"
    assert run.ok(path, "-t", 0, "-i", "the").stdout == b"the cats\n"
    assert run.ok(path, "-t", 0, "-i", " the").stdout == b" the cats\n"
    for prompt, rest in [("", "the cats"), ("the", " cats"), (" the", " cats")]:
        lines = json_lines(run.ok(path, "-t", 0, "-i", prompt, "--json").stdout)
        assert "".join(str(line["text"]) for line in lines) == rest, prompt


def test_the_prompt_is_echoed_as_it_was(run: Program, tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    for prompt in [
        b"a",
        b" a",
        b"  a  ",
        "caf\u00e9 \u2603 \U0001f600".encode(),
        b"\xff\xfe",
        b"a\0b",
        b"\n",
        b" ",
    ]:
        file.write_bytes(prompt)
        assert run.ok(tiny_path, "-f", file, "-n", 0).stdout.startswith(prompt)


# ---------------------------------------------------------------------------------------------------------
# Probabilities


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    "dims",
    [
        {},
        {"flags": TIED, "n_kv_heads": 4},
        {"flags": QKV_BIAS, "n_kv_heads": 1, "rope_theta": 500.0},
        {"flags": QK_NORM | TIED, "head_dim": 14, "dim": 36, "hidden_dim": 50},
        {"rope_scaling": 1, "rope_factor": 4.0, "dim": 17, "hidden_dim": 19, "head_dim": 2},
        {
            "rope_scaling": 2,
            "rope_factor": 8.0,
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0,
            "rope_original_max_seq_len": 32,
            "n_heads": 3,
            "n_kv_heads": 3,
            "head_dim": 16,
            "flags": QKV_BIAS | QK_NORM,
        },
    ],
    ids=["plain", "tied", "bias", "qk_norm", "linear", "llama3"],
)
def test_log_probabilities(run: Program, tmp_path: Path, dtype: str, dims: dict[str, Any]) -> None:
    """Against the Transformer in numpy, over prompt and generated tokens."""
    path = tmp_path / "m.bin"
    model = write_model(path, dtype=dtype, seed=3, max_seq_len=140, **dims)
    prompt = tokens(run, path, "the cat in the, once on " * 4)
    lines = json_lines(run.ok(path, "-i", "the cat in the, once on " * 4, "-n", 0, "-s", 1, "--json").stdout)
    ids = [int(str(line["id"])) for line in lines]
    logits = reference_logits(model, prompt + ids[:-1])[len(prompt) - 1 :]
    expected = log_softmax(logits)[np.arange(len(ids)), ids]
    found = np.array([line["logprob"] for line in lines], float)
    error = np.abs(found - expected)
    # bf16 activations where the CPU has products of them; otherwise only the 16-bit KV cache is less than exact.
    assert error.max() < (0.02 if dtype == "f16" else 0.4), error.max()
    assert error.mean() < (0.003 if dtype == "f16" else 0.08), error.mean()


def test_sampling_follows_the_probabilities(run: Program, tmp_path: Path) -> None:
    """What comes first, for many seeds, against the model's own probabilities."""
    path = tmp_path / "m.bin"
    model = chain_model([BOS, *byte_ids(b"abcd")], max_seq_len=4)
    model.weights["classifier"][:] = 0
    scale = math.sqrt(model.dim)  # what rmsnorm makes of the one dimension that is not 0
    logits = {3 + ord(c): value for c, value in zip("abcd", [9.0, 8.0, 7.0, 6.0], strict=True)}
    for token, logit in logits.items():
        model.weights["classifier"][token, 0] = logit / scale
    model.write(path)
    p = np.exp(log_softmax(reference_logits(model, [BOS]))[0])
    order = np.argsort(-p)

    def share(*args: object, count: int = 60) -> set[int]:
        return {ids_of(run.ok(path, "--json", "-n", 1, "-s", s, *args).stdout)[0] for s in range(count)}

    assert share("-k", 1) == share("-p", 0.0001) == share("-t", 0) == {order[0]}
    assert share("-k", 2, "-p", 1) == set(order[:2])
    assert p[order[0]] > 0.5 and p[order[0]] + p[order[1]] > 0.8
    assert share("-p", float(p[order[0]]) + 1e-3) == set(order[:2])
    hot = share("-t", 1000, "-p", 1)
    assert len(hot) > 40  # nearly uniform over some 300 tokens


# ---------------------------------------------------------------------------------------------------------
# Streams


def test_json_of_generate(run: Program, tiny: Model, tiny_path: Path) -> None:
    lines = json_lines(run.ok(tiny_path, "--json", "-s", 3, "-p", 1).stdout)
    assert len(lines) > 5
    for line in lines:
        assert set(line) - {"bytes"} == {"id", "text", "logprob"}
        assert 0 <= int(str(line["id"])) < tiny.vocab_size
        assert float(str(line["logprob"])) <= 0


def test_json_of_tokenize(run: Program, tiny: Model, tiny_path: Path) -> None:
    text = 'the "cat"\\ \n\t\x01 caf\u00e9 \u2603'
    found = json.loads(run.ok(tiny_path, "-m", "tokenize", "-i", text, "--json").text)
    assert found["tokens"] == tokens(run, tiny_path, text)
    assert len(found["pieces"]) == len(found["tokens"])
    assert found["pieces"][:2] == ["<s>", " the"]


def bench(run: Program, path: Path, *args: object) -> dict[str, Any]:
    measured = json.loads(run.ok(path, "-m", "bench", "--json", "--repeat", 3, *args).stdout)
    assert isinstance(measured, dict)
    return measured


def test_json_of_bench(run: Program, tiny: Model, tiny_path: Path) -> None:
    b = bench(run, tiny_path, "--prefill", 20, "--decode", 4, "-c", 30, "-j", 1)
    size = tiny_path.stat().st_size
    assert (b["model"], b["file_bytes"], b["threads"]) == (str(tiny_path), size, 1)
    assert (b["context"], b["repeat"]) == (30, 3)
    assert b["dtype"] in ("bf16", "f16") and b["isa"] and re.fullmatch("[0-9a-f]{16}", b["logits_hash"])
    assert 0.9 * size < 2 * b["params"] + 4096 <= size  # the rest fills up to 64 bytes
    assert {k: (b[k]["tokens"], b[k]["position"]) for k in ("prefill", "decode", "decode_at_end")} == {
        "prefill": (20, 0),
        "decode": (4, 0),
        "decode_at_end": (4, 26),
    }
    for kind, rate in [("prefill", "gflops"), ("decode", "gb_s"), ("decode_at_end", "gb_s")]:
        work = b[kind]
        assert list(work) == ["tokens", "position", "tok_s", "tok_s_min", "tok_s_max", rate]
        assert 0 < work["tok_s_min"] <= work["tok_s"] <= work["tok_s_max"] and work[rate] > 0


def test_bench_counts_bytes_and_operations(run: Program, tiny: Model, tiny_path: Path) -> None:
    b = bench(run, tiny_path, "--prefill", 20, "--decode", 4, "-c", 30, "-j", 1)
    m = tiny
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    layer = m.dim * (2 * q + 2 * kv + 3 * m.hidden_dim)
    classifier = m.dim * m.vocab_size
    attention = 4 * q * (20 + 1) / 2
    operations = m.n_layers * (2 * layer + attention) + 2 * classifier / 20
    assert b["prefill"]["gflops"] * 1e9 == pytest.approx(operations * b["prefill"]["tok_s"], rel=1e-4)
    unread = 0 if tiny.flags & TIED else 2 * classifier
    read = tiny_path.stat().st_size - unread + 4 * m.n_layers * kv * (1 + 2 + 3 + 4) / 4
    assert b["decode"]["gb_s"] * 1e9 == pytest.approx(read * b["decode"]["tok_s"], rel=1e-4)
    read += 4 * m.n_layers * kv * 26
    assert b["decode_at_end"]["gb_s"] * 1e9 == pytest.approx(read * b["decode_at_end"]["tok_s"], rel=1e-4)


def test_bench_has_the_same_logits_for_any_threads(run: Program, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    write_wide_model(path)
    results = [bench(run, path, "--prefill", 9, "-j", j) for j in (1, 2, 3)]
    assert len({r["logits_hash"] for r in results}) == 1
    assert bench(run, path, "--prefill", 8, "-c", 20)["logits_hash"] != results[0]["logits_hash"]
    openmp = "libgomp" in subprocess.run(["ldd", run.path], capture_output=True, text=True, check=False).stdout
    assert [r["threads"] for r in results] == [1, 2, 3] or not openmp


def test_a_tiny_model_uses_one_thread(run: Program, tiny_path: Path) -> None:
    assert bench(run, tiny_path, "-j", 2)["threads"] == 1


@contextmanager
def cpus_of(quota: float, inner: bool = False) -> Iterator[Callable[[], object]]:
    """A group of processes that have so many CPUs' time, or that are `inner` to such a group. Yields what makes a
    process join it."""
    one, two = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")  # versions of Linux's interface
    first = (one / "cpu.cfs_quota_us").exists()
    group = (one if first else two) / f"twofiles-cpu-{os.getpid()}"
    joined = group / "inner" if inner else group
    try:
        joined.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"needs a cgroup of its own, which takes root: {error}")
    try:
        try:
            if first:
                (group / "cpu.cfs_period_us").write_text("50000")
                (group / "cpu.cfs_quota_us").write_text(str(int(50000 * quota)))
            else:
                (group / "cpu.max").write_text(f"{int(50000 * quota)} 50000")
        except OSError as error:
            pytest.skip(f"this cgroup takes no quota of CPU time: {error}")
        yield lambda: (joined / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for folder in {joined: 0, group: 0}:
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except OSError:  # the process is not quite gone
                    time.sleep(0.1)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("quota", "most"), [(0.5, 1), (1, 1), (1.5, 2), (64, 64)])
def test_threads_are_at_most_the_quota(run: Program, tmp_path: Path, quota: float, most: int, inner: bool) -> None:
    path = tmp_path / "m.bin"
    write_wide_model(path)
    args = [path, "-m", "bench", "--json", "--repeat", 1, "--prefill", 2, "--decode", 1]
    free = json.loads(run.ok(*args).stdout)["threads"]
    if free == 1:
        pytest.skip("one thread is all that there is here without a quota")
    with cpus_of(quota, inner) as join:
        assert json.loads(run.ok(*args, preexec=join).stdout)["threads"] == min(free, most)
        assert json.loads(run.ok(*args, "-j", 2, preexec=join).stdout)["threads"] == 2  # -j has its way


LEVELS = [("x86-64-v3", "AVX2"), ("x86-64-v4", "AVX-512"), ("sapphirerapids", "AVX-512")]


@pytest.mark.parametrize(("level", "lacks"), LEVELS)
def test_a_cpu_that_lacks_the_instructions(root: Path, tmp_path: Path, level: str, lacks: str) -> None:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("qemu-x86_64 is not installed")
    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(root / name)
    subprocess.run(["make", "-s", f"ARCH=-march={level}"], cwd=tmp_path, capture_output=True, check=True)
    emulated = ["qemu-x86_64", "-cpu", "Nehalem", tmp_path / "run", "--version"]
    done = subprocess.run(emulated, capture_output=True, text=True, check=False)
    stderr = re.sub(r"qemu-x86_64: warning: .*\n", "", done.stderr)
    assert (done.returncode, done.stdout) == (1, ""), stderr
    check_one_line(stderr)
    assert "AVX2" in stderr or lacks in stderr
    assert "make portable" in stderr


def test_a_cpu_that_has_the_instructions(root: Path, tmp_path: Path) -> None:
    if not shutil.which("qemu-x86_64"):
        pytest.skip("qemu-x86_64 is not installed")
    for name in ("run.c", "Makefile"):
        (tmp_path / name).symlink_to(root / name)
    subprocess.run(["make", "-s", "portable"], cwd=tmp_path, capture_output=True, check=True)
    emulated = ["qemu-x86_64", "-cpu", "Nehalem", tmp_path / "run", "--version"]
    done = subprocess.run(emulated, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("(portable)\n"), done.stderr


@pytest.mark.parametrize("mode", ["generate", "chat", "next", "perplexity"])
def test_a_terminal_is_told_what_runs(run: Program, tmp_path: Path, mode: str) -> None:
    """Parameters, type, context, KV cache, threads and instructions: the first line on standard error."""
    path, text = tmp_path / "m.bin", tmp_path / "text"
    text.write_text("the cat\n")
    templates = {"templates": ((1,), (), (), (), (), (2,), ()), "template_flags": 1}
    model = write_model(path, dtype="bf16", tokenizer=default_vocabulary(**templates), max_seq_len=200)
    args = [path, "-m", mode, "-f", text, "-n", 9, "-c", 100, "-j", 1, "-t", 0]
    first = on_terminal(run, *args, stderr_too=True)[0].splitlines()[0]
    isa = re.search(r"\((.+)\)", run.ok("--version").text)
    positions = {"generate": 9, "chat": 100}.get(mode) or len(tokens(run, path, "the cat\n"))
    found = re.fullmatch(
        rf"{re.escape(str(path))}: ([\d.]+) M parameters, bf16; context (\d+), KV cache ([\d.]+) MB; 1 thread, (.+)",
        first,
    )
    assert found and isa, first
    parameters = (path.stat().st_size - 4096) / 2
    assert float(found[1]) == pytest.approx(parameters / 1e6, abs=0.1)
    assert int(found[2]) == positions and found[4] == isa[1]
    cache = 2 * model.n_layers * model.n_kv_heads * model.head_dim * 2 * ((positions + 63) // 64 * 64)
    assert float(found[3]) == pytest.approx(cache / 1e6, abs=0.051)
    for other in ([*args, "--json"],):
        assert "parameters" not in on_terminal(run, *other, stderr_too=True)[0]
    assert "parameters" not in run.ok(*args).stderr
    assert "parameters" not in "".join(on_terminal(run, *args))  # only standard output is a terminal


def test_bench_prints_a_markdown_table(run: Program, tiny_path: Path) -> None:
    lines = run.ok(tiny_path, "-m", "bench", "--decode", 2, "--repeat", 2).text.splitlines()
    assert str(tiny_path) in lines[0] and "threads" in lines[0] and not lines[1]
    head, rule, *rows = lines[2:]
    assert set(rule) <= set("|-:") and len(rows) == 3
    assert {len(row) for row in [head, rule, *rows]} == {len(head)}
    assert {row.count("|") for row in [head, rule, *rows]} == {8}


def test_bench_refuses_more_than_the_context(run: Program, tiny_path: Path) -> None:
    for flag in ("--prefill", "--decode"):
        run.fails(2, tiny_path, "-m", "bench", "-c", 16, flag, 17, says=[flag, 16, 17])
    for flag, value in [("--repeat", "0"), ("--repeat", "101"), ("--prefill", "0"), ("--decode", "x")]:
        run.fails(2, tiny_path, "-m", "bench", flag, value, says=[flag, value])


def test_every_byte_is_valid_json(run: Program, tmp_path: Path) -> None:
    ids = byte_ids(bytes(range(256)))
    path = chain_model([BOS, *ids, STOP], max_seq_len=300).write(tmp_path / "bytes.bin")
    lines = json_lines(run.ok(path, "-t", 0, "-n", 0, "--json").stdout)
    assert [line["id"] for line in lines][:256] == ids
    texts = [line["text"] for line in lines]
    assert texts[:128] == [chr(b) for b in range(128)]
    assert all(math.isfinite(float(str(line["logprob"]))) for line in lines)
    raw = run.ok(path, "-t", 0, "-n", 0).stdout
    assert raw == bytes(range(256)) + b"\n"  # to a pipe, bytes go as they are


MIXED = "\u00e9\u20ac\U0001f600"  # 2, 3 and 4 bytes, all different


def test_characters_are_never_split(run: Program, tmp_path: Path) -> None:
    path = endless_model(MIXED.encode(), max_seq_len=1800).write(tmp_path / "mixed.bin")
    reader, writer = os.pipe()
    command: list[str | Path] = [run.path, path, "-t", "0", "-n", "1800", "-j", "1"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    text, reads = "", 0
    while chunk := os.read(reader, 65536):
        text += chunk.decode()  # raises if a character is split
        reads += 1
    os.close(reader)
    stderr = process.communicate()[1].decode()
    check_sanitizers(stderr)
    assert process.returncode == 0
    assert text.startswith(MIXED * 200)
    assert reads > 3


def test_text_is_streamed(run: Program, tmp_path: Path) -> None:
    """The first tokens are there long before the last one."""
    path = endless_model(b"abc", dim=512, hidden_dim=4096, max_seq_len=100_000).write(tmp_path / "slow.bin")
    process = subprocess.Popen([run.path, path, "-t", "0", "-n", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert select.select([process.stdout], [], [], 30)[0]
    assert process.stdout.read(6) == b"abcabc"
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_terminal_is_not_commanded_by_the_model(run: Program, tmp_path: Path) -> None:
    text = b"a\x1b[2J\x07\r\x08\x7f\x00\n\tb"
    path = chain_model([BOS, *byte_ids(text), STOP]).write(tmp_path / "control.bin")
    assert run.ok(path, "-t", 0).stdout == text + b"\n"
    assert on_terminal(run, path, "-t", 0)[0].encode() == b"a\\x1b[2J\\x07\\x0d\\x08\\x7f\\x00\n\tb\n"
    assert run.ok(path, "-t", 0, "--json").stdout == on_terminal(run, path, "-t", 0, "--json")[0].encode()


def test_a_terminal_gets_no_c1_controls_nor_stray_bytes(run: Program, tmp_path: Path) -> None:
    text = b"a\xc2\x9b\xe2\x82z" + "\u00e9\U0001f600".encode()  # CSI in UTF-8, half a euro sign, two good ones
    path = chain_model([BOS, *byte_ids(text), 3 + 0xF1, STOP]).write(tmp_path / "stray.bin")
    assert run.ok(path, "-t", 0).stdout == text + b"\xf1\n"
    expected = b"a\\xc2\\x9b\\xe2\\x82z" + "\u00e9\U0001f600".encode() + b"\\xf1\n"
    assert on_terminal(run, path, "-t", 0)[0].encode() == expected


@pytest.mark.parametrize(
    "stray",
    [
        b"\xff",
        b"\xc0\x80",
        b"\xc1\xbf",
        b"\xe0\x9f\xbf",
        b"\xed\xa0\x80",
        b"\xf0\x8f\xbf\xbf",
        b"\xf4\x90\x80\x80",
    ],
)
def test_what_only_looks_like_utf8(run: Program, tmp_path: Path, stray: bytes) -> None:
    """Overlong forms, surrogates, and what is beyond U+10FFFF, as one token: to a pipe as it is, to a terminal
    escaped, and in JSON as U+FFFD, a byte each."""
    vocabulary = default_vocabulary(extra=[stray])
    chain = [BOS, *byte_ids(b"a"), vocabulary.id(stray), *byte_ids(b"b"), STOP]
    path = chain_model(chain, vocabulary).write(tmp_path / "stray.bin")
    assert run.ok(path, "-t", 0).stdout == b"a" + stray + b"b\n"
    escaped = "".join(f"\\x{b:02x}" for b in stray)
    assert on_terminal(run, path, "-t", 0)[0].encode().decode() == f"a{escaped}b\n"
    lines = json_lines(run.ok(path, "-t", 0, "--json").stdout)
    assert [line["text"] for line in lines][:3] == ["a", "\ufffd" * len(stray), "b"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("args", [["--help"], ["--version"], ["-m", "tokenize", "-i", "a"], ["-t", "0"], ["--json"]])
def test_a_full_disk_is_told(run: Program, tiny: Model, tiny_path: Path, args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [run.path, tiny_path, *args], check=False, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    stderr = process.stderr.decode()
    check_sanitizers(stderr)
    assert process.returncode == 1
    assert stderr.startswith("run: standard output: ") and "No space left" in stderr and stderr.count("\n") == 1


def test_a_closed_pipe_is_no_news(run: Program, tmp_path: Path) -> None:
    path = endless_model(b"abc", max_seq_len=200_000).write(tmp_path / "long.bin")
    process = subprocess.Popen(
        [run.path, path, "-t", "0", "-n", "0", "-j", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    assert process.stdout.read(10) == b"abcabcabca"
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert process.returncode in (1, 141, -signal.SIGPIPE)
    assert stderr == b""


def test_control_c(run: Program, tmp_path: Path) -> None:
    path = endless_model(b"abc", max_seq_len=2_000_000).write(tmp_path / "long.bin")
    process = subprocess.Popen([run.path, path, "-t", "0", "-n", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(3) == b"abc"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    stderr = process.communicate(timeout=60)[1].decode()
    check_sanitizers(stderr)
    assert process.returncode in (130, -signal.SIGINT)
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------------------------------------------------
# The tokenizer file is looked for in four places


def test_where_the_tokenizer_is_found(run: Program, tmp_path: Path) -> None:
    """Each place in turn, the best one last: the vocabularies have the same size, so their ids tell them apart."""
    beside, here = tmp_path / "models", tmp_path / "here"
    beside.mkdir()
    here.mkdir()

    def write(path: Path, letter: bytes) -> None:
        write_tokenizer(path, default_vocabulary(extra=[letter * 2]))

    model = Model(vocabulary=default_vocabulary(extra=[b"zz"])).randomise()

    def use(letter: bytes) -> None:
        model.vocabulary = default_vocabulary(extra=[letter * 2])
        model.write(beside / "m.bin", tokenizer=False)

    special = model.vocabulary.id(b"zz")

    def found(*args: object) -> str:
        for letter in b"wxyz":
            use(bytes([letter]))
            result = run(Path("../models/m.bin"), *map(str, args), "-m", "tokenize", "-i", "wwxxyyzz", cwd=here)
            if result.status == 0:
                assert str(special) in result.text.split()
                return chr(letter)
        return "none"

    assert found() == "none"
    message = run.fails(1, Path("../models/m.bin"), cwd=here, says=["../models/m.bin", "expected", "-z FILE"])
    assert "../models/m.tokenizer.bin" in message.stderr
    write(here / "tokenizer.bin", b"w")
    assert found() == "w"
    write(beside / "tokenizer.bin", b"x")
    assert found() == "x"
    write(beside / "m.tokenizer.bin", b"y")
    assert found() == "y"
    write(here / "any", b"z")
    assert found("-z", "any") == "z"


def test_a_link_to_a_model(run: Program, tmp_path: Path) -> None:
    """Its tokenizer is beside what it leads to; another, of a common name, is where the link is."""
    (tmp_path / "far").mkdir()
    chain_model([BOS, *byte_ids(b"hey"), STOP]).write(tmp_path / "far" / "m.bin")
    write_tokenizer(tmp_path / "tokenizer.bin", default_vocabulary(extra=[b"zz"]))
    (tmp_path / "link.bin").symlink_to("far/m.bin")
    assert run.ok(Path("link.bin"), cwd=tmp_path).stdout == b"hey\n"
    (tmp_path / "far" / "m.tokenizer.bin").rename(tmp_path / "link.tokenizer.bin")
    assert run.ok(Path("link.bin"), cwd=tmp_path).stdout == b"hey\n"


@pytest.mark.parametrize("mode", ["tokenize", "generate"])
def test_a_closed_standard_input(run: Program, tiny_path: Path, mode: str) -> None:
    """Is not taken for the first file that is opened, the weights."""
    says = ["cannot read", "Bad file descriptor"]
    run.fails(1, tiny_path, "-m", mode, "-f", "-", preexec=lambda: os.close(0), says=says)


def test_bytes_of_characters_across_tokens(run: Program, tmp_path: Path) -> None:
    path = chain_model([BOS, *byte_ids("é😀".encode()), STOP]).write(tmp_path / "m.bin")
    lines = json_lines(run.ok(path, "-t", 0, "--json").stdout)
    said = b"".join(bytes(line.get("bytes") or line["text"].encode()) for line in lines)
    assert said == "é😀".encode()
    assert [line["text"] for line in lines] == ["\ufffd"] * 6 + [""]
    assert "bytes" not in lines[-1]


def test_a_model_without_bin_at_its_end(run: Program, tmp_path: Path) -> None:
    model = chain_model([BOS, *byte_ids(b"hey"), STOP])
    model.write(tmp_path / "model", tokenizer=False)
    write_tokenizer(tmp_path / "model.tokenizer.bin")
    assert run.ok(tmp_path / "model").stdout == b"hey\n"
    assert run.ok(Path("model"), cwd=tmp_path).stdout == b"hey\n"


def test_tokenize_needs_no_model(run: Program, tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path / "t.bin")
    args = ["-m", "tokenize", "-i", "the cat"]
    ids = [BOS, vocabulary.id(b" the"), vocabulary.id(b" cat")]
    assert run.ok(*args, "-z", tmp_path / "t.bin").text == " ".join(map(str, ids)) + "\n"
    assert run.ok(*args, "-z", tmp_path / "t.bin").stderr == ""


# ---------------------------------------------------------------------------------------------------------
# A real model


def test_stories260k(run: Program, shared_models: Path, root: Path, tmp_path: Path) -> None:
    model = tmp_path / "s.bin"
    export: list[str | Path] = [sys.executable, root / "export.py", shared_models / "stories260K.bin"]
    subprocess.run([*export, "--tokenizer", shared_models / "tok512.bin", "-o", model], check=True, timeout=120)
    assert run.ok(model, "-t", 0).text == STORY
    lines = json_lines(run.ok(model, "-t", 0, "--json").stdout)
    assert len(lines) == 256
    assert "".join(str(line["text"]) for line in lines) + "\n" == STORY
    # The start of the story as a prompt gives the same story: a prompt in one batch, or token by token.
    begin = STORY[:181]
    ids = tokens(run, model, begin)
    rest = [int(str(line["id"])) for line in lines]
    if ids[1:] == rest[: len(ids) - 1]:
        assert run.ok(model, "-t", 0, "-i", begin).text == STORY


def test_the_model_that_ships_tells_a_story(root: Path) -> None:
    """As `make demo` does: a text of several sentences, mostly with an ending within 256 tokens."""
    lengths = []
    for seed in range(3):
        told = subprocess.run(
            [root / "run", "-t", "0.8", "-s", str(seed)], cwd=root, capture_output=True, text=True, check=True
        )
        assert re.fullmatch(r'[A-Z][\n\x20-\x7e]{150,1500}[.!?"]?\n', told.stdout), told.stdout
        assert STATISTICS.search(told.stderr)
        lengths.append(len(told.stdout))
    assert sum(lengths) >= 3 * 300
