"""A tokenizer is spread over several files, or leaves things out: what transformers and llama.cpp make of it."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from files import Program
from peers import LLAMA3, QWEN2, Tokens, corpus, trained
from test_export import sentencepiece_model
from test_template import CHATML
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

import export

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello there, it's 1234 o'clock",
    "  two  spaces ",
    "[PAD] and <|im_start|>user\n",
    "caf\u00e9 \u4e2d\U0001f600",
]


def ids(path: Path, *texts: str) -> list[list[int]]:
    """What run.c makes of texts, without bos."""
    made = export.replace(export.read_tokenizer(path), add_bos=False)
    file = path.parent / "read.tokenizer.bin"
    file.write_bytes(made.to_bytes())
    program = Tokens(file)
    found = [program(text) for text in texts]
    program.close()
    return found


def library_of(split: str) -> Tokenizer:
    library = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, encoder])
    return trained(library, special=("<|endoftext|>",))


# ---------------------------------------------------------------------------------------------------------
# Hugging Face's files


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_added_tokens_beside_a_sentencepiece_model(tmp_path: Path, kind: str | None, legacy: bool | None) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(sentencepiece_model(tmp_path, vocab_size=300), folder / "tokenizer.model")
    n = len(export.read_tokenizer(folder / "tokenizer.model").tokens)
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    config |= {} if kind is None else {"tokenizer_class": kind}
    config |= {} if legacy is None else {"legacy": legacy}
    added = {"[PAD]": n, "<|im_start|>": n + 1, "<|im_end|>": n + 2}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = export.read_tokenizer(folder)
    assert ours.stop_ids[0] == n + 2 and ours.template
    texts = ["Hello there", "a [PAD]b [PAD]", " [PAD] x", "The  dog", "\n"]
    assert ids(folder, *texts) == [theirs.encode(text, add_special_tokens=False) for text in texts]


def test_added_tokens_decoder(tmp_path: Path) -> None:
    library = library_of(LLAMA3)
    n = library.get_vocab_size()
    library.save(str(tmp_path / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {
        "0": {"content": "<|endoftext|>", "special": True, **flags},
        str(n): {"content": "<|im_end|>", "special": True, **flags},
        str(n + 1): {"content": "<tool>", "special": False, **flags},
    }
    config = {
        "eos_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": tokens,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = export.read_tokenizer(tmp_path)
    assert ours.stop_ids == (n,) and ours.tokens[n].type == export.CONTROL
    texts = ["a<tool>b", " <tool>"]
    assert ids(tmp_path, *texts) == [theirs.encode(text) for text in texts]


def test_an_eos_token_that_is_in_no_vocabulary(tmp_path: Path) -> None:
    library_of(LLAMA3).save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "<end>"}}))
        with pytest.raises(export.ExportError, match="eos_token '<end>' is not in the vocabulary"):
            export.read_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges(tmp_path: Path, kind: str) -> None:
    library = library_of(
        QWEN2
        if kind == "Qwen2Tokenizer"
        else r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    library.normalizer = normalizers.NFC() if kind == "Qwen2Tokenizer" else None
    library.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": kind, "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, *corpus()[:5]]
    assert ids(tmp_path, *texts) == [theirs.encode(text) for text in texts]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(export.ExportError, match="CLIPTokenizer"):
        export.read_tokenizer(tmp_path)


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of a decoder that change what is printed, and templates of which none is the default."""
    library = library_of(LLAMA3)
    data = json.loads(library.to_str())
    replace = {"type": "Replace", "pattern": {"String": "\n "}, "content": "\n"}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for steps, note in (([decoder], ""), ([decoder, replace], "is left out")):
        data["decoder"] = {"type": "Sequence", "decoders": steps}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        export.read_tokenizer(tmp_path)
        said = capsys.readouterr().err
        assert note in said and bool(said) == bool(note)
    data["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    for name, note in (("default", ""), ("rag", "none is named default, found rag")):
        config = {"chat_template": [{"name": name, "template": CHATML}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert bool(export.read_tokenizer(tmp_path).template) == (name == "default")
        assert note in capsys.readouterr().err


def test_spaces_that_sentencepiece_removes(tmp_path: Path) -> None:
    import sentencepiece

    path = sentencepiece_model(tmp_path, remove_extra_whitespaces=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["  The  dog ", "The dog", " ", "", "a\n\n b", "\t x  ", "fox   jumps over    the lazy dog  "]
    assert ids(path, *texts) == [processor.encode(text) for text in texts]


# ---------------------------------------------------------------------------------------------------------
# tiktoken


def test_tiktoken(tmp_path: Path) -> None:
    """A vocabulary that was trained: what the library makes of it with its merges, whose ids start at 1."""
    library = library_of(LLAMA3)
    table = export.byte_of_character()
    vocab = [bytes(table[c] for c in name) for name, _ in sorted(library.get_vocab().items(), key=lambda x: x[1])[1:]]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(text) + b" %d\n" % rank for rank, text in enumerate(vocab)))
    texts = [*TEXTS, *corpus()[:10], "<|eot_id|>"]
    assert ids(path, *texts) == [[id - 1 for id in library.encode(text).ids] for text in texts]
    made = export.read_tokenizer(path)
    n = len(vocab)
    assert len(made.tokens) == n + 256 and (made.bos_id, made.add_bos) == (n, True)
    assert {made.tokens[id].text for id in made.stop_ids} == {
        b"<|end_of_text|>",
        b"<|eot_id|>",
        b"<|eom_id|>",
    }
    # the names that Llama 3.1's tokenizer.json has
    assert [made.tokens[n + i].text.decode() for i in (2, 3, 4, 5, 11)] == [
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
    ]
    path.write_bytes(path.read_bytes().replace(b" 7\n", b" 8\n"))
    with pytest.raises(export.ExportError, match="ranks"):
        export.read_tokenizer(path)


def test_tekken(tmp_path: Path) -> None:
    """Mistral's tekken.json of a vocabulary that was trained; the last three tokens are listed, but not used."""
    library = library_of(export.TEKKEN)
    table = export.byte_of_character()
    vocab = [bytes(table[c] for c in name) for name, _ in sorted(library.get_vocab().items(), key=lambda x: x[1])[1:]]
    listed = [{"rank": rank, "token_bytes": base64.b64encode(text).decode()} for rank, text in enumerate(vocab)]
    more = [{"rank": len(vocab) + i, "token_bytes": "eHl6"} for i in range(3)]
    n = 30  # special tokens, of which 20 have names
    config = {"pattern": export.TEKKEN, "default_vocab_size": n + len(vocab), "default_num_special_tokens": n}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": listed + more}))
    texts = [*TEXTS, *corpus()[:10], "[INST]"]
    assert ids(path, *texts) == [[id - 1 + n for id in library.encode(text).ids] for text in texts]
    made = export.read_tokenizer(path)
    assert (len(made.tokens), made.bos_id, made.stop_ids, made.add_bos) == (n + len(vocab), 1, (2,), True)
    assert [made.tokens[i].text for i in (0, 1, 2, 3, 19, 20, 29)] == [
        *(b"<unk>", b"<s>", b"</s>", b"[INST]", b"[TOOL_CONTENT]", b"<SPECIAL_20>", b"<SPECIAL_29>"),
    ]
    assert export.read_tokenizer(tmp_path).tokens == made.tokens  # a directory that has no other tokenizer
    # later versions list the special tokens
    special = [{"rank": i, "token_str": f"[{i}]", "is_control": True} for i in range(n)]
    path.write_text(json.dumps({"config": config, "vocab": listed, "special_tokens": special}))
    assert export.read_tokenizer(path).tokens[29].text == b"[29]"
    path.write_text(json.dumps({"config": config, "vocab": listed[::-1]}))
    with pytest.raises(export.ExportError, match="ranks"):
        export.read_tokenizer(path)


def test_json_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"add_bos_token": True}))
    with pytest.raises(
        export.ExportError, match=r"tokenizer_config\.json: expected a tokenizer\.json, found JSON without"
    ):
        export.read_tokenizer(path)


