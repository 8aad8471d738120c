"""SWA under FSDP2, where each rank averages its shards: ``torchrun --nproc-per-node 4 examples/fsdp2.py``.

``--checkpoint FOLDER`` saves model and average at the end. ``--resume`` continues from there, on any number of ranks.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from digits import RowTransformer, Training, on_all_ranks, report, update_ms
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from swafast import ShardedAveragedModel


def shard(model: RowTransformer) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def bare_params(model: nn.Module) -> nn.ParameterList:
    """Return the DTensors of a model without its modules, which torch's class cannot copy."""
    return nn.ParameterList(nn.Parameter(param.detach()) for param in model.parameters())


def local_nbytes(average: AveragedModel) -> int:
    return sum(param.to_local().nbytes for param in average.parameters() if isinstance(param, DTensor))


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", metavar="FOLDER")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FOLDER")
    return options


def main(options: argparse.Namespace, device: torch.device) -> None:
    model = shard(RowTransformer().to(device))
    averaged = ShardedAveragedModel(model)
    if options.resume:
        state = {"model": model.state_dict(), "averaged": averaged.state_dict()}
        dcp.load(state, checkpoint_id=options.checkpoint)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
    training = Training(model, device)
    training.run(after_epoch=lambda: averaged.update_parameters(model))

    iterate = training.accuracy(model)
    with averaged.swapped_into(model):
        swa = training.accuracy(model)
    if options.checkpoint:
        state = {"model": model.state_dict(), "averaged": averaged.state_dict()}
        dcp.save(state, checkpoint_id=options.checkpoint)

    params = bare_params(model)
    by_hand = AveragedModel(params, multi_avg_fn=get_swa_multi_avg_fn())
    hand_ms = update_ms(lambda: by_hand.update_parameters(params), device)
    rows = {
        "the last iterate": (iterate, None, None),
        f"ShardedAveragedModel, {int(averaged.n_averaged)} models": (
            swa,
            averaged.nbytes,
            update_ms(lambda: averaged.update_parameters(model), device),
        ),
        # There is no model to evaluate.
        "AveragedModel, sharded by hand": (None, local_nbytes(by_hand), hand_ms),
    }
    report("FSDP2", rows)


if __name__ == "__main__":
    on_all_ranks(partial(main, options_given()))
