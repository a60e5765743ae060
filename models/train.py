#!/usr/bin/env python3
"""Trains the small story-teller that ships with the project: vocabulary, model, export.

    python3 models/train.py --data tinystories.jsonl.xz     # stop it and start it again as you like

--data is a file with a story a line, as JSON with a field "text"; .xz is decompressed. Without it, make_stories.py
composes the stories. One story in forty, chosen by its hash, is held out. Everything else is written to --work: the tokenizer, heldout.jsonl, checkpoint.pt, and log.csv
with the training loss and the held-out bits per byte. The model is Llama's architecture in PyTorch with the parameter
names of a Hugging Face checkpoint, so export.py writes it like any other. tests/requirements.txt lists what it needs.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from export import Config, Model, in_memory, tokenizer_of_model, write_model
from models.make_stories import GRAMMAR, read_grammar
from models.make_stories import stories as composed
from models.stories import read_stories, split

CONFIG = Config(
    dim=256,
    hidden_dim=640,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    vocab_size=3072,
    max_seq_len=512,
    tied=True,
    qk_norm=True,
)
BATCH_TOKENS = 4096  # of each process
COMPOSED = 20_000  # stories, if there is no file of them
LOGGED = 96  # held-out stories that the log measures; judge.py measures all
WARMUP = 100  # steps
IGNORED = -100  # a target that does not count


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are those of the model that ships."""

    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    decay: float = 0.1  # of weights, times the rate
    dropout: float = 0.0
    decay_from: float = 0.35  # the rate is constant until this part of the training is done
    suffixes: float = 0.25  # share of stories that are told from a later sentence on
    unlikelihood: float = 20.0  # weight of the loss against repetition
    unlikelihood_rate: float = 0.2  # learning rate of its steps, relative to the peak; it falls to 0


# ---------------------------------------------------------------------------------------------------------
# Model


