"""What is wrong with a checkpoint is one line that names the file, exit status 1, and nothing stays behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import random_weights
import test_reference
from files import interrupt_export
from test_reference import VOCAB, random_model
from test_sources import changed, gguf_file, half, meta_folder, save_bin, save_safetensors, save_shards, zeros

import export

Refused = Callable[..., str]
EXPORT = Path(export.__file__).resolve()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model as each source has it; and a tokenizer for it."""
    folder = tmp_path_factory.mktemp("originals")
    model, config, arrays = random_model("gqa", "bf16")
    meta_folder(folder / "meta", config, arrays, 1)
    gguf_file(folder / "m.gguf", "gqa", config, arrays)
    model = half(model, "bf16")
    save_shards(model, folder / "shards")
    save_safetensors(model, folder / "hf")
    (folder / "bin").mkdir()
    save_bin(model, folder / "bin")
    (folder / "tokenizer.bin").write_bytes(test_reference.some_tokenizer().to_bytes())
    return folder


@pytest.fixture
def bad(tmp_path: Path, originals: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(originals, tmp_path / "bad"))


@pytest.fixture
def refused(
    tmp_path: Path, originals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs export.py, which has to fail with these words, and to leave the files of a former export alone."""
    folder = tmp_path / "out"
    folder.mkdir()
    names = ["out.bin", "out.tokenizer.bin"]
    for name in names:
        (folder / name).write_text("the former")

    def run(source: Path, *words: object, options: tuple[object, ...] = ()) -> str:
        args = [source, "-o", folder / "out.bin", "--tokenizer", originals / "tokenizer.bin", *options]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
        capsys.readouterr()
        status = export.main()
        stdout, stderr = capsys.readouterr()
        assert (status, stdout) == (1, ""), stderr
        *warnings, line = stderr.splitlines()
        assert all(text.startswith("export.py: warning: ") for text in warnings)
        assert line.startswith("export.py: error: ") and len(line) < 1100
        for word in words:
            assert str(word) in line, line
        assert sorted(os.listdir(folder)) == names
        assert all((folder / name).read_text() == "the former" for name in names)
        return line

    return run


# ---------------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": None}, ["num_hidden_layers is missing"]),
        ({"num_attention_heads": None}, ["num_attention_heads is missing"]),
        ({"model_type": None}, ["model_type is missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "expected a whole number", "'64'"]),
        ({"hidden_size": 64.0}, ["hidden_size", "expected a whole number", "64.0"]),
        ({"hidden_size": True}, ["hidden_size", "expected a whole number", "True"]),
        ({"rms_norm_eps": [1]}, ["rms_norm_eps", "expected a number"]),
        ({"rms_norm_eps": 10**400}, ["norm_eps"]),
        ({"max_position_embeddings": 10**9}, ["max_seq_len: expected 1 to 268435456, found 1000000000"]),
        ({"head_dim": 2048}, ["q_proj", "expected the shape (16384, 64)"]),
        ({"hidden_size": 0}, ["dim: expected 1 to 16777216, found 0"]),
        ({"hidden_size": -64}, ["dim: expected 1 to 16777216, found -64"]),
        ({"num_hidden_layers": 10**30}, ["n_layers: expected 1 to 16777216, found 1000000"]),
        ({"num_hidden_layers": 4096}, ["the tensor model.layers.3", " is missing"]),
        ({"num_hidden_layers": 4097}, ["the tensor model.layers.3", " is missing"]),
        ({"num_hidden_layers": 2}, ["the tensor model.layers.2.", " is not supported"]),
        ({"num_attention_heads": 0}, ["n_heads"]),
        ({"num_attention_heads": 7, "head_dim": None}, ["64 is not a multiple of n_heads 7"]),
        ({"num_key_value_heads": 3}, ["n_heads 8 is not a multiple of n_kv_heads 3"]),
        ({"num_key_value_heads": 4}, ["expected the shape", "found"]),
        ({"head_dim": 7}, ["head_dim is 7"]),
        ({"head_dim": 16}, ["q_proj", "expected the shape (128, 64), found (64, 64)"]),
        ({"vocab_size": 132}, ["embed_tokens", "(132, 64)", "(131, 64)"]),
        ({"hidden_act": "gelu"}, ["hidden_act: expected silu, swish, found 'gelu'"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"is_causal": False}, ["is_causal: expected true, found False"]),
        ({"per_layer_config": {"1": {}}}, ["per_layer_config"]),
        ({"rms_norm_eps": -1.0}, ["norm_eps: expected 0 to 1, found -1.0"]),
        ({"rms_norm_eps": float("nan")}, ["norm_eps: expected 0 to 1, found nan"]),
        ({"rope_parameters": {"rope_theta": 0.0}, "rope_theta": None}, ["rope_theta: expected 1 to 1e+38, found 0.0"]),
        ({"rope_parameters": {"rope_theta": 1e39}, "rope_theta": None}, ["rope_theta", "found 1e+39"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["rope_factor: expected 1 to 1e+38, found 0.5"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["rope_high_freq_factor: expected 4.04 to 10000000, found 4.0"],
        ),
        ({"attention_bias": True}, ["q_proj.bias"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "lm_head.weight differs"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor: expected 1.0, found 0.5"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": ["MistralForCausalLM"]}, ["found ['MistralForCausalLM']", "expected LlamaForCausalLM"]),
        ({"model_type": "qwen2", "architectures": None}, ["q_proj.bias"]),
        ({"model_type": "qwen3", "architectures": None}, ["q_norm"]),
        ({"rope_theta": 5.0}, ["is given twice", "rope_theta", "5.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["is given twice", "linear", "default"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor is missing"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor is missing"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ({"rope_parameters": {"rope_type": 3}}, ["rope_type", "expected a string"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "expected an object"]),
        ({"layer_types": ["chunked_attention"] * 3}, ["chunked_attention"]),
        (
            {"model_type": "mistral", "architectures": None, "sliding_window": -5},
            ["sliding_window: expected 0 or more, found -5"],
        ),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
        ({"eos_token_id": 131}, ["expected ids below 131, found 131"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_config(bad: Path, refused: Refused, fields: dict[str, Any], words: list[str]) -> None:
    changed(bad / "hf" / "config.json", **fields)
    refused(bad / "hf", bad / "hf" if words != ["expected ids below 131, found 131"] else "", *words)


@pytest.mark.parametrize("o_bias", [True, False])
def test_biases_of_llama(bad: Path, refused: Refused, o_bias: bool) -> None:
    """transformers gives all four projections a bias; run.c has those of q, k and v."""
    shape = test_reference.SHAPE | {"attention_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(torch.bfloat16)
    save_bin(model, bad / "bin")
    path = bad / "bin" / "pytorch_model.bin"
    if o_bias:
        assert export.open_source(bad / "bin").config.qkv_bias  # a bias of zeros changes nothing
        name = "model.layers.0.self_attn.o_proj.bias"
        torch.save(model.state_dict() | {name: torch.full((64,), 0.5)}, path)
        refused(bad / "bin", bad / "bin", f"the tensor {name} is not supported")
        return
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("o_proj.bias")}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # harmless, and often there
    torch.save(state, path)
    assert export.open_source(bad / "bin").config.qkv_bias
    torch.save(state | {"model.layers.0.mlp.down_proj.bias": torch.ones(64)}, path)
    refused(bad / "bin", path, "model.layers.0.mlp.down_proj.bias is not supported")


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "mrope"])
def test_other_kinds_of_rope_are_refused_by_name(bad: Path, refused: Refused, kind: str) -> None:
    for fields in (
        {"rope_parameters": {"rope_type": kind, "factor": 2.0}},
        {"rope_parameters": None, "rope_scaling": {"type": kind, "factor": 2.0}},
    ):
        changed(bad / "hf" / "config.json", **fields)
        refused(bad / "hf", bad / "hf" / "config.json", f"rope_type: expected default, linear, llama3, found '{kind}'")


@pytest.mark.parametrize(
    "family", ["GPT2", "Phi3", "Gemma2", "Qwen3Moe", "Mixtral", "GPTNeoX", "Granite", "Cohere", "Olmo2"]
)
def test_other_architectures_are_refused_by_name(bad: Path, refused: Refused, family: str) -> None:
    settings = getattr(transformers, f"{family}Config")()
    settings.architectures = [f"{family}ForCausalLM"]
    settings.save_pretrained(bad / "hf")
    refused(bad / "hf", "config.json", f"expected llama, mistral, qwen2, qwen3, found {settings.model_type!r}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"llama"', "\xff", "[" * 100_000, '{"hidden_size": NaN'])
@pytest.mark.parametrize("name", ["hf/config.json", "hf/generation_config.json", "meta/params.json"])
def test_not_a_json_object(bad: Path, refused: Refused, name: str, text: str) -> None:
    (bad / name).write_text(text, "latin-1")
    line = refused((bad / name).parent, bad / name)
    assert "expected JSON, found" in line or "expected a JSON object" in line


def test_a_pointer_instead_of_settings(bad: Path, refused: Refused) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (bad / "hf" / "config.json").write_text(pointer)
    refused(bad / "hf", bad / "hf" / "config.json", "expected JSON, found a Git LFS pointer")


def test_directories_without_a_model(bad: Path, refused: Refused) -> None:
    (bad / "hf" / "config.json").unlink()
    refused(bad / "hf", bad / "hf", "expected config.json (Hugging Face) or params.json (Meta)")
    (bad / "bin" / "pytorch_model.bin").unlink()
    refused(bad / "bin", bad / "bin", "model.safetensors", "pytorch_model.bin")
    (bad / "meta" / "consolidated.00.pth").unlink()
    refused(bad / "meta", bad / "meta", "consolidated.00.pth")


@pytest.mark.parametrize("name", ["hf/model.safetensors", "hf/config.json", "meta/consolidated.00.pth"])
def test_a_file_of_a_directory(bad: Path, refused: Refused, name: str) -> None:
    refused(bad / name, bad / name, "give the directory that it is in")


def test_no_tokenizer(
    bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("hf", "meta"):
        monkeypatch.setattr(sys, "argv", ["export.py", str(bad / source), "-o", str(tmp_path / "new.bin")])
        assert export.main() == 1
        assert "no tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))


# ---------------------------------------------------------------------------------------------------------
# safetensors


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Writes the file with another header; if `edit` returns bytes, with these as the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h.pop("model.layers.1.mlp.up_proj.weight") and None, ["damaged", "invalid offset"]),
        (
            lambda h: h.pop(max(h, key=lambda k: h[k].get("data_offsets", [0])[0])) and None,
            ["not fully covered"],
        ),
        (lambda h: h[NORM].update(dtype="F32"), ["damaged"]),
        (
            lambda h: h[NORM].update(dtype="I8", shape=[128]),
            [NORM, "expected the type BF16, F16, F32, F64, found I8"],
        ),
        (lambda h: h[NORM].update(dtype="F8_E4M3", shape=[128]), [NORM, "found F8_E4M3"]),
        (lambda h: h[NORM].update(shape=[63]), ["damaged"]),
        (lambda h: h[NORM].update(shape=[8, 8]), [NORM, "expected the shape (64,), found (8, 8)"]),
        (lambda h: h[NORM].update(shape=[-8, -8]), ["damaged"]),
        (lambda h: h[NORM].update(shape=[64.0]), ["damaged"]),
        (lambda h: h[NORM].update(shape=[True]), ["damaged"]),
        (lambda h: h[NORM].update(shape=64), ["damaged"]),
        (lambda h: h[NORM].update(dtype=7), ["damaged"]),
        (lambda h: h[NORM].update(data_offsets=[0]), ["damaged"]),
        (lambda h: h[NORM].update(data_offsets=[0, 128]), ["damaged"]),
        (lambda h: h[NORM].update(data_offsets=[2**70, 2**70 + 128]), ["damaged"]),
        (lambda h: h.update({NORM: 3}), ["damaged"]),
        (lambda h: h.update({"x": {}}), ["damaged"]),
        (
            lambda h: h.update({"model.layers.0.mlp.extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
            ["model.layers.0.mlp.extra is not supported"],
        ),
        (lambda h: b"{}", ["not fully covered"]),
        (lambda h: b"[]", ["damaged"]),
        (lambda h: b"{,}", ["damaged"]),
        (lambda h: b"[" * 100_000, ["damaged"]),
        (lambda h: b'{"\xff', ["damaged"]),
    ],
)
def test_safetensors_header_that_lies(
    bad: Path, refused: Refused, edit: Callable[[Any], Any], words: list[str]
) -> None:
    path = bad / "hf" / "model.safetensors"
    edit_header(path, edit)
    refused(bad / "hf", path, *words)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 3000, -1])
def test_truncated_safetensors(bad: Path, refused: Refused, size: int) -> None:
    path = bad / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(bad / "hf", path)


def test_safetensors_that_is_too_long(bad: Path, refused: Refused) -> None:
    path = bad / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(bad / "hf", path, "not fully covered")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 0, 1])
def test_safetensors_with_a_header_of_any_length(bad: Path, refused: Refused, length: int) -> None:
    path = bad / "hf" / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(bad / "hf", path, "damaged")


def test_missing_shard(bad: Path, refused: Refused) -> None:
    (bad / "shards" / "model-00002-of-00006.safetensors").unlink()
    refused(bad / "shards", bad / "shards", "the tensor model.layers.", " is missing")
    for path in (bad / "shards").glob("*.safetensors"):
        path.unlink()
    refused(bad / "shards", bad / "shards", "model.safetensors", "shards, found none")


@pytest.mark.parametrize("dtype", ["auto", "f16"])
def test_not_a_number(bad: Path, refused: Refused, dtype: str) -> None:
    path = bad / "hf" / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    name, entry = next((k, v) for k, v in json.loads(data[8:start]).items() if k.endswith("up_proj.weight"))
    at = start + entry["data_offsets"][0] + 10
    path.write_bytes(data[:at] + b"\xc0\x7f" + data[at + 2 :])
    refused(bad / "hf", bad / "hf", name, "expected finite values, found nan", options=("--dtype", dtype))


# ---------------------------------------------------------------------------------------------------------
# PyTorch


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, (f"{os.environ['PYTEST_TMP']}/it-ran",)


@pytest.mark.parametrize("source", ["bin/pytorch_model.bin", "meta/consolidated.00.pth"])
def test_a_pickle_that_runs_code(
    bad: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    torch.save({"model.norm.weight": Malicious()}, bad / source)
    refused((bad / source).parent, bad / source, "posix.mkdir", "could run code")
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(bad / source)  # as torch would say
    torch.load(bad / source, weights_only=False)
    assert (tmp_path / "it-ran").exists()  # what was averted


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([1, 2], ["expected a dictionary of tensors"]),
        ({"a": 3}, ["expected a dictionary of tensors"]),
        ({"model": {"a": torch.zeros(3)}}, ["expected a dictionary of tensors"]),
        ({"a": torch.zeros(3).to_sparse()}, ["torch"]),
        ({"a": torch.nn.Linear(3, 3)}, ["torch.nn.modules.linear.Linear", "could run code"]),
        ({"a": torch.zeros(3)}, ["the tensor model.embed_tokens.weight", " is missing"]),
        ({}, ["the tensor model.embed_tokens.weight", " is missing"]),
    ],
)
def test_pytorch_files_of_something_else(bad: Path, refused: Refused, saved: Any, words: list[str]) -> None:
    torch.save(saved, bad / "bin" / "pytorch_model.bin")
    refused(bad / "bin", bad / "bin", *words)


def test_pytorch_files_of_other_kinds(bad: Path, refused: Refused) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "text")
    refused(bad / "bin", path, "damaged")
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), path)
    refused(bad / "bin", path)


def test_truncated_pytorch_file(bad: Path, refused: Refused) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    data = path.read_bytes()
    for size in (0, 3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(bad / "bin", path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def test_damaged_archive(bad: Path, refused: Refused, originals: Path) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    changes: dict[str, tuple[Callable[[str, bytes], bytes], int]] = {
        "expected records as long as its tensors": (
            lambda name, data: data[:-1] if name.endswith("data/0") else data,
            zipfile.ZIP_STORED,
        ),
        "not supported": (lambda name, data: data, zipfile.ZIP_DEFLATED),
        "damaged": (lambda name, data: data[:-9] if name.endswith(".pkl") else data, zipfile.ZIP_STORED),
    }
    for word, (change, method) in changes.items():
        shutil.copy(originals / "bin" / "pytorch_model.bin", path)
        rewritten(path, change, method)
        refused(bad / "bin", path, word)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_pickle_with_wrong_bytes(tmp_path: Path, originals: Path, wrong: list[tuple[int, int]]) -> None:
    """Whatever it says: tensors of the file, or an ExportError."""
    path = tmp_path / "m.bin"
    shutil.copy(originals / "bin" / "pytorch_model.bin", path)

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        new = bytearray(data)
        for at, byte in wrong:
            new[at % len(new)] = byte
        return bytes(new)

    rewritten(path, change)
    try:
        found = export.read_torch(path)
    except export.ExportError:
        return
    for tensor in found.values():
        assert tensor.rows(0, tensor.shape[0] if tensor.shape else 1).size == np.prod(tensor.shape)


@pytest.mark.parametrize("put", [b"r" + (1 << 26).to_bytes(4, "little"), b"p67108864\n"])
def test_a_pickle_that_would_take_all_memory(tmp_path: Path, originals: Path, put: bytes) -> None:
    """It keeps its one object under a number of which Python's own unpickler takes memory for all below."""
    path = tmp_path / "m.bin"
    shutil.copy(originals / "bin" / "pytorch_model.bin", path)
    rewritten(path, lambda name, data: b"\x80\x02}" + put + b"." if name.endswith("data.pkl") else data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(export.ExportError):
        assert export.read_torch(path) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000


# ---------------------------------------------------------------------------------------------------------
# Meta


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_heads": None}, ["n_heads is missing"]),
        ({"n_layers": None}, ["n_layers is missing"]),
        ({"norm_eps": None}, ["norm_eps is missing"]),
        ({"n_layers": 4}, ["the tensor model.layers.3", " is missing"]),
        ({"n_kv_heads": 3}, ["n_kv_heads 3"]),
        ({"n_kv_heads": 4}, ["expected the shape"]),
        ({"dim": 128}, ["columns of wo"]),
        ({"vocab_size": 132}, ["(132, 64)"]),
        ({"moe": {"num_experts": 8}}, ["moe is not supported"]),
        ({"quantization_args": {}}, ["quantization_args is not supported"]),
    ],
)
def test_params(bad: Path, refused: Refused, fields: dict[str, Any], words: list[str]) -> None:
    changed(bad / "meta" / "params.json", **fields)
    refused(bad / "meta", bad / "meta", *words)


