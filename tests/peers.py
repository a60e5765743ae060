"""Tokenizers of the `tokenizers` library, made on the spot, and run.c with what export.py makes of them."""

from __future__ import annotations

import json
import pydoc_data.topics
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from builds import build, variants
from test_tokenizer import CASES, CORPUS
from tokenizers import Tokenizer

import export

SUFFIX = r"'s|'t|'re|'ve|'m|'ll|'d"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokens:
    """The program's tokenizer, running: it takes one text after the other."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [*build("probe", variants("native")[0]), "tokens", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write(struct.pack("<I", len(data)) + data)
        stdin.flush()
        line = stdout.readline()
        assert line.endswith(b"\n"), f"the program ended at {text[:100]!r}"
        return [int(word) for word in line.split()]

    def close(self) -> None:
        for end in (self.process.stdin, self.process.stdout):
            assert end
            end.close()
        assert self.process.wait() == 0


def without_special(data: dict[str, Any]) -> Tokenizer:
    """The library's tokenizer, for which no text is a special token."""
    added = [token for token in data["added_tokens"] if not token["special"]]
    copy = Tokenizer.from_str(json.dumps(data | {"added_tokens": added}))
    return copy


@dataclass(repr=False)
class Peer:
    ours: Tokens
    tokenizer: export.Tokenizer
    path: Path
    library: Tokenizer
    special: Tokenizer  # the same, with its special tokens

    def check(self, text: str) -> None:
        assert self.ours(text) == self.library.encode(text).ids, repr(text[:200])

    def decoded(self, ids: list[int]) -> bytes:
        return b"".join(self.tokenizer.tokens[id].text for id in ids)


@contextmanager
def peer(library: Tokenizer, folder: Path) -> Iterator[Peer]:
    data = json.loads(library.to_str())
    library.save(str(folder / "tokenizer.json"))
    made = export.read_tokenizer(folder / "tokenizer.json")
    path = folder / "t.tokenizer.bin"
    path.write_bytes(made.to_bytes())
    assert export.Tokenizer.from_bytes(path.read_bytes()) == made
    ours = Tokens(path)
    yield Peer(ours, made, path, without_special(data), library)
    ours.close()


@cache
def corpus() -> tuple[str, ...]:
    """Prose, code, and some of every script."""
    topics = list(pydoc_data.topics.topics.values())
    return (*topics[:25], *CORPUS, *CASES.values())


def trained(
    library: Tokenizer, vocab_size: int = 1500, alphabet: bool = True, special: tuple[str, ...] = ()
) -> Tokenizer:
    from tokenizers import pre_tokenizers, trainers

    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=initial, special_tokens=list(special), show_progress=False
    )
    library.train_from_iterator(corpus(), trainer)
    return library
