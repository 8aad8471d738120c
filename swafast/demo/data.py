"""scikit-learn's handwritten digits, split by seed: a few to train on, partly mislabelled, and all others to test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from .settings import Settings

NUM_CLASSES = 10
MAX_PIXEL = 16  # the images count ink in 0..16


@dataclass(frozen=True)
class Split:
    """The images of one seed; ``(n, 1, 8, 8)`` float32 in [0, 1] and ``(n,)`` int64 labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits_split(seed: int, settings: Settings) -> Split:
    """Draw the training images of one seed and mislabel some of them; all others test, with true labels.

    Raises:
        ValueError: ``settings.num_train`` leaves no test image.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / MAX_PIXEL
    labels = torch.tensor(digits.target, dtype=torch.int64)
    if settings.num_train >= len(images):
        raise ValueError(f"num_train must be below {len(images)}, the number of digits, got {settings.num_train}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[: settings.num_train], order[settings.num_train :]
    noisy = _mislabelled(labels[train], settings.label_noise, generator)
    return Split(images[train], noisy, images[test], labels[test])


def _mislabelled(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace exactly ``share`` of the labels, rounded, by another class, each other class alike."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.randint(1, NUM_CLASSES, chosen.shape, generator=generator)) % NUM_CLASSES
    return noisy


def shifted(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Move every image by up to ``max_shift`` pixels in x and y, drawn for each; what comes in is blank."""
    count, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4)
    corners = torch.randint(0, 2 * max_shift + 1, (2, count, 1), generator=generator)
    rows = (corners[0] + torch.arange(height))[:, :, None]
    columns = (corners[1] + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)
