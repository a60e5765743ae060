"""README.md: each command in it runs and prints what it shows; its table of flags, its picture and its pieces of code agree
with the program. The formats of files, models/FORMAT.md, are tested by test_format.py."""

from __future__ import annotations

import importlib.metadata
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from files import ROOT, Program, read_terminal

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "run.c").read_text()
SVG = "{http://www.w3.org/2000/svg}"

# ---------------------------------------------------------------------------------------------------------
# Reading it


def is_command(line: str) -> bool:
    word = line.split()[0]
    return (
        word in ("make", "python3", "pip", "printf", "mpirun")
        or ("/" in word and not word.endswith(":"))
        or shutil.which(word) is not None
    )


@dataclass(frozen=True)
class Command:
    section: str
    text: str
    shown: str = ""  # what the README says that it prints

    def __str__(self) -> str:
        return self.text


def sections(text: str) -> dict[str, str]:
    """The text under each heading, without the code of other languages."""
    parts = re.split(
        r"^#+ (.*)\n",
        re.sub(r"^```c\n.*?^```\n", "", text, flags=re.MULTILINE | re.DOTALL),
        flags=re.MULTILINE,
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read_commands() -> Iterator[Command]:
    """A block whose first line is a command is one of commands, a line each; so is `code` within a line, if it begins
    as one does. Another block shows what the last command before it in its section prints."""
    for section, text in sections(README).items():
        last: Command | None = None
        for match in re.finditer(r"(?:^ {4}.*\n|^\n(?= {4}))+|`[^`]+`", text, re.MULTILINE):
            lines = [line.strip() for line in match[0].splitlines() if line.strip()]
            if match[0].startswith("`"):
                span = match[0].strip("`").replace("\n", " ")
                lines = [span] if re.match(r"(\./run|make|python3|pip|tests/\w+\.py) ", span) else []
            elif not is_command(lines[0]):
                if last:
                    yield replace(last, shown="\n".join(lines))
                last, lines = None, []
            for line in lines:
                if last:
                    yield last
                last = Command(section, re.sub(r"\s+#.*", "", line))
        if last:
            yield last


COMMANDS = list(read_commands())

# Commands that no test can run, and why. What can be checked without running them is checked.
NOT_RUN = {
    "make test": "runs this test",
    "make check": "takes many minutes",
    "make bench": "takes many minutes and 30 GB",
    "make peers": "needs the network, and builds for minutes",
    "make smollm2": "needs the network",
    "make mpi": "needs MPI; test_mpi.py builds it",
    "make static": "test_builds.py builds it",
    "mpirun -q -n 4 --map-by node --bind-to none --hostfile machines ./run-mpi my.bin -m chat": "needs four machines",
    "pip install -r requirements.txt": "needs the network",
    "apt-get install clang llvm libclang-rt-dev libomp-dev shellcheck valgrind cppcheck strace": "root",
    "apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross openmpi-bin libopenmpi-dev": "root",
    "make fuzz": "takes an hour",
    "tests/speed.py --rounds 9 --shapes 1b": "needs llama-cpp-python, which make peers builds",
}
# Commands that run are these.
RUN = re.compile(
    r"make (demo|plain|scaling|build/roofline-native)$|(printf .* \| )?\./run(-plain)? |python3 (export|tests/bench)\.py "
)
# What stands for something else in them, or is made smaller here so that it takes seconds.
INSTEAD = {
    r"\[MODEL\] \[options\]": "my.bin -i a -n 5",
    "DIRECTORY_OR_FILE": "checkpoint",
    "make scaling": "python3 tests/scaling.py",  # with the tests' Python environment
    "--shapes [0-9a-z,]+": "--shapes 15m --prefill 16 --folder .",
}
# Files that do not come with the repository, and what brings them.
ELSEWHERE = {"models/smollm2.bin": "make smollm2"}


# ---------------------------------------------------------------------------------------------------------
# Running it


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a clone has it, and the files that some commands speak of, where they are there."""
    folder = tmp_path_factory.mktemp("readme")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git clone, so there is no list of its files")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for path in ROOT.glob("models/smollm2.*"):
        (folder / "models" / path.name).symlink_to(path.resolve())
    write_checkpoint(folder / "checkpoint")
    shell(folder, "make")
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ '\n' if m.role == 'system' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def write_checkpoint(folder: Path) -> None:
    """A small model at random as Hugging Face has it, with a tokenizer that knows the README, and a chat template."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([README], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": "80", "OMP_WAIT_POLICY": "passive"}


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=folder,
        shell=True,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",  # what a model at random says
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def on_terminal(folder: Path, command: str) -> str:
    """Everything that a command shows on a terminal, if it reads no input."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=folder,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env=environment(),
    )
    output = read_terminal(process, master, slave)
    assert process.wait(timeout=120) == 0, output
    return output.decode().replace("\r\n", "\n")


MODEL_LINE = re.compile(r"^(\S+: .* parameters, .*; context .*, KV cache .* MB; .* threads?), .*$", re.MULTILINE)
STATISTICS = re.compile(
    r"^prefill: (\d+) tokens, [\d.]+ tok/s; decode: (\d+) tokens, [\d.]+ tok/s; seed (\d+)$", re.MULTILINE
)


def words(text: str) -> list[str]:
    """To compare: without figures of speed, the instruction set, the prompt of a terminal, and the bars of a table."""
    text = STATISTICS.sub(r"\1 \2 \3", MODEL_LINE.sub(r"\1", text))
    lines = [line for line in text.splitlines() if not re.match(r"(tok_s .*|>|\.\.\.)$", line)]
    return re.sub("[\u2588-\u258f]", " ", "\n".join(lines)).split()


def number(word: str) -> float | None:
    return float(word.rstrip("%")) if re.fullmatch(r"\d+\.\d+%?", word) else None


def assert_prints(shown: str, printed: str) -> None:
    """The same words, to the README's dots if it leaves out the rest; the last digits of a number depend on the CPU."""
    expected, found = words(shown), words(printed)
    if "\n...\n" in f"\n{shown}\n":
        found = found[: len(expected)]
    for i, (a, b) in enumerate(zip(expected, found, strict=False)):
        x, y = number(a), number(b)
        assert a == b or (x is not None and y == pytest.approx(x, rel=0.01, abs=0.02)), (
            expected[i:],
            found[i:],
        )
    assert len(found) == len(expected), printed