def rope(length: int, c: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (length, head_dim / 2)."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, length, head_dim): the two halves of a head are the pairs' two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


KVCache = tuple[Tensor, Tensor]  # the keys and the values of a layer, each (batch, kv heads, positions, head_dim)


class Dropout(nn.Module):
    """Drops the same numbers of a vector at all tokens of a story (Gal and Ghahramani 2016).

    Random numbers for each token would take a quarter of the time of a training step.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.share)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.dim, c.q_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.kv_dim, bias=False)
        self.o_proj = nn.Linear(c.q_dim, c.dim, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        """With a KV cache, x is what follows `start` tokens that are in the cache."""

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], -1, self.c.head_dim)

        q = self.q_norm(heads(self.q_proj(x))).transpose(1, 2)
        k = self.k_norm(heads(self.k_proj(x))).transpose(1, 2)
        v = heads(self.v_proj(x)).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            keys, values = cache
            end = start + x.shape[1]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            q, k, v = q.to(keys), keys[:, :, :end], values[:, :, :end]
        group = self.c.n_heads // self.c.n_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        # On a CPU, this is faster than scaled_dot_product_attention once torch.compile has fused it.
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(start + 1)
        scores = (q @ k.mT).float() / math.sqrt(self.c.head_dim)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        out: Tensor = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
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
    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = FeedForward(c)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache, start))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Body(nn.Module):
    def __init__(self, c: Config, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.dropout = Dropout(dropout)


class Llama(nn.Module):
    def __init__(self, c: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.c, self.model = c, Body(c, dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What a layer adds to the stream starts small, the smaller the more layers add to it.
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * c.n_layers) if last else 1))

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None, start: int = 0) -> Tensor:
        """tokens (batch, length) -> logits (batch, length, vocab_size)."""
        cos, sin = (x[start:] for x in rope(start + tokens.shape[1], self.c))
        x = self.model.dropout(self.model.embed_tokens(tokens))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, caches[i] if caches else None, start)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def loss_of(model: Llama, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


# ---------------------------------------------------------------------------------------------------------
# Data


def stories_of(data: Path | None) -> list[str]:
    if data:
        return read_stories(data)
    return [text for _, text in composed(COMPOSED, 1, read_grammar(GRAMMAR))]


def train_tokenizer(stories: list[str], work: Path) -> sentencepiece.SentencePieceProcessor:
    """BPE that takes the text as it is, with a byte's piece for whatever it has never seen."""
    path = work / "tokenizer.model"
    if not path.exists():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(stories),
            model_writer=model,
            model_type="bpe",
            vocab_size=CONFIG.vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=1,
        )
        path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def padded(length: int) -> int:
    """Few lengths mean few shapes of matrix products: PyTorch compiles each of them when it first comes."""
    return -(-length // 16) * 16


@dataclass
class Texts:
    """Texts as tokens, each with eos after it, one behind the other."""

    tokens: NDArray[np.uint16]
    starts: NDArray[np.int64]  # and at last the end
    sentences: NDArray[np.int64]  # where in `tokens` a sentence begins with a space
    begins_word: NDArray[np.bool_]  # of each piece of the vocabulary
    bos: int
    n_bytes: int

    def row(self, start: int, end: int) -> NDArray[np.int64]:
        return np.concatenate([[self.bos], self.tokens[start:end].astype(np.int64)])

    def rows(self, slices: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The inputs and targets of some slices, (slices, padded length of the longest)."""
        length = padded(max(end - start for start, end in slices))
        inputs = np.zeros((len(slices), length), np.int64)
        targets = np.full((len(slices), length), IGNORED, np.int64)
        for row, (start, end) in enumerate(slices):
            text = self.row(start, end)
            inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def encode(stories: list[str], processor: sentencepiece.SentencePieceProcessor) -> Texts:
    encoded = processor.encode(stories, add_eos=True)
    starts = np.cumsum([0, *map(len, encoded)])
    tokens = np.fromiter(chain.from_iterable(encoded), np.uint16, int(starts[-1]))
    pieces = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    ends = np.array([piece.rstrip('"').endswith((".", "!", "?")) for piece in pieces])
    spaced = np.array([piece.startswith("\u2581") for piece in pieces])
    begins_word = spaced | np.array([piece in ("\n", "<0x0A>") for piece in pieces])
    sentences = np.flatnonzero(ends[tokens[:-1]] & spaced[tokens[1:]]) + 1
    n_bytes = sum(len(text.encode()) for text in stories)
    return Texts(tokens, starts, sentences, begins_word, processor.bos_id(), n_bytes)


def slices(texts: Texts, suffixes: float, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Every story once, some from a later sentence on; of one that is too long, the beginning or the end."""
    limit = CONFIG.max_seq_len
    for begin, end in zip(texts.starts[:-1].tolist(), texts.starts[1:].tolist(), strict=True):
        first, last = np.searchsorted(texts.sentences, [begin + 1, end - 12])
        if first < last and random.random() < suffixes:
            begin = int(texts.sentences[random.integers(first, last)])
        if end - begin > limit:
            later = np.searchsorted(texts.sentences, end - limit)
            if random.random() < 0.5 or later >= last:
                end = begin + limit
            else:
                begin = int(texts.sentences[later])
        yield begin, end


def batches(chosen: list[tuple[int, int]], seed: int) -> Iterator[list[tuple[int, int]]]:
    """All of them once, in batches of at most BATCH_TOKENS; those of one batch are of like length."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(chosen))
    lengths = np.array([end - start for start, end in chosen])
    for pool in np.array_split(order, max(1, len(order) // 4096)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        groups = []
        while len(pool):
            rows = BATCH_TOKENS // padded(lengths[pool[-1]])
            groups.append(pool[-rows:])
            pool = pool[:-rows]
        random.shuffle(groups)
        yield from ([chosen[i] for i in group] for group in groups)


def epochs(texts: Texts, suffixes: float) -> Iterator[list[tuple[int, int]]]:
    for epoch in range(1000):
        yield from batches(list(slices(texts, suffixes, np.random.default_rng(epoch))), epoch)


def bits_per_byte(model: Llama, texts: Texts) -> float:
    """As run's -m perplexity counts: eos costs nothing."""
    eos = int(texts.tokens[-1])
    total = 0.0
    model.eval()
    with torch.no_grad():
        for chosen in batches(list(slices(texts, 0, np.random.default_rng(0))), 0):
            inputs, targets = texts.rows(chosen)
            targets[targets == eos] = IGNORED
            total += loss_of(model, inputs, targets, "sum").item()
    model.train()
    return total / math.log(2) / texts.n_bytes


# ---------------------------------------------------------------------------------------------------------
# Unlikelihood training: the model continues beginnings, and what it repeats becomes less likely


@dataclass
class Told:
    """Continuations by the model. A token is unlikely if it belongs to words that repeat earlier ones."""

    tokens: Tensor  # (rows, length), with bos
    unlikely: Tensor  # (rows, length), bool

    N_ROWS = 64  # half of them are greedy continuations of a few words, half are sampled stories
    N_STEPS = 8  # of training that use them
    LENGTH = 256
    TEMPERATURE, TOP_P = 0.8, 0.9


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits (rows, vocab_size) -> tokens (rows), from the nucleus among the likeliest 128."""
    best, ids = logits.topk(128)
    p = (best / temperature).softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return ids.gather(1, torch.multinomial(p, 1)).flatten()


def repeats(tokens: list[int], begins_word: NDArray[np.bool_], n: int = 3) -> list[int]:
    """The positions of the tokens of all n-grams of words that occurred before."""
    starts = [i for i, token in enumerate(tokens) if begins_word[token]]
    bounds = [*starts, len(tokens)]
    found: set[int] = set()
    known: set[tuple[int, ...]] = set()
    for first, last in zip(bounds, bounds[n:], strict=False):
        gram = tuple(tokens[first:last])
        if gram in known:
            found.update(range(first, last))
        known.add(gram)
    return sorted(found)


def tell(model: Llama, texts: Texts, random: np.random.Generator) -> Told:
    """Lets the model continue beginnings of the stories by itself."""
    eos, bos = int(texts.tokens[-1]), texts.bos
    n_greedy = Told.N_ROWS // 2
    beginnings = [[bos] for _ in range(Told.N_ROWS)]
    everywhere = np.concatenate([texts.starts[:-1], texts.sentences])
    for row, start in zip(beginnings, random.choice(everywhere, n_greedy), strict=False):
        row += texts.tokens[start : start + random.integers(3, 16)].tolist()
    tokens = torch.full((Told.N_ROWS, Told.LENGTH), eos)
    for row, beginning in zip(tokens, beginnings, strict=True):
        row[: len(beginning)] = torch.tensor(beginning)
    lengths = torch.tensor([len(beginning) for beginning in beginnings])
    c = model.c
    shape = (Told.N_ROWS, c.n_kv_heads, Told.LENGTH, c.head_dim)
    caches = [torch.zeros(2, *shape, dtype=torch.bfloat16).unbind() for _ in range(c.n_layers)]
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(Told.LENGTH - 1):
            logits = model(tokens[:, i : i + 1], caches, i)[:, 0].float()
            chosen = logits.argmax(-1)
            chosen[n_greedy:] = sample(logits[n_greedy:], Told.TEMPERATURE, Told.TOP_P)
            ended = (tokens[:, i] == eos) & (lengths <= i)
            tokens[:, i + 1] = torch.where((lengths <= i + 1) & ~ended, chosen, tokens[:, i + 1])
    model.train()
    unlikely = torch.zeros_like(tokens, dtype=torch.bool)
    for row, marks, length in zip(tokens.tolist(), unlikely, lengths.tolist(), strict=True):
        end = row.index(eos, length) if eos in row[length:] else len(row)
        marks[[i for i in repeats(row[:end], texts.begins_word) if i >= length]] = True
    return Told(tokens, unlikely)


def unlikelihood_of(model: Llama, tokens: Tensor, unlikely: Tensor) -> Tensor:
    """The mean of -log(1 - p) over all tokens, where p is an unlikely token's probability (Welleck et al., 2019)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1])
    log_p = -F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = -torch.log1p(-log_p.exp().clamp(max=1 - 1e-5))
    return (loss * unlikely[:, 1:].flatten()).mean()


# ---------------------------------------------------------------------------------------------------------
# Optimizer


def orthogonal(x: Tensor) -> Tensor:
    """Brings the singular values of each matrix, (matrices, rows, columns), near to 1 by Newton-Schulz."""
    x = x.bfloat16()
    flipped = x.shape[-2] > x.shape[-1]
    if flipped:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flipped else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Keller Jordan, 2024), in steps as long as Adam's (Liu et al., 2025)."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        shapes = {p.shape for p in parameters}
        groups = [{"params": [p for p in parameters if p.shape == shape]} for shape in sorted(shapes)]
        super().__init__(groups, {"lr": rate, "peak": rate, "weight_decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            parameters = group["params"]
            gradients = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            updates = orthogonal(gradients.lerp_(state["momentum"], group["momentum"]))
            scale = 0.2 * math.sqrt(max(updates.shape[-2:]))
            for p, update in zip(parameters, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimizers_of(model: Llama, r: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; vectors do not decay."""
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": [embedding], "weight_decay": r.decay, "peak": r.adam_rate},
        {"params": vectors, "weight_decay": 0.0, "peak": r.adam_rate},
    ]
    return [
        Muon(matrices, r.muon_rate, r.decay),
        torch.optim.AdamW(groups, lr=r.adam_rate, betas=(0.9, 0.98), fused=True),
    ]


# ---------------------------------------------------------------------------------------------------------
# Training


class Run:
    """A training that can stop at any time and go on from its last checkpoint."""

    def __init__(
        self, work: Path, r: Recipe, steps: int, minutes: float = math.inf, unlikelihood_steps: int = 0
    ) -> None:
        torch.manual_seed(1)
        self.work, self.r, self.steps, self.minutes, self.step, self.seconds = work, r, steps, minutes, 0, 0.0
        self.unlikelihood_steps = unlikelihood_steps
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.model = Llama(CONFIG, r.dropout)
        self.optimizers = optimizers_of(self.model, r)
        if (work / "checkpoint.pt").exists():
            state = torch.load(work / "checkpoint.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                peaks = [group["peak"] for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["peak"] = peak
            self.step, self.seconds = state["step"], state["seconds"]
        torch.manual_seed(1000 * self.step + self.rank)
        self.loss, self.unlikelihood, self.clock = loss_of, unlikelihood_of, 0.0
        self.told: Told | None = None

    def done(self) -> float:
        return min(1, max(self.step / self.steps, self.seconds / 60 / self.minutes))

    def ended(self) -> bool:
        in_time = self.seconds / 60 < self.minutes
        return not in_time or self.step >= self.steps + self.unlikelihood_steps

    def rate(self) -> float:
        """Relative to the peak: a warm-up, a plateau, and then down to 0; a second, lower slope against repetition."""
        if self.step >= self.steps and self.unlikelihood_steps:
            return self.r.unlikelihood_rate * (1 - (self.step - self.steps) / self.unlikelihood_steps)
        return min(1, (self.step + 1) / WARMUP, (1 - self.done()) / (1 - self.r.decay_from))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.work / "checkpoint.part")
        (self.work / "checkpoint.part").rename(self.work / "checkpoint.pt")

    def log(self, loss: float, heldout: Texts) -> None:
        path = self.work / "log.csv"
        new = not path.exists()
        bits = bits_per_byte(self.model, heldout)
        row = [self.step, f"{self.seconds:.0f}", f"{self.rate():.3f}", f"{loss:.4f}", f"{bits:.4f}"]
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "seconds", "rate", "loss", "heldout_bits_per_byte"])
            writer.writerow(row)
        print(*row, flush=True)

    def repetition(self, texts: Texts) -> Tensor:
        """The unlikelihood loss of the next rows that the model told."""
        turn = (self.step - self.steps) % Told.N_STEPS
        if turn == 0 or self.told is None:
            self.told = tell(self.model, texts, np.random.default_rng([self.step, self.rank]))
        rows = slice(turn, None, Told.N_STEPS)
        return self.unlikelihood(self.model, self.told.tokens[rows], self.told.unlikely[rows])

    def take_step(self, loss: Tensor) -> float:
        """Returns the loss; it, the gradients and the clock are the same in all processes."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate()
        torch.autograd.backward(loss)
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        now = time.monotonic()
        seconds = self.seconds + min(now - self.clock, 10)  # a pause does not count
        numbers = torch.tensor([loss.item(), seconds])
        self.clock = now
        if self.ranks > 1:
            flat = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
            dist.all_reduce(flat)
            flat /= self.ranks
            *parts, numbers = torch.split(flat, [p.numel() for p in parameters] + [2])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        self.seconds = numbers[1].item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return numbers[0].item()

    def train(self, texts: Texts, heldout: Texts, every: float) -> None:
        """Goes on to the last step; `every` so many seconds it writes the log and a checkpoint."""
        losses: list[float] = []
        self.clock = saved = time.monotonic()
        for number, chosen in enumerate(epochs(texts, self.r.suffixes)):
            if number < self.step * self.ranks or number % self.ranks != self.rank:
                continue  # it has seen this batch before it stopped, or another process sees it
            if self.ended():
                break
            loss = self.loss(self.model, *texts.rows(chosen))
            if self.step >= self.steps:
                loss = loss + self.r.unlikelihood * self.repetition(texts)
            losses.append(self.take_step(loss))
            if self.rank == 0 and (time.monotonic() - saved >= every or self.ended()):
                self.log(sum(losses) / len(losses), heldout)
                self.save()
                losses.clear()
                self.clock = saved = time.monotonic()


def export(model: Llama, tokenizer: Path, path: Path) -> None:
    tensors = {name: in_memory(value.detach().numpy()) for name, value in model.state_dict().items()}
    source = Model(path, CONFIG, tensors)
    write_model(path, source, tokenizer_of_model(tokenizer.read_bytes()))


def work(rank: int, args: argparse.Namespace) -> None:
    """One of the processes that train together."""
    # glibc gives every large block back to the kernel at once, and clearing it anew costs a third of the time.
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    torch.set_num_threads(args.threads)
    if args.processes > 1:
        address = f"file://{args.work.resolve()}/meeting"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.processes)
    stories, held = split(stories_of(args.data))
    processor = train_tokenizer(stories, args.work)
    if rank == 0:
        lines = [json.dumps({"text": text}) + "\n" for text in held]
        (args.work / "heldout.jsonl").write_text("".join(lines))
    texts, heldout = encode(stories, processor), encode(held[:LOGGED], processor)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    run = Run(args.work, recipe, args.steps, args.minutes, args.unlikelihood_steps)
    if rank == 0:
        numbers = f"{len(stories):,} stories, {len(texts.tokens):,} tokens, {texts.n_bytes:,} bytes"
        print(f"{numbers}; {len(held)} held out; {sum(p.numel() for p in run.model.parameters()):,}", flush=True)
    if args.compile:
        run.loss = torch.compile(loss_of, dynamic=True)
        run.unlikelihood = torch.compile(unlikelihood_of, dynamic=True)
    run.train(texts, heldout, args.every)
    if rank == 0:
        export(run.model, args.work / "tokenizer.model", args.output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of stories (default: composed ones)")
    parser.add_argument("--work", type=Path, default=TOP / "build" / "stories", help="where all but the model goes")
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--unlikelihood-steps", type=int, default=400, help="more steps, against repetition")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by then, if not by the steps")
    parser.add_argument("--every", type=float, default=300, help="seconds from one checkpoint to the next")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    for field in fields(Recipe):
        parser.add_argument("--" + field.name.replace("_", "-"), type=float, default=field.default)
    parser.add_argument("-o", "--output", type=Path, default=TOP / "models" / "stories.bin")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "meeting").unlink(missing_ok=True)
    if args.processes == 1:
        work(0, args)
    else:
        context = torch.multiprocessing.get_context("spawn")
        others = [context.Process(target=work, args=(rank, args)) for rank in range(1, args.processes)]
        for process in others:
            process.start()
        (args.work / "pids").write_text("".join(f"{p}\n" for p in [os.getpid(), *(q.pid for q in others)]))
        work(0, args)
        for process in others:
            process.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
