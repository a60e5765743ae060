"""Chat templates: the pieces that export.py finds, glued around texts, give the ids of apply_chat_template."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from files import Model as FileModel
from files import Program, chain_model, read_tokenizer
from peers import LLAMA3, Tokens, corpus, trained
from test_tokenizer import CASES
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import export

# In the style of what the models bring along, in short.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
VICUNA = (  # plain text all through: turns run into each other
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DATED = (  # Llama 3.1 and later: the system's turn is always there, and says what day it is
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- if tools is not none %}{{ tools | tojson }}{%- endif %}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
THINKING = (  # Qwen3: what it has thought is there in the last answer, but no more in those before
    "{%- set ns = namespace(last=messages | length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set index = (messages | length - 1) - loop.index0 %}"
    "{%- if m.role == 'user' and m.content is string %}{%- set ns.last = index %}{%- break %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
NAMES = {"LLAMA2": LLAMA2, "LLAMA3": LLAMA3_CHAT, "CHATML": CHATML, "CHATML_DEFAULT": CHATML_DEFAULT}
NAMES |= {"ZEPHYR": ZEPHYR, "MISTRAL": MISTRAL, "VICUNA": VICUNA, "DATED": DATED, "THINKING": THINKING}
TAKES_NO_SYSTEM = {"MISTRAL"}

CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BAR = "\u2581"


def byte_level() -> Tokenizer:
    library = Tokenizer(models.BPE(ignore_merges=True))
    library.normalizer = normalizers.NFC()  # as Qwen's
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return trained(library, special=("<s>", "</s>"))


def sentencepiece_like(first_only: bool) -> Tokenizer:
    """As Llama 2's: a space before each text; or before the first one only."""
    from tokenizers import trainers

    library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", BAR)
    library.pre_tokenizer = pre_tokenizers.Split(BAR, "merged_with_next")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1100, special_tokens=names, show_progress=False, limit_alphabet=300)
    library.train_from_iterator(corpus(), trainer)
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    prepend = {"type": "Prepend", "prepend": BAR}
    bars = {"type": "Replace", "pattern": {"String": " "}, "content": BAR}
    data["normalizer"] = None if first_only else {"type": "Sequence", "normalizers": [prepend, bars]}
    metaspace = {"type": "Metaspace", "replacement": BAR, "prepend_scheme": "first", "split": False}
    data["pre_tokenizer"] = metaspace if first_only else None
    return Tokenizer.from_str(json.dumps(data))


KINDS = ["byte-level", "space before each", "space before the first"]


class Model:
    """A checkpoint's tokenizer with a chat template: transformers', and the program's."""

    def __init__(self, folder: Path, kind: str, template: str, in_file: bool = False) -> None:
        library = byte_level() if kind == "byte-level" else sentencepiece_like(kind == KINDS[2])
        library.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROL])
        library.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
        if in_file:
            (folder / "chat_template.jinja").write_text(template)
        else:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        self.theirs = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
        self.theirs.chat_template = template
        self.tokenizer = export.read_tokenizer(folder)
        # Texts within a conversation are tokenized as run.c does it at the start of a text, or after a token.
        self.programs: dict[bool, Tokens] = {}
        for first in (True, False):
            space = self.tokenizer.add_dummy_prefix if first else self.tokenizer.prefix_after_special
            path = folder / f"{first}.bin"
            path.write_bytes(replace(self.tokenizer, add_bos=False, add_dummy_prefix=space).to_bytes())
            self.programs[first] = Tokens(path)

    def glued(self, turns: list[str], system: str | None) -> list[int]:
        """The ids of a conversation whose last turn is the user's, or an answer that is complete."""
        template = self.tokenizer.template
        assert template
        pieces = dict(zip(export.TEMPLATE_PARTS, template.parts, strict=True))

        def trimmed(text: str, kind: int) -> str:
            left, right = (template and template.flags & 4 << 2 * kind + side for side in (0, 1))
            text = text.lstrip() if left else text
            return text.rstrip() if right else text

        if system is None:
            items = [*pieces["before_user"]]
        else:
            items = [*pieces["before_system"], trimmed(system, 0), *pieces["after_system"]]
        for i, turn in enumerate(turns):
            if i % 2 == 0:
                items += [
                    *(pieces["next_user"] if i else ()),
                    trimmed(turn, 1 if system is not None and i == 0 else 2),
                    *pieces["after_user"],
                ]
            else:
                items += [*pieces["before_answer"], trimmed(turn, 3), *pieces["after_answer"]]
        ids: list[int] = []
        text = ""
        for item in [*items, -1]:
            if isinstance(item, str):
                text += item  # of texts in a row, words may reach from one to the next
                continue
            ids += self.programs[not ids](text) if text else []
            ids += [item] if item >= 0 else []
            text = ""
        return ids

    def check(self, turns: list[str], system: str | None) -> None:
        turns = [unicodedata.normalize("NFC", turn) for turn in turns]  # as the tokenizer wants it
        system = unicodedata.normalize("NFC", system) if system is not None else None
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if len(turns) % 2 == 0 and self.theirs.chat_template == THINKING:
            return
        expected = self.theirs.apply_chat_template(
            messages, add_generation_prompt=len(turns) % 2 == 1, tokenize=True, return_dict=False
        )
        assert self.glued(turns, system) == expected, messages

    def close(self) -> None:
        for program in self.programs.values():
            program.close()


