"""Three EMAs in one pass, on handwritten digits, and a test of each: ``python examples/several.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from swafast import ExponentialAverage, FusedAverages
from swafast.demo.measurements import held_nbytes
from swafast.demo.task import Settings, digits_split, shifted
from swafast.demo.training import digits_cnn, score

SETTINGS = Settings(epochs=24)
# A constant rate makes the params noisy; the averages smooth them.
LEARNING_RATE = 0.15
RULES = {
    "fast": ExponentialAverage(0.9),
    "middle": ExponentialAverage(0.98),
    "slow": ExponentialAverage(0.995, warmup="ratio"),
}
# Each average may have its own format. Those that are not named have the default.
FORMATS = {"slow": "compact"}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small gains nothing from more
    split, generator = digits_split(0, SETTINGS), torch.Generator().manual_seed(0)
    model = digits_cnn(SETTINGS.width)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
    )
    averages = FusedAverages(model, rules=RULES, format=FORMATS)
    for _ in range(SETTINGS.epochs):
        model.train()
        images = shifted(split.train_images, SETTINGS.max_shift, generator)
        for batch in torch.randperm(len(images), generator=generator).split(SETTINGS.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
            averages.update_parameters(model)  # all three

    def row_of(tested: nn.Module) -> tuple[str, str]:
        """Test with new BatchNorm statistics. With so few test images the loss tells more than the accuracy."""
        result = score(tested, split, SETTINGS.epochs)
        return f"{result.accuracy:.1%}", f"{result.loss:.3f}"

    table = Table(title=f"After {int(averages['fast'].n_averaged)} updates of three averages, each in one pass")
    for column in ("", "rule", "format", "accuracy", "loss", "bytes"):
        table.add_column(column, justify="right" if column in ("accuracy", "loss", "bytes") else "left")
    table.add_row("the model", "", "", *row_of(model), "")
    for name, averaged in averages.items():
        # In the model itself: the module of the compact average would run in bfloat16.
        with averaged.swapped_into(model):
            row = row_of(model)
        table.add_row(name, f"decay {averaged.rule.decay:g}", averaged.format, *row, f"{held_nbytes(averaged):,}")
    Console().print(table)


if __name__ == "__main__":
    main()
