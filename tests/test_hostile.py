"""Inputs that are made to harm: one clear line, little time, little memory, and the files of a former export survive."""

from __future__ import annotations

import base64
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from files import ROOT
from test_export import llama2c_arrays, llama2c_file, llama2c_pieces, llama2c_tokenizer
from test_template import CHATML

import export

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

SECONDS, MEGABYTES = 11, 1000  # what start and imports take is part of it


@dataclass
class Outcome:
    status: int
    line: str  # the last one on standard error
    notes: list[str]


# Runs a command and writes the seconds and the kilobytes of its largest process to a file. Linux counts the memory of
# the process that starts another one as that one's, so a small process must start the command, not pytest.
MEASURE = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=file)
sys.exit(status if status >= 0 else 128 - status)
"""


def measured(command: list[str], folder: Path, env: dict[str, str] | None = None) -> Outcome:
    """Runs a program whose children it waits for: all of them within the limits of time and memory."""
    measure = [sys.executable, "-S", "-c", MEASURE, str(folder / "usage")]
    with (folder / "said").open("w+") as said:
        process = subprocess.run([*measure, *command], check=False, stdout=said, stderr=said, env=env)
        said.seek(0)
        text = said.read()
    seconds, kilobytes = (folder / "usage").read_text().split()
    took, megabytes = float(seconds), int(kilobytes) / 1024
    assert took < SECONDS and megabytes < MEGABYTES, (took, megabytes, text)
    assert "Traceback" not in text, text
    lines = text.splitlines()
    assert lines and all(line.startswith("export.py: ") or i == len(lines) - 1 for i, line in enumerate(lines))
    return Outcome(process.returncode, lines[-1], lines[:-1])


class Exports:
    """Runs export.py in a folder with two files of a former export; by default of a small good model."""

    def __init__(self, folder: Path, seconds: int) -> None:
        self.folder, self.seconds = folder, seconds
        self.model = llama2c_file(folder / "tiny.bin", llama2c_arrays(np.random.default_rng(1)))
        self.tokenizer = llama2c_tokenizer(folder / "tokenizer300.bin", llama2c_pieces())
        self.out = folder / "out"
        self.out.mkdir()
        self.names = ["out.bin", "out.tokenizer.bin"]

    def __call__(self, source: Path | None = None, *options: object, env: dict[str, str] | None = None) -> Outcome:
        for name in self.names:
            (self.out / name).write_text("the former")
        program = f"import sys, export; export.READ_SECONDS = {self.seconds}; sys.exit(export.main())"
        args = [source or self.model, "-o", self.out / "out.bin", "--tokenizer", self.tokenizer, *options]
        found = measured(
            [sys.executable, "-c", program, *map(str, args)],
            self.folder,
            (env or dict(os.environ)) | {"PYTHONPATH": str(ROOT)},
        )
        assert sorted(os.listdir(self.out)) == self.names
        if found.status:
            assert all((self.out / name).read_text() == "the former" for name in self.names)
        return found

    def refused(self, source: Path | None, *words: str, options: tuple[object, ...] = ()) -> None:
        found = self(source, *options)
        assert found.status == 1 and found.line.startswith("export.py: error: ") and len(found.line) < 1100, found
        assert all(word in found.line for word in words), found


@pytest.fixture
def exports(tmp_path: Path) -> Exports:
    """The limit of time is a little lower than that of a user, so that the tests take less of it."""
    return Exports(tmp_path, 8)


BEYOND = "--no-limits, if you trust it"


# ---------------------------------------------------------------------------------------------------------
# Chat templates


def folder_with_template(folder: Path, template: str) -> Path:
    """A tokenizer of 300 tokens with this template."""
    names = [*export.byte_of_character(), *(f"x{i}" for i in range(42)), "<|im_start|>", "<|im_end|>"]
    encoder = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    vocab = {name: id for id, name in enumerate(names)}
    added = [
        {"id": 298, "content": names[298], "special": True},
        {"id": 299, "content": names[299], "special": True},
    ]
    library = {"model": {"vocab": vocab, "merges": []}, "pre_tokenizer": encoder, "added_tokens": added}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(library))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


HOSTILE_TEMPLATES = {
    "surrogate": ("\ud800" + CHATML, "UnicodeEncodeError"),
    "surrogate that is made": ('{{ "\\ud800" }}' + CHATML, "UnicodeEncodeError"),
    "surrogate in an expression": ('{{ "\ud800" }}' + CHATML, "UnicodeEncodeError"),
    "list": ("{{ [1] * 10**9 }}", "to read (--no-limits"),
    "text": ("{{ 'x' * 10**10 }}", "to read (--no-limits"),
    "width": ("{{ '%1000000000d' % 1 }}", "to read (--no-limits"),
    "center": ("{{ 'x' | center(10**10) }}", "to read (--no-limits"),
    "range": ("{{ range(10**9) | list }}", "OverflowError"),
    "indent": ("{{ messages | tojson(indent=10**10) }}", "to read (--no-limits"),
    "parentheses": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", ""),
    "brackets": ("{{" + "[" * 5000 + "1" + "]" * 5000 + "}}", ""),
    "blocks": ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, ""),
    "loops": ("{% for i in [1] %}" * 100 + "{% endfor %}" * 100, ""),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "itself": ("{% include 'x' %}", ""),
    "sum": ("{{ " + "1 + " * 100_000 + "1 }}", ""),
}
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDLESS_TEMPLATES = {
    "nested ranges": NESTED + "{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "nothing but text": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_templates_that_take_what_there_is(exports: Exports, name: str) -> None:
    """They are left out with a note, or the model is refused; what a good one gives, they do not change."""
    template, word = HOSTILE_TEMPLATES[name]
    found = exports(None, "--tokenizer", folder_with_template(exports.folder / "t", template))
    if found.status == 0:
        assert any("no chat template is stored" in note and word in note for note in found.notes), found
    else:
        assert BEYOND in found.line and not word, found


@pytest.mark.parametrize("name", ENDLESS_TEMPLATES)
def test_templates_without_end(exports: Exports, name: str) -> None:
    """The model is refused, or, if memory ends before the time does, the template is left out."""
    found = exports(None, "--tokenizer", folder_with_template(exports.folder / "t", ENDLESS_TEMPLATES[name]))
    lines = found.notes if found.status == 0 else [found.line]
    assert any(BEYOND in line for line in lines), found


def test_the_limit_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", export.READ_SECONDS + 2)
    exports = Exports(tmp_path, export.READ_SECONDS)
    tokenizer = folder_with_template(tmp_path / "t", ENDLESS_TEMPLATES["nested ranges"])
    exports.refused(None, BEYOND, options=("--tokenizer", tokenizer))


def test_a_good_template_is_kept(exports: Exports) -> None:
    for options in ((), ("--no-limits",)):
        tokenizer = folder_with_template(exports.folder / f"t{len(options)}", CHATML)
        assert exports(None, "--tokenizer", tokenizer, *options).status == 0
        assert export.read_tokenizer(exports.out / "out.tokenizer.bin").template


ESCAPES = [
    "{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}",
    "{{ ('{0.__init__.__globals__[os].environ}' | attr('format'))(cycler) }}",
    "{% set f = 'x{0.__class__.__init__.__globals__}' | attr('format') %}{{ f(namespace()) }}",
    "{{ raise_exception.__globals__['os'].environ }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ['{0.__globals__}'] | map('format', strftime_now) | list }}",
    "{{ '{0.__globals__}'.format(strftime_now) }}",
    "{{ '{x.__globals__}'.format_map({'x': strftime_now}) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_read_the_environment(exports: Exports, escape: str) -> None:
    secret = "zq-environment-secret"
    for template in (escape + CHATML, "{% set text %}" + escape + "{% endset %}{{ raise_exception(text) }}"):
        tokenizer = folder_with_template(exports.folder / f"t{len(template)}", template)
        found = exports(None, "--tokenizer", tokenizer, env=os.environ | {"TWOFILES_SECRET": secret})
        assert secret not in found.line + "".join(found.notes)
        assert "root:" not in found.line + "".join(found.notes)
        if found.status == 0:
            data = (exports.out / "out.tokenizer.bin").read_bytes()
            assert secret.encode() not in data and b"TWOFILES_SECRET" not in data


@pytest.mark.parametrize(("found", "good"), [("3.1.5", False), ("3.1.6", True), ("3.2", True), ("2.11.3", False)])
def test_a_jinja2_whose_sandbox_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str, good: bool) -> None:
    monkeypatch.setattr(export, "version", lambda name: found)
    folder = folder_with_template(tmp_path / "t", CHATML)
    if good:
        assert export.read_tokenizer(folder).template
        return
    with pytest.raises(ImportError, match=f"expected jinja2 3.1.6 or newer, found {found}"):
        export.read_tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def with_pattern(folder: Path, pattern: str) -> Path:
    made = folder_with_template(folder, CHATML)
    library = json.loads((made / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    library["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, library["pre_tokenizer"]]}
    (made / "tokenizer.json").write_text(json.dumps(library))
    return made


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("(((a{100}){100}){100}){100}", "pattern of the pre-tokenizer is not supported"),
        ("((((((){100}){100}){100}){100}){100}){100}", ""),
        ("(?:a?){100}" * 50 + "a", ""),
        ("(" * 5000 + "a" + ")" * 5000, "pattern of the pre-tokenizer is not supported"),
        ("(?:" * 90 + "a*" + ")*" * 90, ""),
        (r"\p{Foo}", "Foo"),
        (r"[\p{L}\p{Foo}]+", "Foo"),
        ("[" + "a-z" * 100_000 + "]", ""),
        ("|".join(chr(c) for c in range(0x4E00, 0x4E00 + 5000)), ""),
        ("[a-z]*" * 2000, ""),
        ("(?:.|a){100}" * 20, ""),
        ("a{99999999999}", "pattern of the pre-tokenizer is not supported"),
        ("\ud800", ""),
    ],
    ids=range(13),
)
def test_patterns_that_explode(exports: Exports, pattern: str, word: str) -> None:
    found = exports(None, "--tokenizer", with_pattern(exports.folder / "t", pattern))
    assert found.status == 0 or found.line.startswith("export.py: error: ") and word in found.line, found


def changed_library(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    made = folder_with_template(folder, CHATML)
    library = json.loads((made / "tokenizer.json").read_text())
    change(library)
    (made / "tokenizer.json").write_text(json.dumps(library))
    return made


def deep(n: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "Digits"}
    for _ in range(n):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["model"]["vocab"].update({"zz": (1 << 24) - 1}),
        lambda x: x["model"]["vocab"].update({"zz": 10**19}),
        lambda x: x["model"]["vocab"].update({"zz": -1}),
        lambda x: x["model"]["vocab"].update({"zz\ud800": 300}),
        lambda x: x["added_tokens"].append({"id": (1 << 22) - 1, "content": "far away"}),
        lambda x: x["added_tokens"].append({"id": 300, "content": "\ud800"}),
        lambda x: x["added_tokens"].append({"id": 1e300, "content": "\ud800"}),
        lambda x: x["added_tokens"].extend({"id": 300, "content": f"{i}"} for i in range(200_000)),
        lambda x: x.update(pre_tokenizer=deep(400)),
        lambda x: x.update(added_tokens=[[]] * 1_000_000),
        lambda x: x["model"].update(merges=["a b"] * 3_000_000),
    ],
    ids=range(11),
)
def test_tokenizers_of_any_size(exports: Exports, change: Callable[[dict[str, Any]], Any]) -> None:
    """They are refused, or what no text needs is left out."""
    found = exports(None, "--tokenizer", changed_library(exports.folder / "t", change))
    assert found.status == 0 or found.line.startswith("export.py: error: "), found


def test_other_tokenizers(exports: Exports) -> None:
    path = exports.folder / "t.model"
    path.write_bytes(base64.b64encode(bytes(3_000_000)) + b" 0\n" + base64.b64encode(b"a") + b" 1\n")
    exports.refused(None, "", options=("--tokenizer", path))
    path.write_bytes(struct.pack("<i", 1) + struct.pack("<fi", 0, 0) * 5_000_000)
    exports.refused(None, "", options=("--tokenizer", path))
    path.write_bytes(b"\n\x04\n\x02ab" * 3_000_000)
    exports.refused(None, "", options=("--tokenizer", path))
    path.write_bytes(b'{"model": {"vocab": [' + b"{}," * 20_000_000 + b"{}]}}")
    exports.refused(None, BEYOND, options=("--tokenizer", path))


def test_files_that_are_none(exports: Exports) -> None:
    pipe = exports.folder / "pipe"
    os.mkfifo(pipe)
    link = exports.folder / "link"
    link.symlink_to("/dev/zero")
    for path in (Path("/dev/zero"), Path("/dev/random"), pipe, link):
        exports.refused(None, str(path), "expected a regular file", options=("--tokenizer", path))
        exports.refused(path, str(path), "expected a regular file")
    for source, names in {
        "hf": ("config.json", "model.safetensors", "generation_config.json"),
        "meta": ("params.json", "consolidated.00.pth"),
        "bin": ("config.json", "pytorch_model.bin"),
    }.items():
        for name in names:
            folder = exports.folder / source / name
            folder.mkdir(parents=True)
            for other in names[: names.index(name)]:
                (folder / other).write_text('{"model_type": "llama", "n_layers": 1}')
            os.mkfifo(folder / name)
            if name == "generation_config.json":
                (folder / "model.safetensors").unlink()
            exports.refused(folder, "error")
    tokenizer = folder_with_template(exports.folder / "t", CHATML)
    (tokenizer / "tokenizer_config.json").unlink()
    os.mkfifo(tokenizer / "tokenizer_config.json")
    assert exports(None, "--tokenizer", tokenizer).status == 0  # as if it were not there


# ---------------------------------------------------------------------------------------------------------
# Settings and weights


@pytest.mark.parametrize("number", [10**9, 2**31, 10**10, 2**32, 10**19, 2**64, 10**300, -(10**19)])
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_numbers_of_a_configuration(tmp_path: Path, field: str, number: int) -> None:
    from safetensors.numpy import save_file

    config = export.Config(8, 12, 1, 2, 1, 4, 20, 16)
    arrays = {spec.name: np.ones(spec.shape, np.float16) for spec in export.specs_of(config)}
    save_file(arrays, tmp_path / "model.safetensors")
    settings = {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert export.open_source(tmp_path).config.vocab_size == 20
    (tmp_path / "config.json").write_text(json.dumps(settings | {field: number}))
    with pytest.raises(export.ExportError):
        export.open_source(tmp_path)


def test_json_without_end(exports: Exports) -> None:
    folder = exports.folder / "m"
    folder.mkdir()
    path = folder / "config.json"
    for text, word in (
        ('{"a": [' + "{}," * 20_000_000 + "{}]}", BEYOND),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "expected JSON"),
        ('{"hidden_size": ' + "9" * 100_000 + "}", "expected JSON"),
    ):
        path.write_text(text)
        exports.refused(folder, word)


def test_safetensors_headers_that_are_long(exports: Exports) -> None:
    folder = exports.folder / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for header in (
        "{" + ",".join(entry % i for i in range(1_500_000)) + "}",
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(5_000_000)) + "}}",
        '{"a":{"dtype":"F32","shape":[' + "1," * 20_000_000 + '1],"data_offsets":[0,4]}}',
    ):
        data = header.encode()
        (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        exports.refused(folder)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_start(n_tensors: int, n_fields: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_fields)


def gguf_array(kind: int, count: int) -> bytes:
    return gguf_start(0, 1) + gguf_string("a") + struct.pack("<IIQ", 9, kind, count)


HOSTILE_GGUF: dict[str, tuple[bytes, int]] = {  # what they begin with, and how many bytes of zeros follow
    "2^60 strings": (gguf_array(8, 1 << 60), 0),
    "2^60 strings, many of them": (gguf_array(8, 1 << 60), 300_000_000),
    "2^60 bytes": (gguf_array(0, 1 << 60), 0),
    "200 MB of bytes": (gguf_array(0, 200_000_000), 200_000_100),
    "1 GB of bytes": (gguf_array(0, 1_000_000_000), 1_000_000_100),
    "1 GB of text": (gguf_start(0, 1) + struct.pack("<Q", 1_000_000_000), 1_000_000_100),
    "2^60 fields": (gguf_start(0, 1 << 60), 300_000_000),
    "2^60 tensors": (gguf_start(1 << 60, 0), 300_000_000),
    "2^32 dimensions": (gguf_start(1, 0) + gguf_string("x") + struct.pack("<I", 2**32 - 1), 300_000_000),
    "arrays in arrays": (gguf_array(9, 1) + struct.pack("<IQ", 9, 1) * 100_000, 0),
    "many arrays in arrays": (gguf_array(9, 1 << 60), 100_000_000),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_gguf_that_promises_much(exports: Exports, name: str) -> None:
    data, zeros = HOSTILE_GGUF[name]
    path = exports.folder / "m.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + zeros)
    exports.refused(path, str(path))
    exports.refused(None, options=("--tokenizer", path))


def test_gguf_of_many_files_and_many_layers(exports: Exports) -> None:
    path = exports.folder / "m-00001-of-4294967295.gguf"
    count = gguf_string("split.count") + struct.pack("<II", 4, 2**32 - 1)
    path.write_bytes(gguf_start(0, 1) + count + bytes(64))
    exports.refused(path, "m-00002-of-4294967295.gguf", "missing")
    path = exports.folder / "m.gguf"
    fields = gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama")
    fields += gguf_string("llama.block_count") + struct.pack("<II", 4, 2**32 - 1)
    tensors = b"".join(gguf_string(f"x{i}") + struct.pack("<IQIQ", 1, 0, 0, 0) for i in range(200_000))
    path.write_bytes(gguf_start(200_000, 2) + fields + tensors + bytes(64))
    exports.refused(path, str(path))


class Storage:
    """What the pickle names so has this many numbers."""

    def __init__(self, count: Any) -> None:
        self.count = count


class Rebuilt:
    def __init__(self, count: Any, offset: Any, shape: Any, stride: Any) -> None:
        self.args = (Storage(count), offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


def nested_tuple(depth: int) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * depth + b"s."


def torch_file(path: Path, pickled: Any, method: int = zipfile.ZIP_STORED, numbers: int = 4) -> Path:
    """As torch.save() would write it, with this pickle, or a pickle of this, and one storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", thing.count) if isinstance(thing, Storage) else None

    path.parent.mkdir(exist_ok=True)
    if not isinstance(pickled, bytes):
        Pickler((file := path.with_suffix(".pkl")).open("wb"), 2).dump(pickled)
        pickled = file.read_bytes()
        file.unlink()
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/data/0", bytes(4 * numbers))
        archive.writestr("m/version", "3\n")
    return path