@pytest.mark.parametrize("section", dict.fromkeys(command.section for command in COMMANDS))
def test_commands(copy: Path, section: str) -> None:
    """One section's, in their order."""
    missing: dict[str, str] = {}  # files, and why they are not there
    for command in COMMANDS:
        if command.section != section or command.text in NOT_RUN:
            continue
        assert RUN.match(command.text), f"nobody knows how to test this command: {command}"
        text = command.text
        for old, new in INSTEAD.items():
            text = re.sub(old, new, text)
        for name, source in (ELSEWHERE | missing).items():
            if name in text.split() and not (copy / name).exists():
                missing |= dict.fromkeys([name, *re.findall(r" -o (\S+)", text)], source)
        if any(name in text.split() for name in missing):
            continue
        if "my.bin" in text and not (copy / "my.bin").exists():
            shell(copy, "python3 export.py checkpoint -o my.bin")
        if MODEL_LINE.match(command.shown):
            assert STATISTICS.search(command.shown)
            assert_prints(command.shown, on_terminal(copy, text))
            continue
        done = shell(copy, text)
        if command.shown:
            assert_prints(command.shown, done.stdout)
    if missing:
        pytest.skip("; ".join(f"{name} is not there: {source}" for name, source in missing.items()))


@pytest.mark.parametrize("text", NOT_RUN)
def test_commands_that_are_not_run(text: str) -> None:
    assert text in [command.text for command in COMMANDS], "the README does not have it any more"
    program, *arguments = text.split()
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        for line in (ROOT / arguments[-1]).read_text().splitlines():
            if not line.startswith("#"):
                assert importlib.metadata.version(re.split("[<=>]", line)[0])
    elif program == "apt-get":  # what CI installs
        found = (ROOT / ".ci/run").read_text().replace("\\\n", " ").split("apt-get install -y -qq ")[1]
        assert set(arguments[1:]) <= set(found.split(">")[0].split())
    elif program == "mpirun":
        assert "./run-mpi" in arguments and "run-mpi" in (ROOT / "Makefile").read_text()
    else:
        script = (ROOT / program).read_text()
        assert all(f'"{flag}"' in script for flag in arguments if flag.startswith("--"))


