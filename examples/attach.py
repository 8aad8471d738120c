"""An attached EMA that survives a stop: ``python examples/attach.py [CHECKPOINT]``.

Each update runs beside the next training step. Stop the example with Ctrl-C, or kill it, and start it again with the
same file: it ends with the same bits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from swafast import ExponentialAverage, FusedAveragedModel, update_bn
from swafast.demo.task import Settings, digits_split, shifted
from swafast.demo.training import digits_cnn
from swafast.op.checksum import checksum

try:
    SETTINGS = Settings(epochs=int(os.environ.get("EPOCHS", "24")))
except ValueError as error:
    sys.exit(f"EPOCHS does not fit: {error}")
STEPS = SETTINGS.epochs * SETTINGS.steps_per_epoch


def main(checkpoint: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a network this small gains nothing from more
    split = digits_split(0, SETTINGS)
    model = digits_cnn(SETTINGS.width)
    optimizer = torch.optim.SGD(model.parameters(), 0.5 * SETTINGS.learning_rate, momentum=SETTINGS.momentum)
    averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.98))
    attachment = averaged.attach(optimizer, start="0.25dur", duration=STEPS, overlap=True)

    parts = {"model": model, "optimizer": optimizer, "averaged": averaged}
    if checkpoint is not None and checkpoint.exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
        print(f"resumed after step {attachment.step}, with {int(averaged.n_averaged)} models in the average")

    for epoch in range(attachment.step // SETTINGS.steps_per_epoch, SETTINGS.epochs):
        generator = torch.Generator().manual_seed(epoch)
        images = shifted(split.train_images, SETTINGS.max_shift, generator)
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(SETTINGS.batch_size)[: SETTINGS.steps_per_epoch]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
        if checkpoint is not None:
            written = checkpoint.with_suffix(".new")
            torch.save({name: part.state_dict() for name, part in parts.items()}, written)
            written.replace(checkpoint)

    attachment.detach()
    for name, tested in (("the model", model), ("its EMA", averaged)):
        update_bn(split.train_images.split(SETTINGS.batch_size), tested)
        with torch.no_grad():
            hits = tested.eval()(split.test_images).argmax(1) == split.test_labels
        bits = sum(checksum(param) for param in tested.parameters()) % 2**32
        print(f"{name}: {hits.double().mean():.1%} of the test images, bits {bits:08x}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
