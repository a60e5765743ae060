"""run.c against Hugging Face transformers in float32, on tiny random models of every architecture, tensor by tensor;
and against itself: the bits of the logits must not depend on the threads or on how the prompt was cut."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from builds import build, variants

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import export

VOCAB = 131  # no multiple of any tile

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("Llama", {}),
    "gqa": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "head_dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 2}),
    "odd": (
        "Llama",
        {"hidden_size": 42, "intermediate_size": 61, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "wide": (  # wide enough for AMX, whole panels and parts of one
        "Llama",
        {
            "hidden_size": 520,
            "intermediate_size": 2113,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "num_hidden_layers": 1,
        },
    ),
    "big_head": ("Llama", {"head_dim": 128, "num_key_value_heads": 2, "num_hidden_layers": 1}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "theta": ("Mistral", {"rope_theta": 1e6, "num_key_value_heads": 2, "sliding_window": None}),
    "bias": ("Qwen2", {"num_key_value_heads": 2}),
    "qk_norm": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
}


def random_model(name: str, dtype: str) -> tuple[Any, export.Config, dict[str, np.ndarray]]:
    """A transformers model in float32 whose weights are 16-bit numbers, its shape, and those numbers."""
    family, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    arrays = {}
    for key, tensor in model.state_dict().items():
        if settings.tie_word_embeddings and key == "lm_head.weight":
            continue
        spread = 0.2 if "norm" in key or "bias" in key else 0.7 / tensor.shape[-1] ** 0.5
        value = ((1.0 if "norm" in key else 0.0) + spread * torch.randn(tensor.shape)).to(half)
        tensor.copy_(value.float())
        bits = value.view(torch.int16).numpy()
        arrays[key] = bits.view(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16)
    rope = settings.rope_parameters or {}
    config = export.Config(
        dim=settings.hidden_size, hidden_dim=settings.intermediate_size, n_layers=settings.num_hidden_layers,
        n_heads=settings.num_attention_heads, n_kv_heads=settings.num_key_value_heads,
        head_dim=getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads,
        vocab_size=VOCAB, max_seq_len=512, norm_eps=settings.rms_norm_eps, rope_theta=rope["rope_theta"],
        rope_scaling={"default": 0, "linear": 1, "llama3": 2}[rope["rope_type"]],
        rope_factor=rope.get("factor", 0.0), rope_low_freq_factor=rope.get("low_freq_factor", 0.0),
        rope_high_freq_factor=rope.get("high_freq_factor", 0.0),
        rope_original_max_seq_len=rope.get("original_max_position_embeddings", 0)
        if rope["rope_type"] == "llama3" else 0,
        tied=settings.tie_word_embeddings, qkv_bias=family == "Qwen2", qk_norm=family == "Qwen3",
    )  # fmt: skip
    return model, config, arrays


def some_tokenizer() -> export.Tokenizer:
    tokens = [export.Token(b"t%d" % i, export.NORMAL, 0.0) for i in range(VOCAB)]
    return export.Tokenizer(tokens, bos_id=1, unk_id=0, stop_ids=(2,), add_bos=True, add_dummy_prefix=False)


def in_memory(config: export.Config, arrays: dict[str, np.ndarray]) -> export.Model:
    return export.Model(Path("memory"), config, {name: export.in_memory(a) for name, a in arrays.items()})


def reference(model: Any, tokens: list[int]) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """For each layer what probe.c shows of it; and the logits."""
    layers: list[dict[str, np.ndarray]] = [{} for _ in model.model.layers]
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    rotate, rotated = module.apply_rotary_pos_emb, []

    def record(*args: Any, **kwargs: Any) -> Any:
        rotated.append(rotate(*args, **kwargs))
        return rotated[-1]

    def flat(x: Any) -> np.ndarray:  # (1, heads, T, d) or (1, T, D) -> (T, D)
        x = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x
        return x[0].detach().numpy().copy()

    hooks = []
    for out, layer in zip(layers, model.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp

        def keep(name: str, out: dict[str, np.ndarray] = out) -> Any:
            return lambda _module, args, result=None: out.__setitem__(
                name, flat(args[0] if result is None else result[0] if isinstance(result, tuple) else result)
            )

        hooks += [
            attention.v_proj.register_forward_hook(keep("v")),
            attention.o_proj.register_forward_pre_hook(keep("attended")),
            mlp.down_proj.register_forward_pre_hook(keep("hidden")),
            layer.register_forward_hook(keep("x")),
        ]
    module.apply_rotary_pos_emb = record
    try:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].numpy()
    finally:
        module.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()
    for out, (q, k) in zip(layers, rotated, strict=True):
        out["q"], out["k"] = flat(q), flat(k)
    return layers, logits


@pytest.fixture(scope="session", params=variants("native"))
def probe(request: pytest.FixtureRequest) -> list[str]:
    return build("probe", request.param)


def run_probe(
    probe: list[str],
    file: Path,
    tokens: list[int],
    c: export.Config,
    threads: int = 1,
    chunk: int = 512,
    layers: int = 0,
) -> dict[str, np.ndarray]:
    out = file.with_suffix(".out")
    args = [*probe, file, threads, chunk, layers, out, *tokens]
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = np.fromfile(out, np.float32)
    widths = {
        "x": c.dim, "q": c.q_dim, "k": c.kv_dim, "v": c.kv_dim,
        "attended": c.q_dim, "hidden": c.hidden_dim, "logits": c.vocab_size,
    }  # fmt: skip
    sizes = [c.dim, c.q_dim + 2 * c.kv_dim, c.q_dim, c.hidden_dim, c.vocab_size]
    parts = np.split(data, np.cumsum([len(tokens) * n for n in sizes])[:-1])
    x, qkv, attended, hidden, logits = (p.reshape(len(tokens), -1) for p in parts)
    q, k, v = np.split(qkv, [c.q_dim, c.q_dim + c.kv_dim], axis=1)
    result = {"x": x, "q": q, "k": k, "v": v, "attended": attended, "hidden": hidden, "logits": logits}
    assert {name: array.shape[1] for name, array in result.items()} == widths
    return result


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


TOKENS = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 150)]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_agrees_with_transformers(
    probe: list[str], name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config, arrays = random_model(name, dtype)
    file = tmp_path / "m.bin"
    assert export.write_model(file, in_memory(config, arrays), some_tokenizer(), dtype) == dtype
    layers, logits = reference(model, TOKENS)

    # Where the CPU multiplies bf16 by bf16, activations are rounded to bf16: one part in 256.
    isa = subprocess.run([*probe, "isa"], capture_output=True, text=True, check=True).stdout
    tolerance = 0.03 if dtype == "bf16" and "BF16" in isa else 0.003
    worst: dict[str, float] = {}
    for layer, expected in enumerate(layers):
        found = run_probe(probe, file, TOKENS, config, layers=layer + 1)
        for key, value in expected.items():
            scale = float(np.abs(value).max())
            difference = float(np.abs(found[key] - value).max()) / scale
            worst[key] = max(worst.get(key, 0.0), difference)
            assert difference < tolerance, f"layer {layer}: {key} differs by {difference:.2g} of its largest"

    found_logits = run_probe(probe, file, TOKENS, config)["logits"]
    p, q = log_softmax(logits), log_softmax(found_logits)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    worst["kl"] = float(kl.max())
    with capsys.disabled():
        if os.environ.get("SHOW_DIFFERENCES"):
            print(f"\n{name} {dtype} {isa.strip()}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    assert kl.max() < 1e-4
    top = np.sort(logits, axis=-1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 0.05
    assert clear.mean() > 0.5
    assert (found_logits.argmax(-1) == logits.argmax(-1))[clear].all()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["mha", "gqa", "odd", "wide", "head_dim", "bias"])
def test_bits_do_not_depend_on_threads_or_batches(probe: list[str], name: str, dtype: str, tmp_path: Path) -> None:
    _, config, arrays = random_model(name, dtype)
    file = tmp_path / "m.bin"
    export.write_model(file, in_memory(config, arrays), some_tokenizer(), dtype)
    expected = run_probe(probe, file, TOKENS, config, threads=1, chunk=1)
    for threads in (1, 2, 3):
        for chunk in (1, 2, 7, 64, len(TOKENS)):
            found = run_probe(probe, file, TOKENS, config, threads, chunk)
            for key, value in expected.items():
                assert value.tobytes() == found[key].tobytes(), f"{key}, {threads} threads, batches of {chunk}"


def llama2c_file(c: export.Config, arrays: dict[str, np.ndarray]) -> bytes:
    """The checkpoint as llama2.c would have it: float32, and the rows of wq and wk in RoPE's pairs."""

    def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
        halves = w.reshape(heads, 2, c.head_dim // 2, -1)
        return halves.swapaxes(1, 2).reshape(w.shape)

    def layers(name: str, heads: int = 0) -> bytes:
        all_of_them = [export.widened(arrays[f"model.layers.{i}.{name}.weight"]) for i in range(c.n_layers)]
        return b"".join((interleaved(w, heads) if heads else w).tobytes() for w in all_of_them)

    head = [
        c.dim,
        c.hidden_dim,
        c.n_layers,
        c.n_heads,
        c.n_kv_heads,
        VOCAB if c.tied else -VOCAB,
        c.max_seq_len,
    ]
    parts = [
        np.array(head, np.int32).tobytes(),
        export.widened(arrays["model.embed_tokens.weight"]).tobytes(),
        layers("input_layernorm"),
        layers("self_attn.q_proj", c.n_heads),
        layers("self_attn.k_proj", c.n_kv_heads),
        layers("self_attn.v_proj"),
        layers("self_attn.o_proj"),
        layers("post_attention_layernorm"),
        layers("mlp.gate_proj"),
        layers("mlp.down_proj"),
        layers("mlp.up_proj"),
        export.widened(arrays["model.norm.weight"]).tobytes(),
        bytes(4 * c.max_seq_len * c.head_dim),  # its tables of cosines and sines
        b"" if c.tied else export.widened(arrays["lm_head.weight"]).tobytes(),
    ]
    return b"".join(parts)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "tied", "odd"])
def test_a_llama2c_file_becomes_the_same_weights_file(name: str, dtype: str, tmp_path: Path) -> None:
    """Interleaved and halved q/k rows are one model: what transformers was compared with above."""
    _, config, arrays = random_model(name, dtype)
    direct, detour, source = tmp_path / "direct.bin", tmp_path / "detour.bin", tmp_path / "llama2c.bin"
    export.write_model(direct, in_memory(config, arrays), some_tokenizer(), dtype)
    source.write_bytes(llama2c_file(config, arrays))
    assert export.write_model(detour, export.open_source(source), some_tokenizer(), "auto") == dtype
    assert detour.read_bytes() == direct.read_bytes()
