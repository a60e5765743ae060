"""What the model thinks: next, --probs and perplexity, against Hugging Face transformers on tiny random models."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import (
    ADD_BOS,
    ADD_DUMMY_PREFIX,
    PREFIX_AFTER_SPECIAL,
    QK_NORM,
    QKV_BIAS,
    ROOT,
    TIED,
    USER_DEFINED,
    Floats,
    Model,
    Piece,
    Program,
    chain_model,
    default_vocabulary,
    log_softmax,
    on_terminal,
    windows_of,
    write_model,
)
from numpy.typing import NDArray
from shapes import NEXT, PERPLEXITY, SAID, SAID_WITH_TOP, objects

BOS, STOP = 1, 2
TEXT = "the cat in the ocean, once on a stone; tea at ten. " * 12


def byte_ids(text: bytes) -> list[int]:
    return [3 + b for b in text]


def ids_of(run: Program, path: Path, *args: object) -> list[int]:
    return [int(word) for word in run.ok(path, "-m", "tokenize", *args).text.split()]


def with_env(run: Program, **env: str) -> Program:
    program = Program(run.path)
    unset = ("COLUMNS", "NO_COLOR")
    program.env = {k: v for k, v in program.env.items() if k not in unset} | env
    return program


# ---------------------------------------------------------------------------------------------------------
# The same model in transformers


def transformers_logits(m: Model, windows: list[list[int]]) -> list[Floats]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family = "Qwen3" if m.flags & QK_NORM else "Qwen2" if m.flags & QKV_BIAS else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=m.hidden_dim, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_kv_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_seq_len, rms_norm_eps=m.norm_eps, rope_theta=m.rope_theta,
        tie_word_embeddings=bool(m.flags & TIED), attn_implementation="eager",
    )  # fmt: skip
    names = {
        "attn_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
        "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
        "wo": "self_attn.o_proj.weight", "w_down": "mlp.down_proj.weight",
    }  # fmt: skip
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    tops = {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "classifier": "lm_head.weight",
    }
    state: dict[str, Floats] = {}
    for name, array in m.weights.items():
        layer, _, part = name.partition(".")
        if not part:
            state[tops[name]] = array
        elif part in names:
            state[f"model.layers.{layer}.{names[part]}"] = array
        elif part == "w_gate_up":
            for which, half in zip(["gate", "up"], np.split(array, 2), strict=True):
                state[f"model.layers.{layer}.mlp.{which}_proj.weight"] = half
        else:
            kind = "weight" if part == "wqkv" else "bias"
            for which, rows in zip("qkv", np.split(array, [q, q + kv]), strict=True):
                state[f"model.layers.{layer}.self_attn.{which}_proj.{kind}"] = rows
    if m.flags & TIED:
        state["lm_head.weight"] = m.weights["embedding"]
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    with torch.no_grad():
        return [model(torch.tensor([window])).logits[0].numpy() for window in windows]


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"flags": TIED, "n_kv_heads": 4},
    "bias": {"flags": QKV_BIAS, "n_kv_heads": 1},
    "qk_norm": {"flags": QK_NORM, "head_dim": 16},
}


def calm_model(path: Path, **dims: Any) -> Model:
    """A random model that is unsure, as real ones are: the classifier's rows have a length of about 1."""
    model = Model(**({"max_seq_len": 96} | dims)).randomise(5)
    for name in ("embedding", "classifier"):
        if name in model.weights:
            model.weights[name] = model.rounded(model.weights[name] * model.dim**-0.5)
    model.write(path)
    return model


