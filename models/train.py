#!/usr/bin/env python3
"""Trains the small story-teller that ships with the project: stories, tokenizer, model, export.

    python3 models/train.py                  # an hour on two idle cores; stop it and start it again as you like
    python3 models/train.py --steps 50       # a short try

The stories come from make_stories.py, the same ones each time. All that is made on the way stays in --work:
stories.txt and heldout.txt, the tokenizer, checkpoint.pt, and log.csv with the loss and the held-out bits per
byte. The model is Llama's architecture in PyTorch, whose parameters bear the names of a Hugging Face checkpoint,
so that export.py's classes write it as they write any other. It needs what tests/requirements.txt lists.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from export import Config, Model, in_memory, tokenizer_of_model, write_model
from models.make_stories import GRAMMAR, read_grammar, stories

N_STORIES, N_HELDOUT = 120_000, 500
CONFIG = Config(
    dim=256,
    hidden_dim=640,
    n_layers=5,
    n_heads=8,
    n_kv_heads=4,
    head_dim=32,
    vocab_size=2048,
    max_seq_len=512,
    tied=True,
)
PEAK_RATE, WARMUP = 1.5e-3, 300
BATCH_TOKENS = 4096
IGNORED = -100  # a target that does not count


def rope(length: int, c: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (length, head_dim / 2)."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, length, head_dim): the two halves of a head are the pairs' two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.dim, c.q_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.o_proj = nn.Linear(c.q_dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], -1, self.c.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.c.n_heads // self.c.n_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with torch.autocast("cpu", enabled=False):  # the backward pass is 4 times as fast in f32 as in bf16
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)


class Llama(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c, self.model = c, Body(c)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What a layer adds to the stream starts small, the smaller the more layers add to it.
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * c.n_layers) if last else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> logits (batch, length, vocab_size)."""
        cos, sin = rope(tokens.shape[1], self.c)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def write_corpus(work: Path, count: int) -> None:
    """stories.txt and heldout.txt, a story a line; no story is in both."""
    if (work / "stories.txt").exists():
        return
    told = [text for _, text in stories(N_HELDOUT + count, seed=1, grammar=read_grammar(GRAMMAR))]
    (work / "heldout.txt").write_text("\n".join(told[:N_HELDOUT]) + "\n")
    part = work / "stories.part"
    part.write_text("\n".join(told[N_HELDOUT:]) + "\n")
    part.rename(work / "stories.txt")