def test_meta_shards_that_do_not_fit(tmp_path: Path, refused: Refused) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    config = export.replace(config, vocab_size=VOCAB - 1)
    arrays = {key: array[: VOCAB - 1] if len(array) == VOCAB else array for key, array in arrays.items()}
    folder = meta_folder(tmp_path / "meta", config, arrays, 2)
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    data = second.read_bytes()
    second.unlink()
    refused(folder, folder, "64 columns of wo", "found 32 in 1 (are shards missing?)")
    first.rename(second)
    refused(folder, folder, "consolidated.00.pth is missing, but there is consolidated.01.pth")
    first.write_bytes(data)
    state = torch.load(second)
    torch.save({key: value for key, value in state.items() if key != "norm.weight"}, second)
    refused(folder, second, "the tensor norm.weight is only in one of consolidated.00.pth and this file")
    torch.save(state | {"output.weight": state["output.weight"][:-1]}, second)
    refused(folder, second, "output.weight: expected the same shape and type as in consolidated.00.pth")
    torch.save(state | {"output.weight": state["output.weight"].float()}, second)
    refused(folder, second, "output.weight: expected the same shape and type as in consolidated.00.pth")
    torch.save(state | {"output.bias": state["norm.weight"]}, first)
    torch.save(state | {"output.bias": state["norm.weight"]}, second)
    refused(folder, first, "the tensor output.bias is not supported")


