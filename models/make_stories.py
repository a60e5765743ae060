#!/usr/bin/env python3
"""Composes short, simple stories for small children from the grammar in plots.txt, one a line.

    python3 models/make_stories.py -n 20 --seed 1

The same seed gives the same stories. The grammar, and so the stories, are the project's own work (MIT).
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

GRAMMAR = Path(__file__).resolve().parent / "plots.txt"
SHE = {"he": "she", "him": "her", "his": "her"}
HE = {"he": "he", "him": "him", "his": "his"}
OPTIONAL = "? "
WEIGHT = re.compile(r"(.*?)(?: \*(\d+))?")

Fields = dict[str, str]


class GrammarError(Exception):
    pass


@dataclass
class Grammar:
    lists: dict[str, list[Fields]] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)
    plots: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)  # of plots


def entries(line: str) -> Iterator[Fields]:
    """A line of a list; entries with fields may have commas in them, so these stand between semicolons."""
    for entry in line.split(";" if " / " in line else ","):
        text, weight = weigh(entry.strip())
        yield {str(i): part.strip() for i, part in enumerate(text.split(" / "))} | {"weight": str(weight)}


def weigh(text: str) -> tuple[str, int]:
    """The text without its weight, and the weight: "text *3" comes three times as often as "text"."""
    match = WEIGHT.fullmatch(text)
    assert match
    return match[1], int(match[2] or 1)


def weighted(random: random.Random, texts: list[str]) -> str:
    """One of the texts."""
    pairs = [weigh(text) for text in texts]
    return random.choices([text for text, _ in pairs], [weight for _, weight in pairs])[0]


def read_grammar(path: Path) -> Grammar:
    grammar, section, name = Grammar(), "", ""
    for line in map(str.strip, path.read_text().splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("= "):
            title, weight = weigh(line[2:])
            section, name = title.split()
            grammar.weights[name] = weight
        elif section == "list":
            grammar.lists.setdefault(name, []).extend(entries(line))
        else:
            target = grammar.rules if section == "rule" else grammar.plots
            target.setdefault(name, []).append(line)
    return grammar


class Story:
    """One story in the making: who and what is in it, by the names that the plot gives them."""

    def __init__(self, grammar: Grammar, plot: str, random: random.Random) -> None:
        self.grammar, self.plot, self.random = grammar, plot, random
        self.things: dict[str, Fields] = {}

    def pick(self, name: str) -> Fields:
        """An entry whose first field is not yet in the story."""
        taken = {value for thing in self.things.values() for key, value in thing.items() if key in ("0", "kind")}
        free = [e for e in self.grammar.lists[name] if e["0"] not in taken]
        return self.random.choices(free, [int(e["weight"]) for e in free])[0]

    def cast(self, spec: str) -> Fields:
        """Somebody of one of the kinds; `without` or `of` say which animals may not or must be."""
        match = re.fullmatch(r"(.*?)(?: (without|of) (.*))?", spec)
        assert match
        kinds, word, names = match.groups("")
        kind = self.random.choice(kinds.split())
        if kind == "same":
            kind = self.things["hero"]["type"]
        while True:
            found = {"type": kind, **getattr(self, f"cast_{kind}")(kind)}
            if not word or kind == "child" or (found["kind"] in names.split()) == (word == "of"):
                return found

    def cast_child(self, kind: str) -> Fields:
        girl = self.random.random() < 0.5
        name, kind = self.pick("girl" if girl else "boy")["0"], "girl" if girl else "boy"
        another = "another" if self.things.get("hero", {}).get("kind") == kind else "a"
        new = f"{another} {kind} named {name}"
        return {"0": name, "kind": kind, "new": new, "known": f"{{his}} friend {name}"} | (SHE if girl else HE)

    def cast_animal(self, kind: str) -> Fields:
        girl = self.random.random() < 0.5
        name, animal = self.pick("pet-girl" if girl else "pet-boy")["0"], self.pick(kind)
        new = f"a [|little |young |small ]{animal['0']} named {name}"
        known = f"{{his}} friend {name} the {animal['0']}"
        found = {"0": name, "kind": animal["0"], "home": animal["1"], "new": new, "known": known}
        return found | (SHE if girl else HE)

    def cast_elder(self, kind: str) -> Fields:
        elder = self.pick(kind)
        return {"0": f"{{his}} {elder['0']}", "kind": elder["0"]} | (SHE if elder["1"] == "she" else HE)

    cast_parent = cast_elder

    def cast_royal(self, kind: str) -> Fields:
        royal = self.pick(kind)
        girl = royal["1"] == "she"
        return {"0": self.pick("girl" if girl else "boy")["0"], "kind": royal["0"]} | (SHE if girl else HE)

    def cast_creature(self, kind: str) -> Fields:
        hero = self.things["hero"].get("kind", "")
        creature = self.pick(kind)["0"]
        while creature.split()[-1] == hero:
            creature = self.pick(kind)["0"]
        noun = creature.split()[-1]
        pronouns = self.random.choice([SHE, HE])
        return {"0": f"the {noun}", "kind": noun, "a": f"a {creature}"} | pronouns

    cast_swimmer = cast_creature

    def cast_other(self, kind: str) -> Fields:
        """Whatever has a name of its own like an animal and a word for what it is: an engine, a snail."""
        girl = self.random.random() < 0.5
        name, noun = self.pick("pet-girl" if girl else "pet-boy")["0"], self.pick(kind)["0"]
        found = {
            "0": name,
            "kind": noun,
            "a": f"{{his}} friend {name} the {noun}",
            "color": self.pick("color")["0"],
        }
        return found | (SHE if girl else HE)

    cast_engine = cast_snail = cast_caterpillar = cast_goatlike = cast_other

    def value(self, reference: str) -> str:
        """What stands for {reference}."""
        if reference in HE:
            reference = f"hero.{reference}"
        name, _, key = reference.partition(".")
        if name in self.things:
            if (key or "0") not in self.things[name]:
                raise GrammarError(f"plot {self.plot}: no {{{reference}}}")
            return self.things[name][key or "0"]
        if name not in self.grammar.lists:
            raise GrammarError(f"plot {self.plot}: no {{{reference}}}")
        return self.pick(name)["0"]

    def expand(self, text: str) -> str:
        """Chooses among the alternatives from the inside out and fills in names until none is left."""
        while True:
            choices = re.search(r"\[([^][]*)\]", text)
            if choices:
                chosen = weighted(self.random, choices[1].split("|"))
            else:
                choices = re.search(r"<([a-z-]+)>", text)
                if choices:
                    if choices[1] not in self.grammar.rules:
                        raise GrammarError(f"plot {self.plot}: no <{choices[1]}>")
                    chosen = weighted(self.random, self.grammar.rules[choices[1]])
                else:
                    choices = re.search(r"\{([a-z0-9.-]+)\}", text)
                    if not choices:
                        return text
                    chosen = self.value(choices[1])
            text = text[: choices.start()] + chosen + text[choices.end() :]

    def line(self, text: str) -> str:
        if text.startswith(OPTIONAL):
            return self.expand(text[len(OPTIONAL) :]) if self.random.random() < 0.5 else ""
        # Names within <...>, as in <{hero.type}-open>, first.
        text = re.sub(r"<\{([a-z.]+)\}", lambda m: "<" + self.value(m[1]), text)
        rules = [r for r in re.findall(r"<([a-z-]+)>", text) if r in self.grammar.rules]
        for rule in rules:
            chosen = weighted(self.random, self.grammar.rules[rule])
            text = text.replace(f"<{rule}>", re.sub(r"<\{([a-z.]+)\}", lambda m: "<" + self.value(m[1]), chosen))
        return self.expand(text)

    def tell(self) -> str:
        told = []
        for text in self.grammar.plots[self.plot]:
            if match := re.fullmatch(r"(let|cast) ([a-z]+) = ([a-z -]+)", text):
                self.things[match[2]] = self.cast(match[3]) if match[1] == "cast" else self.pick(match[3])
            else:
                told.append(self.line(text))
        return polish(" ".join(told))


SPEECH = "said|asked|cried|called|shouted|laughed|thought|whispered|sang|told|added|cheered|read|replied"
STARTS = "he|she|his|her|the|it|they|a|an|one|then"


def polish(text: str) -> str:
    """Spaces, "an" for "a", and the capitals of sentences.

    After "Boom!" the same sentence may go on, and after "Oh!" in quotes comes who said it.
    """
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    text = re.sub(r'((?:^|\. |\." )"?)([a-z])', lambda m: m[1] + m[2].upper(), text)
    text = re.sub(rf'([!?] "?)({STARTS})\b', lambda m: m[1] + m[2].capitalize(), text)
    said = rf'([!?]" "?)(?!(?:\w+ ){{0,3}}(?:{SPEECH})\b)({STARTS})\b'
    return re.sub(said, lambda m: m[1] + m[2].capitalize(), text)


def stories(count: int, seed: int, grammar: Grammar) -> Iterator[tuple[str, str]]:
    """(plot, story), each story once."""
    source, seen = random.Random(seed), set[str]()
    names = list(grammar.plots)
    weights = [grammar.weights.get(name, 1) for name in names]
    while len(seen) < count:
        plot = source.choices(names, weights)[0]
        text = Story(grammar, plot, source).tell()
        if text not in seen:
            seen.add(text)
            yield plot, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-n", type=int, default=10, help="how many stories")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", help="of this plot only")
    parser.add_argument("--names", action="store_true", help="write the plot's name before each story")
    args = parser.parse_args()
    grammar = read_grammar(GRAMMAR)
    if args.plot:
        grammar.plots = {args.plot: grammar.plots[args.plot]}
    counts: Counter[str] = Counter()
    for plot, text in stories(args.n, args.seed, grammar):
        counts[plot] += 1
        print(f"[{plot}] {text}" if args.names else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