def test_more_stop_tokens_than_a_file_holds(tmp_path: Path) -> None:
    """The first of them, and what ends an answer, count."""
    library = library_of(LLAMA3)
    names = [f"<end{i}>" for i in range(9)]
    library.add_special_tokens([*names, "<|im_start|>", "<|im_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    stops = [library.token_to_id(name) for name in names]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    found = export.read_tokenizer(tmp_path)
    assert found.template and found.stop_ids == (*stops[:6], library.token_to_id("<|im_end|>"))


def test_a_text_file_that_is_cut_within_a_character(tmp_path: Path) -> None:
    """Its kind is told by 512 bytes, of which a message shows 40."""
    for n in range(30, 42):
        path = tmp_path / "chat_template.jinja"
        path.write_text("x" * n + "\uff5c" * 200)
        assert export.read_text(path) == "x" * n + "\uff5c" * 200


def test_a_gguf_tokenizer_with_a_name_that_is_not_utf8() -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "a\udcff", "b"]
    types = [2, 3, 3, *[6] * 256, 1, 1]
    found = export.tokenizer_of_gguf(metadata("llama", names, token_type=types, scores=[0.0] * len(names)))
    assert found.tokens[259].text == b"a\xff"


# ---------------------------------------------------------------------------------------------------------
# What GGUF leaves out


def metadata(model: str, tokens: list[str], **fields: Any) -> dict[str, Any]:
    found = {"model": model, "tokens": tokens, **fields}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


BYTES = list(export.byte_of_character())


@pytest.mark.parametrize(
    ("pre", "adds"),
    [
        ("llama-bpe", True),
        ("llama3", True),
        ("falcon3", True),
        ("tekken", True),
        ("gpt-2", False),
        ("qwen2", False),
    ],
)
def test_bos_by_pre_tokenizer(pre: str, adds: bool) -> None:
    fields = metadata("gpt2", [*BYTES, "<b>"], pre=pre, merges=[], bos_token_id=256)
    assert export.tokenizer_of_gguf(fields).add_bos == adds
    for said in (True, False):
        more = {"tokenizer.ggml.add_bos_token": said}
        assert export.tokenizer_of_gguf(fields | more).add_bos == said


def test_what_ends_a_text_is_known_by_its_text() -> None:
    ends = ["<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|eom_id|>"]
    fields = metadata("gpt2", [*BYTES, "<x>", *ends], pre="llama-bpe", merges=[], eos_token_id=256)
    found = export.tokenizer_of_gguf(fields)
    assert found.stop_ids[0] == 256 and {*found.stop_ids} == {*range(256, 262)}
    assert all(found.tokens[id].type == export.CONTROL for id in found.stop_ids)
    many = metadata("gpt2", [*BYTES, *export.GGUF_ENDS], pre="llama-bpe", merges=[])
    assert len(export.tokenizer_of_gguf(many).stop_ids) == export.MAX_STOP_IDS


def test_ids_of_llama_that_are_left_out() -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581a"]
    found = export.tokenizer_of_gguf(metadata("llama", names))
    assert (found.bos_id, found.stop_ids, found.unk_id, found.add_bos) == (1, (2,), 0, True)
    assert found.add_dummy_prefix and found.tokens[3].type == export.BYTE
    assert found.tokens[259] == export.Token(b" a", export.NORMAL, 0.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0, 0.0)),
        ({"rope.scaling.factor": 4.0}, (1, 4.0)),  # of no type: linear
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, (1, 4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, (0, 0.0)),
        ({"rope.scaling.type": "linear"}, (0, 0.0)),
        ({"rope.scaling.factor": 0.0}, (0, 0.0)),
        ({"rope.scale_linear": 2.0}, (1, 2.0)),
    ],
)
def test_rope_scaling_of_gguf(fields: dict[str, Any], expected: tuple[int, float]) -> None:
    found = export.gguf_rope(fields)
    assert found["rope_theta"] == 10000.0
    assert (found.get("rope_scaling", 0), found.get("rope_factor", 0.0)) == expected


def test_the_help_shows_an_example_of_each_source(run: Program) -> None:
    for example in ("SmolLM2-135M-Instruct -o", "Llama3.2-1B -o", ".gguf -o", "stories260K.bin --tokenizer"):
        assert example in export.HELP