# ---------------------------------------------------------------------------------------------------------
# GGUF


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general__architecture": "phi3"}, ["expected llama, qwen2, qwen3, found 'phi3'"]),
        ({"llama__rope__scaling__type": "yarn"}, ["expected none, linear, found 'yarn'"]),
        ({"llama__expert_count": 8}, ["expert_count is not supported, found 8"]),
        ({"llama__logit_scale": 0.5}, ["logit_scale"]),
        ({"llama__attention__head_count": [8, 8, 4]}, ["attention.head_count", "expected a whole number"]),
        ({"llama__rope__dimension_count": 4}, ["rope.dimension_count: expected 8, the whole head, found 4"]),
        ({"llama__block_count": 4}, ["the tensor model.layers.3", " is missing"]),
        ({"llama__block_count": 2}, ["the tensor blk.2.", " is not supported"]),
        ({"llama__embedding_length": 32}, ["expected the shape"]),
        ({"llama__context_length": "long"}, ["context_length", "expected a whole number"]),
        ({"split__count": 2}, ["expected the first of 2 files", "-00001-of-00002.gguf"]),
        ({"general__alignment": 0}, ["alignment"]),
        ({"llama__attention__causal": False}, ["attention.causal: expected True, found False"]),
        ({"llama__rope__scaling__attn_factor": 0.5}, ["attn_factor: expected 1.0, found 0.5"]),
    ],
)
def test_gguf_settings(tmp_path: Path, refused: Refused, fields: dict[str, Any], words: list[str]) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    path = tmp_path / "m.gguf"

    class Writer(gguf.GGUFWriter):  # type: ignore[misc, name-defined]
        """In which later settings replace earlier ones."""

        def add_key_value(self, key: str, val: Any, vtype: Any, sub_type: Any = None) -> None:
            self.kv_data[0].pop(key, None)
            super().add_key_value(key, val, vtype, sub_type)

    original, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        gguf_file(path, "gqa", config, arrays, **fields)
    finally:
        gguf.GGUFWriter = original
    refused(path, path, *words)


