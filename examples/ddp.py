"""SWA under DDP, where each rank averages its cut: ``torchrun --nproc-per-node 4 examples/ddp.py``."""

from __future__ import annotations

import torch
from digits import RowTransformer, Training, on_all_ranks, report, update_ms
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from swafast import ShardedAveragedModel
from swafast.demo.measurements import held_nbytes


def main(device: torch.device) -> None:
    model = DistributedDataParallel(RowTransformer().to(device))
    averaged = ShardedAveragedModel(model)
    training = Training(model, device)
    training.run(after_epoch=lambda: averaged.update_parameters(model))

    iterate = training.accuracy(model)
    with averaged.swapped_into(model):
        swa = training.accuracy(model)

    # For comparison: a whole copy on every rank.
    whole = AveragedModel(model.module)
    whole.load_state_dict(averaged.full_state_dict())
    rows = {
        "the last iterate": (iterate, None, None),
        "ShardedAveragedModel": (swa, averaged.nbytes, update_ms(lambda: averaged.update_parameters(model), device)),
        "AveragedModel": (
            training.accuracy(whole),
            held_nbytes(whole),
            update_ms(lambda: whole.update_parameters(model.module), device),
        ),
    }
    report("DDP", rows)


if __name__ == "__main__":
    on_all_ranks(main)
