"""models/FORMAT.md: its tables agree with the structs of run.c, and with the files that export.py writes."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import MODEL_FIELDS, ROOT, TOKENIZER_FIELDS, Model, fnv1a
from test_readme import sections, write_checkpoint

FORMAT = (ROOT / "models/FORMAT.md").read_text()
SOURCE = (ROOT / "run.c").read_text()
WEIGHTS, TOKENIZER, *_ = re.split(r"^(?=## )", FORMAT, flags=re.MULTILINE)[1:]

C_TYPES = {
    "char": "char",
    "u8": "uint8_t",
    "u32": "uint32_t",
    "i32": "int32_t",
    "u64": "uint64_t",
    "f32": "float",
}
FORMS = {"char": "s", "u8": "B", "u32": "I", "i32": "i", "u64": "Q", "f32": "f"}


@dataclass(frozen=True)
class Field:
    offset: int
    type: str
    name: str
    count: int = 1

    @property
    def form(self) -> str:
        return f"<{self.count}{FORMS[self.type]}"

    def read(self, data: bytes) -> Any:
        values = struct.unpack_from(self.form, data, self.offset)
        return values if self.count > 1 and self.type != "char" else values[0]


def fields(text: str) -> list[Field]:
    """The table of a header."""
    rows = re.findall(r"^\| (\d+) \| (\w+)(?:\[(\d+)\])? \| `(\w+)` \|", text, re.MULTILINE)
    return [Field(int(offset), type, name, int(count or 1)) for offset, type, count, name in rows]


def elements(text: str) -> Iterator[tuple[str, list[Field], str]]:
    """The table of arrays: the name, the fields of an element, and how many there are."""
    for name, element, count in re.findall(r"^\| `(\w+)` \| ([a-z].*?) \| (.*?) \|", text, re.MULTILINE):
        offset, found = 0, []
        for part in element.split(", "):
            type, _, field = part.partition(" ")
            found.append(Field(offset, type, field))
            offset += struct.calcsize(FORMS[type])
        yield name, found, count


HEADERS = {"Header": fields(WEIGHTS), "TokenizerHeader": fields(TOKENIZER)}
ARRAYS = list(elements(TOKENIZER))
STRUCTS = {"pieces": "Piece", "merges": "Merge", "items": "TemplateItem"}


def test_the_tables_are_read() -> None:
    assert [len(found) for found in HEADERS.values()] == [21, 21]
    assert [name for name, *_ in ARRAYS] == re.findall(r"t->(\w+) = next_array\(", SOURCE)
    for text in (WEIGHTS, TOKENIZER):
        assert all(line.count(" | ") in (1, 2, 3) for line in text.splitlines() if line.startswith("| "))


def test_structs(tmp_path: Path) -> None:
    """A program that includes run.c asserts the offset, the size and the type of each field."""
    structs = HEADERS | {STRUCTS[name]: found for name, found, _ in ARRAYS if name in STRUCTS}
    lines = ["#define NO_MAIN", '#include "run.c"', "int main(void) {"]
    for name, found in structs.items():
        for field in found:
            member = f"(({name} *)0)->{field.name}"
            element = f"{member}[0]" if field.count > 1 else member
            lines += [
                f'_Static_assert(offsetof({name}, {field.name}) == {field.offset}, "{field.name}");',
                f'_Static_assert(sizeof {member} == {struct.calcsize(field.form)}, "{field.name}");',
                f"(void)_Generic({element}, {C_TYPES[field.type]}: 0);",
            ]
        last = found[-1]
        end = last.offset + struct.calcsize(last.form)
        lines.append(f'_Static_assert(sizeof({name}) == {end}, "{name}: there are more fields");')
    source = tmp_path / "structs.c"
    source.write_text("\n".join([*lines, "}\n"]))
    command = ["cc", "-std=c11", "-w", "-fsyntax-only", "-I", ROOT, source]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(("name", "known"), [("Header", MODEL_FIELDS), ("TokenizerHeader", TOKENIZER_FIELDS)])
def test_fields_of_the_tests(name: str, known: dict[str, tuple[int, str]]) -> None:
    """The fields by which the tests write files."""
    expected = {name: (offset, form.removeprefix("8")) for name, (offset, form) in known.items()}
    assert {field.name: (field.offset, FORMS[field.type]) for field in HEADERS[name]} == expected


def rows(title: str, text: str = FORMAT) -> list[tuple[int, str]]:
    """The numbers and names of the table whose head begins with `title`."""
    table = re.search(rf"^\| {title} \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table
    return [(int(n), name) for n, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table[1], re.MULTILINE)]


def constants(first: str, last: str) -> list[tuple[int, str]]:
    """The names and values of enum, from one name to another."""
    text = re.sub(r"//.*", "", SOURCE)
    found = re.search(rf"\b{first} = .*?\b{last} = \d+", text, re.DOTALL)
    assert found
    return [(int(n), name) for name, n in re.findall(r"(\w+) = (\d+)", found[0])]


def test_types() -> None:
    assert rows("type") == constants("NORMAL", "LATE_USER_DEFINED")


def test_flags() -> None:
    *flags, (all_flags, _) = constants("ADD_BOS", "ALL_TOKENIZER_FLAGS")
    assert rows("flag") == flags
    assert sum(flag for flag, _ in flags) == all_flags


def test_templates() -> None:
    names = re.search(r"enum \{ (BEFORE_USER.*?) \};\s*enum \{ (OPENS_ANSWER.*?), N_TEMPLATES \};", SOURCE)
    assert names
    expected = [name.split(" = ")[0] for part in names.groups() for name in part.split(", ")]
    assert rows("template") == list(enumerate(expected))
    assert HEADERS["TokenizerHeader"][-1].count == len(expected)


def test_template_flags() -> None:
    table = re.search(r"`template_flags` is the sum of:\n\n((?:\|.*\n)+)", FORMAT)
    assert table
    cells = re.findall(r"^\| (\d+(?:, \d+)?) \|", table[1], re.MULTILINE)
    flags = [int(n) for cell in cells for n in cell.split(", ")]
    (all_flags,) = re.findall(r"ALL_TEMPLATE_FLAGS = (\d+)", SOURCE)
    assert flags == [1 << i for i in range(len(flags))] and sum(flags) == int(all_flags)


def test_tensors() -> None:
    """Their order and shapes."""
    (block,) = re.findall(r"(?:^ {4}.*\n)+", WEIGHTS, re.MULTILINE)
    model = Model(dim=40, flags=6, n_layers=1)  # no two sizes are the same
    found = [(name, shape) for name, shape, _, _ in tensors_of(block, vars(model))]
    assert found == [(name.split(".")[-1], shape) for name, shape in model.shapes()]


def tensors_of(block: str, header: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool, str]]:
    """Each tensor that the block of tensors names: its name and shape, whether it is a layer's, and its condition."""
    sizes = header | {
        "q": header["n_heads"] * header["head_dim"],
        "kv": header["n_kv_heads"] * header["head_dim"],
    }
    for indent, name, shape, note in re.findall(r"^ {4}( *)(\w+) +\((.*?)\)(.*)", block, re.MULTILINE):
        axes = [re.findall(r"(\d*) ?([a-z_]+)", axis) for axis in shape.split(", ")]
        yield name, tuple(sum(int(n or 1) * sizes[s] for n, s in axis) for axis in axes), bool(indent), note


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    """The two files of models that export.py made: one with automata and a chat template, and what ships."""
    folder = tmp_path_factory.mktemp("format")
    write_checkpoint(folder / "checkpoint")
    command = [sys.executable, ROOT / "export.py", folder / "checkpoint", "-o", folder / "my.bin"]
    subprocess.run(command, check=True, capture_output=True)
    files = {
        "byte-level": (folder / "my.bin", folder / "my.tokenizer.bin"),
        "SentencePiece": (ROOT / "models/stories.bin", ROOT / "models/stories.tokenizer.bin"),
    }
    return {name: (a.read_bytes(), b.read_bytes()) for name, (a, b) in files.items()}