def test_quantised_gguf_needs_a_package(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "m.gguf", "gguf", "pip install -r requirements.txt")


def test_gguf_without_the_rest_of_its_files(tmp_path: Path, refused: Refused) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    path = gguf_file(tmp_path / "m-00001-of-00003.gguf", "gqa", config, arrays, split__count=3)
    refused(path, tmp_path / "m-00002-of-00003.gguf", "missing", "3 files")


def test_gguf_with_other_rope_factors(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, arrays = random_model("llama3_rope", "bf16")
    factors = np.linspace(1, 3, config.head_dim // 2).astype(np.float32)
    monkeypatch.setattr("test_sources.llama3_factors", lambda c: factors)
    path = gguf_file(tmp_path / "m.gguf", "llama3_rope", config, arrays)
    refused(path, path, "rope_freqs.weight: expected the numbers of Llama 3's RoPE")


def test_gguf_that_ends_anywhere(bad: Path, refused: Refused) -> None:
    path = bad / "m.gguf"
    data = path.read_bytes()
    for size in [*range(4, 200, 9), 1000, 5000, len(data) // 2, len(data) - 40]:
        path.write_bytes(data[:size])
        refused(path, path)


def test_names_cannot_write_to_the_terminal(bad: Path, refused: Refused) -> None:
    path = bad / "hf" / "model.safetensors"
    extra = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edit_header(path, lambda header: header.update({"out\x1b\n\u2581": extra}))
    assert r"the tensor out\x1b\n" + "\u2581" in refused(bad / "hf")
    (bad / "hf" / "config.json").write_text('{"model_type": "\\u001b[31m\\n▁"}')
    assert r"\x1b[31m\n▁" in refused(bad / "hf")
    (bad / "hf" / "config.json").write_text(json.dumps({"model_type": "long" * 1000}))
    assert len(refused(bad / "hf")) < 1100


# ---------------------------------------------------------------------------------------------------------
# What looks wrong and is not


def same_result(tmp_path: Path, source: Path, expected: Path) -> None:
    tokenizer = test_reference.some_tokenizer()
    files = []
    for path in (source, expected):
        export.write_model(tmp_path / "x.bin", export.open_source(path), tokenizer)
        files.append((tmp_path / "x.bin").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads", "architectures"]
)
def test_what_the_shapes_say_may_be_left_out(bad: Path, originals: Path, tmp_path: Path, field: str) -> None:
    changed(bad / "hf" / "config.json", **{field: None})
    same_result(tmp_path, bad / "hf", originals / "hf")


def test_defaults_of_transformers(bad: Path) -> None:
    changed(bad / "hf" / "config.json", max_position_embeddings=None, rms_norm_eps=None)
    config = export.open_source(bad / "hf").config
    defaults = transformers.LlamaConfig()
    assert config.max_seq_len == defaults.max_position_embeddings
    assert config.norm_eps == defaults.rms_norm_eps
    for name, family in export.FAMILIES.items():
        defaults = transformers.AutoConfig.for_model(name)
        assert family["max_seq_len"] == defaults.max_position_embeddings
        assert "head_dim" not in family or family["head_dim"] == defaults.head_dim


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.bfloat16])
def test_buffers_of_any_type(bad: Path, originals: Path, tmp_path: Path, dtype: Any) -> None:
    """inv_freq and its like are computed anew, whatever they were stored as."""
    from safetensors.torch import load_file, save_file

    path = bad / "hf" / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=dtype)
    state["model.rotary_emb.inv_freq"] = torch.ones(4, dtype=dtype)
    save_file(state, path)
    same_result(tmp_path, bad / "hf", originals / "hf")
    torch.save(state, bad / "bin" / "pytorch_model.bin")
    same_result(tmp_path, bad / "bin", originals / "hf")


