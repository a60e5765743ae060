"""Every source of weights becomes the same file, bit for bit, as the tensors that it was made of, with which
test_reference.py compares run.c and transformers; and run.c's logits agree with what transformers loads."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import ROOT, build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import random_weights
import test_reference
from test_reference import ARCHITECTURES, TOKENS, VOCAB, in_memory, log_softmax, random_model, run_probe

import export

Arrays = dict[str, np.ndarray]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    path.write_bytes(test_reference.some_tokenizer().to_bytes())
    return path


@pytest.fixture
def exported(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs export.py, which must succeed; returns what it said, and writes out.bin."""

    def run(source: Path | str, *options: object) -> str:
        args = [source, "-o", tmp_path / "out.bin", "--tokenizer", tokenizer, *options]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
        status = export.main()
        stdout, stderr = capsys.readouterr()
        assert (status, stdout) == (0, ""), stderr
        return stderr

    return run


def written(path: Path, config: export.Config, arrays: Arrays, dtype: str) -> bytes:
    """The weights file of tensors in memory."""
    export.write_model(path, in_memory(config, arrays), test_reference.some_tokenizer(), dtype)
    return path.read_bytes()


def half(model: Any, dtype: str) -> Any:
    """The model in 16 bits, as checkpoints are; its numbers are of 16 bits already."""
    return model.to(torch.bfloat16 if dtype == "bf16" else torch.float16)


def assert_agrees(file: Path, config: export.Config, model: Any) -> None:
    found = run_probe(build("probe", "native"), file, TOKENS, config)["logits"]
    with torch.no_grad():
        p = log_softmax(model.float().eval()(torch.tensor([TOKENS])).logits[0].numpy())
    q = log_softmax(found)
    assert (np.exp(p) * (p - q)).sum(axis=-1).max() < 1e-4


