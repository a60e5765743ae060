"""What users of other programs reported about loading, tokenizers and templates; each test names the report's kind."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from files import ROOT, Program, chain_model, read_tokenizer
from peers import LLAMA3
from test_export import sentencepiece_model
from test_reference import SHAPE, VOCAB, random_model
from test_sources import assert_agrees, gguf_file, half, meta_folder, save_bin_shards, save_shards
from test_template import CHATML, LLAMA3_CHAT, byte_level
from test_tokenizer_files import ids, library_of

import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

# ---------------------------------------------------------------------------------------------------------
# Which files belong to a checkpoint


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    model, _, _ = random_model("gqa", "bf16")
    save_shards(half(model, "bf16"), tmp_path / "hf")
    return tmp_path / "hf"


def contents(tmp_path: Path, source: Path) -> bytes:
    from test_reference import some_tokenizer

    export.write_model(tmp_path / "out.bin", export.open_source(source), some_tokenizer())
    return (tmp_path / "out.bin").read_bytes()


def test_shards_of_another_checkpoint_in_the_folder(tmp_path: Path, shards: Path) -> None:
    """mlx-vlm 1464, sglang 35107: a former export, or Mistral's consolidated file, is merged in."""
    expected = contents(tmp_path, shards)
    other, _, _ = random_model("gqa", "f16")
    other = half(other, "f16")
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(3)
    other.save_pretrained(tmp_path / "other", max_shard_size="30KB")
    for path in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(path, shards)
    first = next((tmp_path / "other").glob("*.safetensors"))
    shutil.copy(first, shards / "consolidated-00001-of-00001.safetensors")
    assert contents(tmp_path, shards) == expected
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(export.ExportError, match=r"the tensor \S+ is also in \S+"):
        export.open_source(shards)