# ---------------------------------------------------------------------------------------------------------
# next


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_next_agrees_with_transformers(run: Program, tmp_path: Path, shape: str, dtype: str) -> None:
    path = tmp_path / "m.bin"
    model = calm_model(path, dtype=dtype, **SHAPES[shape])
    ids = ids_of(run, path, "-i", "the cat in")
    expected = log_softmax(transformers_logits(model, [ids])[0][-1])
    (found,) = objects(run.ok(path, "-m", "next", "-i", "the cat in", "-k", 100000, "--json").stdout, NEXT)
    assert found["tokens"] == len(ids)
    tolerance = 6e-3 if dtype == "f16" else 5e-2
    assert found["entropy_bits"] == pytest.approx(-(np.exp(expected) * expected).sum() / math.log(2), abs=tolerance)
    items = found["next"]
    assert sorted(item["id"] for item in items) == list(range(model.vocab_size))
    assert [item["logprob"] for item in items] == sorted((i["logprob"] for i in items), reverse=True)
    for item in items:
        assert item["logprob"] == pytest.approx(expected[item["id"]], abs=tolerance)
        assert item["prob"] == pytest.approx(math.exp(item["logprob"]), rel=1e-4, abs=1e-9)
        piece = model.vocabulary.pieces[item["id"]]
        assert item["text"] == ("" if item["id"] < 3 else piece.text.decode(errors="replace"))
    assert len(json.loads(run.ok(path, "-m", "next", "-i", "the cat", "--json").stdout)["next"]) == 10


def test_next_of_the_end_of_a_long_text(run: Program, tmp_path: Path) -> None:
    path, file = tmp_path / "m.bin", tmp_path / "text"
    model = calm_model(path)
    file.write_text(TEXT)
    ids = ids_of(run, path, "-f", file)
    assert len(ids) > 200
    for context in (96, 20, 1):
        result = run.ok(path, "-m", "next", "-f", file, "-k", 3, "--json", "-c", context)
        assert f"the prompt has {len(ids)} tokens; the context holds only the last {context}\n" in result.stderr
        window = [BOS, *ids[len(ids) - context + 1 :]]
        expected = log_softmax(transformers_logits(model, [window])[0][-1])
        found = json.loads(result.stdout)
        assert found["tokens"] == context
        for item in found["next"]:
            assert item["logprob"] == pytest.approx(expected[item["id"]], abs=6e-3)


