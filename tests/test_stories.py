"""The stories that the small model learns from, and what its trainer writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from files import Program

from models import judge, train
from models.make_stories import GRAMMAR, Grammar, read_grammar, stories

PLOTS = sorted(read_grammar(GRAMMAR).plots)


def told(plot: str, count: int, seed: int = 1) -> list[str]:
    whole = read_grammar(GRAMMAR)
    return [
        text for _, text in stories(count, seed, Grammar(whole.lists, whole.rules, {plot: whole.plots[plot]}))
    ]


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_tells_whole_stories(plot: str) -> None:
    for text in told(plot, 100):
        assert re.fullmatch(r"[A-Z][A-Za-z ,.:!?'\"-]*[.!?]\"?", text), text
        assert 80 <= len(text.split()) <= 230, text
        assert text.count('"') % 2 == 0, text
        assert not re.search(r"\b[Aa] [aeiou]|[.] [a-z]| [,.!?]|\b(the|his|a) (the|his|her|a)\b", text), text


def test_a_seed_gives_the_same_stories_again() -> None:
    assert told("moon", 20, seed=5) == told("moon", 20, seed=5) != told("moon", 20, seed=6)


def test_a_weight_says_how_often(tmp_path: Path) -> None:
    path = tmp_path / "plots.txt"
    path.write_text(
        "= list a\nred *8, blue, green\n= rule b\nbig *4\nsmall\n"
        "= plot one *9\nIt is {a} and <b>, [warm *9|cold] and {n}.\n= plot two\nTwo {n}.\n"
        "= list n\n" + ", ".join(f"n{i}" for i in range(5000)) + "\n"
    )
    all_told = list(stories(2000, 1, read_grammar(path)))
    ones = [text for plot, text in all_told if plot == "one"]
    assert 0.87 < len(ones) / 2000 < 0.93
    for word, share in (("red", 0.8), ("blue", 0.1), ("big", 0.8), ("warm", 0.9)):
        assert abs(sum(word in text for text in ones) / len(ones) - share) < 0.03, word
    assert "*" not in "".join(text for _, text in all_told)


def test_the_judge_counts_what_repeats() -> None:
    assert judge.repeated("a b c d a b c d") == (1, 5)
    assert judge.repeated("a b c") == (0, 0)


def test_the_judge_reads_a_story_and_its_end(
    run: Program, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "RUN", run.path)
    model = root / "models" / "stories.bin"
    text, ended = judge.story(model, 1, 0.8, 400)
    assert text == run.ok(model, "-t", 0.8, "-s", 1, "-n", 400).text.strip()
    assert ended and not judge.story(model, 1, 0.8, 9)[1]
    found = json.loads(run.ok(model, "-m", "perplexity", "--json", "-i", text).text)
    assert judge.bits(model, text) == pytest.approx(found["bits_per_byte"] * len(text.encode()))


def test_training_ends_in_time(tmp_path: Path) -> None:
    """The schedule is over when either the steps or the minutes are."""
    train.write_corpus(tmp_path, 600)
    texts = train.read_texts(tmp_path / "heldout.txt", train.train_tokenizer(tmp_path))
    hurried = train.Run(tmp_path, steps=1_000_000, minutes=1e-6)
    assert hurried.done() == 0
    hurried.train(texts, texts, every=1e9)
    assert hurried.step == 1 and hurried.done() == 1
    assert train.learning_rate(10_000, 1) == pytest.approx(train.PEAK_RATE / 50)


def test_what_the_trainer_exports_tells_what_the_trainer_hears(run: Program, tmp_path: Path) -> None:
    """A few steps are enough to compare: the likeliest tokens in PyTorch, f32, and in run's f16."""
    train.write_corpus(tmp_path, 2000)
    processor = train.train_tokenizer(tmp_path)
    texts, heldout = (
        train.read_texts(tmp_path / f"{name}.txt", processor) for name in ("stories", "heldout")
    )
    assert len(heldout.starts) == train.N_HELDOUT + 1
    first = train.Run(tmp_path, steps=3)
    first.train(texts, heldout, every=1e9)
    again = train.Run(tmp_path, steps=3)
    assert again.step == 3 and torch.equal(first.model.model.norm.weight, again.model.model.norm.weight)
    train.export(first.model, tmp_path / "tokenizer.model", tmp_path / "s.bin")

    for prompt in ("Once upon a time, there was", "Zs\u00f3fi the mole", '"Thank you," said Tom.'):
        ids = processor.encode(prompt, add_bos=True)
        tokens = run.ok(tmp_path / "s.bin", "-m", "tokenize", "-i", prompt).text
        assert [int(id) for id in tokens.split()] == ids
        with torch.no_grad():
            likeliest = int(first.model(torch.tensor([ids]))[0, -1].argmax())
        done = run.ok(tmp_path / "s.bin", "-i", prompt, "-t", 0, "-n", len(ids) + 1, "--json")
        assert [json.loads(line) for line in done.text.splitlines()][-1]["id"] == likeliest
