"""The stories that the small model learns from, and what its trainer writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from files import Program

from models import train
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