def train_tokenizer(work: Path) -> sentencepiece.SentencePieceProcessor:
    """BPE that takes the text as it is, with a byte's piece for whatever it has never seen."""
    path = work / "tokenizer.model"
    if not path.exists():
        sentencepiece.SentencePieceTrainer.train(
            input=str(work / "stories.txt"),
            model_prefix=str(work / "tokenizer"),
            model_type="bpe",
            vocab_size=CONFIG.vocab_size,
            input_sentence_size=50_000,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@dataclass
class Texts:
    """Texts as tokens, each with bos before and eos after, one behind the other."""

    tokens: NDArray[np.uint16]
    starts: NDArray[np.int64]  # and at last the end
    n_bytes: int

    def rows(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The inputs and targets of some texts, (texts, length of the longest)."""
        texts = [self.tokens[self.starts[i] : self.starts[i + 1]].astype(np.int64) for i in chosen]
        length = max(map(len, texts)) - 1
        inputs = np.zeros((len(texts), length), np.int64)
        targets = np.full((len(texts), length), IGNORED, np.int64)
        for row, text in enumerate(texts):
            inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def read_texts(path: Path, processor: sentencepiece.SentencePieceProcessor) -> Texts:
    lines = path.read_text().splitlines()
    encoded = processor.encode(lines, add_bos=True, add_eos=True)
    starts = np.cumsum([0, *map(len, encoded)])
    tokens = np.fromiter(chain.from_iterable(encoded), np.uint16, int(starts[-1]))
    return Texts(tokens, starts, sum(len(line.encode()) for line in lines))


def batches(texts: Texts, seed: int) -> Iterator[NDArray[np.int64]]:
    """All texts once, in batches of about BATCH_TOKENS; those of one batch are of like length."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(texts.starts) - 1)
    lengths = np.diff(texts.starts)
    for pool in np.array_split(order, max(1, len(order) // 4096)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        cuts = np.flatnonzero(np.diff(np.cumsum(lengths[pool]) // BATCH_TOKENS)) + 1
        groups = np.split(pool, cuts)
        random.shuffle(groups)
        yield from groups


def learning_rate(step: int, done: float) -> float:
    """`done` goes from 0 to 1: a cosine down to a fiftieth of the peak, which begins with a warm-up."""
    return PEAK_RATE * min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: Llama, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def bits_per_byte(model: Llama, texts: Texts) -> float:
    total = 0.0
    with torch.no_grad():
        for chosen in batches(texts, 0):
            total += loss_of(model, *texts.rows(chosen), reduction="sum").item()
    return total / math.log(2) / texts.n_bytes


def optimizer_of(model: Llama) -> torch.optim.AdamW:
    """Weight decay is for matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


class Run:
    """A training that can stop at any time and go on from its last checkpoint."""

    def __init__(self, work: Path, steps: int, minutes: float = math.inf) -> None:
        torch.manual_seed(1)
        self.work, self.steps, self.minutes, self.step, self.seconds = work, steps, minutes, 0, 0.0
        self.model = Llama(CONFIG)
        self.optimizer = optimizer_of(self.model)
        if (work / "checkpoint.pt").exists():
            state = torch.load(work / "checkpoint.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def done(self) -> float:
        return min(1, max(self.step / self.steps, self.seconds / 60 / self.minutes))

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, self.work / "checkpoint.part")
        (self.work / "checkpoint.part").rename(self.work / "checkpoint.pt")

    def log(self, loss: float, heldout: Texts) -> None:
        path = self.work / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "seconds", "rate", "loss", "heldout_bits_per_byte"])
            rate = learning_rate(self.step, self.done())
            bits = bits_per_byte(self.model, heldout)
            row = [self.step, f"{self.seconds:.0f}", f"{rate:.2e}", f"{loss:.4f}", f"{bits:.4f}"]
            writer.writerow(row)
        print(*row, flush=True)

    def take_step(self, inputs: Tensor, targets: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.done())
        loss = loss_of(self.model, inputs, targets)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def train(self, texts: Texts, heldout: Texts, every: float) -> None:
        """Goes on to the last step; `every` so many seconds it writes the log and a checkpoint."""
        order = chain.from_iterable(batches(texts, epoch) for epoch in range(1000))
        losses: list[float] = []
        began = saved = time.monotonic()
        before = self.seconds
        for number, chosen in enumerate(order):
            if number < self.step:
                continue  # it has seen this batch before it stopped
            if self.done() >= 1:
                break
            losses.append(self.take_step(*texts.rows(chosen)))
            now = time.monotonic()
            self.seconds = before + now - began
            if now - saved >= every or self.done() >= 1:
                self.log(sum(losses) / len(losses), heldout)
                self.save()
                losses.clear()
                saved = now


def export(model: Llama, tokenizer: Path, path: Path) -> None:
    tensors = {name: in_memory(value.detach().numpy()) for name, value in model.state_dict().items()}
    source = Model(path, CONFIG, tensors)
    write_model(path, source, tokenizer_of_model(tokenizer.read_bytes()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=TOP / "build" / "stories", help="where all but the model goes"
    )
    parser.add_argument("--stories", type=int, default=N_STORIES)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by then, if not by the steps")
    parser.add_argument("--every", type=float, default=300, help="seconds from one checkpoint to the next")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=TOP / "models" / "stories.bin")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    write_corpus(args.work, args.stories)
    processor = train_tokenizer(args.work)
    texts, heldout = (read_texts(args.work / f"{name}.txt", processor) for name in ("stories", "heldout"))
    print(
        f"{len(texts.starts) - 1:,} stories, {len(texts.tokens):,} tokens, {texts.n_bytes:,} bytes",
        flush=True,
    )
    run = Run(args.work, args.steps, args.minutes)
    run.train(texts, heldout, args.every)
    export(run.model, args.work / "tokenizer.model", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
