"""Token ids of byte-level BPE, and of SentencePiece's kind in a tokenizer.json, against the `tokenizers` library."""

from __future__ import annotations

import json
import random
import resource
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from files import BYTE, Piece, Program, byte_level_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import GPT2, LLAMA3, QWEN2, Peer, Tokens, corpus, peer, trained
from test_tokenizer import CASES, INVALID
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import export

BAR = "\u2581"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|eot_id|>")
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WITH_MARKS = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


def bytes_of(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)


def after(*patterns: str) -> Any:
    """The patterns cut one after the other, then come the bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, bytes_of(use_regex=False)])


def digits(individual: bool) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), bytes_of()])


PRE_TOKENIZERS: dict[str, Any] = {
    "gpt2": bytes_of,
    "gpt2 as a split": lambda: after(GPT2),
    "gpt2 with a space": pre_tokenizers.ByteLevel,
    "llama3": lambda: after(LLAMA3),
    "qwen2": lambda: after(QWEN2),
    "qwen2 with marks": lambda: after(WITH_MARKS),
    "smollm2": lambda: digits(True),
    "numbers": lambda: digits(False),
    "cl100k": lambda: after(CL100K),
    "deepseek-coder": lambda: after(
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"
    ),
    "deepseek-llm": lambda: pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(pattern), "isolated")
                for pattern in (
                    *(r"[\r\n]", "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\U00010400-\U0001044f]+"),
                    *("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$"),
                    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
                )
            ),
            *(pre_tokenizers.Digits(individual_digits=True), bytes_of()),
        ]
    ),
    "deepseek-llm of llama.cpp": lambda: after(*export.DEEPSEEK_LLM),
    "deepseek-v3": lambda: after(
        *(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "all but the gaps is removed": lambda: pre_tokenizers.Sequence(  # as made of tiktoken's files
        [pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True), bytes_of(use_regex=False)]
    ),
    "tekken": lambda: after(TEKKEN),
    "far ahead": lambda: after(r"[a-z ]*!|[a-z]", r"\d*%|\s+$|\d"),
    "ends of lines": lambda: after(r"[a-z ]+$|\s+$", r"b+|\d$"),
    "a literal": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split("th.", "isolated"), bytes_of()]),
    "no words": lambda: bytes_of(use_regex=False),
}


def make(name: str, alphabet: bool = True, vocab_size: int = 1500, **options: Any) -> Tokenizer:
    library = Tokenizer(models.BPE(**options))
    library.pre_tokenizer = PRE_TOKENIZERS[name]()
    if name == "qwen2":
        library.normalizer = normalizers.NFC()
    if name in ("llama3", "tekken"):
        library.model.ignore_merges = True
    return trained(library, vocab_size, alphabet, SPECIAL)


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with peer(make(request.param), tmp_path_factory.mktemp("t")) as found:
        yield found


def normal(found: Peer, text: str) -> str:
    """Text as the tokenizer wants it, which run.c leaves as it is: in NFC, if it says so."""
    wants = "NFC" in json.dumps(json.loads(found.library.to_str())["normalizer"])
    return normalizers.NFC().normalize_str(text) if wants else text


# ---------------------------------------------------------------------------------------------------------
# Hard cases

MORE = {
    "contractions": "I'm you're he's we've I'll they'd can't o'clock 'tis rock'n'roll's",
    "capitals": "I'M YOU'RE HE'S WE'VE I'LL THEY'D CAN'T 'S'T'RE 'Ll 'lL 'Ve",
    "long s": "he'\u017f '\u017f\u017f 'K '\u212a",
    "apostrophes": "'' 's's 's''s ''s \u2019s he\u2019s '\n's '\ts ' s",
    "numbers": "1 12 123 1234 12345 123456 1234567 a1b22c333d4444 1,234,567.89 -5 +7",
    "other digits": "\u0661\u0662\u0663\u0664 \u0967\u0968 \uff11\uff12 \u2460\u00b2\u00bd\u2167 \U0001d7d8\U0001d7d9 \u4e00\u4e8c",
    "line ends": "a\r\nb\rc\n\rd \r\n e\t\r\n\tf\n\n\n  g  \n  \n h.\n!\r\n?\n\n -\n",
    "spaces at the end": "a  ",
    "tabs": "\ta\t\tb \tc\t d",
    "other spaces": "a\u00a0b \u00a0c\u00a0 d\u2003\u2003e\u3000\u3000f\u0085g\u2028h\u200bi\ufeffj\x1cj\x1fk\x0bl\x0cm",
    "marks": "e\u0301\u0301 \u0301a 1\u0301 .\u0301 \u0928\u093f\u0302",
    "newer letters": "\U00010ec2\U00011b60 \U000105c0\U0001e6c0 \U00031350\U0002ebf0 \U00016d40\U00010d40",
    "typed control": " ".join(SPECIAL) + "".join(SPECIAL) + "\n<|im_start|>user\n",
}
ALL_CASES = {**CASES, **MORE}


def test_hard_cases(one: Peer) -> None:
    for text in ALL_CASES.values():
        one.check(normal(one, text))


def test_prose_and_code(one: Peer) -> None:
    for text in corpus():
        one.check(normal(one, text))
    source = Path(export.__file__).read_text()
    one.check(source)
    assert one.decoded(one.ours(source)).lstrip(b" ") == source.encode()


SCALARS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def test_many_characters(one: Peer) -> None:
    """Those of nearly all scripts, side by side; and some before and after what patterns treat in a special way."""
    many = [c for i, c in enumerate(SCALARS) if i < 0x3000 or 0x9800 <= i < 0x11000 or i % 29 == 0]
    one.check(normal(one, "".join(many)))
    some = [c for i, c in enumerate(SCALARS) if i < 0x600 or i % 97 == 0]
    for between in [" ", "a", "1", "'", ".", "\n", "\u0301"]:
        one.check(normal(one, between.join(some)))


@pytest.mark.parametrize("kind", ["llama3", "smollm2"])
def test_every_character(tmp_path: Path, kind: str) -> None:
    with peer(make(kind), tmp_path) as found:
        found.check("".join(SCALARS))


fragments = st.sampled_from(
    [
        "the",
        " the",
        "'s",
        "'LL",
        "'t",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "12",
        "1",
        "\u0663",
        "\u00bd",
        ".",
        "...",
        "\u00a0",
    ]
    + [
        "e\u0301",
        "\u4e2d",
        "\u0928\u093f",
        "\U0001f468\u200d\U0001f469",
        "_",
        "<|im_end|>",
        "</s>",
        "\u017f",
        "'",
        "\0",
    ]
)
texts = st.one_of(
    st.text(max_size=40),
    st.lists(fragments, max_size=20).map("".join),
    st.text(
        alphabet=" \t\r\n\u00a0\u2003'sStTlLrReEdDvVmM12\u0663a\u00e9,.-_\u0301\u200d\u4e2d\u017f",
        max_size=40,
    ),
)
thoroughly = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@thoroughly
@given(text=texts)
def test_random_text(one: Peer, text: str) -> None:
    one.check(normal(one, text))


def test_bytes_that_are_no_text(one: Peer) -> None:
    """Nothing is lost, and what is text comes out as it does alone, where words end before stray bytes."""
    rng = random.Random(3)
    for data in [*INVALID, b"\0", b"a\0b", *(rng.randbytes(50) for _ in range(300))]:
        assert one.decoded(one.ours(data)).removeprefix(b" ") == data.removeprefix(b" ")
    assert one.ours(b"") == one.library.encode("").ids == []


def test_no_text_is_ever_a_control_token(one: Peer) -> None:
    control = {id for id, token in enumerate(one.tokenizer.tokens) if token.type == export.CONTROL}
    assert control == {one.special.token_to_id(name) for name in SPECIAL}
    for name in SPECIAL:
        for text in [name, f" {name}", f"a{name}b", name * 3, f"{name}\n{name} "]:
            assert not control & {*one.ours(text)}
            assert control & {*one.special.encode(text).ids}


# ---------------------------------------------------------------------------------------------------------
# NFC

COMPOSE, DECOMPOSE = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str


@cache
def kinds_of_characters() -> dict[str, list[str]]:
    """As the library and Python know them."""
    parts = {c: DECOMPOSE(c) for c in SCALARS if not "\uac00" <= c <= "\ud7a3"}
    kinds = {
        "marks": [c for c in SCALARS if unicodedata.combining(c)],
        "Hangul's letters": [chr(c) for c in [*range(0x10F0, 0x1210), *range(0xA960, 0xA980)]],
        "syllables": [chr(c) for c in range(0xABF0, 0xD7B0)],
        "singletons": [c for c, p in parts.items() if len(p) == 1 and p != c],
        "not composed again": [c for c, p in parts.items() if len(p) > 1 and COMPOSE(c) != c],
        "composed": [c for c, p in parts.items() if len(p) > 1 and COMPOSE(c) == c],
        "compatibility": [c for c in SCALARS if unicodedata.decomposition(c).startswith("<")],
    }
    kinds["parts"] = sorted({p for kind in ("not composed again", "composed") for c in kinds[kind] for p in parts[c]})
    return kinds


KINDS = [
    *(
        "marks",
        "Hangul's letters",
        "syllables",
        "singletons",
        "not composed again",
        "composed",
        "compatibility",
    ),
    "parts",
]
some_of = {kind: st.deferred(lambda kind=kind: st.sampled_from(kinds_of_characters()[kind])) for kind in KINDS}
unicode_texts = st.lists(
    st.one_of(*some_of.values(), some_of["marks"], st.sampled_from(["a", " ", "\0", "\u0345", "\u0334", "e", "\n"])),
    max_size=24,
).map("".join)


@pytest.fixture(scope="module")
def nfc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with peer(make("qwen2"), tmp_path_factory.mktemp("t")) as found:
        yield found


@thoroughly
@given(text=st.one_of(unicode_texts, unicode_texts.map(DECOMPOSE)))
def test_text_in_nfc(nfc: Peer, text: str) -> None:
    """run.c does not make it so, and export.py says that."""
    nfc.check(COMPOSE(text))


def test_a_note_about_nfc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("qwen2").save(str(tmp_path / "tokenizer.json"))
    export.read_tokenizer(tmp_path)
    assert "expects text in Unicode's NFC" in capsys.readouterr().err
    make("gpt2").save(str(tmp_path / "tokenizer.json"))
    export.read_tokenizer(tmp_path)
    assert capsys.readouterr().err == ""


def check_fast(run: Program, peer: Peer, text: bytes, name: str) -> None:
    """The same ids as the library's, and within two seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = run.ok("-z", peer.path, "-m", "tokenize", "-f", "-", stdin=text)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert [int(word) for word in result.text.split()] == peer.library.encode(text.decode()).ids
    if not run.sanitized:
        print(f"{name}: {took:.2f} s", file=sys.stderr)
        assert took < 2