@pytest.mark.parametrize("save", [save_shards, save_bin_shards])
def test_an_index_that_is_out_of_date(tmp_path: Path, save: Any) -> None:
    """CoSER 3, mlx-vlm 1827: it names shards that are no more, but all tensors are there."""
    model, _, _ = random_model("gqa", "bf16")
    folder = tmp_path / "hf"
    folder.mkdir()
    save(half(model, "bf16"), folder)
    expected = contents(tmp_path, folder)
    index = next(folder.glob("*.index.json"))
    values = json.loads(index.read_text())
    values["weight_map"] = {key: f"gone-{name}" for key, name in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    assert contents(tmp_path, folder) == expected


def test_files_of_other_names(tmp_path: Path, shards: Path) -> None:
    """ollama 6273: files that were renamed; the index says which they are, and leads nowhere else."""
    expected = contents(tmp_path, shards)
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    for i, path in enumerate(sorted(shards.glob("*-of-*"))):
        path.rename(shards / f"llama part {i}.safetensors")
        for key, name in values["weight_map"].items():
            values["weight_map"][key] = f"../llama part {i}.safetensors" if name == path.name else name
    index.write_text(json.dumps(values))
    assert contents(tmp_path, shards) == expected


@pytest.mark.parametrize("architectures", [[], ["LlamaModel"], None])
def test_a_base_model(tmp_path: Path, architectures: list[str] | None) -> None:
    """AutoModelForCausalLM goes by the model_type: tied, a base model is complete."""
    model, _, _ = random_model("tied", "bf16")
    half(model, "bf16").save_pretrained(tmp_path / "hf")
    expected = contents(tmp_path, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    assert values["tie_word_embeddings"] and values["model_type"] == "llama"
    path.write_text(json.dumps(values | {"architectures": architectures}))
    assert contents(tmp_path, tmp_path / "hf") == expected
    path.write_text(json.dumps(values | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(export.ExportError, match="expected LlamaForCausalLM, found"):
        export.open_source(tmp_path / "hf")


def test_an_adapter_is_given_as_the_model(tmp_path: Path) -> None:
    """ollama 9505, Chinese-Vicuna 13: its folder has no config.json."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(export.ExportError, match="a LoRA adapter.*--lora"):
        export.open_source(tmp_path)


def test_links_of_a_cache_and_names_without_an_ending(tmp_path: Path, shards: Path) -> None:
    """The folder of a snapshot in the hub's cache has links to files that are called by their hashes."""
    expected = contents(tmp_path, shards)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(shards.iterdir())):
        path.rename(tmp_path / "blobs" / f"{i:064}")
        path.symlink_to(f"../blobs/{i:064}")
    assert contents(tmp_path, shards) == expected


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(tmp_path: Path, shards: Path, mark: str) -> None:
    """simpletransformers 1169, OpenViking 500: what editors of Windows put in front."""
    expected = contents(tmp_path, shards)
    path = shards / "config.json"
    path.write_text(path.read_text(), mark)
    assert contents(tmp_path, shards) == expected
    library = library_of(LLAMA3)
    library.save(str(tmp_path / "tokenizer.json"))
    before = export.read_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text, mark)
    assert export.read_tokenizer(tmp_path) == before
    if mark == "utf-8-sig":
        assert export.read_tokenizer(tmp_path / "tokenizer.json") == before


def test_heads_of_two_dimensions(tmp_path: Path) -> None:
    """llama2.c 550: a model of 50,000 parameters, three heads that share one of keys and values."""
    fields = {
        "hidden_size": 6,
        "intermediate_size": 16,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    settings = transformers.LlamaConfig(**SHAPE | fields)
    transformers.LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    config = export.open_source(tmp_path / "hf").config
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.dim) == (3, 1, 2, 6)
    assert contents(tmp_path, tmp_path / "hf")[:8] == b"twofiles"


# ---------------------------------------------------------------------------------------------------------
# Tokenizers and models of different sizes


def test_a_padding_token_that_the_model_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Program
) -> None:
    """llama.cpp 6111, CTranslate2 1415: an added token is one more than the embedding has rows."""
    _, config, arrays = random_model("gqa", "bf16")
    tokens = [export.Token(b"t%d" % i, export.NORMAL, 0.0) for i in range(VOCAB)]
    pad = export.Token(b"<pad>", export.CONTROL)
    template = export.Template((("a",), *[()] * 7, (VOCAB,), ()), 1)
    from test_reference import in_memory

    for more, said in (
        (pad, "'<pad>'"),
        (pad._replace(type=export.USER_DEFINED), "'<pad>'"),
        (tokens[0], ""),
    ):
        tokenizer = export.Tokenizer([*tokens, more], 1, 0, (2, VOCAB), True, False, template=template)
        model = in_memory(config, arrays)
        if not said:
            with pytest.raises(export.ExportError, match=f"{VOCAB} tokens, the tokenizer {VOCAB + 1}"):
                export.write_model(tmp_path / "out.bin", model, tokenizer)
            continue
        export.write_model(tmp_path / "out.bin", model, tokenizer)
        assert said in capsys.readouterr().err
        found = export.read_tokenizer(tmp_path / "out.tokenizer.bin")
        assert found.tokens == tokens and found.stop_ids == (2,) and found.template is None
        assert run.ok(tmp_path / "out.bin", "-m", "tokenize", "-i", "t7").text.split()[0] == "1"


def test_added_tokens_that_were_there_before(tmp_path: Path) -> None:
    """llama.cpp 3633: added_tokens.json has ids 0, 1 and 2 as well, which tokenizer.model has."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(sentencepiece_model(tmp_path, vocab_size=300), folder / "tokenizer.model")
    n = len(export.read_tokenizer(folder / "tokenizer.model").tokens)
    config = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": n, "<|im_start|>": n + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    ours = export.read_tokenizer(folder)
    assert len(ours.tokens) == n + 2 and ours.stop_ids[0] == n and (ours.bos_id, ours.unk_id) == (1, 0)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Hello there", "The fox<|im_start|>dog", "again"]
    assert ids(folder, *texts) == [theirs.encode(text, add_special_tokens=False) for text in texts]


def test_bytes_in_a_llama_tokenizer(tmp_path: Path) -> None:
    """transformers 48206: a tokenizer.json of bytes whose class is that of SentencePiece's kind loses all spaces."""
    library = library_of(LLAMA3)
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_prefix_space": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["theorem t (a b : \u2115) : a + b = b + a := by\n  rw [add_comm]", " two  spaces"]
    assert ids(tmp_path, *texts) == [library.encode(text).ids for text in texts]


def test_text_is_printed_as_it_was(tmp_path: Path) -> None:
    """transformers 32575, 35175, 40088: clean_up_tokenization_spaces takes spaces away in front of punctuation."""
    library = library_of(LLAMA3)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": True}))
    made = export.read_tokenizer(tmp_path)
    for text in ("x != y , isn't it ? the 'word' n't 's", "': 'search"):
        assert b"".join(made.tokens[id].text for id in ids(tmp_path, text)[0]) == text.encode()


def test_bos_is_there_once(tmp_path: Path, run: Program) -> None:
    """llama-cpp-python 1501, llama.cpp 7332: the template has bos, and the tokenizer puts it in front, too."""
    library = byte_level()
    library.normalizer = None
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    library.add_special_tokens(names)
    from tokenizers import processors

    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    library.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "<|eot_id|>",
        "add_bos_token": True,
        "chat_template": LLAMA3_CHAT,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="<|eot_id|>")
    theirs.chat_template = LLAMA3_CHAT
    made = export.read_tokenizer(tmp_path)
    assert made.add_bos
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    chain = [expected[-1], theirs.convert_tokens_to_ids("<|eot_id|>")]
    path = chain_model(chain, vocabulary=read_tokenizer(made.to_bytes()), max_seq_len=128).write(tmp_path / "m.bin")
    lines = run.ok(path, "-m", "chat", "--json", "-t", 0, stdin=b"Hi\n").stdout.splitlines()
    found = next(value["prompt_tokens"] for value in map(json.loads, lines) if "prompt_tokens" in value)
    assert found == expected and found.count(bos) == 1


