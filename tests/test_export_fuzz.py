"""Whatever a file says, export.py makes something of it that is whole, or an ExportError, and no other exception."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_hostile import folder_with_template
from test_template import CHATML, LLAMA2, THINKERS

import export

quickly = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
fewer = settings(quickly, max_examples=50)  # of what takes a few tenths of a second each
numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**32, 2**63, 2**64 - 1, 10**30, -(2**63)]), st.floats()
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["\ud800", "\0", "model.norm.weight", "F32", "BF16", "llama"]))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all that is in a JSON value, but for long lists of like things."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:20]:
        yield from places(value, (*path, key))


def changed(tree: Any, changes: list[tuple[int, Any]]) -> Any:
    """The value with others in some places; ... leaves out what is there."""
    tree = copy.deepcopy(tree)
    for number, value in changes:
        ways = [way for way in places(tree) if way]
        if not ways:
            break
        *way, last = ways[number % len(ways)]
        inside = tree
        for key in way:
            inside = inside[key]
        if value is ...:
            del inside[last]
        else:
            inside[last] = value
    return tree


changes = st.lists(st.tuples(st.integers(0, 10_000), st.one_of(trees, st.just(...))), min_size=1, max_size=4)


def whole_or_refused(work: Callable[[], Any]) -> Any:
    """Its result, if there is one; an ExportError has one line's words."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return work()
    except export.ExportError as error:
        assert str(error)
        return None


def opened(path: Path) -> None:
    """All that main() would do with a model but for writing."""

    def work() -> None:
        with export.naming(path):
            model = export.open_source(path)
            assert len(export.header(model.config, "bf16", 0)) == export.TENSORS_START
            for spec in export.specs_of(model.config):
                assert sum(piece.size for piece in model.tensors[spec.name].pieces()) == spec.size

    whole_or_refused(work)


CONFIG = export.Config(8, 12, 1, 2, 1, 4, 20, 16)
SETTINGS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 20,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": None, "eos_token_id": [2, 3],
    "sliding_window": 8, "layer_types": ["full_attention"], "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    arrays = {spec.name: np.ones(spec.shape, np.float16) for spec in export.specs_of(CONFIG)}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


@quickly
@given(changes=changes)
def test_settings(checkpoint: Path, changes: list[tuple[int, Any]]) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(changed(SETTINGS, changes)))
    opened(checkpoint)
    path.write_text(json.dumps(SETTINGS))


@quickly
@given(changes=changes, more=st.binary(max_size=3), length=st.sampled_from([0, 0, 0, 1, -1, 2**40]))
def test_safetensors_headers(
    checkpoint: Path, tmp_path: Path, changes: list[tuple[int, Any]], more: bytes, length: int
) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(changed(json.loads(data[8:end]), changes)).encode()
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    size = (len(header) + length).to_bytes(8, "little", signed=True)
    (tmp_path / "model.safetensors").write_bytes(size + header + data[end:] + more)
    opened(tmp_path)


# ---- GGUF files: keys and values of any type, with counts that may lie


def gguf_text(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any, lie: int) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value % 2**64)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    items = [gguf_value(item, 0) for item in value]
    kinds = {item[:4] for item in items} or {struct.pack("<I", 8)}
    kind = min(kinds)
    same = [item[4:] for item in items if item[:4] == kind]
    return struct.pack("<I", 9) + kind + struct.pack("<Q", (len(same) + lie) % 2**64) + b"".join(same)


FIELDS: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 16, "llama.embedding_length": 8,
    "llama.feed_forward_length": 12, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4, "llama.rope.dimension_count": 4,
    "llama.attention.key_length": 4, "split.count": 1, "general.alignment": 32, "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(17))], "tokenizer.ggml.scores": [0.5] * 20,
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 17, "tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template": CHATML,
    "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["t 1", "t 2"],
}  # fmt: skip
some_values = st.one_of(
    st.booleans(),
    st.integers(0, 2**64 - 1) | st.integers(0, 40),
    st.floats(width=32),
    texts | st.sampled_from(["gpt2", "llama", "qwen2", "qwen3", "tekken", "linear"]),
    st.lists(st.integers(0, 70), max_size=4) | st.lists(texts, max_size=20) | st.lists(st.floats(), max_size=4),
)