ODD_TOKENS = {
    b"\n": '"\\n"', b" \t\r": '" \\t\\u000d"', b'"\\': '"\\"\\\\"', b"\x1b[2J": '"\\u001b[2J"', b"\0": '"\\u0000"',
    b"\xe2\x82": '"\\xe2\\x82"', b"\xc2\x9b": '"\\u009b"', b" the": '" the"', b" " * 30: '"' + " " * 30 + '"',
    "\u65e5\u672c\u8a9e\u306e\u6587\u5b57\u5217\u3067\u3059".encode(): '"\u65e5\u672c\u8a9e\u306e\u6587\u5b57\u5217\u3067\u3059"',
    "\U0001f600\U0001f600".encode(): '"\U0001f600\U0001f600"', "e\u0301".encode(): '"e\u0301"',
    b"internationalisation": '"internationalisation"', b"fourteen_chars": '"fourteen_chars"',
}  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says, after bos, what is hard to show."""
    vocabulary = default_vocabulary(extra=list(ODD_TOKENS))
    model = chain_model([BOS, 10, 11], vocabulary)
    model.weights["classifier"][:] = 0
    for i, text in enumerate(ODD_TOKENS):
        last = len(vocabulary) - 1 - [p.text for p in vocabulary.pieces[::-1]].index(text)
        model.weights["classifier"][last, 0] = 2.5 - i / 8
    model.weights["classifier"][STOP, 0] = 2.5
    return model.write(tmp_path_factory.mktemp("odd") / "odd.bin")


def check_table(text: str, columns: int) -> None:
    """A probability, a bar, and a token in quotes; what has a width for certain is aligned."""
    *rows, rest, entropy = text.splitlines()
    assert re.fullmatch(r"entropy \d+\.\d\d bits", entropy)
    assert len(rows) == 15
    shown = [re.fullmatch(r"( *\d+\.\d\d)% ([\u2588-\u258f]* *) (\".*\")( \(control\))?", row) for row in rows]
    left = re.fullmatch(r"( *\d+\.\d\d)% rest", rest)
    assert left, rest
    found = []
    for row, match in zip(rows, shown, strict=True):
        assert match, row
        assert not any(unicodedata.category(c).startswith("C") for c in row), row
        assert len(match[1]) == len(left[1])
        found.append(float(match[1]))
        assert len(match[2]) == min((columns - 8) // 3, 40)
        assert len(match[2].rstrip()) == pytest.approx(len(match[2]) * found[-1] / found[0], abs=1.1)
    assert found == sorted(found, reverse=True)
    assert sum(found) + float(left[1]) == pytest.approx(100, abs=0.1)
    assert max(len(row) for row in rows if '" the"' in row) <= columns
    for quoted in ODD_TOKENS.values():
        assert any(match and match[3] == quoted for match in shown), quoted


@pytest.mark.parametrize("columns", [20, 21, 22, 33, 40, 79, 80, 132, 300])
def test_the_table_fits(run: Program, odd: Path, columns: int) -> None:
    args = [odd, "-m", "next", "-i", "", "-k", 15]
    text = with_env(run, COLUMNS=str(columns)).ok(*args).text
    check_table(text, columns)
    assert on_terminal(with_env(run), *args, columns=columns)[0] == text
    assert '"</s>" (control)' in text


def test_odd_terminals(run: Program, odd: Path) -> None:
    args = [odd, "-m", "next", "-i", "", "-k", 15]
    usual = with_env(run, COLUMNS="80").ok(*args).text
    assert with_env(run).ok(*args).text == usual  # no terminal
    assert on_terminal(with_env(run), *args, columns=0)[0] == usual  # one that does not say
    for value in ("", "0", "-5", "abc"):
        assert with_env(run, COLUMNS=value).ok(*args).text == usual
    for value, columns in (("1", 20), ("19", 20), ("999999999", 300), ("99999999999999999999999", 300)):
        check_table(with_env(run, COLUMNS=value).ok(*args).text, columns)


WRONG = [
    '{"id": 1.0, "text": "", "logprob": -1}', '{"id": true, "text": "", "logprob": -1}',
    '{"id": -1, "text": "", "logprob": -1}', '{"id": 1, "text": null, "logprob": -1}',
    '{"id": 1, "text": "", "logprob": NaN}', '{"id": 1, "text": "", "logprob": -Infinity}',
    '{"id": 1, "text": "", "logprob": -1e999}', '{"id": 1, "text": "", "logprob": 0.1}',
    '{"id": 1, "text": ""}', '{"id": 1, "text": "", "logprob": -1, "p": 1}', '[1]', '',
    '{"id": 1, "id": 1, "text": "", "logprob": -1}', '{"id": 1, "text": "\t", "logprob": -1}',
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_json_is_seen(line: str) -> None:
    objects(b'{"id": 1, "text": "\\t", "logprob": -1}\n', SAID)
    with pytest.raises((AssertionError, ValueError)):
        objects(line.encode() + b"\n", SAID)


def test_json_of_odd_tokens(run: Program, odd: Path) -> None:
    """Bytes that are not UTF-8, quotes and control characters, in each mode that shows tokens."""
    (found,) = objects(run.ok(odd, "-m", "next", "-i", "", "-k", 15, "--json").stdout, NEXT)
    texts = [item["text"] for item in found["next"]]
    printed = (text.removeprefix(b" ") for text in ODD_TOKENS)  # a space that begins a text is not
    escaped = (text.decode(errors="surrogateescape") for text in printed)
    assert texts == ["", *(re.sub("[\udc80-\udcff]", "\ufffd", text) for text in escaped)]
    for seed in range(20):
        args = [odd, "-i", "", "-n", 1, "-s", seed, "--json"]
        (said,) = objects(run.ok(*args, "-k", 15).stdout, SAID)
        (line,) = objects(run.ok(*args, "-k", 15, "--probs").stdout, SAID_WITH_TOP)
        assert line | said == line and said["text"] in texts
        assert [item["text"] for item in line["top"]] == texts
    assert len(objects(run.ok(odd, "-m", "perplexity", "-i", '"\\\x1b', "--json").stdout, PERPLEXITY)) == 1


# ---------------------------------------------------------------------------------------------------------
# --probs


@pytest.mark.parametrize(("args", "k"), [([], 5), (["-k", 3], 3), (["-k", 100000], None)])
def test_json_has_the_likeliest(run: Program, tmp_path: Path, args: list[object], k: int | None) -> None:
    path = tmp_path / "m.bin"
    model = calm_model(path)
    prompt = ids_of(run, path, "-i", "the cat")
    result = run.ok(path, "-i", "the cat", "--probs", "--json", "-n", 30, "-s", 4, *args)
    lines = objects(result.stdout, SAID_WITH_TOP)
    plain = run.ok(path, "-i", "the cat", "--json", "-n", 30, "-s", 4, *args).stdout.splitlines()
    ids = [line["id"] for line in lines]
    logits = transformers_logits(model, [prompt + ids[:-1]])[0][len(prompt) - 1 :]
    for line, without, expected in zip(lines, plain, log_softmax(logits), strict=True):
        top = line.pop("top")
        assert line == json.loads(without)
        assert len(top) == (k or model.vocab_size)
        assert {item["id"] for item in top if item["id"] == expected.argmax()}
        for item in top:
            assert item["prob"] == pytest.approx(math.exp(item["logprob"]), rel=1e-4, abs=1e-9)
            assert item["logprob"] == pytest.approx(expected[item["id"]], abs=5e-3)
        for item in top:
            assert item["id"] != line["id"] or (item["text"], item["logprob"]) == (
                line["text"],
                line["logprob"],
            )


SHADES = [(0.8, 28), (0.4, 64), (0.1, 136), (0.02, 166), (0, 160)]


def test_colours_follow_the_probabilities(run: Program, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    model = Model(max_seq_len=120).randomise(5)
    model.weights["classifier"] /= 2
    model.weights["classifier"][:3] = 0  # nothing that prints nothing, and only characters of one byte
    model.weights["classifier"][[*range(3, 3 + 32), *range(3 + 127, 3 + 256)]] = 0
    model.weights["classifier"][model.vocabulary.id("\u00e9".encode())] = 0
    model.write(path)
    args = [path, "-i", "the cat", "-n", 100, "-s", 2, "-p", 1, "-t", 1.2, "-k", 40]
    lines = [json.loads(line) for line in run.ok(*args, "--json").stdout.splitlines()]
    shown = on_terminal(with_env(run), *args, "--probs")[0]
    assert all(line["id"] > 2 and line["text"].isascii() for line in lines)
    colours = [next(colour for p, colour in SHADES if math.exp(line["logprob"]) >= p) for line in lines]
    found = re.findall(r"\x1b\[38;5;(\d+)m([^\x1b]*)\x1b\[0m", shown)
    assert found == [(str(colour), line["text"]) for colour, line in zip(colours, lines, strict=True)]
    assert shown.startswith("the cat\x1b[38;5;")
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == on_terminal(with_env(run), *args)[0]
    assert len(set(colours)) >= 4


def test_no_escape_is_in_a_character(run: Program, tmp_path: Path) -> None:
    """A byte a token: each character has the colour of its first, and nothing in it."""
    text = "a\u00e9b\u20ac\U0001f600\u0431"
    model = chain_model([BOS, *byte_ids(text.encode()), STOP])
    model.weights["classifier"][3 + 0xC3, 1] = 0.4  # after a, the first byte of an accented e is the likeliest, barely
    path = model.write(tmp_path / "m.bin")
    shown = on_terminal(with_env(run), path, "-t", 0, "--probs")[0]
    runs = re.findall(r"\x1b\[38;5;(\d+)m([^\x1b]*)\x1b\[0m", shown)
    assert "".join(part for _, part in runs) + "\n" == re.sub(r"\x1b\[[\d;]*m", "", shown) == text + "\n"
    assert ("160", "\u00e9") in runs and {c for c, part in runs if part != "\u00e9"} == {"28"}
    stray = chain_model([BOS, *byte_ids(b"a\xe2\x82"), STOP]).write(tmp_path / "stray.bin")
    shown = on_terminal(with_env(run), stray, "-t", 0, "--probs")[0]
    assert shown == "\x1b[38;5;28ma\x1b[0m\x1b[38;5;28m\\xe2\\x82\x1b[0m\n"


def test_without_colour_there_are_no_escapes(run: Program, tmp_path: Path) -> None:
    path = chain_model([BOS, *byte_ids(b"hey"), STOP]).write(tmp_path / "hey.bin")
    args = [path, "-t", 0, "--probs"]
    result = with_env(run).ok(*args)
    assert result.text == "hey\n" and "\x1b" not in result.stderr and "probability" not in result.stderr
    for env in ({"NO_COLOR": "1"}, {"NO_COLOR": "0"}):
        text, _ = on_terminal(with_env(run, **env), *args, stderr_too=True)
        assert "\x1b" not in text and "probability" not in text
    text, stderr = on_terminal(with_env(run, NO_COLOR=""), *args)  # empty counts as not set
    assert text == "".join(f"\x1b[38;5;28m{c}\x1b[0m" for c in "hey") + "\n"
    assert "\x1b" not in stderr  # no terminal
    text, _ = on_terminal(with_env(run), *args, stderr_too=True)
    model, legend, *_ = text.splitlines()
    assert model.startswith(f"{path}: ") and "\x1b" not in model
    assert legend.startswith("probability, at least: ") and "\x1b[38;5;160m0%\x1b[0m" in legend
    assert "\x1b" not in on_terminal(with_env(run), *args, "--json")[0]


# ---------------------------------------------------------------------------------------------------------
# perplexity


def expected_costs(m: Model, ids: list[int], context: int, stride: int | None, bos: bool = True) -> NDArray[np.float64]:
    windows = list(windows_of(ids, context, stride, BOS if bos else None))
    costs = []
    for (window, scored), logits in zip(windows, transformers_logits(m, [w for w, _ in windows]), strict=True):
        logs = log_softmax(logits)
        costs += [-logs[i - 1, window[i]] for i in scored]
    return np.array(costs)


def perplexity(run: Program, path: Path, *args: object) -> dict[str, Any]:
    (found,) = objects(run.ok(path, "-m", "perplexity", "--json", *args).stdout, PERPLEXITY)
    del found["tok_s"]
    return found


def check_perplexity(found: dict[str, Any], costs: NDArray[np.float64], n_bytes: int) -> None:
    assert found["tokens"] == len(costs)
    perplexity = math.exp(costs.mean())
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert found["nll"] == pytest.approx(math.log(found["perplexity"]), rel=1e-6)
    assert found["stderr"] == pytest.approx(perplexity * costs.std(ddof=1) / math.sqrt(len(costs)), rel=5e-3)
    assert found["bits_per_byte"] == pytest.approx(costs.sum() / math.log(2) / n_bytes, rel=1e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [None, 32])
def test_perplexity_agrees_with_transformers(
    run: Program, tmp_path: Path, shape: str, dtype: str, stride: int | None
) -> None:
    path, file = tmp_path / "m.bin", tmp_path / "text"
    model = calm_model(path, dtype=dtype, **SHAPES[shape])
    file.write_text(TEXT)
    ids = ids_of(run, path, "-f", file)
    found = perplexity(run, path, "-f", file, *(["--stride", stride] if stride else []))
    check_perplexity(found, expected_costs(model, ids, 96, stride), len(TEXT))


@pytest.mark.parametrize("context", [2, 3, 17, 64])
@pytest.mark.parametrize("stride", ["none", 1, "half", "less one", "all"])
def test_windows_of_any_length(run: Program, tmp_path: Path, context: int, stride: str | int) -> None:
    path = tmp_path / "m.bin"
    model = calm_model(path)
    text = "the cat in the ocean at ten, " * 3
    ids = ids_of(run, path, "-i", text)
    named = {"none": None, "half": context // 2, "less one": context - 1, "all": context}
    step = named[stride] if isinstance(stride, str) else stride
    costs = expected_costs(model, ids, context, step)
    found = perplexity(run, path, "-i", text, "-c", context, *(["--stride", step] if step else []))
    assert found["tokens"] == len(costs) and found["perplexity"] == pytest.approx(math.exp(costs.mean()), rel=1e-3)
    assert found["tokens"] == len(ids) - 1 or step == context  # then the first of each window is not scored


@pytest.mark.parametrize("stride", [None, 20])
def test_a_tokenizer_without_bos(run: Program, tmp_path: Path, stride: int | None) -> None:
    """The text's first token is not scored, so its bytes do not count."""
    path = tmp_path / "m.bin"
    model = calm_model(path, vocabulary=default_vocabulary(bos_id=-1, flags=ADD_DUMMY_PREFIX))
    ids = ids_of(run, path, "-i", TEXT)
    found = perplexity(run, path, "-i", TEXT, "-c", 50, *(["--stride", stride] if stride else []))
    assert found["tokens"] == len(ids) - 1
    check_perplexity(found, expected_costs(model, ids, 50, stride, bos=False), len(TEXT) - len("the"))