def test_tokens_that_only_the_settings_call_special(tmp_path: Path) -> None:
    """transformers 27132, axolotl 1221: additional_special_tokens are in the vocabulary as ordinary tokens."""
    library = library_of(LLAMA3)
    data = json.loads(library.to_str())
    names = ["<|im_start|>", "<|im_end|>"]
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] |= {name: len(vocab) + len(data["added_tokens"]) + i for i, name in enumerate(names)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    config = {"additional_special_tokens": names, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    made = export.read_tokenizer(tmp_path)
    start, end = (theirs.convert_tokens_to_ids(name) for name in names)
    assert made.template and made.template.parts[0] == (start, "user\n") and end in made.template.parts[3]
    assert [made.tokens[id].type for id in (start, end)] == [export.CONTROL] * 2
    assert ids(tmp_path, "a<|im_end|>b") != [theirs.encode("a<|im_end|>b", add_special_tokens=False)]  # cannot be typed


def test_control_pieces_in_a_template(tmp_path: Path) -> None:
    """FastChat 488: those of tokenizer.model become single tokens in a chat, too."""
    shutil.copy(sentencepiece_model(tmp_path, control_symbols=["[INST]", "[/INST]"]), tmp_path / "tokenizer.model")
    template = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + '[/INST]' }}{% endfor %}"
    template = template.replace("m.content + '[/INST]'", "m.content + ('[/INST]' if m.role == 'user' else '</s>')")
    template = template.replace("'[INST] '", "('[INST] ' if m.role == 'user' else '')")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = export.read_tokenizer(tmp_path)
    names = [token.text for token in made.tokens]
    inst, end = names.index(b"[INST]"), names.index(b"[/INST]")
    assert made.template and made.template.parts[0] == (1, inst, " ") and made.template.parts[3] == (end,)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_the_end_that_a_class_of_tokenizers_has(tmp_path: Path, name: str) -> None:
    library = library_of(LLAMA3)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|endoftext|>"
    assert export.read_tokenizer(tmp_path).stop_ids == (library.token_to_id("<|endoftext|>"),)


def test_templates_by_name(tmp_path: Path) -> None:
    library = library_of(LLAMA3)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"tool": "x", "default": CHATML}}))
    assert export.read_tokenizer(tmp_path).template