@pytest.fixture(scope="module", params=[(kind, name) for kind in KINDS for name in NAMES], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, str]]:
    kind, name = request.param
    found = Model(tmp_path_factory.mktemp("m"), kind, NAMES[name], in_file=name == "ZEPHYR")
    yield found, name
    found.close()


CONVERSATIONS = [
    ["Hello"],
    ["Hello", "Hi there!"],
    ["Hello", "Hi there!", "How are you?"],
    ["12", "34", "56", "78", "90", "and so on", "..."],
    ["\u4f60\u597d", "\U0001f600", "\u0645\u0631\u062d\u0628\u0627"],
    ["'s it", "'s so\n", "!\n\nWhy?"],
    ["def f():\n    return 1\n", "    pass", "\tx"],
    ["  spaces around  ", "an answer", "\n\nlines around\n"],
    ["cafe\u0301", "e\u0301\u0323", "\u1112\u1161\u11ab"],
    ["", "an answer", ""],
]


def test_conversations(model: tuple[Model, str]) -> None:
    ours, name = model
    for system in [None] + ([] if name in TAKES_NO_SYSTEM else ["You are a pirate.", " Be\n\nbrief: ", "1\n"]):
        for turns in CONVERSATIONS:
            if name == "LLAMA2" and system is not None and not turns[0]:
                continue  # it trims the system text's end with the user's text, if that is empty
            ours.check(turns, system)


def test_random_conversations(model: tuple[Model, str]) -> None:
    ours, name = model
    rng = random.Random(name)
    texts = [
        text
        for text in CASES.values()
        if len(text) < 400 and not any(c in text for c in ("<s>", "</s>", "<|im", "<unk>"))
    ]
    for _ in range(60):
        turns = [rng.choice(texts) for _ in range(rng.randint(1, 5))]
        turns[1::2] = [turn.strip() or "x" for turn in turns[1::2]]
        none = name in TAKES_NO_SYSTEM or rng.random() < 0.5 or (name == "LLAMA2" and not turns[0].strip())
        ours.check(turns, None if none else rng.choice(texts))