def test_there_are_commands_with_outputs() -> None:
    shown = [command.text for command in COMMANDS if command.shown]
    assert len(COMMANDS) > 15 and len(shown) >= 5
    assert "./run -t 0.8 -s 1 -j 1" in shown


# ---------------------------------------------------------------------------------------------------------
# Its table of flags, its picture, its code


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*\b", text))


def test_flags(run: Program) -> None:
    """Those that run.c knows, those of --help, and those of the table."""
    known = set(re.findall(r'\{"(--?[a-z-]+)", (?:TEXT|NUMBER|INTEGER|SWITCH),', SOURCE))
    assert len(known) > 15
    assert flags_of(run.ok("--help").text) == known
    table = re.findall(r"^\| (`-.*?) \|", sections(README)["Every flag"], re.MULTILINE)
    assert flags_of(" ".join(table)) == known


def test_modes(run: Program) -> None:
    modes = re.findall(r'\{"(\w+)", \1\}', SOURCE)
    assert len(modes) > 5
    rows = re.search(r"^\| `-m MODE` .*\n(?:\| \|.*\n)*", README, re.MULTILINE)
    assert rows and set(re.findall(r"`([a-z]+)`", rows[0])) == set(modes)
    assert set(re.findall(r"(\w+)(?: \(default\))?: ", run.ok("--help").text.split("-i TEXT")[0])) >= set(modes)


def test_the_code_is_that_of_run_c() -> None:
    """Each piece stands once in sections 2 to 4."""
    blocks = re.findall(r"^```c\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    part = SOURCE[SOURCE.index("\n// 2 The Transformer") : SOURCE.index("\n// 5 The tokenizer")]
    for block in blocks:
        assert part.count(block) == 1, block


def test_the_defaults_in_the_table(run: Program) -> None:
    """--help and the table agree on the default of each flag that has a number as its default."""
    help = re.sub(r"\n {12,}", " ", run.ok("--help").text)
    found = re.findall(r"^  (-\S+) .*?\(default:? ([\d.]+)", help, re.MULTILINE)
    found = [(flag, value) for flag, value in found if flag != "--probs"]  # that of -k
    assert len(found) > 7
    cells = [line.split(" | ") for line in sections(README)["Every flag"].splitlines() if line.startswith("| `")]
    table: dict[str, str] = {}
    for flags, _, default, *_ in cells:
        names = re.findall(r"`(-\S+)", flags)
        values = default.removesuffix(" |").split(", ")
        if len(values) == len(names):
            table |= dict(zip(names, values, strict=True))
    assert {flag: float(table[flag]) for flag, _ in found} == {flag: float(value) for flag, value in found}


def test_names_in_the_tour_are_those_of_run_c() -> None:
    tour = README.split("## A tour of run.c")[1].split("\n## ")[0]
    names = set(re.findall(r"`([a-z]\w*)`", tour))
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{name}\b", SOURCE)] == []


def test_picture() -> None:
    path = ROOT / ".readme/token.svg"
    assert f"]({path.relative_to(ROOT)})" in README
    assert path.stat().st_size < 15_000
    picture = ElementTree.parse(path).getroot()
    assert picture.find(f"{SVG}title") is not None and picture.find(f"{SVG}desc") is not None
    assert "prefers-color-scheme: dark" in (picture.findtext(f"{SVG}style") or "")
    names = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "f"]
    assert {
        "embed",
        "rmsnorm",
        "matmul",
        "rope_and_cache_kv",
        "attention",
        "swiglu",
        "compute_logits",
        "sample",
    } <= set(names)
    for name in names:
        assert re.search(rf"^static [\w ]+\*?{name}\(", SOURCE, re.MULTILINE), name


def test_commands_of_the_log() -> None:
    """tests/SPEED.md speaks of flags that its programs have."""
    text = (ROOT / "tests/SPEED.md").read_text()
    commands = re.findall(r"(?:^ {4}(?:python3 )?|`)(tests/\w+\.py) ([^`\n]+)", text, re.MULTILINE)
    assert len(commands) > 4
    for program, arguments in commands:
        script = (ROOT / program).read_text()
        assert all(f'"{flag}"' in script for flag in re.findall(r"--\w+", arguments)), arguments


def test_links() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in sections(README)}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 5
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link