def changed(path: Path, **fields: Any) -> None:
    """Changes a JSON file; None takes a field away."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# ---------------------------------------------------------------------------------------------------------
# Hugging Face


def save_safetensors(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()


def save_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-0*-of-0*.safetensors"))) > 1


def save_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_bin_shards(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    weight_map = {}
    for i in range(3):
        name = f"pytorch_model-0000{i + 1}-of-00003.bin"
        part = {key: torch.nn.Parameter(state[key]) for key in list(state)[i::3]}  # parameters, not tensors
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS = [save_safetensors, save_shards, save_bin, save_bin_shards]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hugging_face(tmp_path: Path, exported: Run, name: str, dtype: str) -> None:
    """Each architecture in each type, in all the forms by turns."""
    model, config, arrays = random_model(name, dtype)
    expected = written(tmp_path / "direct.bin", config, arrays, dtype)
    turn = list(ARCHITECTURES).index(name) + (dtype == "f16")
    for save in (FORMS[turn % 4], FORMS[(turn + 1) % 4]):
        folder = tmp_path / save.__name__
        folder.mkdir()
        save(half(model, dtype), folder)
        assert f"out.bin: {dtype}" in exported(folder)
        assert (tmp_path / "out.bin").read_bytes() == expected, save.__name__


@pytest.mark.parametrize("name", ["gqa", "llama3_rope", "linear_rope", "theta", "bias", "qk_norm", "tied"])
def test_hugging_face_agrees_with_transformers(tmp_path: Path, exported: Run, name: str) -> None:
    """Of what is on the disk alone: transformers reads the same directory."""
    model, config, _ = random_model(name, "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    exported(tmp_path / "model", "--verify")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert_agrees(tmp_path / "out.bin", config, loaded)


@pytest.mark.parametrize("name", ["mha", "llama3_rope", "linear_rope"])
def test_settings_of_rope_before_transformers_5(tmp_path: Path, exported: Run, name: str) -> None:
    model, config, arrays = random_model(name, "bf16")
    expected = written(tmp_path / "direct.bin", config, arrays, "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    rope = json.loads(settings.read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        scaling = None if name == "mha" else rope | {key: rope.get("rope_type", rope.get("type"))}
        changed(settings, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
        exported(tmp_path / "model")
        assert (tmp_path / "out.bin").read_bytes() == expected
        rope = {("type" if k == "rope_type" else k): v for k, v in rope.items()}


AS_PUBLISHED: dict[str, dict[str, Any]] = {  # what their config.json has besides the sizes
    "Llama-2-7b": {"model_type": "llama", "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None, "max_length": 4096},
    "TinyLlama-1.1B": {"model_type": "llama", "attention_bias": False, "pretraining_tp": 1, "rope_scaling": None},
    "Yi-6B": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
        "rope_scaling": None, "rope_theta": 5000000.0, "pad_token_id": 0, "num_key_value_heads": 1,
    },
    "deepseek-llm-7b": {"model_type": "llama", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_scaling": None},
    "deepseek-coder-6.7b": {
        "model_type": "llama", "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
        "rms_norm_eps": 1e-6, "pretraining_tp": 1,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "attention_bias": False, "head_dim": 16, "mlp_bias": False, "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "num_key_value_heads": 2,
    },
    "SmolLM2-135M": {
        "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
        "rope_scaling": None, "tie_word_embeddings": True, "num_key_value_heads": 2, "initializer_range": 0.04,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "sliding_window": 400, "rope_theta": 10000.0, "num_key_value_heads": 2,
    },
    "Mistral-Nemo": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "num_key_value_heads": 2, "head_dim": 24},
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False,
        "use_mrope": False, "tie_word_embeddings": True, "rope_theta": 1000000.0, "num_key_value_heads": 2,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 32, "max_window_layers": 28,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "tie_word_embeddings": True, "num_key_value_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_configurations_as_they_were_published(tmp_path: Path, exported: Run, name: str) -> None:
    """As transformers 4 wrote them; transformers makes a random model of them, and we agree on its logits."""
    shape = {k: v for k, v in test_reference.SHAPE.items() if k not in ("rope_theta", "attn_implementation")}
    fields = shape | AS_PUBLISHED[name] | {"hidden_act": "silu", "use_cache": True, "torch_dtype": "bfloat16"}
    family = f"{fields['model_type'].capitalize()}ForCausalLM"
    folder = tmp_path / "model"
    folder.mkdir()
    text = json.dumps(fields | {"architectures": [family], "bos_token_id": 1, "eos_token_id": 2})
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor.copy_(tensor + 0.05 * torch.randn(tensor.shape))
    save_safetensors(model, folder)
    (folder / "config.json").write_text(text)
    exported(folder, "--verify")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert_agrees(tmp_path / "out.bin", export.open_source(folder).config, loaded)


def test_float32_checkpoint(tmp_path: Path, exported: Run) -> None:
    """What bf16 holds stays exact; what it does not becomes f16."""
    model, config, arrays = random_model("gqa", "bf16")
    expected = written(tmp_path / "direct.bin", config, arrays, "bf16")
    save_safetensors(model, tmp_path / "model")
    exported(tmp_path / "model")
    assert (tmp_path / "out.bin").read_bytes() == expected
    with torch.no_grad():
        model.model.norm.weight[3] = 1.0001
    save_safetensors(model, tmp_path / "model")
    assert "out.bin: f16" in exported(tmp_path / "model")
    assert_agrees(tmp_path / "out.bin", config, model)


def test_stop_ids(tmp_path: Path, exported: Run) -> None:
    model, _, _ = random_model("mha", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    changed(tmp_path / "model" / "config.json", eos_token_id=7)
    changed(tmp_path / "model" / "generation_config.json", eos_token_id=[9, 7, 11])
    exported(tmp_path / "model")
    stop_ids = export.Tokenizer.from_bytes((tmp_path / "out.tokenizer.bin").read_bytes()).stop_ids
    assert stop_ids == (2, 7, 9, 11)


@pytest.mark.parametrize("rows", [64, 20])
def test_vocabulary_that_is_padded(tmp_path: Path, exported: Run, rows: int, run: Any) -> None:
    """As Qwen's: more rows of the embedding than tokens, up to a round number."""
    vocab = (VOCAB // rows + 1) * rows
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**test_reference.SHAPE | {"vocab_size": vocab}))
    save_safetensors(model.to(torch.bfloat16), tmp_path / "model")
    tokens = [export.Token(b"t%d" % i, export.NORMAL, 0.0) for i in range(vocab - 5)]
    fewer = tmp_path / "fewer.bin"
    fewer.write_bytes(export.Tokenizer(tokens, 1, 0, (2,), True, False).to_bytes())
    if rows == 20:
        with pytest.raises(AssertionError, match=f"{vocab} tokens, the tokenizer {vocab - 5}"):
            exported(tmp_path / "model", "--tokenizer", fewer)
        return
    said = exported(tmp_path / "model", "--tokenizer", fewer)
    assert f"warning: the model has {vocab} tokens, the tokenizer {vocab - 5}" in said
    tokenizer = export.Tokenizer.from_bytes((tmp_path / "out.tokenizer.bin").read_bytes())
    assert tokenizer.tokens[-5:] == [export.Token(b"", export.UNUSED, 0.0)] * 5
    assert run.ok(tmp_path / "out.bin", "-m", "tokenize", "-i", "t7t8").text.split()[0] == "1"