def test_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Model(tmp_path, KINDS[0], CHATML_DEFAULT)
    start, end = (found.theirs.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    template = found.tokenizer.template
    assert template
    assert dict(zip(export.TEMPLATE_PARTS, template.parts, strict=True)) == {
        "before_user": (start, "system\nYou are kind.", end, "\n", start, "user\n"),
        "before_system": (start, "system\n"),
        "after_system": (end, "\n", start, "user\n"),
        "after_user": (end, "\n", start, "assistant\n"),
        "before_answer": (),
        "after_answer": (end, "\n"),
        "next_user": (start, "user\n"),
        "opens_answer": (),
        "opens_answer_no_think": (),
        "end_of_thought": (),
    }
    assert template.flags == 3
    assert found.tokenizer.stop_ids == (found.theirs.eos_token_id, end)
    assert export.Tokenizer.from_bytes(found.tokenizer.to_bytes()) == found.tokenizer
    assert "chat template" not in capsys.readouterr().err
    found.close()


def test_tokens_of_a_template_cannot_be_typed(tmp_path: Path) -> None:
    """Not even those that the checkpoint has as plain added tokens."""
    library = byte_level()
    library.add_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>", "<tool>")])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer = export.read_tokenizer(tmp_path)
    types = [tokenizer.tokens[library.token_to_id(name)].type for name in ("<|im_start|>", "<|im_end|>", "<tool>")]
    assert types == [export.CONTROL, export.CONTROL, export.USER_DEFINED]


def test_tokens_that_take_spaces_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = byte_level()
    library.add_special_tokens([AddedToken("<|im_end|>", rstrip=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert export.read_tokenizer(tmp_path).template is None
    assert "its token <|im_end|> has lstrip or rstrip" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Models that think


def thinking(opens: str, rest: str) -> str:
    """A template with a switch, where `opens` stands in front of a new answer, and `rest` is left of an earlier one."""
    return (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- generation %}"
        "{%- if '</think>' in m.content %}{{- " + rest + " }}{%- else %}{{- m.content }}{%- endif %}"
        "{%- endgeneration %}{{- '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
        "{%- else %}{{- '" + opens + "' }}{%- endif %}{%- endif %}"
    )


LAST = "m.content.split('</think>')[-1]"
THINKERS = {
    "drops": thinking("", LAST),
    "drops newlines": thinking("", LAST + ".lstrip('\n')"),  # Qwen3
    "drops spaces": thinking("", LAST + ".lstrip()"),
    "opens": thinking("<think>\n", LAST),  # DeepSeek-R1's distillations
    "opens, drops newlines": thinking("<think>\n", LAST + ".lstrip('\n')"),  # QwQ
    "keeps": thinking("", "m.content"),
    "trims": thinking("", LAST + " | trim").replace("{{- m.content }}", "{{- m.content | trim }}"),
}


def check_chat(
    tmp_path: Path,
    run: Program,
    source: str,
    says: str,
    *args: str,
    users: tuple[str, ...] = ("Hi", "yo", "and then?"),
    system: str | None = None,
    special: bool = False,
    **options: Any,
) -> None:
    """What the model reads, if it says the same in each turn, is what transformers gives it."""
    library = byte_level()
    library.normalizer = None
    library.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    library.add_tokens([AddedToken(t, normalized=False, special=special) for t in ("<think>", "</think>")])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": source}))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|im_end|>")
    theirs.chat_template = source

    def prompt(messages: list[dict[str, str]]) -> list[int]:
        found: list[int] = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
        return found

    messages = [] if system is None else [{"role": "system", "content": system}]
    first = prompt([*messages, {"role": "user", "content": users[0]}])
    reply = theirs.encode(says, add_special_tokens=False)
    if first[-1] in reply:  # each token of such a model has one successor
        return
    vocabulary = read_tokenizer(export.read_tokenizer(tmp_path).to_bytes())
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    path = chain_model([first[-1], *reply, end], vocabulary=vocabulary, max_seq_len=512).write(tmp_path / "m.bin")
    lines = run.ok(path, "-m", "chat", "--json", "-t", 0, *args, stdin="\n".join([*users, ""]).encode()).stdout
    values = map(json.loads, lines.splitlines())
    prompts = [found["prompt_tokens"] for found in values if "prompt_tokens" in found]
    for found, user in zip(prompts, users, strict=True):
        messages.append({"role": "user", "content": user})
        assert found == prompt(messages), (theirs.decode(found), theirs.decode(prompt(messages)))
        messages.append({"role": "assistant", "content": says})


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("name", THINKERS)
def test_chats_with_thoughts(tmp_path: Path, run: Program, name: str, special: bool) -> None:
    """In conversations of one, three and five turns."""
    for says in ("<think>r</think>\n\nA", "<think>r</think> \nA", "<think>r</think>A", "A", "<think>r", "</think> A"):
        for args, options in (((), {}), (("--no-think",), {"enable_thinking": False})):
            said = says.removeprefix("<think>") if "opens" in name and not args else says
            check_chat(tmp_path, run, THINKERS[name], said, *args, special=special, **options)


def history(answer: str, opens: str = "") -> str:
    """ChatML, in which an earlier answer becomes `answer`, and `opens` stands in front of a new one."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ "
        + answer
        + " }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opens + "' }}{% endif %}"
    )


ANSWERS = {
    "a space": history("' ' + m.content"),  # Mistral 0.2
    "a word": history("'all:' + m.content"),
    "the rest of a word": history("'>>>all\n' + m.content", ">>>"),  # functionary 3.2
    "no thought": history("'</think>' + m.content", "</think>"),  # GLM 4.7 without thinking
    "an empty thought": history("'<think></think>' + m.content.split('</think>')[-1]"),  # GLM 4.6
    "trimmed before the thought is dropped": history("(m.content | trim).split('</think>')[-1]"),  # Qwen 3.5
}


@pytest.mark.parametrize("says", ["ok", " ok", "r</think>ok", "</think> ok", "all:ok"])
@pytest.mark.parametrize("name", ANSWERS)
def test_what_stands_in_front_of_an_earlier_answer(tmp_path: Path, run: Program, name: str, says: str) -> None:
    """If the model has not said it itself."""
    if says == {"a space": " ok", "a word": "all:ok"}.get(name):
        return  # it is taken for the template's
    check_chat(tmp_path, run, ANSWERS[name], says)


SYSTEM_LAST = (  # Mistral 0.3: in front of the last message of the user
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '<|im_start|>' }}{% if loop.last %}{{ system }}{% endif %}"
    "{{ m.content + '<|eot_id|>' }}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
IF_SYSTEM = (  # Solar, Phi 3.5: not if it is empty
    "{% for m in messages %}{% if m.role != 'system' or m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("source", [SYSTEM_LAST, IF_SYSTEM, CHATML], ids=["last", "if", "always"])
@pytest.mark.parametrize("system", ["Be brief.", "", " \n", None])
def test_system_texts(tmp_path: Path, run: Program, source: str, system: str | None) -> None:
    if source is SYSTEM_LAST and system == "":
        return  # it leaves a blank line, as run does: but these are two tokens there
    check_chat(tmp_path, run, source, "ok", *([] if system is None else ["-y", system]), system=system)


SPACES = "\t\v\f\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000"


def test_all_whitespace_is_trimmed(tmp_path: Path, run: Program) -> None:
    assert SPACES.isspace()
    text = SPACES + "\u4f60\u597d" + SPACES
    for says in ("ok", "\u3000ok\xa0", "\u200bok"):
        trims = CHATML.replace("m['content']", "m['content'] | trim")
        check_chat(tmp_path, run, trims, says, "-y", text, users=(text, "\u200b!\u200b", "x"), system=text)


@pytest.mark.parametrize(
    "rest",
    [
        "'<think>\\n' + m.content.split('</think>')[0] | replace('<think>', '') + '\\n</think>'",  # Bielik
        "m.content if loop.index > 3 else m.content.split('</think>')[-1]",  # LFM 2.5
    ],
)
def test_thoughts_that_are_changed(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.find_template(thinking("", rest), {}, {}) is None
    assert "no chat template is stored: it changes what the model has thought: " in capsys.readouterr().err


def test_whitespace_that_is_a_token(tmp_path: Path) -> None:
    """Gemma 3 has them; text in front of "\n" of the template may end in another."""
    library = byte_level()
    library.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n")])
    library.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    made = export.read_tokenizer(tmp_path)
    one = library.token_to_id("\n")
    assert made.tokens[one] == export.Token(b"\n", export.USER_DEFINED)
    assert made.template and one not in {item for part in made.template.parts for item in part}


def test_no_think_takes_a_template_that_knows_it(tmp_path: Path, run: Program) -> None:
    found = Model(tmp_path, KINDS[0], CHATML)
    found.close()
    vocabulary = read_tokenizer(found.tokenizer.to_bytes())
    path = FileModel(vocabulary=vocabulary).zero().write(tmp_path / "m.bin")
    run.fails(1, path, "-m", "chat", "--no-think", says=["--no-think", "has no such option"])


def test_what_cannot_be_done_is_said_with_the_turn(capsys: pytest.CaptureFixture[str]) -> None:
    odd = (
        "{% for m in messages %}[{% if m.role == 'assistant' and loop.index > 3 %}later {% endif %}"
        "{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    assert export.find_template(odd, {}, {}) is None
    assert "turn 4 of 5, an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("{{ messages[0]['content'] ", "no chat template is stored"),
        ("{% for m in messages %}{{ m['content'].upper() }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "repeats"),
        ("{{ messages[-1]['content'] }}", "leaves out"),
        ("{% for m in messages %}{{ m['role'] ~ loop.index ~ m['content'] }}{% endfor %}", "alike"),
        ("{% for m in messages %}[{{ m['content'].replace(' ', '') }}]{% endfor %}", "spaces"),
        (
            "{% for m in messages %}[{{ m['content'] if loop.first else m['content'] | trim }}]{% endfor %}",
            "spaces",
        ),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ 1 // 0 }}", "it fails for plain messages (ZeroDivisionError"),
        ("{{ messages.clear() }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "no chat template is stored"),
    ],
)
def test_templates_that_have_no_plain_pieces(source: str, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.find_template(source, {"bos_token": "<s>"}, {"<s>": 1}) is None
    stderr = capsys.readouterr().err
    assert (
        stderr.startswith("export.py: note: no chat template is stored: ")
        and note in stderr
        and stderr.count("\n") == 1
    )


def test_a_template_without_a_system_text(capsys: pytest.CaptureFixture[str]) -> None:
    template = export.find_template(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, {"<s>": 1, "</s>": 2})
    assert template and template.flags == 1 and template.parts[1:3] == ((), ())
    assert "takes no system message" in capsys.readouterr().err