# ---------------------------------------------------------------------------------------------------------
# What else may be in a tokenizer.json


@thoroughly
@given(text=texts)
def test_bytes_that_are_not_in_the_vocabulary(small: Peer, text: str) -> None:
    small.check(text)


@pytest.fixture(scope="module", params=["nothing", "unknown"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """Trained on English alone: other bytes are left out, or one <unk> each."""
    options = {"unk_token": "<unk>"} if request.param == "unknown" else {}
    library = Tokenizer(models.BPE(**options))
    library.pre_tokenizer = bytes_of()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    library.train_from_iterator(["the cat sat on the mat", "it's that"] * 9, trainer)
    with peer(library, tmp_path_factory.mktemp("t")) as found:
        yield found


def test_an_unknown_byte_is_never_the_end_of_the_text(tmp_path: Path) -> None:
    library = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    library.pre_tokenizer = bytes_of()
    trainer = trainers.BpeTrainer(vocab_size=20, special_tokens=list(SPECIAL), show_progress=False)
    library.train_from_iterator(["ab"] * 9, trainer)
    folder_of(tmp_path, library, tokenizer_config={"eos_token": SPECIAL[0]})
    tokenizer = export.read_tokenizer(tmp_path)
    assert (tokenizer.unk_id, tokenizer.stop_ids) == (-1, (0,))
    (tmp_path / "t.bin").write_bytes(tokenizer.to_bytes())
    ours = Tokens(tmp_path / "t.bin")
    a, b = ours("a") + ours("b")
    assert library.encode("a\x05b").ids == [a, 0, b] and ours("a\x05b") == [a, b]
    ours.close()


ADDED = ["<think>", "<think", "the", " cat", "caf\u00e9", "    ", "\n\n", "ab", "abcab", "'s", "\U0001f600"]
added_texts = st.lists(
    st.one_of(st.sampled_from([*ADDED, "<thi", "k>", "c", "a", " ", "s", "\n", "1", *SPECIAL]), st.text(max_size=3)),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module", params=["gpt2", "gpt2 with a space", "llama3"])
def with_added(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    library = make(request.param)
    library.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    with peer(library, tmp_path_factory.mktemp("t")) as found:
        yield found


@thoroughly
@given(text=added_texts)
def test_added_tokens(with_added: Peer, text: str) -> None:
    with_added.check(text)


def test_added_tokens_everywhere(with_added: Peer) -> None:
    for text in [*ADDED, *ALL_CASES.values(), "".join(ADDED) * 3, " ".join(ADDED)]:
        with_added.check(text)


# ---------------------------------------------------------------------------------------------------------
# Other ways in


def gguf(found: Peer, pre: str) -> dict[str, Any]:
    """The metadata that a GGUF file would have."""
    data = json.loads(found.special.to_str())
    names = {id: name for name, id in found.special.get_vocab(with_added_tokens=True).items()}
    control = [found.special.token_to_id(name) for name in SPECIAL]
    return {
        "general.name": "x",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names[id] for id in range(len(names))],
        "tokenizer.ggml.token_type": [3 if id in control else 1 for id in range(len(names))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": control[0],
        "tokenizer.ggml.eot_token_id": control[2],
        "tokenizer.ggml.unknown_token_id": control[0],
    }


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        *(("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("smollm2", "smollm")),
        *(("tekken", "tekken"), ("deepseek-coder", "deepseek-coder"), ("deepseek-llm of llama.cpp", "deepseek-llm")),
    ],
)
def test_gguf(tmp_path: Path, name: str, pre: str) -> None:
    with peer(make(name), tmp_path) as found:
        metadata = gguf(found, pre)
        ours = export.tokenizer_of_gguf(metadata)
        same = (
            "unk_id",
            "tokens",
            "merges",
            "words",
            "kind",
            "ignore_merges",
            "add_dummy_prefix",
            "add_bos",
        )
        for field in same:
            assert getattr(ours, field) == getattr(found.tokenizer, field), field
        by_text = (SPECIAL[0], SPECIAL[2], SPECIAL[4], SPECIAL[3])  # named as such, then known by their texts
        assert ours.stop_ids == tuple(found.special.token_to_id(name) for name in by_text)
        with pytest.raises(export.ExportError, match="'new-one'"):
            export.tokenizer_of_gguf(metadata | {"tokenizer.ggml.pre": "new-one"})


@pytest.mark.parametrize("type", [1, 4], ids=["normal", "user-defined"])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_what_ends_a_text_cannot_be_typed_whatever_gguf_says_of_it(tmp_path: Path, name: str, type: int) -> None:
    with peer(make(name), tmp_path) as found:
        metadata = gguf(found, "gpt-2" if name == "gpt2" else "llama-bpe")
        metadata["tokenizer.ggml.token_type"] = [type if t == 3 else t for t in metadata["tokenizer.ggml.token_type"]]
        (tmp_path / "t.bin").write_bytes(export.tokenizer_of_gguf(metadata).to_bytes())
        ours = Tokens(tmp_path / "t.bin")
        for end in (SPECIAL[0], SPECIAL[2]):
            assert ours(end) == found.library.encode(end).ids
        ours.close()


def test_gguf_with_odd_settings(tmp_path: Path) -> None:
    """llama.cpp takes the first of equal merges, and adds no space to text of bytes."""
    with peer(make("gpt2"), tmp_path) as found:
        metadata = gguf(found, "gpt-2")
        plain = export.tokenizer_of_gguf(metadata)
        merges = metadata["tokenizer.ggml.merges"]
        odd = {"merges": [*merges, *merges[:40]], "add_space_prefix": True, "unknown_token_id": len(plain.tokens)}
        assert export.tokenizer_of_gguf(metadata | {f"tokenizer.ggml.{key}": x for key, x in odd.items()}) == plain
        metadata.pop("tokenizer.ggml.merges")
        with pytest.raises(export.ExportError, match="merges is missing"):
            export.tokenizer_of_gguf(metadata)


@pytest.mark.parametrize("pattern", [r"\w+", r"\p{L}+|\s", "a"])
def test_a_split_that_removes_text(tmp_path: Path, pattern: str) -> None:
    library = Tokenizer.from_str(plain().to_str())
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of(use_regex=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(export.ExportError, match="pre_tokenizer is not supported"):
        export.read_tokenizer(tmp_path)


def test_gguf_without_a_pre_tokenizer(tmp_path: Path) -> None:
    with peer(make("gpt2"), tmp_path) as found:
        metadata = gguf(found, "gpt-2")
        metadata.pop("tokenizer.ggml.pre")
        with pytest.raises(export.ExportError, match="pre-tokenizer ''"):
            export.tokenizer_of_gguf(metadata)


def test_gguf_of_sentencepiece(root: Path, tmp_path: Path) -> None:
    """Llama 2's vocabulary as llama.cpp has it is the same as that of the top-level tokenizer.bin."""
    top = export.read_tokenizer(root / "tokenizer.bin")
    names = [f"<0x{t.text[0]:02X}>" if t.type == export.BYTE else t.text.decode().replace(" ", BAR) for t in top.tokens]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [t.score for t in top.tokens],
        "tokenizer.ggml.token_type": [t.type for t in top.tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert export.tokenizer_of_gguf(metadata) == replace(top, prefix_after_special=True)


def folder_of(folder: Path, library: Tokenizer, **files: Any) -> Path:
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoints_folder(tmp_path: Path) -> None:
    library = make("llama3")
    ids = [library.token_to_id(name) for name in SPECIAL]
    one = [(SPECIAL[0], ids[0])]
    library.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A", f"{SPECIAL[0]} $A $B", one)
    config = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2], "lstrip": False}}
    folder = folder_of(
        tmp_path,
        library,
        tokenizer_config=config,
        generation_config={"eos_token_id": [ids[4], ids[2]]},
        config={"vocab_size": 1600, "eos_token_id": ids[3], "bos_token_id": 7},
    )
    tokenizer = export.read_tokenizer(folder)
    assert export.read_tokenizer(folder / "tokenizer.json") == tokenizer
    assert (tokenizer.bos_id, tokenizer.add_bos) == (ids[0], True)
    assert tokenizer.stop_ids == (ids[2], ids[4], ids[3])
    assert len(tokenizer.tokens) == 1600 and tokenizer.tokens[1599] == export.Token(b"", export.UNUSED)
    (tmp_path / "t.bin").write_bytes(tokenizer.to_bytes())
    ours = Tokens(tmp_path / "t.bin")
    for text in ["", "the cat", SPECIAL[2]]:
        library.encode_special_tokens = True
        assert ours(text) == library.encode(text).ids
    ours.close()
    folder_of(tmp_path, library, tokenizer_config=config | {"add_bos_token": False})
    assert not export.read_tokenizer(folder).add_bos


def test_ids_that_are_mere_defaults_are_no_control_tokens(tmp_path: Path) -> None:
    """A configuration says bos 1 and eos 2 if nobody has told it otherwise; here those are letters."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = bytes_of()
    trained(library, 400)
    folder_of(tmp_path, library, config={"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2})
    tokenizer = export.read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (-1, ())
    assert {t.type for t in tokenizer.tokens} == {export.NORMAL, export.BYTE}


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


ENCODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern), ENCODER]}}, pattern)
        for pattern in [
            *(
                r"\w+|\s",
                r"a(?<=b)",
                r"\bthe\b",
                r"^a",
                "a.b",
                "a+?",
                "(?<x>a)",
                "(a",
                "a)",
                "[a",
                "[^]",
                "a{1,200}",
            ),
            *(
                "*",
                "a**",
                r"(?>a)",
                r"\p{L}++\p{Lu}",
                r"(?:ab)++c",
                r"(?:a++)ab?",
                r"(a++)*ab",
                "(?!ab)c",
                r"[\w]",
                "[a&&b]",
                r"\k<a>",
                "(?i:[ab])",
            ),
        ]
    ),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("a", "Removed"), ENCODER]}}, '"Removed"'),
    (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, ENCODER]}},
        "BertPre",
    ),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": None}, "byte-level or writes spaces"),
    ({"normalizer": {"type": "NFKC"}}, "NFKC"),
    ({"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": None}, "a normalizer of the type ByteLevel"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
    ({"model": {"type": "WordPiece"}}, "WordPiece"),
    ({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}, "expected the type BPE, found Unigram"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ({"model": {"dropout": 0.1}}, "dropout"),
    ({"model": {"merges": [["a", "qqq"]]}}, "merge"),
    ({"model": {"merges": None}}, "not supported"),
    ({"model": 7}, "model: expected an object, found 7"),
    ({"pre_tokenizer": {}, "normalizer": 3}, "not supported"),
    *(
        (
            {"added_tokens": [{"id": 50, "content": "zq", "special": False, flag: True}]},
            f"{flag} of the added token 'zq'",
        )
        for flag in ("lstrip", "rstrip", "single_word")
    ),
]


@pytest.fixture(scope="module", params=["gpt2", "gpt2 with a space"])
def in_two_steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    library = make(request.param)
    names = ["b>c", "<ab>d", "ab", "zq", "z", "q<", "<ab>"]
    library.add_tokens([AddedToken(name, normalized=i % 2 == 0) for i, name in enumerate(names)])
    with peer(library, tmp_path_factory.mktemp("t")) as found:
        yield found


@thoroughly
@given(text=st.text(alphabet="<ab>cdzq ", max_size=30))
def test_added_tokens_that_the_library_seeks_one_after_the_other(in_two_steps: Peer, text: str) -> None:
    in_two_steps.check(text)


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data = json.loads(plain().to_str())
    for key, value in changes.items():
        merge = isinstance(value, dict) and key == "model"
        data[key] = data[key] | value if merge else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(export.ExportError) as caught:
        export.read_tokenizer(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@cache
def plain() -> Tokenizer:
    return make("gpt2", vocab_size=300)


# ---------------------------------------------------------------------------------------------------------
# Speed

LONG: dict[str, bytes] = {
    "prose": b"The quick brown fox isn't as quick as 12345 lazy dogs, it's said.\n" * 15000,
    "one letter": b"a" * 1_000_000,
    "spaces": b" " * 1_000_000,
    "lines": b"\n" * 1_000_000,
    "lines and spaces": b" \n  " * 250_000,
    "digits": b"7" * 1_000_000,
    "punctuation": b"'" * 1_000_000,
    "marks": "\u0301".encode() * 500_000,
    "no space": random.Random(1)
    .randbytes(500_000)
    .hex()
    .translate({ord(d): chr(ord(d) + 64) for d in "0123456789"})
    .encode(),
    "Chinese": "\u4e2d\u6587\u5b57\u7b26".encode() * 83_000,
    "control tokens": b"<|im_end|>" * 100_000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kind", ["llama3", "no words"])
def test_a_megabyte(run: Program, long_peers: dict[str, Peer], kind: str, name: str) -> None:
    found, text = long_peers[kind], LONG[name]
    check_fast(run, found, text, name)


FAR: dict[str, bytes] = {
    "letters": b"a" * 400_000,
    "spaces and a letter": b" " * 400_000 + b"A",
    "digits": b"7" * 400_000,
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("kind", ["deepseek-llm", "far ahead"])
def test_searches_that_read_far_ahead(run: Program, long_peers: dict[str, Peer], kind: str, name: str) -> None:
    """The library takes quadratic time for these, so it is asked for two small parts only."""
    found, text = long_peers[kind], FAR[name]
    check_fast(run, found, text[:2000], name)
    check_fast(run, found, text[-2000:], name)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run.ok("-z", found.path, "-m", "tokenize", "-f", "-", stdin=text)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert run.sanitized or took < 2


@pytest.fixture(scope="module")
def long_peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(peer(make(kind), tmp_path_factory.mktemp("t")))
            for kind in ("llama3", "no words", "deepseek-llm", "far ahead")
        }


def test_a_large_vocabulary_opens_at_once(run: Program, tmp_path: Path) -> None:
    """As large as Llama 3's: 130,000 tokens and 280,000 merges."""
    pairs = [(a, b) for a in range(256) for b in range(256)]
    texts = [bytes(pair) for pair in pairs] + [bytes([a, b, a]) for a, b in pairs]
    merges = [(a, b, 256 + i) for i, (a, b) in enumerate(pairs)]
    for first in (256, 256 + 65536):
        merges += [(first + i, a, 256 + 65536 + i) for i, (a, _) in enumerate(pairs)]
    merges += [(a, 256 + 256 * b + a, 256 + 65536 + i) for i, (a, b) in enumerate(pairs)]
    pieces = [Piece(bytes([b]), BYTE) for b in range(256)] + [Piece(text) for text in texts]
    fields: dict[str, Any] = {"pieces": tuple(pieces), "merges": tuple(merges), "bos_id": 0, "stop_ids": (0,)}
    vocabulary = replace(byte_level_vocabulary(), **fields, templates=(), template_flags=0)
    path = tmp_path / "large.bin"
    path.write_bytes(vocabulary.to_bytes())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run.ok("-z", path, "-m", "tokenize", "-i", "the")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if not run.sanitized:
        print(f"opened in {took:.3f} s", file=sys.stderr)
        assert took < 0.1


# ---------------------------------------------------------------------------------------------------------
# SentencePiece's kind

PREPEND = [normalizers.Prepend(BAR), normalizers.Replace(" ", BAR)]
LLAMA2_LIKE: dict[str, Any] = {
    "prepend": (normalizers.Sequence(PREPEND), None),
    "nfc": (normalizers.Sequence([normalizers.NFC(), *PREPEND]), None),
    "replace": (normalizers.Replace(" ", BAR), None),
    "first": (None, pre_tokenizers.Metaspace(BAR, "first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(BAR, "always", split=False)),
    "never": (None, pre_tokenizers.Metaspace(BAR, "never", split=False)),
    "split": (None, pre_tokenizers.Metaspace(BAR, "always", split=True)),
}


@pytest.fixture(scope="module", params=LLAMA2_LIKE)
def llama2_like(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    normalizer, pre_tokenizer = LLAMA2_LIKE[request.param]
    library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizer or normalizers.Replace(" ", BAR)
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.Split(BAR, "merged_with_next")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1100, special_tokens=names, show_progress=False, limit_alphabet=300, max_token_length=12
    )
    library.train_from_iterator(corpus(), trainer)
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are tokens like others
    data["normalizer"] = json.loads(normalizer.__getstate__()) if normalizer else None
    data["pre_tokenizer"] = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else None
    library = Tokenizer.from_str(json.dumps(data))
    library.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "cat", "\n\n")])
    with peer(library, tmp_path_factory.mktemp("t")) as found:
        yield found


@thoroughly
@given(text=st.one_of(texts, unicode_texts, added_texts, st.text(alphabet=f" a{BAR}the\n<>k", max_size=30)))
def test_sentencepiece_in_json(llama2_like: Peer, text: str) -> None:
    llama2_like.check(normal(llama2_like, text))


def test_hard_cases_of_sentencepiece_in_json(llama2_like: Peer) -> None:
    for text in [*ALL_CASES.values(), *corpus()]:
        llama2_like.check(normal(llama2_like, text))
