"""Token ids of byte-level BPE, and of SentencePiece's kind in a tokenizer.json, against the `tokenizers` library."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import GPT2, LLAMA3, QWEN2, Peer, corpus, peer, trained
from test_tokenizer import CASES, INVALID
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

import export

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<|eot_id|>")
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
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
    "with gaps": lambda: after(
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u3040-\u30ff]+", r"\p{N}"
    ),
    "a literal": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split("th.", "isolated"), bytes_of()]),
    "no words": lambda: bytes_of(use_regex=False),
}


def make(name: str, alphabet: bool = True, vocab_size: int = 1500, **options: Any) -> Tokenizer:
    library = Tokenizer(models.BPE(**options))
    library.pre_tokenizer = PRE_TOKENIZERS[name]()
    if name == "qwen2":
        library.normalizer = normalizers.NFC()
    if name == "llama3":
        library.model.ignore_merges = True
    return trained(library, vocab_size, alphabet, SPECIAL)


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with peer(make(request.param), tmp_path_factory.mktemp("t")) as found:
        yield found


def is_nfc(found: Peer) -> bool:
    return found.library.normalizer is not None


def normal(found: Peer, text: str) -> str:
    """run.c leaves NFC out, so texts are in that form here where a tokenizer would put them into it."""
    return str(normalizers.NFC().normalize_str(text)) if is_nfc(found) else text


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


def test_every_character(one: Peer) -> None:
    """Each once, and before and after what patterns treat in a special way."""
    scalars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    one.check(normal(one, "".join(scalars)))
    some = [c for i, c in enumerate(scalars) if i < 0x600 or i % 97 == 0]
    for between in [" ", "a", "1", "'", ".", "\n", "\u0301"]:
        one.check(normal(one, between.join(some)))


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
    max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
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
# What else may be in a tokenizer.json


def test_text_that_is_not_in_nfc_keeps_its_form(tmp_path: Path) -> None:
    """The one known difference: the library composes e and an accent for such a tokenizer, run.c leaves them."""
    with peer(make("qwen2"), tmp_path) as found:
        assert found.decoded(found.ours("e\u0301")) == "e\u0301".encode()
        assert found.ours("\u00e9") == found.library.encode("e\u0301").ids


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
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    library.train_from_iterator(["the cat sat on the mat", "it's that"] * 9, trainer)
    with peer(library, tmp_path_factory.mktemp("t")) as found:
        yield found


ADDED = ["<think>", "<think", "the", " cat", "caf\u00e9", "    ", "\n\n", "ab", "abcab", "'s", "\U0001f600"]
added_texts = st.lists(
    st.one_of(
        st.sampled_from([*ADDED, "<thi", "k>", "c", "a", " ", "s", "\n", "1", *SPECIAL]), st.text(max_size=3)
    ),
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
# SentencePiece's kind

BAR = "\u2581"
PREPEND = [normalizers.Prepend(BAR), normalizers.Replace(" ", BAR)]
LLAMA2_LIKE: dict[str, Any] = {
    "prepend": (normalizers.Sequence(PREPEND), None),
    "replace": (normalizers.Replace(" ", BAR), None),
    "first": (None, pre_tokenizers.Metaspace(BAR, "first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(BAR, "always", split=False)),
    "never": (None, pre_tokenizers.Metaspace(BAR, "never", split=False)),
    "split": (None, pre_tokenizers.Metaspace(BAR, "always", split=True)),
}


@pytest.fixture(scope="module", params=LLAMA2_LIKE)
def llama2_like(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    normalizer, pre_tokenizer = LLAMA2_LIKE[request.param]
    from tokenizers import trainers

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
@given(text=st.one_of(texts, added_texts, st.text(alphabet=f" a{BAR}the\n<>k", max_size=30)))
def test_sentencepiece_in_json(llama2_like: Peer, text: str) -> None:
    llama2_like.check(text)


def test_hard_cases_of_sentencepiece_in_json(llama2_like: Peer) -> None:
    for text in [*ALL_CASES.values(), *corpus()]:
        llama2_like.check(text)