NAN = float("nan")
HOSTILE_PICKLES: dict[str, Any] = {
    "2^29 of nothing": {"a": Rebuilt(4, 0, (2**29,), (0,))},
    "2^60 of nothing": {"a": Rebuilt(4, 0, (2**30, 2**30), (0, 0))},
    "2^29 of four": {"a": Rebuilt(2**29, 0, (2**29,), (1,))},
    "2^60 of four": {"a": Rebuilt(2**60, 0, (4,), (1,))},
    "too much": {"a": Rebuilt(4, 0, (2**40, 2**40), (1, 1))},
    "from behind": {"a": Rebuilt(4, 2**40, (4,), (1,))},
    "backwards": {"a": Rebuilt(4, 0, (4,), (-1,))},
    "negative": {"a": Rebuilt(-4, 0, (-4,), (1,))},
    "nan": {"a": Rebuilt(NAN, 0, (4,), (1,))},
    "nan in the shape": {"a": Rebuilt(4, 0, (NAN,), (1,))},
    "text": {"a": Rebuilt("4", "0", ("4",), ("1",))},
    "tuples": {"a": Rebuilt(4, 0, ((4,),), ((1,),))},
    "nested tuples": nested_tuple(1_000_000),
    "lists": b"\x80\x02" + b"]" * 50_000_000 + b".",
    "a long number": b"\x80\x02}X\x01\x00\x00\x00a\x8b"
    + struct.pack("<i", 100_000_000)
    + b"\x01" * 100_000_000
    + b"s.",
    "many tensors": {f"a{i}": Rebuilt(4, 0, (4,), (1,)) for i in range(100_000)},
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_pickles(exports: Exports, name: str) -> None:
    exports.seconds = 6  # of which torch itself takes two or three
    path = torch_file(exports.folder / "m" / "pytorch_model.bin", HOSTILE_PICKLES[name])
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    exports.refused(path.parent, str(path.parent))


def test_a_zip_bomb(exports: Exports) -> None:
    exports.seconds = 6
    path = exports.folder / "m" / "pytorch_model.bin"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("m/data.pkl", "w") as file:  # not in this process's memory, which others inherit
            file.write(b"\x80\x02}.")
            for _ in range(2047):
                file.write(bytes(1 << 20))
        archive.writestr("m/version", "3\n")
    assert path.stat().st_size < 4_000_000
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    exports.refused(path.parent, str(path.parent))


def test_an_old_pickle_without_end(exports: Exports) -> None:
    exports.seconds = 6
    path = exports.folder / "m" / "pytorch_model.bin"
    path.parent.mkdir()
    path.write_bytes(b"\x80\x02" + b"]" * 100_000_000)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    exports.refused(path.parent, str(path.parent))