def test_numbers_of_other_types(bad: Path, refused: Refused) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    state = torch.load(path)
    torch.save(state | {NORM: state[NORM].long()}, path)
    refused(bad / "bin", path, NORM, "expected the type BF16, F16, F32, F64, found int64")
    torch.save({name: tensor.double() for name, tensor in state.items()}, path)
    assert export.choose_dtype(export.open_source(bad / "bin")) == "bf16"


def test_tensors_of_any_strides(bad: Path, originals: Path, tmp_path: Path) -> None:
    """Stored transposed, or as a part of a larger one."""
    path = bad / "bin" / "pytorch_model.bin"
    state = torch.load(path)
    for i, name in enumerate(name for name in list(state) if state[name].dim() == 2):
        tensor = state[name]
        state[name] = tensor.T.contiguous().T if i % 2 else torch.cat([tensor, tensor])[: len(tensor)]
    torch.save(state, path)
    same_result(tmp_path, bad / "bin", originals / "hf")


def test_pytorch_files_from_before_1_6(bad: Path, originals: Path, tmp_path: Path) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    same_result(tmp_path, bad / "bin", originals / "hf")


def test_a_checkpoint_of_the_bare_model(bad: Path, originals: Path, tmp_path: Path) -> None:
    path = bad / "bin" / "pytorch_model.bin"
    torch.save({name.removeprefix("model."): tensor for name, tensor in torch.load(path).items()}, path)
    same_result(tmp_path, bad / "bin", originals / "hf")