@fewer
@given(
    others=st.dictionaries(st.sampled_from([*FIELDS, "llama.rope.scaling.type", "llama.expert_count"]), some_values, max_size=4),
    left_out=st.sets(st.sampled_from(list(FIELDS)), max_size=2),
    lies=st.sampled_from([0, 0, 0, 1, -1, 2**60, 2**32]),
    tensors=st.lists(
        st.tuples(texts | st.just("token_embd.weight"), st.lists(st.integers(0, 70), max_size=5), st.integers(0, 45), numbers),
        max_size=3,
    ),
    more=st.tuples(st.sampled_from([0, 0, 1, 2**60]), st.sampled_from([0, 0, 1, 2**60])),
)  # fmt: skip
def test_gguf(
    tmp_path: Path,
    others: dict[str, Any],
    left_out: set[str],
    lies: int,
    tensors: list[Any],
    more: tuple[int, int],
) -> None:
    fields = {key: value for key, value in (FIELDS | others).items() if key not in left_out}
    data = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors) + more[0], len(fields) + more[1])
    for key, value in fields.items():
        data += gguf_text(key) + gguf_value(value, lies if key == "tokenizer.ggml.merges" else 0)
    for name, shape, kind, offset in tensors:
        at = int(offset) % 2**64 if abs(offset) < 2**70 else 0
        data += gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, at)
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(4096))
    opened(path)
    tokenizer = whole_or_refused(lambda: export.read_tokenizer(path))
    if tokenizer:
        assert export.Tokenizer.from_bytes(tokenizer.to_bytes()) == tokenizer


@fewer
@given(which=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "added_tokens.json"]), changes=changes)
def test_tokenizers(tmp_path_factory: pytest.TempPathFactory, which: str, changes: list[tuple[int, Any]]) -> None:
    folder = tmp_path_factory.mktemp("t") / "t"
    folder_with_template(folder, CHATML)
    (folder / "added_tokens.json").write_text('{"<a>": 300, "<b>": 301}')
    library = json.loads((folder / which).read_text())
    if which == "tokenizer.json":
        split = {"type": "Split", "pattern": {"Regex": "a+|b"}, "behavior": "Isolated", "invert": False}
        library["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, library["pre_tokenizer"]]}
        library = {
            "normalizer": None,
            "decoder": {"type": "ByteLevel"},
            "post_processor": {"type": "ByteLevel"},
        } | library
    (folder / which).write_text(json.dumps(changed(library, changes)))
    tokenizer = whole_or_refused(lambda: export.read_tokenizer(folder))
    if tokenizer:
        whole_or_refused(lambda: check_bytes(tokenizer))


def check_bytes(tokenizer: export.Tokenizer) -> None:
    with export.naming("t"):
        assert len(export.Tokenizer.from_bytes(tokenizer.to_bytes()).tokens) == len(tokenizer.tokens)


pieces_of_templates = st.sampled_from(
    [
        "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{{ m.content }}",
        "{{ m['content'] | trim }}", "{% if add_generation_prompt %}", "{{ bos_token }}", "{{ eos_token }}", "{% set x = 1 %}",
        "{{ raise_exception('no') }}", "{%- break %}", "{% generation %}", "{% endgeneration %}", "{{ strftime_now('%Y') }}",
        "{{ messages | tojson(indent=2) }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "<|im_start|>", "<think>", "</think>", "\n", " ", "}}",
        "{{ m.content.split('</think>')[-1] }}", "{% if enable_thinking is defined %}", "{{ loop.index }}", "{#", "#}", "é\ud800",
        "{% macro f(a) %}", "{% endmacro %}", "{{ f(m) }}", "{{ messages[-1] }}", "{{ m | string | length }}", "{{ caller() }}",
    ]
)  # fmt: skip


@quickly
@given(
    st.one_of(
        st.lists(pieces_of_templates, max_size=12).map("".join),
        st.text(max_size=30),
        st.tuples(
            st.sampled_from([CHATML, LLAMA2, *THINKERS.values()]),
            st.integers(0, 900),
            st.integers(0, 9),
            pieces_of_templates,
        ).map(lambda x: x[0][: x[1]] + x[3] + x[0][x[1] + x[2] :]),
    )
)
def test_templates(source: str) -> None:
    special, added = (
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"<s>": 0, "</s>": 1, "<|im_start|>": 2, "<|im_end|>": 3},
    )
    found = whole_or_refused(lambda: export.find_template(source, special, added))
    assert (
        found is None
        or "".join(item for part in found.parts for item in part if isinstance(item, str)).encode() is not None
    )