@pytest.mark.parametrize("inner", [64, None])
@pytest.mark.parametrize("outer", [256, 64.0, None])
def test_where_llama3_says_the_first_length(tmp_path: Path, inner: int | None, outer: float | None) -> None:
    """It takes precedence outside of rope_scaling; absent, it is max_position_embeddings."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, _, _ = random_model("gqa", "bf16")
    half(model, "bf16").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    values |= {"rope_scaling": rope, "rope_theta": 10000.0, "original_max_position_embeddings": outer}
    values.pop("rope_parameters", None)
    if inner:
        rope["original_max_position_embeddings"] = inner
    if not outer:
        values.pop("original_max_position_embeddings")
    path.write_text(json.dumps(values))
    found = export.open_source(tmp_path / "hf").config
    assert found.rope_original_max_seq_len == (outer or inner or found.max_seq_len)
    contents(tmp_path, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_agrees(tmp_path / "out.bin", found, theirs)


def test_mistral_has_no_biases(tmp_path: Path) -> None:
    """transformers 29553: whatever attention_bias says."""
    fields = {key: value for key, value in SHAPE.items() if key != "attention_bias"}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    expected = contents(tmp_path, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    assert contents(tmp_path, tmp_path / "hf") == expected


def test_a_vocabulary_size_that_is_out_of_date(tmp_path: Path) -> None:
    """llama.cpp 5910: llama.cpp counts the tokens."""
    _, config, arrays = random_model("gqa", "bf16")
    gguf_file(tmp_path / "m.gguf", "gqa", config, arrays, llama__vocab_size=100)
    assert export.open_source(tmp_path / "m.gguf").config.vocab_size == VOCAB


def test_mistrals_params_and_tokenizers(tmp_path: Path) -> None:
    _, config, arrays = random_model("gqa", "bf16")
    more = {"max_seq_len": None, "max_position_embeddings": 96, "tied_embeddings": False}
    folder = meta_folder(tmp_path / "m", config, arrays, 1, **more)
    model = export.open_source(folder)
    assert (model.config.max_seq_len, model.tokenizer_file) == (96, None)
    for name in ("tekken.json", "tokenizer.model.v3"):  # the second has precedence
        (folder / name).touch()
        assert export.open_source(folder).tokenizer_file == folder / name


# ---------------------------------------------------------------------------------------------------------
# Names that the gguf package knows, and the version of Python

TENSORS = {  # by Hugging Face's names: llama.cpp's, Meta's
    "model.embed_tokens": ("token_embd", "tok_embeddings"),
    "model.layers.{}.input_layernorm": ("blk.{}.attn_norm", "layers.{}.attention_norm"),
    "model.layers.{}.self_attn.q_proj": ("blk.{}.attn_q", "layers.{}.attention.wq"),
    "model.layers.{}.self_attn.k_proj": ("blk.{}.attn_k", "layers.{}.attention.wk"),
    "model.layers.{}.self_attn.v_proj": ("blk.{}.attn_v", "layers.{}.attention.wv"),
    "model.layers.{}.self_attn.q_norm": ("blk.{}.attn_q_norm", None),
    "model.layers.{}.self_attn.k_norm": ("blk.{}.attn_k_norm", None),
    "model.layers.{}.self_attn.o_proj": ("blk.{}.attn_output", "layers.{}.attention.wo"),
    "model.layers.{}.post_attention_layernorm": ("blk.{}.ffn_norm", "layers.{}.ffn_norm"),
    "model.layers.{}.mlp.gate_proj": ("blk.{}.ffn_gate", "layers.{}.feed_forward.w1"),
    "model.layers.{}.mlp.up_proj": ("blk.{}.ffn_up", "layers.{}.feed_forward.w3"),
    "model.layers.{}.mlp.down_proj": ("blk.{}.ffn_down", "layers.{}.feed_forward.w2"),
    "model.norm": ("output_norm", "norm"),
    "lm_head": ("output", "output"),
}


def test_names_of_tensors() -> None:
    """Every tensor that export.py reads, in layers of one digit and of more, by all three names."""
    layers = 34
    config = export.Config(4, 4, layers, 2, 1, 2, 4, 4, qkv_bias=True, qk_norm=True)
    specs = {spec.name for spec in export.specs_of(config)}
    names = {}
    for theirs, others in TENSORS.items():
        for layer in range(layers if "{}" in theirs else 1):
            for suffix in (".weight", ".bias"):
                name = theirs.format(layer) + suffix
                if name in specs:
                    names[name] = [(other or theirs).format(layer) + suffix for other in others]
    assert names.keys() == specs
    for i in range(2):
        found: dict[str, Any] = {both[i]: name for name, both in names.items()}
        assert export.by_hugging_face_names(found, layers) == {name: name for name in names}
    others: dict[str, Any] = {
        "blk.0.attn_qkv.weight": 1,
        "blk.0.ffn_gate_exps.weight": 2,
        "rope.freqs": 3,
        "x": 4,
    }
    assert export.by_hugging_face_names(others, 1) == others


@pytest.mark.parametrize("found", [(3, 10, 12), (3, 8, 0)])
def test_older_versions_of_python(monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...]) -> None:
    """They are named; and such a Python can read as far as that."""
    ast.parse((ROOT / "export.py").read_text(), feature_version=found[:2])
    version = ".".join(map(str, found))
    monkeypatch.setattr(sys, "version_info", found)
    monkeypatch.setattr(sys, "version", f"{version} (main)")
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "export.py"))
    assert caught.value.code == f"export.py: error: expected Python 3.11 or newer, found {version}"
