"""Training steps to follow: the demo's network, and decoders of any shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

# Drawn beforehand; the steps go through them in turn.
BATCHES = 4


@dataclass(frozen=True)
class Shape:
    """A decoder and the batches that it is trained on."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    length: int  # tokens, and positions that the decoder knows
    batch: int


class Block(nn.Module):
    """One layer of a decoder, as GPT-2 has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        joined = self.attention(self.norms[0](hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.perceptron(self.norms[1](hidden))


class Decoder(nn.Module):
    """A GPT-2 of any shape: learned positions, and a head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.layers(hidden)), self.embedding.weight)


Batch = tuple[Tensor, Tensor]  # inputs and targets


@dataclass(frozen=True)
class Work:
    """What is trained, and how its steps are timed."""

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[], Batch]
    make_optimizer: Callable[[nn.Module], Optimizer]
    steps_per_sample: int
    autocast: torch.dtype | None = None


class Training:
    """A model in training: with the same params and batches as all others of its work."""

    def __init__(self, work: Work, device: torch.device) -> None:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type), device:
            torch.manual_seed(0)
            self.model = work.build()
            self._batches = [work.draw() for _ in range(BATCHES)]
        self.optimizer = work.make_optimizer(self.model)
        self._work, self._device, self._done = work, device, 0

    def step(self) -> None:
        inputs, targets = self._batches[self._done % BATCHES]
        self._done += 1
        self.optimizer.zero_grad()
        dtype = self._work.autocast
        with torch.autocast(self._device.type, dtype) if dtype is not None else nullcontext():
            loss = F.cross_entropy(self.model(inputs).flatten(0, -2).float(), targets.flatten())
        loss.backward()
        self.optimizer.step()


def decoder_work(title: str, shape: Shape, steps_per_sample: int, autocast: torch.dtype | None = None) -> Work:
    """Return the training of a decoder by AdamW, in one fused launch."""

    def draw() -> Batch:
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    def make_optimizer(model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), 1e-4, fused=True)

    return Work(title, lambda: Decoder(shape), draw, make_optimizer, steps_per_sample, autocast)


def demo_work() -> Work:
    """Return the training of the demo's network, on noise in the shape of its images."""
    from swafast.demo.task import MAX_PIXEL, NUM_CLASSES, Settings
    from swafast.demo.training import digits_cnn

    settings = Settings()

    def draw() -> Batch:
        images = torch.randint(MAX_PIXEL + 1, (settings.batch_size, 1, 8, 8)) / MAX_PIXEL
        return images, torch.randint(NUM_CLASSES, (settings.batch_size,))

    def make_optimizer(model: nn.Module) -> Optimizer:
        rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
        return SGD(model.parameters(), rate, momentum=momentum, weight_decay=decay)

    # A step takes milliseconds: so many give a sample that one switch of processes does not make.
    return Work("the demo's network", lambda: digits_cnn(settings.width), draw, make_optimizer, 20)
