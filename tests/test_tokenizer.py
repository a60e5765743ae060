"""Token ids, against Google's sentencepiece: the same vocabulary must give exactly the same ids."""

from __future__ import annotations

import io
import random
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from files import (
    ADD_BOS,
    ADD_DUMMY_PREFIX,
    BYTE,
    CONTROL,
    LATE,
    NORMAL,
    PREFIX_AFTER_SPECIAL,
    USER_DEFINED,
    Piece,
    Program,
    Vocabulary,
    default_vocabulary,
    read_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

pb: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is loaded: mypy cannot see them

MARK = "\u2581"  # how SentencePiece writes a space


@dataclass
class Pair:
    """run.c's tokenizer file, and sentencepiece with the same vocabulary."""

    run: Program
    path: Path
    vocabulary: Vocabulary
    peer: sentencepiece.SentencePieceProcessor
    plain: sentencepiece.SentencePieceProcessor  # without a space in front

    def ids(self, text: bytes) -> list[int]:
        stdout = self.run.ok("-z", self.path, "-m", "tokenize", "-f", "-", stdin=text).text
        assert stdout.endswith("\n")
        return [int(word) for word in stdout.split()]

    def expected(self, text: bytes) -> list[int]:
        """What sentencepiece says. It would replace bytes that are not UTF-8; those stand for themselves here."""
        ids = [self.vocabulary.bos_id] if self.vocabulary.flags & ADD_BOS else []
        peer, valid = self.peer, ""
        for c in text.decode(errors="surrogateescape"):
            if "\udc80" <= c <= "\udcff":
                if peer is self.peer and not valid and self.vocabulary.flags & ADD_DUMMY_PREFIX:
                    ids += self.plain.encode(" ")
                ids += peer.encode(valid) + [self.vocabulary.id(bytes([ord(c) - 0xDC00]), BYTE)]
                peer, valid = self.plain, ""
            else:
                valid += c
        return ids + list(peer.encode(valid))

    def check(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        ids = self.ids(data)
        assert ids == self.expected(data), repr(text[:100])

    def decode(self, ids: list[int]) -> bytes:
        pieces = [self.vocabulary.pieces[i] for i in ids]
        text = b"".join(piece.text for piece in pieces if piece.type in (NORMAL, LATE, BYTE))
        return text[1:] if self.vocabulary.flags & ADD_DUMMY_PREFIX else text


def processor(model: Any, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    model.normalizer_spec.add_dummy_prefix = prefix
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def to_proto(vocabulary: Vocabulary) -> Any:
    """The vocabulary as SentencePiece would store it."""
    model = pb.ModelProto()
    for piece in vocabulary.pieces:
        text = f"<0x{piece.text[0]:02X}>" if piece.type == BYTE else piece.text.decode().replace(" ", MARK)
        type = USER_DEFINED if piece.type == LATE else piece.type
        model.pieces.add(piece=text, type=type, score=piece.score)
    spec = model.trainer_spec
    spec.model_type = pb.TrainerSpec.BPE
    spec.vocab_size = len(vocabulary)
    spec.byte_fallback = True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = vocabulary.unk_id, vocabulary.bos_id, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model


def from_proto(model: Any, flags: int) -> Vocabulary:
    pieces = []
    for piece in model.pieces:
        text = piece.piece.replace(MARK, " ").encode()
        if piece.type == BYTE:
            text = bytes([int(piece.piece[3:5], 16)])
        type = LATE if piece.type == USER_DEFINED else piece.type
        pieces.append(Piece(text, type, piece.score))
    return Vocabulary(tuple(pieces), flags=flags)


@pytest.fixture(scope="session")
def llama(run: Program, root: Path) -> Pair:
    """Llama 2's vocabulary, which ships with the repository."""
    path = root / "tokenizer.bin"
    if not path.exists():
        pytest.skip("tokenizer.bin is not there")
    vocabulary = read_tokenizer(path.read_bytes())
    model = to_proto(vocabulary)
    return Pair(run, path, vocabulary, processor(model, True), processor(model, False))


CORPUS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "the cat sat on the mat and the rat sat on the cat, and that was that; ate, sate, state, estate",
    "for (int i = 0; i < n; i++) {  sum += x[i] * y[i];  }  return sum / (float)n;",
    "Quel dr\u00f4le d'\u00e9t\u00e9 : \u00e0 No\u00ebl, l'\u00e2ne mangea la p\u00e2te. \u00dcber alle Gipfeln ist Ruh.",
    "\u0412\u0441\u0435 \u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438",
    "\u5409\u7956\u5c71\u7684\u732b\u5728\u7761\u89c9\u3002\u732b\u5728\u5c71\u4e0a\u3002",
    "aaaa aaaaa aaaaaaaa    bbbb   1234567890 1000000 2000 3.14159",
] * 6


def trained(run: Program, folder: Path, name: str, flags: int, **options: Any) -> Pair:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=bool(flags & ADD_DUMMY_PREFIX),
        minloglevel=2,
        **options,
    )
    model = pb.ModelProto.FromString(writer.getvalue())
    vocabulary = from_proto(model, flags)
    path = folder / f"{name}.tokenizer.bin"
    path.write_bytes(vocabulary.to_bytes())
    return Pair(run, path, vocabulary, processor(model, bool(flags & ADD_DUMMY_PREFIX)), processor(model, False))


@pytest.fixture(scope="session")
def with_bytes(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("with_bytes")
    return trained(run, folder, "t", ADD_BOS | ADD_DUMMY_PREFIX, vocab_size=600, byte_fallback=True)


@pytest.fixture(scope="session")
def with_unknown(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """No byte tokens: what it does not know is <unk>. And no space in front."""
    folder = tmp_path_factory.mktemp("with_unknown")
    return trained(run, folder, "t", 0, vocab_size=300, byte_fallback=False, character_coverage=0.98)


@pytest.fixture(scope="session")
def across_words(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Pieces that go on after a space, so that words cannot be taken one by one."""
    folder = tmp_path_factory.mktemp("across_words")
    pair = trained(run, folder, "t", ADD_DUMMY_PREFIX, vocab_size=700, byte_fallback=True, split_by_whitespace=False)
    assert any(b" " in p.text.strip(b" ") for p in pair.vocabulary.pieces if p.type == NORMAL)
    return pair


SYMBOLS = [
    "<sep>",
    "<sep",
    "cat",
    f"{MARK}the",
    f"a{MARK}b",
    f"{MARK}{MARK}{MARK}",
    "\n\n",
    "\u00e9t",
    "\U0001f600",
]


@pytest.fixture(scope="session")
def user_defined(run: Program, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tokens that are taken from the text before all else, the longest at each place."""
    folder = tmp_path_factory.mktemp("user_defined")
    options: dict[str, Any] = {"vocab_size": 600, "byte_fallback": True, "user_defined_symbols": SYMBOLS}
    pair = trained(run, folder, "t", ADD_BOS | ADD_DUMMY_PREFIX, **options)
    assert sum(p.type == LATE for p in pair.vocabulary.pieces) == len(SYMBOLS)
    return pair


PAIRS = ["llama", "with_bytes", "with_unknown", "across_words", "user_defined"]


@pytest.fixture(scope="session", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Pair)
    return found


# ---------------------------------------------------------------------------------------------------------
# Hard cases

SCRIPTS = {
    "Latin": "The quick brown fox, na\u00efve caf\u00e9 \u00c5ngstr\u00f6m \u0141\u00f3d\u017a \u0130stanbul",
    "Greek": "\u039c\u1fc6\u03bd\u03b9\u03bd \u1f04\u03b5\u03b9\u03b4\u03b5 \u03b8\u03b5\u03ac",
    "Cyrillic": "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445",
    "Armenian": "\u0532\u0561\u0580\u0565\u0582 \u0541\u0565\u0566",
    "Georgian": "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0",
    "Hebrew": "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "Arabic": "\u0627\u0644\u0633\u0644\u0627\u0645\u064f \u0639\u0644\u064a\u0643\u0645 \u0660\u0661\u0662",
    "Syriac": "\u072b\u0720\u0721\u0710",
    "Devanagari": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968",
    "Bengali": "\u09a8\u09ae\u09b8\u09cd\u0995\u09be\u09b0",
    "Tamil": "\u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd",
    "Telugu": "\u0c28\u0c2e\u0c38\u0c4d\u0c24\u0c47",
    "Sinhala": "\u0d86\u0dba\u0dd4\u0db6\u0ddd\u0dc0\u0db1\u0dca",
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "Lao": "\u0eaa\u0eb0\u0e9a\u0eb2\u0e8d\u0e94\u0eb5",
    "Tibetan": "\u0f56\u0f40\u0fb2\u0f0b\u0f64\u0f72\u0f66\u0f0b",
    "Myanmar": "\u1019\u1004\u103a\u1039\u1002\u101c\u102c\u1015\u102b",
    "Khmer": "\u179f\u17bd\u179f\u17d2\u178a\u17b8",
    "Ethiopic": "\u1230\u120b\u121d \u12d3\u1208\u121d",
    "Cherokee": "\u13a3\u13cf\u13f1\u13a9",
    "Mongolian": "\u182e\u1823\u1829\u182d\u1823\u182f",
    "Chinese": "\u5929\u5730\u7384\u9ec3\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\u4f60\u597d\u4e16\u754c",
    "Japanese": "\u3044\u308d\u306f\u306b\u307b\u3078\u3068 \u30ab\u30bf\u30ab\u30ca \uff76\uff9e \u6f22\u5b57",
    "Korean": "\uc548\ub155\ud558\uc138\uc694 \u1112\u1161\u11ab",
    "Gothic": "\U00010332\U0001033f\U00010344",
    "Cuneiform": "\U00012000\U00012001",
    "rare Han": "\U00020000\U0002a6d6\U00030000",
    "mathematics": "\u2200x\u2208\u211d: \u2211\u1d62 x\u1d62\u00b2 \u2264 \u221e \U0001d400\U0001d7d9",
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
    "noncharacters": "\ufffe\uffff\ufdd0\U0010ffff",
}

CASES = {
    "empty": "",
    "one space": " ",
    "two spaces": "  ",
    "space before": " a",
    "space after": "a ",
    "spaces around": "  the cat  ",
    "spaces between": "a  b   c    d",
    "tab": "\t",
    "tabs": "a\tb\t\tc\t d \t",
    "newlines": "\n\na\n b\n\n\n c \n",
    "DOS": "a\r\nb\r\n\r\n",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "NUL": "a\0b\0\0",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u2029g\u0085h",
    "mark": MARK,
    "marks": f"{MARK}{MARK}a{MARK}b {MARK} {MARK}",
    "mark after a letter": f"the{MARK}cat",
    "BOM": "\ufeffBOM",
    "BOM within": "a\ufeffb",
    "replacement": "\ufffd\ufffd a\ufffd",
    "eos typed": "</s>",
    "bos typed": "<s> hello <s></s>",
    "unk typed": "<unk>",
    "byte typed": "<0x0A> <0x00><0xFF>",
    "llama instruction": "[INST] <<SYS>>\nYou are kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] x [/INST]",
    "chat markup": "<|im_start|>user<|im_end|><|endoftext|>",
    "combining": "e\u0301 a\u0308\u0323 \u0301 Z\u0351\u036b\u0343\u036a\u0302\u036b",
    "precomposed and not": "\u00e9 e\u0301 \ufb01 \u210c \u2460",
    "emoji": "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "keycap": "1\ufe0f\u20e3#\ufe0f\u20e3",
    "ZWJ alone": "\u200d\u200c\u200b",
    "direction": "\u202eabc\u202c \u2066x\u2069",
    "one letter, long": "a" * 5000,
    "another letter, long": "\u00e9" * 3001,
    "spaces, long": " " * 5001,
    "word, long": "the" * 2000,
    "alternating": "ab" * 1500 + "ba" * 1500,
    "digits": "0123456789 3.14159 1e-5 1,000,000 0x7fff 007 " + "9" * 200,
    "code": 'int main(void)\n{\n\tfor (int i = 0; i < 10; ++i) {\n        printf("%d\\n", i);\n\t}\n}\n',
    "python": "def f(x):\n    return [y for y in x if y]  # a comment\n\n\nclass A:\n    pass\n",
    "JSON": '{"a": [1, 2.5e10, null], "b": {"c": "\\u00e9"}}',
    "URL": "https://www.example.com/a/b?c=d&e=%20f#g mailto:someone@example.org",
    "LaTeX": "$\\sum_{i=1}^{n} x_i = \\frac{n(n+1)}{2}$",
    "punctuation": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ... --- ??? !!!",
    "quotes": "\u201cHe said \u2018no\u2019\u201d \u2026 \u2014 \u2013 \u00abguillemets\u00bb",
    "capitals": "HELLO wORLD camelCase SCREAMING_SNAKE kebab-case",
    "everything at once": " ".join(SCRIPTS.values()) + "\n" + "".join(SCRIPTS.values()),
    **SCRIPTS,
    **{f"{n} spaces": "x" + " " * n + "y" for n in range(1, 41)},
}


@pytest.mark.parametrize("name", CASES)
def test_hard_cases(llama: Pair, name: str) -> None:
    llama.check(CASES[name])


@pytest.mark.parametrize("name", PAIRS[1:])
def test_hard_cases_elsewhere(request: pytest.FixtureRequest, name: str) -> None:
    pair = request.getfixturevalue(name)
    for text in [*CASES.values(), *CORPUS]:
        pair.check(text)


def test_known_ids(llama: Pair) -> None:
    """Ids of Llama 2 that are printed elsewhere, so that not all rests on one vocabulary file."""
    assert llama.ids(b"Hello world") == [1, 15043, 3186]
    assert llama.ids(b"Hello, world!") == [1, 15043, 29892, 3186, 29991]
    assert llama.ids(b"I believe the meaning of life is") == [1, 306, 4658, 278, 6593, 310, 2834, 338]
    assert llama.ids(b"Simply put, the theory of relativity states that ") == [
        *(1, 3439, 17632, 1925, 29892, 278, 6368, 310, 14215, 537, 5922, 393, 29871)
    ]
    assert llama.ids(b"\n") == [1, 29871, 13]
    assert llama.ids("\U0001f600".encode()) == [1, 29871, 243, 162, 155, 131]


def test_no_text_is_ever_a_control_token(pair: Pair) -> None:
    names = [p.text.decode() for p in pair.vocabulary.pieces if p.type == CONTROL]
    assert names
    bos = 1 if pair.vocabulary.flags & ADD_BOS else 0
    for name in [*names, "<unk>", *(f"<0x{b:02X}>" for b in (0, 10, 65, 255))]:
        for text in [name, f" {name}", f"a{name}b", name * 3, f"{name}\n{name} "]:
            ids = pair.ids(text.encode())[bos:]
            types = {pair.vocabulary.pieces[i].type for i in ids}
            assert CONTROL not in types
            if BYTE in types:
                assert pair.vocabulary.id(b"\0", BYTE) not in ids


def test_the_prompt_may_come_as_an_argument(llama: Pair) -> None:
    for text in ["the cat", " ", "", "caf\u00e9 \U0001f600", "-i", "a\nb"]:
        stdout = llama.run.ok("-z", llama.path, "-m", "tokenize", "-i", text).text
        assert [int(word) for word in stdout.split()] == llama.expected(text.encode())


# ---------------------------------------------------------------------------------------------------------
# Random cases

words = st.sampled_from(
    [
        "the",
        "cat",
        " ",
        "  ",
        "\n",
        "s",
        "ing",
        "\u00e9",
        MARK,
        "<sep>",
        "<se",
        "p>",
        "t",
        "a b",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
    ]
)
letters = st.text(alphabet="abest \n", max_size=60)
texts = st.one_of(
    st.text(max_size=40),
    st.lists(words, max_size=30).map("".join),
    letters,
    st.text(alphabet=" a\u2581\t", max_size=30),
)
mixtures = st.lists(st.one_of(st.binary(max_size=4), texts.map(str.encode)), max_size=6).map(b"".join)

quickly = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quickly
@given(text=texts)
def test_random_text(llama: Pair, text: str) -> None:
    llama.check(text)


@pytest.mark.parametrize("name", ["user_defined"])
def test_user_defined_symbols_side_by_side(request: pytest.FixtureRequest, name: str) -> None:
    pair = request.getfixturevalue(name)
    raw = [symbol.replace(MARK, " ") for symbol in SYMBOLS]
    for a in raw:
        pair.check(a)
        for b in [*raw, " ", "x"]:
            for text in [a + b, f"{a} {b}", f" {a}{b}{a} "]:
                pair.check(text)


@settings(quickly, max_examples=60)
@given(text=texts)
@pytest.mark.parametrize("name", PAIRS[1:])
def test_random_text_elsewhere(request: pytest.FixtureRequest, name: str, text: str) -> None:
    request.getfixturevalue(name).check(text)


@quickly
@given(data=mixtures)
def test_random_bytes(llama: Pair, data: bytes) -> None:
    """Bytes that are not UTF-8 are their byte tokens, and nothing is lost."""
    ids = llama.ids(data)
    assert llama.decode(ids) == data.replace(MARK.encode(), b" ")
    assert ids == llama.expected(data)


INVALID = [
    b"\x80",
    b"\xff\xfe",
    b"a\xc3",
    b"\xc3 ",
    b"\xc0\x80",  # NUL, too long
    b"\xc1\xbf",
    b"\xe0\x80\xaf",
    b"\xe0\x9f\xbf",
    b"\xed\xa0\x80",  # surrogates
    b"\xed\xbf\xbf",
    b"\xf0\x8f\xbf\xbf",
    b"\xf4\x90\x80\x80",  # beyond U+10FFFF
    b"\xf5\x80\x80\x80",
    b"\xe2\x96",  # the start of the mark
    b"\xe2\x96the",
    b"\xf0\x9f\x98",
    b"the\xf0\x9f\x98cat",
    b"the cat \xe9t\xe9",  # Latin-1
    b"\xff\xfet\0h\0e\0",  # UTF-16
    bytes(range(256)),
    bytes(range(255, -1, -1)) * 3,
]


@pytest.mark.parametrize("data", INVALID)
def test_invalid_utf8(llama: Pair, data: bytes) -> None:
    ids = llama.ids(data)
    assert llama.decode(ids) == data
    assert ids == llama.expected(data)


def test_every_character(llama: Pair) -> None:
    """Each Unicode scalar value once, and then after a space."""
    scalars = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    text = "".join(map(chr, scalars))
    assert llama.ids(text.encode()) == llama.expected(text.encode())
    text = " ".join(map(chr, scalars[:0x3000]))
    assert llama.ids(text.encode()) == llama.expected(text.encode())


def test_every_piece(llama: Pair) -> None:
    """The text of each token of the vocabulary, alone on its line."""
    text = b"\n".join(piece.text for piece in llama.vocabulary.pieces if piece.type == NORMAL)
    llama.check(text)


# ---------------------------------------------------------------------------------------------------------
# Speed

MEGABYTE = 1_000_000


def prose() -> bytes:
    rng = random.Random(1)
    vocabulary = " ".join(CORPUS).split()
    lines = (" ".join(rng.choices(vocabulary, k=rng.randint(3, 15))) for _ in range(MEGABYTE // 20))
    return "\n".join(lines).encode()[:MEGABYTE]


LONG: dict[str, tuple[Callable[[], bytes], float]] = {
    "prose": (prose, 1.0),
    "one letter": (lambda: b"a" * MEGABYTE, 2.0),
    "spaces": (lambda: b" " * MEGABYTE, 2.0),
    "marks": (lambda: MARK.encode() * (MEGABYTE // 3), 2.0),
    "newlines": (lambda: b"\n" * MEGABYTE, 2.0),
    "two letters": (lambda: b"ab" * (MEGABYTE // 2), 2.0),
    "no space": (lambda: prose().replace(b" ", b"").replace(b"\n", b""), 2.0),
    "random bytes": (lambda: random.Random(2).randbytes(MEGABYTE), 2.0),
    "words that grow": (lambda: b" ".join(b"t" * n for n in range(1400)), 2.0),
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte(llama: Pair, name: str) -> None:
    """Processor time, and the same ids as sentencepiece."""
    make, limit = LONG[name]
    text = make()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ids = llama.ids(text)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    if name == "random bytes":
        assert llama.decode(ids) == text.replace(MARK.encode(), b" ")
    else:
        assert ids == llama.expected(text)
    if not llama.run.sanitized:
        print(f"{name}: {took:.2f} s", file=sys.stderr)
        assert took < limit


def test_more_tokens_than_bytes(run: Program, tmp_path: Path) -> None:
    """A space before what follows each user-defined token makes three tokens of every two bytes."""
    base = default_vocabulary()
    pieces = (*base.pieces, Piece(b"\n", USER_DEFINED))
    vocabulary = Vocabulary(pieces, flags=ADD_BOS | ADD_DUMMY_PREFIX | PREFIX_AFTER_SPECIAL)
    (tmp_path / "t.bin").write_bytes(vocabulary.to_bytes())
    ids = run.ok("-z", tmp_path / "t.bin", "-m", "tokenize", "-i", "\nZ" * 1000).text.split()
    three = [str(i) for i in (len(base), vocabulary.id(b" "), 3 + ord("Z"))]
    assert ids == ["1", *three * 1000]


@pytest.mark.parametrize("type", [USER_DEFINED, LATE])
def test_long_user_defined_tokens_take_linear_time(run: Program, tmp_path: Path, type: int) -> None:
    """Texts that start like a very long token, and are not one; and all that is found in between."""
    long, short = b"a" * 1001, b"a" * 7
    vocabulary = default_vocabulary()
    pieces = (*vocabulary.pieces, Piece(long, type), Piece(short, type), Piece(b"a" * 9, NORMAL, -99.0))
    vocabulary = replace(vocabulary, pieces=pieces)
    path = tmp_path / "t.bin"
    path.write_bytes(vocabulary.to_bytes())
    longer, shorter = len(pieces) - 3, len(pieces) - 2
    text = b"a" * 1000 + b"!" + b"a" * 1003 + b"!" + b"a" * 6
    found = [int(word) for word in run.ok("-z", path, "-m", "tokenize", "-f", "-", stdin=text).text.split()]
    assert found.count(longer) == 1 and found.count(shorter) == 142
    assert found.index(longer) > 142
    times = []
    for n in (40, 160):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run.ok("-z", path, "-m", "tokenize", "-f", "-", stdin=text * n)
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    if not run.sanitized:
        assert times[1] < 8 * times[0] + 0.2 and times[1] < 4, times