def test_bits_do_not_depend_on_threads_or_batches(run: Program, tmp_path: Path) -> None:
    """Against itself with other threads, and against a run.c whose batches are 7 and 5 tokens."""
    path = tmp_path / "m.bin"
    source = (ROOT / "run.c").read_text()
    for old, new in [("MAX_BATCH = 512", "MAX_BATCH = 7"), ("SCORED_AT_ONCE = 32", "SCORED_AT_ONCE = 5")]:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "small.c").write_text(source)
    flags = ["-O1", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-march=native", "-w"]
    small = Program(tmp_path / "small")
    subprocess.run(["cc", *flags, tmp_path / "small.c", "-o", small.path, "-lm"], check=True)
    for dtype in ("f16", "bf16"):
        write_model(path, dtype=dtype, dim=50, hidden_dim=70, n_heads=6, n_kv_heads=3, head_dim=10, max_seq_len=150)
        for args in ([], ["--stride", 40]):
            expected = perplexity(run, path, "-i", TEXT, "-j", 1, *args)
            for other in (2, 3):
                assert perplexity(run, path, "-i", TEXT, "-j", other, *args) == expected
            assert perplexity(small, path, "-i", TEXT, *args) == expected


def test_perplexity_as_text(run: Program, tiny_path: Path) -> None:
    found = perplexity(run, tiny_path, "-i", TEXT)
    result = run.ok(tiny_path, "-m", "perplexity", "-i", TEXT)
    lines = [line.split() for line in result.text.splitlines()]
    assert [key for key, _ in lines] == list(PERPLEXITY)  # the names that JSON has
    values = {key: float(value) for key, value in lines}
    del values["tok_s"]
    assert values == pytest.approx({key: found[key] for key in values}, rel=1e-5)
    assert result.stderr == ""  # progress is for terminals
    _, stderr = on_terminal(with_env(run), tiny_path, "-m", "perplexity", "-i", TEXT)
    assert stderr == ""
    both, _ = on_terminal(with_env(run), tiny_path, "-m", "perplexity", "-i", TEXT, stderr_too=True)
    assert f"\r{found['tokens'] + 1} tokens\n" in both and "\x1b" not in both


def test_numbers_that_json_cannot_hold(run: Program, tmp_path: Path) -> None:
    """A perplexity beyond what a double holds; one token, whose error cannot be known; bytes that are not UTF-8."""
    model = chain_model([BOS, *byte_ids(b"abc")])
    model.weights["classifier"] *= 100
    path = model.write(tmp_path / "m.bin")
    found = perplexity(run, path, "-i", "zzz")
    assert found["nll"] > 1000 and found["perplexity"] > 1e308 and math.isfinite(found["stderr"])
    (tmp_path / "byte").write_bytes(b"\xff\xfe")
    assert perplexity(run, path, "-f", tmp_path / "byte")["tokens"] > 1
    vocabulary = default_vocabulary(flags=ADD_BOS)
    one = chain_model([BOS, *byte_ids(b"abc")], vocabulary).write(tmp_path / "one.bin")
    found = perplexity(run, one, "-i", "a")
    assert (found["tokens"], found["stderr"]) == (1, 0)


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("mode", ["next", "perplexity"])
def test_no_text(run: Program, tiny_path: Path, tmp_path: Path, mode: str) -> None:
    run.fails(2, tiny_path, "-m", mode, says=[f"-m {mode}: expected a text", "-i or -f"])
    run.fails(1, tiny_path, "-m", mode, "-f", tmp_path / "none", says=[tmp_path / "none", "No such file"])
    without = chain_model([BOS, 5], default_vocabulary(bos_id=-1, flags=ADD_DUMMY_PREFIX)).write(tmp_path / "m.bin")
    run.fails(1, without, "-m", mode, "-i", "", says=["too short", "found 0"])


def test_bad_input_for_perplexity(run: Program, tiny_path: Path) -> None:
    run.fails(1, tiny_path, "-m", "perplexity", "-i", "", says=["too short", "at least 2", "found 1"])
    run.fails(1, tiny_path, "-m", "perplexity", "-f", "-", says=["too short", "at least 2", "found 1"])
    args = [tiny_path, "-m", "perplexity", "-i", "the cat"]
    run.fails(2, *args, "--stride", 65, says=["--stride: expected at most 64", "context", "found 65"])
    run.fails(2, *args, "--stride", 9, "-c", 8, says=["--stride: expected at most 8", "found 9"])
    run.fails(2, *args, "-c", 1, says=["-c:", "at least 2", "found 1"])
    for value in ("0", "-1", "x", "", "1.5"):
        run.fails(2, *args, "--stride", value, says=["--stride: expected", f"found '{value}'"])
    run.ok(*args, "--stride", 64)


def test_nan_is_told(run: Program, tmp_path: Path) -> None:
    model = Model().randomise()
    model.weights["final_norm"][3] = np.nan
    path = model.write(tmp_path / "nan.bin")
    for mode in ("next", "perplexity"):
        run.fails(1, path, "-m", mode, "-i", "the cat", says=[path, "not finite", "NaN"])


MAX_RESIDENT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


def test_a_long_text(run: Program, tmp_path: Path) -> None:
    """Of megabytes: its tokens are those that -m tokenize prints, and memory is in proportion to it."""
    path = tmp_path / "m.bin"
    base = default_vocabulary()
    vocabulary = replace(base, pieces=(*base.pieces, Piece(b"\n\n", USER_DEFINED)))
    dims = {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    calm_model(path, max_seq_len=512, vocabulary=vocabulary, **dims)
    line = "the cat in the ocean, number {}, once on a stone;\n\n  \ttea at ten.\n"
    resident = []
    for size in (2 << 20, 6 << 20):
        if run.sanitized:
            size //= 16  # it takes 40 times as long
        text = "".join(line.format(i) for i in range(size // len(line)))
        file = tmp_path / "text"
        file.write_text(text)
        command = [run.path, path, "-m", "perplexity", "-f", file, "--json", "-j", 1]
        measured = [sys.executable, "-c", MAX_RESIDENT, *map(str, command)]
        done = subprocess.run(measured, capture_output=True, check=True, env=run.env)
        (found,) = objects(done.stdout, PERPLEXITY)
        resident.append(int(done.stderr.split()[-1]))
        assert found["tokens"] == len(ids_of(run, path, "-f", file)) - 1
    assert resident[1] - resident[0] < 12 * (4 << 10) or run.sanitized  # KB: 12 bytes for each more of the text


def test_a_line_longer_than_a_piece(run: Program, tmp_path: Path) -> None:
    path, file = tmp_path / "m.bin", tmp_path / "text"
    calm_model(path, dim=8, hidden_dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, max_seq_len=512)
    file.write_text("once \n " * (10_000 if run.sanitized else 150_000) + "\n" + "tea at ten. " * 10)
    found = perplexity(run, path, "-f", file)
    assert found["tokens"] == len(ids_of(run, path, "-f", file)) - 1


def test_a_space_anew_at_the_start_of_a_piece(run: Program, tmp_path: Path) -> None:
    """Where a piece ends with a user-defined token, the next one begins as the whole text goes on."""
    base = default_vocabulary()
    line_break = Piece(b"\n", USER_DEFINED)
    vocabulary = replace(
        base, pieces=(*base.pieces, line_break), flags=ADD_BOS | ADD_DUMMY_PREFIX | PREFIX_AFTER_SPECIAL
    )
    path, file = tmp_path / "m.bin", tmp_path / "text"
    dims = {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    calm_model(path, max_seq_len=512, vocabulary=vocabulary, **dims)
    file.write_text(
        "zzzz\n" * (10_000 if run.sanitized else 220_000)
    )  # no token is " z", so that the space is one more
    found = perplexity(run, path, "-f", file)
    assert found["tokens"] == len(ids_of(run, path, "-f", file)) - 1