@pytest.mark.parametrize("stored", ["embedding", "classifier", "both"])
def test_a_tied_tensor_under_either_name(tmp_path: Path, stored: str) -> None:
    model, config, arrays = random_model("tied", "bf16")
    (tmp_path / "hf").mkdir()
    model = half(model, "bf16")
    model.config.save_pretrained(tmp_path / "hf")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if stored != "embedding":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if stored == "classifier":
        state.pop("model.embed_tokens.weight")
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    model = test_reference.in_memory(config, arrays)
    export.write_model(tmp_path / "direct.bin", model, test_reference.some_tokenizer())
    found = export.open_source(tmp_path / "hf")
    export.write_model(tmp_path / "out.bin", found, test_reference.some_tokenizer())
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "direct.bin").read_bytes()


# ---------------------------------------------------------------------------------------------------------
# Files of other kinds

FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "denied": (b"Access to model x is restricted. Please log in.", "a text file: 'Access to model"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.9.0", "ONNX"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(50), "NumPy"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), "compressed archive"),
    "ggml": (b"tjgg\3\0\0\0" + bytes(50), "older than GGUF"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(50), "big-endian"),
    "llama2c": (b"24ka\2\0\0\0" + bytes(300), "llama2.c model of version 1 or later"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_kinds_are_named(bad: Path, refused: Refused, name: str) -> None:
    data, words = FOREIGN[name]
    for file, source in {
        "m.gguf": "m.gguf",
        "hf/model.safetensors": "hf",
        "hf/config.json": "hf",
        "bin/pytorch_model.bin": "bin",
        "meta/consolidated.00.pth": "meta",
        "meta/params.json": "meta",
    }.items():
        before = (bad / file).read_bytes()
        (bad / file).write_bytes(data)
        refused(bad / source, bad / file, words)
        (bad / file).write_bytes(before)
    (bad / "tokenizer").write_bytes(data)
    refused(bad / "hf", bad / "tokenizer", words, options=("--tokenizer", bad / "tokenizer"))


@pytest.mark.parametrize("name", ["lfs", "xml"])
def test_run_names_them_too(bad: Path, run: Any, name: str) -> None:
    (bad / "m.gguf").write_bytes(FOREIGN[name][0])
    run.fails(1, bad / "m.gguf", says=[bad / "m.gguf", FOREIGN[name][1]])


def test_mistrals_own_form(bad: Path, originals: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.load(bad / "meta" / "consolidated.00.pth")
    (bad / "meta" / "consolidated.00.pth").unlink()
    save_file(state, bad / "meta" / "consolidated.safetensors")
    same_result(tmp_path, bad / "meta", originals / "meta")
    refused_file = bad / "meta" / "consolidated.safetensors"
    with pytest.raises(export.ExportError, match="give the directory that it is in"):
        export.open_source(refused_file)


def test_pytorch_files_take_torch(bad: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(bad / "bin", bad / "bin" / "pytorch_model.bin", "torch", "safetensors")
    assert export.open_source(bad / "hf").tensors


# ---------------------------------------------------------------------------------------------------------
# Any wrong bytes


@pytest.mark.parametrize("name", ["m.gguf", "hf/model.safetensors", "hf/config.json", "meta/params.json"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9000), st.binary(min_size=1, max_size=8))
def test_wrong_bytes(bad: Path, originals: Path, name: str, at: int, wrong: bytes) -> None:
    """A model, or an ExportError; and soon, with little memory."""
    data = bytearray((originals / name).read_bytes())
    at %= min(len(data), 9000)  # where the headers are
    data[at : at + len(wrong)] = wrong
    (bad / name).write_bytes(data)
    try:
        source = export.open_source(bad / Path(name).parts[0])
        for spec in export.specs_of(source.config):
            assert sum(piece.size for piece in source.tensors[spec.name].pieces()) == spec.size
    except export.ExportError:
        pass


# ---------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peft = pytest.importorskip("peft")
    model, _, _ = random_model("gqa", "bf16")
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type: expected LORA, found 'IA3'"]),
        ({"peft_type": None}, ["peft_type is missing"]),
        ({"use_dora": True}, ["use_dora is not supported, found True"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save is not supported, found ['lm_head']"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"something_new": {"x": 1}}, ["something_new is not supported, found {'x': 1}"]),
        ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": 8}}, ["alpha_pattern"]),
        ({"bias": "all"}, ["bias: expected none, found 'all'"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights: ", "found 'pissa'"]),
        ({"r": None}, ["r is missing"]),
        ({"r": 0}, ["r: expected 1 or more, found 0"]),
        ({"r": 8}, ["expected the shape (8, 64), found (4, 64)"]),
        ({"lora_alpha": "big"}, ["lora_alpha", "expected a number"]),
    ],
)
def test_adapter_settings(
    originals: Path, adapter: Path, tmp_path: Path, refused: Refused, fields: dict[str, Any], words: list[str]
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    changed(folder / "adapter_config.json", **fields)
    refused(originals / "hf", folder, *words, options=("--lora", folder))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "lora_A",
            lambda h, k: h.update({k.replace("layers.1", "layers.9"): h.pop(k)}),
            ["layers.9", "expected lora_A and lora_B"],
        ),
        (
            "lora_A",
            lambda h, k: h.update({k.replace("q_proj", "x_proj"): h.pop(k)}),
            ["x_proj", "expected lora_A and lora_B"],
        ),
        (
            "lora_A",
            lambda h, k: h.update({k.replace("lora_A", "lora_C"): h.pop(k)}),
            ["lora_C", "expected lora_A and lora_B"],
        ),
        (
            "lora_A",
            lambda h, k: h.update({k.replace("self_attn.q_proj", "self_attn.k_proj"): h.pop(k)}),
            ["lora_", " is missing"],
        ),
        ("lora_A", lambda h, k: h[k].update(shape=h[k]["shape"][::-1]), ["lora_A", "(4, 64), found (64, 4)"]),
        ("lora_B", lambda h, k: h[k].update(shape=h[k]["shape"][::-1]), ["lora_B", "(64, 4), found (4, 64)"]),
        ("lora_B", lambda h, k: h[k].update(dtype="I32"), ["lora_B", "expected the type BF16, F16", "found I32"]),
    ],
)
def test_adapter_tensors(
    originals: Path, adapter: Path, tmp_path: Path, refused: Refused, name: str, change: Any, words: list[str]
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_model.safetensors"
    key = f"base_model.model.model.layers.1.self_attn.q_proj.{name}.weight"
    edit_header(path, lambda header: change(header, key) and None)
    refused(originals / "hf", path, *words, options=("--lora", folder))


def test_adapter_of_another_model(tmp_path: Path, adapter: Path, originals: Path, refused: Refused) -> None:
    model, _, _ = random_model("odd", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "odd")
    options = ("--lora", adapter)
    refused(tmp_path / "odd", adapter, "lora_A", "expected the shape (4, 42), found (4, 64)", options=options)
    refused(originals / "hf", tmp_path / "nowhere", "No such file", options=("--lora", tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------
# Outputs


def test_disk_full_while_a_checkpoint_is_written(tmp_path: Path, originals: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, EXPORT, originals / "hf", "-o", tmp_path / "out.bin"]
    command += ["--tokenizer", originals / "tokenizer.bin"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"export.py: error: {tmp_path / 'out.bin'}: cannot write: {os.strerror(errno.EFBIG)}\n"
    assert os.listdir(tmp_path) == []


def test_output_in_a_file(tmp_path: Path, originals: Path, refused: Refused) -> None:
    out = originals / "tokenizer.bin" / "out.bin"
    refused(originals / "hf", "cannot write: Not a directory", options=("-o", out))


def test_output_must_not_be_one_of_the_inputs(bad: Path, refused: Refused) -> None:
    for source, file in (("hf", "model.safetensors"), ("shards", "model-00003-of-00006.safetensors")):
        path = bad / source / file
        before = path.read_bytes()
        refused(bad / source, path, "overwrite", options=("-o", path))
        assert path.read_bytes() == before


def test_interrupt_leaves_nothing(tmp_path: Path, originals: Path) -> None:
    folder = zeros(tmp_path / "model", export.replace(random_weights.SHAPES["7b"], n_layers=8, tied=True))
    (tmp_path / "out").mkdir()
    interrupt_export(tmp_path / "out", folder, "--tokenizer", EXPORT.with_name("tokenizer.bin"))


# ---------------------------------------------------------------------------------------------------------
# Tokenizers that are damaged


def test_many_states_of_no_classes(bad: Path) -> None:
    """Of a tokenizer file: refused at once, though there would be 4 billion of what takes no bytes."""
    data = bytearray(EXPORT.with_name("tokenizer.bin").read_bytes())
    n_classes = 100
    struct.pack_into("<2I", data, n_classes, 0, 0xFFFFFFFF)
    (bad / "t.bin").write_bytes(data)
    with pytest.raises(export.ExportError):
        export.read_tokenizer(bad / "t.bin")


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_type": [2, 3, 3, 6]},  # a byte, of which the name does not say which
        {"token_type": ["a"] * 4},
        {"bos_token_id": "x"},
        {"scores": ["a"] * 4},
        {"tokens": [1, 2, 3, 4]},
        {"unknown_token_id": 77},
    ],
    ids=str,
)
def test_gguf_tokenizers_with_wrong_types(tmp_path: Path, wrong: dict[str, Any]) -> None:
    fields = {
        "tokens": ["<unk>", "<s>", "</s>", "abc"],
        "scores": [0.0] * 4,
        "token_type": [2, 3, 3, 1],
        "model": "llama",
    }
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (fields | wrong).items():
        add = (
            writer.add_array
            if isinstance(value, list)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
        )
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(export.ExportError, match=re.escape(str(path))):
        export.read_tokenizer(path)