@pytest.mark.parametrize("name", ["byte-level", "SentencePiece"])
def test_a_weights_file(exported: dict[str, tuple[bytes, bytes]], name: str) -> None:
    """Its tensors, as the page has them, fill it."""
    weights, tokenizer = exported[name]
    header = {field.name: field.read(weights) for field in HEADERS["Header"]}
    assert (header["magic"], header["version"], header["file_size"]) == (b"twofiles", 1, len(weights))
    assert header["dtype"] in (1, 2) and not any(weights[96:4096])
    (hash_field,) = (field for field in HEADERS["TokenizerHeader"] if field.name == "vocab_hash")
    assert header["vocab_hash"] == hash_field.read(tokenizer)
    (block,) = re.findall(r"(?:^ {4}.*\n)+", WEIGHTS, re.MULTILINE)
    at = 4096

    def add(shape: tuple[int, ...], note: str) -> None:
        nonlocal at
        condition = re.search(r"only (with|without) flag (\d)", note)
        if condition and bool(header["flags"] & int(condition[2])) != (condition[1] == "with"):
            return
        at = (at + 63) // 64 * 64 + 2 * prod(shape)

    tensors = list(tensors_of(block, header))
    for _, shape, of_layer, note in tensors[:1]:
        assert not of_layer
        add(shape, note)
    for _ in range(header["n_layers"]):
        for _, shape, of_layer, note in tensors:
            if of_layer:
                add(shape, note)
    for _, shape, of_layer, note in tensors[1:]:
        if not of_layer:
            add(shape, note)
    assert at == len(weights)


