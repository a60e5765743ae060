"""The trainer of the small model that ships, what it writes, and the measurements of stories."""

from __future__ import annotations

import json
import lzma
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import Program

from models import judge, stories, train
from models.make_stories import GRAMMAR, Grammar, read_grammar
from models.make_stories import stories as composed

WORDS = "the a and to Tim Lily dog cat ball tree river boat red big happy sad ran saw found gave"


def invented(count: int, seed: int = 1) -> list[str]:
    """Texts that look like stories to a tokenizer."""
    chance = random.Random(seed)

    def sentence() -> str:
        return " ".join(chance.choices(WORDS.split(), k=chance.randint(4, 12))).capitalize() + chance.choice('.!?"')

    return [
        "\n".join(" ".join(sentence() for _ in range(chance.randint(2, 6))) for _ in range(2)) for _ in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in invented(1200)))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that such texts can fill."""
    monkeypatch.setattr(train, "CONFIG", replace(train.CONFIG, vocab_size=400, n_layers=2))
    torch.set_num_threads(1)  # so small matrices are not faster with more, and other tests run at the same time


def prepared(data: Path, work: Path) -> tuple[train.Texts, train.Texts]:
    told, heldout = stories.split(stories.read_stories(data))
    processor = train.train_tokenizer(told, work)
    return train.encode(told, processor), train.encode(heldout, processor)


PLOTS = sorted(read_grammar(GRAMMAR).plots)


def told(plot: str, count: int, seed: int = 1) -> list[str]:
    whole = read_grammar(GRAMMAR)
    one = Grammar(whole.lists, whole.rules, {plot: whole.plots[plot]})
    return [text for _, text in composed(count, seed, one)]


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_tells_whole_stories(plot: str) -> None:
    for text in told(plot, 20):
        assert re.fullmatch(r"[A-Z][A-Za-z ,.:!?'\"-]*[.!?]\"?", text), text
        assert 80 <= len(text.split()) <= 230, text
        assert text.count('"') % 2 == 0, text
        assert not re.search(r"\b[Aa] [aeiou]|[.] [a-z]| [,.!?]|\b(the|his|a) (the|his|her|a)\b", text), text


def test_a_seed_gives_the_same_stories_again() -> None:
    assert told("moon", 20, seed=5) == told("moon", 20, seed=5) != told("moon", 20, seed=6)


def test_without_data_the_stories_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COMPOSED", 300)
    found = train.stories_of(None)
    assert len(set(found)) == 300
    trained, heldout = stories.split(found)
    assert 200 < len(trained) < 300 and 0 < len(heldout) < 20


def test_stories_are_read_once_each(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("One.\nTwo.", "Three. ", "One.\nTwo."))
    (tmp_path / "a.jsonl").write_text(lines)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write(lines)
    for name in ("a.jsonl", "a.jsonl.xz"):
        assert stories.read_stories(tmp_path / name) == ["One.\nTwo.", "Three."]


def test_held_out_stories_are_not_trained_on() -> None:
    texts = invented(2000)
    near = [text + " The end." for text in texts if stories.held_out(text) and len(text.split()) >= 30]
    told, heldout = stories.split(texts + near)
    assert 20 < len(heldout) < 100 and near
    assert not set(told) & set(heldout) and not set(told) & set(near)
    assert len(told) == len(texts) - sum(map(stories.held_out, texts))
    assert stories.split(texts[::-1] + near)[1] != heldout != []
    assert set(stories.split(texts[::-1])[1]) == set(stories.split(texts)[1])


def test_the_judge_counts_what_repeats() -> None:
    assert judge.repeated("a b c d a b c d") == (1, 5)
    assert judge.repeated("a b c") == (0, 0)
    assert judge.loops("we ran and ran " * 6)
    assert not judge.loops("a b c d e f g h i 1 a b c d e f g h i 2")


def test_known_text_is_found_however_it_is_broken_into_lines() -> None:
    known = judge.Known(["a b c d e f g h", "x a b c d\ne f g h i j y", "1 2 3"])
    assert known.longest_run("q a b c d e f\ng h i j z") == 10
    assert known.longest_run("a b c d e f") == 6
    assert known.longest_run("a b c d e 1 2 3") == 0


def test_the_judge_reads_a_story_and_its_end(run: Program, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RUN", run.path)
    model = root / "models" / "stories.bin"
    text, ended = judge.continuation(model, 1, 0.8, 512)
    assert text == run.ok(model, "-t", 0.8, "-s", 1, "-n", 512).text.removesuffix("\n")
    assert ended and not judge.continuation(model, 1, 0.8, 9)[1]
    found = json.loads(run.ok(model, "-m", "perplexity", "--json", "-i", text).text)
    assert judge.bits(model, text) == pytest.approx(found["bits_per_byte"] * len(text.encode()))


def test_the_judge_prints_its_tables(
    run: Program,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(judge, "RUN", run.path)
    model = str(root / "models" / "stories.bin")
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps({"text": "Once upon a time, there was a big dog named Max."}) + "\n")
    for options, row in (
        (["heldout", str(path), model], "| stories.bin | 1 | 48 |"),
        (["stories", model, model, "-n", "2", "--length", "40", "--known", str(path)], "| stories.bin | 2 |"),
        (["stories", model, model, "--length", "40", "--begin", str(path)], "| stories.bin | 1 |"),
        (["beginnings", model, "-t", "0", "-n", "20"], "40. "),
    ):
        monkeypatch.setattr(sys, "argv", ["judge.py", *options])
        judge.main()
        assert row in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_slices_begin_where_sentences_do(data: Path, tmp_path: Path) -> None:
    texts, _ = prepared(data, tmp_path)
    for share in (0.0, 1.0):
        taken = list(train.slices(texts, share, np.random.default_rng(1)))
        assert len(taken) == len(texts.starts) - 1
        begun = [begin for begin, _ in taken]
        assert set(begun) <= set(texts.starts.tolist()) | set(texts.sentences.tolist())
        assert (begun == texts.starts[:-1].tolist()) == (share == 0)
    batched = [piece for group in train.batches(taken, 1) for piece in group]
    assert sorted(batched) == sorted(taken) and batched != taken


def test_orthogonal_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(1)
    for shape in ((2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(train.orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.usefixtures("small")
def test_training_ends_in_time(data: Path, tmp_path: Path) -> None:
    """The schedule is over when either the steps or the minutes are."""
    _, heldout = prepared(data, tmp_path)
    hurried = train.Run(tmp_path, train.Recipe(), steps=1_000_000, minutes=1e-6)
    assert hurried.done() == 0
    hurried.train(heldout, heldout, every=1e9)
    assert hurried.step == 1 and hurried.done() == 1
    assert hurried.rate() == 0


def test_words_that_repeat_are_found() -> None:
    begins = np.array([True] * 8 + [False] * 2)  # 8 and 9 go on with a word
    assert train.repeats([0, 1, 2, 3, 4, 0, 1, 2, 3, 5], begins) == [5, 6, 7, 8]
    assert train.repeats([0, 1, 8, 2, 3, 4, 0, 1, 9, 2, 3], begins) == []
    assert train.repeats([0, 1, 8, 2, 3, 4, 0, 1, 8, 2, 3], begins) == [6, 7, 8, 9, 10]
    assert train.repeats([7] * 6, begins) == [1, 2, 3, 4, 5]
    assert train.repeats([1, 2, 3], begins) == []


@pytest.mark.usefixtures("small")
def test_the_model_is_told_what_it_repeats(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greedy tokens are those that it finds likeliest without a KV cache, and they become less likely."""
    texts, heldout = prepared(data, tmp_path)
    monkeypatch.setattr(train.Told, "LENGTH", 48)
    monkeypatch.setattr(train, "BATCH_TOKENS", 512)
    run = train.Run(tmp_path, train.Recipe(), steps=30)
    run.train(texts, heldout, every=1e9)
    run.unlikelihood_steps = 3
    told = train.tell(run.model, texts, np.random.default_rng(1))
    eos = int(texts.tokens[-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        likeliest = run.model(told.tokens).argmax(-1)
    greedy = slice(0, train.Told.N_ROWS // 2)
    before, after = told.tokens[greedy, 20:-1], told.tokens[greedy, 21:]
    same = (likeliest[greedy, 20:-1] == after)[before != eos].float().mean()
    assert same > 0.95  # bfloat16 sums differ
    assert told.unlikely.any() and not told.unlikely[:, 0].any()

    rows = (told.tokens, told.unlikely)
    first = train.unlikelihood_of(run.model, *rows)
    run.take_step(first)
    assert train.unlikelihood_of(run.model, *rows) < first


@pytest.mark.usefixtures("small")
def test_training_goes_on_against_repetition(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, heldout = prepared(data, tmp_path)
    monkeypatch.setattr(train.Told, "LENGTH", 24)
    run = train.Run(tmp_path, train.Recipe(), steps=2, unlikelihood_steps=3)
    rates = []
    while not run.ended():
        rates.append(run.rate())
        run.take_step(run.loss(run.model, *heldout.rows([(0, 20)])))
    assert rates[2:] == pytest.approx([0.2, 0.4 / 3, 0.2 / 3]) and run.rate() == 0
    again = train.Run(tmp_path / "again", train.Recipe(), steps=2, unlikelihood_steps=3)
    again.work.mkdir()
    again.train(heldout, heldout, every=1e9)
    assert again.step == 5 and again.told is not None


@pytest.mark.usefixtures("small")
def test_what_the_trainer_exports_tells_what_the_trainer_hears(run: Program, data: Path, tmp_path: Path) -> None:
    """A few steps are enough to compare: the likeliest tokens in PyTorch, f32, and in run's f16."""
    texts, heldout = prepared(data, tmp_path)
    first = train.Run(tmp_path, train.Recipe(), steps=3)
    first.train(texts, heldout, every=1e9)
    again = train.Run(tmp_path, train.Recipe(), steps=3)
    assert again.step == 3 and torch.equal(first.model.model.norm.weight, again.model.model.norm.weight)
    path = tmp_path / "s.bin"
    train.export(first.model, tmp_path / "tokenizer.model", path)

    processor = train.train_tokenizer([], tmp_path)
    for prompt in ("Tim saw the dog", "Zs\u00f3fi the mole", '"The cat ran," said Tim.\nLily'):
        ids = processor.encode(prompt, add_bos=True)
        tokens = run.ok(path, "-m", "tokenize", "-i", prompt).text
        assert [int(id) for id in tokens.split()] == ids
        with torch.no_grad():
            likeliest = int(first.model.eval()(torch.tensor([ids]))[0, -1].argmax())
        done = run.ok(path, "-i", prompt, "-t", 0, "-n", len(ids) + 1, "--json")
        assert [json.loads(line) for line in done.text.splitlines()][-1]["id"] == likeliest
    # run and the trainer agree on what a text costs: neither counts the end.
    text = stories.read_stories(data)[0]
    found = json.loads(run.ok(path, "-m", "perplexity", "--json", "-i", text).text)
    one = train.encode([text], processor)
    assert train.bits_per_byte(first.model, one) == pytest.approx(found["bits_per_byte"], rel=0.01)