def test_tokenizer_model_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_export import sentencepiece_model

    model_file = sentencepiece_model(tmp_path)
    vocab = len(export.read_tokenizer(model_file).tokens)
    settings = transformers.LlamaConfig(**test_reference.SHAPE | {"vocab_size": vocab})
    save_safetensors(transformers.LlamaForCausalLM(settings).to(torch.bfloat16), tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "model"), "-o", str(tmp_path / "out.bin")])
    assert export.main() == 1
    assert "no tokenizer" in capsys.readouterr().err
    model_file.rename(tmp_path / "model" / "tokenizer.model")
    assert export.main() == 0
    found = export.Tokenizer.from_bytes((tmp_path / "out.tokenizer.bin").read_bytes())
    assert found == export.read_tokenizer(tmp_path / "model" / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "fields", "window"),
    [
        ("theta", {"sliding_window": 100}, 100),
        ("theta", {"sliding_window": 512}, None),
        ("theta", {"sliding_window": None}, None),
        (
            "theta",
            {"sliding_window": 100, "layer_types": ["full_attention"] * 3},
            100,
        ),  # which Mistral does not look at
        ("bias", {"use_sliding_window": False, "sliding_window": 100, "layer_types": None}, None),
        (
            "bias",
            {"use_sliding_window": True, "sliding_window": 100, "layer_types": None},
            None,
        ),  # from layer 28
        (
            "bias",
            {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1, "layer_types": None},
            100,
        ),
        (
            "bias",
            {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": None, "layer_types": None},
            None,
        ),  # 28, if it is absent
        (
            "bias",
            {"use_sliding_window": True, "sliding_window": 100},
            None,
        ),  # layer_types has none that slides
        (
            "bias",
            {
                "use_sliding_window": True,
                "sliding_window": 90,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            90,
        ),
        ("mha", {"sliding_window": 100}, None),  # which Llama does not have
    ],
)
def test_sliding_windows(tmp_path: Path, exported: Run, name: str, fields: dict[str, Any], window: int | None) -> None:
    model, _, _ = random_model(name, "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    changed(tmp_path / "model" / "config.json", **fields)
    said = exported(tmp_path / "model")
    assert (f"512 to {window} positions, the sliding window" in said) == (window is not None)
    seq_len = struct.unpack_from("<I", (tmp_path / "out.bin").read_bytes(), 48)[0]
    assert seq_len == (window or 512)
    if window:
        assert f"{600} to {window}" in exported(tmp_path / "model", "--max-seq-len", 600)
        assert "warning" not in exported(tmp_path / "model", "--max-seq-len", window - 1)


def test_the_window_that_mistral_has_if_none_is_said(tmp_path: Path, exported: Run) -> None:
    """Absent, it is what transformers takes for it; null, there is none."""
    model, _, _ = random_model("theta", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text()) | {"max_position_embeddings": 8192, "sliding_window": None}
    path.write_text(json.dumps(values))
    assert "warning" not in exported(tmp_path / "model")
    values.pop("sliding_window")
    path.write_text(json.dumps(values))
    window = transformers.MistralConfig.from_pretrained(tmp_path / "model").sliding_window
    assert window and f"8192 to {window} positions" in exported(tmp_path / "model")


def test_the_window_that_qwen_has_if_none_is_said(tmp_path: Path, exported: Run) -> None:
    model, _, _ = random_model("bias", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text()) | {"max_position_embeddings": 8192, "use_sliding_window": True}
    values = {key: x for key, x in values.items() if key not in ("sliding_window", "layer_types")}
    path.write_text(json.dumps(values | {"max_window_layers": 0}))
    window = transformers.Qwen2Config.from_pretrained(tmp_path / "model").sliding_window
    assert window and f"8192 to {window} positions" in exported(tmp_path / "model")


def test_within_its_window_mistral_is_exact(tmp_path: Path, exported: Run) -> None:
    """The window is as long as the text here: one position less, and transformers differs."""
    model, config, _ = random_model("theta", "bf16")
    folder = tmp_path / "model"
    save_safetensors(half(model, "bf16"), folder)
    for window in (len(TOKENS), len(TOKENS) - 1):
        changed(folder / "config.json", sliding_window=window)
        exported(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        changed(folder / "config.json", sliding_window=None)
        exported(folder)
        if window == len(TOKENS):
            assert_agrees(tmp_path / "out.bin", config, loaded)
        else:
            with pytest.raises(AssertionError):
                assert_agrees(tmp_path / "out.bin", config, loaded)


# ---------------------------------------------------------------------------------------------------------
# Meta


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of halves become rows of pairs, as in Meta's checkpoints, llama2.c's and llama.cpp's."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


META = {
    **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"feed_forward.w{i}" for x, i in (("gate", 1), ("down", 2), ("up", 3))},
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def by_pairs(arrays: Arrays, c: export.Config) -> Arrays:
    result = {}
    for name, array in arrays.items():
        heads = c.n_heads if "q_proj" in name else c.n_kv_heads if "k_proj" in name else 0
        result[name] = interleaved(array, heads) if heads else array
    return result


def meta_folder(
    folder: Path, c: export.Config, arrays: Arrays, shards: int, embedding_axis: int = 1, **changes: Any
) -> Path:
    folder.mkdir()
    params = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads}
    params |= {"vocab_size": -1, "multiple_of": 16, "norm_eps": c.norm_eps, "max_seq_len": c.max_seq_len}
    params = {key: value for key, value in (params | changes).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    whole = {}
    for name, array in by_pairs(arrays, c).items():
        for old, new in META.items():
            name = name.replace(old, new)
        whole[name.removeprefix("model.")] = array
    for i in range(shards):
        part = {"rope.freqs": torch.ones(c.head_dim // 2)}
        part["layers.0.attention.inner_attention.rope.freqs"] = part["rope.freqs"].clone()  # as in Llama 1
        for name, array in whole.items():
            axis = 1 if ".wo." in name or ".w2." in name else 0
            axis = embedding_axis if "tok_embeddings" in name else axis
            piece = array if array.ndim == 1 else np.split(array, shards, axis)[i]
            tensor = torch.tensor(np.ascontiguousarray(piece).view(np.int16))
            part[name] = tensor.view(torch.float16 if array.dtype == np.float16 else torch.bfloat16)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["mha", "gqa", "tied"])
def test_meta(tmp_path: Path, exported: Run, name: str, shards: int) -> None:
    model, config, arrays = random_model(name, "bf16")
    if shards == 2:  # an even vocabulary
        config = export.replace(config, vocab_size=VOCAB + 1)
        for key in arrays.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            arrays[key] = np.concatenate([arrays[key], arrays[key][:1]])
    tokens = [*test_reference.some_tokenizer().tokens, export.Token(b"more", export.NORMAL, 0.0)]
    tokenizer = export.Tokenizer(tokens[: config.vocab_size], 1, 0, (2,), True, False)
    (tmp_path / "tokenizer").write_bytes(tokenizer.to_bytes())
    export.write_model(tmp_path / "direct.bin", in_memory(config, arrays), tokenizer, "bf16")
    for axis in (0, 1):  # of the embedding: Llama 2 and 3 differ
        folder = meta_folder(tmp_path / f"meta{axis}", config, arrays, shards, axis)
        exported(folder, "--tokenizer", tmp_path / "tokenizer")
        assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "direct.bin").read_bytes()
    if shards == 1:
        assert_agrees(tmp_path / "out.bin", config, model)


@pytest.mark.parametrize(
    ("params", "header"),
    [
        ({}, (2048, 10000, 0, 0, 0)),
        ({"rope_theta": 500000.0}, (8192, 500000, 0, 0, 0)),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, (131072, 500000, 2, 32, 8192)),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8},
            (131072, 500000, 2, 8, 8192),
        ),
    ],
)
def test_what_meta_leaves_out(tmp_path: Path, exported: Run, params: dict[str, Any], header: tuple[float, ...]) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    folder = meta_folder(tmp_path / "meta", config, arrays, 1, max_seq_len=None, **params)
    said = exported(folder)
    assert ("no context length" in said) == (header[0] == 2048)
    data = (tmp_path / "out.bin").read_bytes()
    seq_len, _, theta, kind, factor, _, _, original = struct.unpack_from("<I2fI3fI", data, 48)
    assert (seq_len, theta, kind, factor, original) == header