def read_arrays(data: bytes) -> tuple[dict[str, Any], dict[str, list[tuple[Any, ...]]]]:
    """The header and the arrays of a tokenizer file, by the page alone."""
    header = {field.name: field.read(data) for field in HEADERS["TokenizerHeader"]}
    at, found = 160, {}
    for name, element, count in ARRAYS:
        form = "<" + "".join(FORMS[field.type] for field in element)
        n = prod(eval(part, {"__builtins__": {}}, header) for part in count.split(" * "))
        if name == "class_block" and header["n_classes"] == 0:
            n = 0
        at = (at + 3) // 4 * 4
        end = at + n * struct.calcsize(form)
        found[name] = list(struct.iter_unpack(form, data[at:end]))
        assert len(found[name]) == n
        at = end
    assert (at + 3) // 4 * 4 == len(data) and not any(data[at:])
    return header, found


def class_of(arrays: dict[str, list[tuple[Any, ...]]], codepoint: int) -> int:
    """The class of a code point, by the formula of the page."""
    (block,) = arrays["class_block"][codepoint // 256]
    found: int = arrays["classes"][block * 256 + codepoint % 256][0]
    return found


@pytest.mark.parametrize("name", ["byte-level", "SentencePiece"])
def test_a_tokenizer_file(exported: dict[str, tuple[bytes, bytes]], name: str) -> None:
    """What the page says of each array holds."""
    data = exported[name][1]
    header, arrays = read_arrays(data)
    assert (header["magic"], header["version"], header["file_size"]) == (b"twotoken", 3, len(data))
    assert header["hash"] == fnv1a(np.frombuffer(data[24:], "<u4").tolist())
    text = bytes(n for (n,) in arrays["text"])
    pieces = [(text[at : at + n], type, score) for at, n, type, score in arrays["pieces"]]
    assert b"".join(piece for piece, *_ in pieces) == text[: sum(len(piece) for piece, *_ in pieces)]
    assert header["vocab_hash"] == fnv1a(
        b"".join(struct.pack("<2If", len(piece), *rest) + piece for piece, *rest in pieces)
    )
    sorted_pieces = [pieces[id][0] for (id,) in arrays["by_text"]]
    assert sorted_pieces == sorted(set(sorted_pieces))
    assert set(sorted_pieces) == {piece for piece, type, _ in pieces if type in (1, 4, 7)}
    pairs = [row[:2] for row in arrays["merges"]]
    assert pairs == sorted(set(pairs))
    for left, right, merged, _ in arrays["merges"]:
        assert pieces[left][0] + pieces[right][0] == pieces[merged][0]
    for byte, (id,) in enumerate(arrays["byte_id"]):
        assert id == header["unk_id"] & 0xFFFFFFFF or pieces[id][:2] == (bytes([byte]), 6)
    for byte, (longest,) in enumerate(arrays["longest"]):
        lengths = [len(p) for p, type, _ in pieces if type in (4, 7) and p[0] == byte]
        assert longest == max(lengths, default=0)
    assert [row for row in arrays["classes"] if row[0] == 0 or row[0] >= header["n_classes"]] == []
    blocks = [tuple(arrays["classes"][at : at + 256]) for at in range(0, len(arrays["classes"]), 256)]
    assert len(set(blocks)) == len(blocks) == header["n_class_blocks"]
    if blocks:
        stray = [class_of(arrays, 0x110000 + byte) for byte in range(256)]
        assert set(stray) == {class_of(arrays, 0xFFFD)}
    if name == "byte-level":
        assert header["n_dfas"] and header["template_flags"] & 3 == 3
        ends = [0, *header["template_ends"]]
        templates = [arrays["items"][a:b] for a, b in pairwise(ends)]
        said = [
            "".join(
                text[at : at + n].decode() if token == 0xFFFFFFFF else f"[{pieces[token][0].decode()}]"
                for token, at, n in items
            )
            for items in templates[:7]
        ]
        assert said == ["user\n", "system\n", "\nuser\n", "[</s>]assistant\n", "", "[</s>]", "user\n"]


def test_an_automaton(exported: dict[str, tuple[bytes, bytes]]) -> None:
    """The section on words, done by the page, cuts a text as GPT-2's expression does."""
    header, arrays = read_arrays(exported["byte-level"][1])
    assert header["n_dfas"] == 1
    text, words, at = "It's 12 o'clock,  isn't it? ", [], 0
    while at < len(text):
        state, word, i = 1, 0, at
        while state:
            kind = class_of(arrays, ord(text[i])) if i < len(text) else 0
            (transition,) = arrays["transitions"][state * header["n_classes"] + kind]
            if transition & 1:
                word = i
            state = transition >> 1 if i < len(text) else 0
            i += 1
        assert word > at
        words.append(text[at:word])
        at = word
    assert words == ["It", "'s", " 12", " o", "'", "clock", ",", " ", " isn", "'t", " it", "?", " "]


def test_links() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in sections(FORMAT)}
    for link in re.findall(r"\]\(#([^)\s]+)\)", FORMAT):
        assert link in anchors, link