def test_pairs_and_halves_give_the_same_scores() -> None:
    """Meta's RoPE, a product of complex numbers, against run.c's on rows that were permuted."""
    rng = np.random.default_rng(3)
    head_dim, dim = 8, 5
    x = rng.standard_normal((6, dim))
    angles = np.arange(6)[:, None] * 100.0 ** -(np.arange(0, head_dim, 2) / head_dim)

    def pairs(w: np.ndarray) -> np.ndarray:
        z = (x @ w.T).reshape(6, head_dim // 2, 2)
        z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(6, head_dim)

    def halves(w: np.ndarray) -> np.ndarray:
        a, b = np.split(x @ w.T, 2, axis=1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    wq, wk = rng.standard_normal((2, head_dim, dim))
    permuted = []
    for w in (wq, wk):
        tensor = export.Tensor(Path(), w.shape, "F64", lambda start, stop, w=w: w[start:stop])
        permuted.append(export.half_split(tensor, head_dim).rows(0, head_dim))
    np.testing.assert_allclose(halves(permuted[0]) @ halves(permuted[1]).T, pairs(wq) @ pairs(wk).T)


# ---------------------------------------------------------------------------------------------------------
# GGUF


def gguf_file(path: Path, name: str, c: export.Config, arrays: Arrays, kind: str = "BF16", **changes: Any) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py writes it: vectors in float32, llama's q and k by pairs."""
    family = {"Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}.get(ARCHITECTURES[name][0], "llama")
    w = gguf.GGUFWriter(path, family)
    w.add_block_count(c.n_layers)
    w.add_context_length(c.max_seq_len)
    w.add_embedding_length(c.dim)
    w.add_feed_forward_length(c.hidden_dim)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    w.add_token_scores([0.0] * c.vocab_size)
    w.add_eos_token_id(4)
    if c.rope_scaling == 1:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(c.rope_factor)
    for key, value in changes.items():
        w.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    if c.rope_scaling == 2:
        w.add_tensor("rope_freqs.weight", llama3_factors(c))
    arrays = by_pairs(arrays, c) if family == "llama" else arrays
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_layers)
    for key, array in arrays.items():
        quantisation = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quantize(export.widened(array), quantisation)
        w.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=quantisation)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def llama3_factors(c: export.Config) -> np.ndarray:
    """rope_freqs.weight, in the words of llama.cpp's converter."""
    factors = []
    low_wavelength = c.rope_original_max_seq_len / c.rope_low_freq_factor
    high_wavelength = c.rope_original_max_seq_len / c.rope_high_freq_factor
    for freq in 1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2) / c.head_dim):
        wavelength = 2 * np.pi / freq
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(c.rope_factor)
        else:
            smooth = c.rope_original_max_seq_len / wavelength - c.rope_low_freq_factor
            smooth /= c.rope_high_freq_factor - c.rope_low_freq_factor
            factors.append(1 / ((1 - smooth) / c.rope_factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(tmp_path: Path, exported: Run, name: str) -> None:
    dtype = "f16" if name in ("gqa", "bias") else "bf16"
    model, config, arrays = random_model(name, dtype)
    expected = written(tmp_path / "direct.bin", config, arrays, dtype)
    exported(gguf_file(tmp_path / "m.gguf", name, config, arrays, dtype.upper()))
    assert (tmp_path / "out.bin").read_bytes() == expected
    assert_agrees(tmp_path / "out.bin", config, model)
    stop_ids = export.Tokenizer.from_bytes((tmp_path / "out.tokenizer.bin").read_bytes()).stop_ids
    assert stop_ids == (2, 4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ2_0"])
def test_quantised_gguf(tmp_path: Path, exported: Run, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The 16-bit weights are those that the gguf package dequantises; q and k are permuted after that."""
    name = "head_dim"
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4}
    monkeypatch.setitem(ARCHITECTURES, "wide", (ARCHITECTURES[name][0], ARCHITECTURES[name][1] | shape))
    _, config, arrays = random_model("wide", "f16")
    exported(gguf_file(tmp_path / "m.gguf", name, config, arrays, kind), "--dtype", "f16")
    quantisation = gguf.GGMLQuantizationType[kind]
    expected = {}
    for key, array in arrays.items():
        values = export.widened(array)
        if array.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, quantisation), quantisation).reshape(array.shape)
        expected[key] = values
    assert (tmp_path / "out.bin").read_bytes() == written(tmp_path / "direct.bin", config, expected, "f16")


def test_every_quantised_type_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    """Random bits of each type, in pieces of some rows or at once."""
    readable = 0
    rng = np.random.default_rng(5)
    for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"):
            continue  # the last two are not for weights
        w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        data = rng.integers(0, 100, (6, 2 * block_bytes), np.uint8)
        w.add_tensor("x", data, raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        try:
            expected = gguf.dequantize(data, kind)
        except NotImplementedError:
            with pytest.raises(export.ExportError, match="not supported"):
                export.read_gguf(tmp_path / "m.gguf")
            continue
        tensor = export.read_gguf(tmp_path / "m.gguf")[1]["x"]
        assert tensor.shape == expected.shape == (6, 2 * block)
        np.testing.assert_array_equal(np.concatenate([tensor.rows(0, 2), tensor.rows(2, 6)]), expected)
        readable += 1
    assert readable > 20


def test_split_gguf(tmp_path: Path, exported: Run) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    expected = written(tmp_path / "direct.bin", config, arrays, "bf16")
    first = {key: value for key, value in arrays.items() if "layers.2" not in key}
    rest = {key: value for key, value in arrays.items() if "layers.2" in key}
    gguf_file(tmp_path / "m-00001-of-00002.gguf", "gqa", config, first, split__count=2)
    gguf_file(tmp_path / "m-00002-of-00002.gguf", "gqa", config, rest, split__count=2)
    exported(tmp_path / "m-00001-of-00002.gguf")
    assert (tmp_path / "out.bin").read_bytes() == expected


# ---------------------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["gqa", "qk_norm"])
def test_lora(tmp_path: Path, exported: Run, name: str, rslora: bool) -> None:
    """Against the PEFT library: what it saves, and the weights that it merges."""
    peft = pytest.importorskip("peft")
    model, config, _ = random_model(name, "bf16")
    save_shards(half(model, "bf16"), tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, use_rslora=rslora)
    adapted = peft.get_peft_model(base, settings)
    torch.manual_seed(2)
    for key, value in adapted.state_dict().items():
        if "lora_" in key:
            value.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    expected = {key: value.numpy() for key, value in merged.state_dict().items()}
    for dtype in ("f16", "auto"):  # auto: bf16, as the model
        said = exported(tmp_path / "model", "--lora", tmp_path / "adapter", "--dtype", dtype, "--verify")
        direct = written(tmp_path / "direct.bin", config, expected, "f16" if dtype == "f16" else "bf16")
        assert ("out.bin: bf16" in said) == (dtype == "auto")
        kind = np.float16 if dtype == "f16" else np.uint16
        result = (tmp_path / "out.bin").read_bytes()
        a, b = (export.widened(np.frombuffer(data[4096:], kind)) for data in (result, direct))
        np.testing.assert_allclose(a, b, rtol=2**-10 if dtype == "f16" else 2**-7, atol=1e-7)
        assert (a == b).mean() > 0.99  # float32 is not associative
    exported(tmp_path / "model", "--lora", tmp_path / "adapter", "--dtype", "f16")
    assert_agrees(tmp_path / "out.bin", config, half(merged, "f16"))


def test_lora_on_other_sources(tmp_path: Path, exported: Run) -> None:
    """An adapter's names and rows are Hugging Face's, wherever the model comes from."""
    peft = pytest.importorskip("peft")
    model, config, arrays = random_model("gqa", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    for key, value in adapted.state_dict().items():
        if "lora_" in key:
            value.normal_(0, 0.2)
    adapted.float().save_pretrained(tmp_path / "adapter")
    results = set()
    meta = meta_folder(tmp_path / "meta", config, arrays, 1)
    for source in (tmp_path / "model", meta, gguf_file(tmp_path / "m.gguf", "gqa", config, arrays)):
        exported(source, "--lora", tmp_path / "adapter")
        results.add((tmp_path / "out.bin").read_bytes())
    assert len(results) == 1
    assert results != {written(tmp_path / "direct.bin", config, arrays, "bf16")}


# ---------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("piece", [1, 100, 3000])
def test_pieces_of_any_size(tmp_path: Path, exported: Run, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    model, config, arrays = random_model("gqa", "bf16")
    expected = written(tmp_path / "direct.bin", config, arrays, "bf16")
    monkeypatch.setattr(export, "PIECE", piece)
    save_shards(half(model, "bf16"), tmp_path / "model")
    for source in (
        tmp_path / "model",
        meta_folder(tmp_path / "meta", config, arrays, 1),
        gguf_file(tmp_path / "m.gguf", "gqa", config, arrays),
    ):
        exported(source)
        assert (tmp_path / "out.bin").read_bytes() == expected


def test_verify(tmp_path: Path, exported: Run) -> None:
    model, config, arrays = random_model("gqa", "bf16")
    save_safetensors(half(model, "bf16"), tmp_path / "model")
    assert exported(tmp_path / "model", "--verify").endswith(" MB, verified\n")
    assert "verified" not in exported(tmp_path / "model")

    model = in_memory(config, arrays)
    norm = model.tensors["model.norm.weight"]
    signs = itertools.cycle([1, -1])
    unsteady = norm._replace(rows=lambda start, stop: next(signs) * norm.rows(start, stop))
    model.tensors["model.norm.weight"] = unsteady
    with pytest.raises(export.ExportError, match="differs from its source"):
        export.write_model(tmp_path / "new.bin", model, test_reference.some_tokenizer(), verify=True)
    assert not list(tmp_path.glob("new*"))


def zeros(folder: Path, config: export.Config) -> Path:
    """A checkpoint of zeros that takes no room on the disk."""
    folder.mkdir()
    header, end = {}, 0
    for part in export.specs_of(config):
        span = [end, end + 2 * part.size]
        header[part.name] = {"dtype": "BF16", "shape": part.shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=4096, tie_word_embeddings=config.tied,
    )  # fmt: skip
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("shape", "layers", "size"), [("7b", 2, 1.0e9), ("70b", 1, 2.2e9)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, shape: str, layers: int, size: float) -> None:
    """Layers of 7B and 70B, with the embedding, in what Python, numpy and a few pieces take."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts memory as Linux does")
    folder = zeros(tmp_path / "model", export.replace(random_weights.SHAPES[shape], n_layers=layers, tied=True))
    program = (  # whose own children do not begin with the memory that pytest has in use
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    args = [ROOT / "export.py", folder, "-o", tmp_path / "out.bin", "--tokenizer", ROOT / "tokenizer.bin"]
    command = [sys.executable, "-c", program, sys.executable, *map(str, args)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kilobytes = int(done.stdout)
    assert (tmp_path / "out.bin").stat().st_size > size
    assert kilobytes < 200_000
    (tmp_path / "out.bin").unlink()
