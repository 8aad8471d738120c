"""The program in docs/sharded.md: stopped, and started again on as many ranks or on more, it goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.sharded_models import require
from tests.test_documents import PROGRAM, TEXTS, blocks_of

(CODE,) = (block for block in blocks_of(TEXTS["docs/sharded.md"]) if block.startswith(PROGRAM))


def _train(code: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Run the program in the process group of the tests; return its first step, and model and average as they end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("init_process_group", "destroy_process_group"):
            patch.setattr(dist, name, lambda: None)
        exec(code, scope := dict[str, Any]())
    model = {name: param.full_tensor() for name, param in scope["model"].named_parameters()}
    return scope["first"], scope["averaged"].full_state_dict() | model


def _stop_after_ten() -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree("checkpoints/000020")
    dist.barrier()


def _straight_and_restarted(folder: Path) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Return the ends of a training without a stop, and whether restarts end alike: with all, and without a load."""
    os.chdir(folder)
    first, straight = _train(CODE)
    assert first == 1
    forgetful = CODE.replace("    averaged.load_state_dict(", "    dict(")
    assert forgetful != CODE
    alike = []
    for code in (CODE, forgetful):
        _stop_after_ten()
        first, restarted = _train(code)
        assert first == 11
        alike.append(all(torch.equal(straight[key], restarted[key]) for key in straight))
    return straight, alike


def _restarted(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    os.chdir(folder)
    _stop_after_ten()
    return _train(CODE)


@pytest.mark.distributed
def test_the_program_goes_on_on_as_many_ranks_and_on_more(tmp_path: Path) -> None:
    require("fsdp2", forward=True)
    (straight, alike), _ = run_ranks(2, _straight_and_restarted, tmp_path)
    assert alike == [True, False]
    for first, restarted in run_ranks(3, _restarted, tmp_path):
        assert first == 11
        assert restarted.keys() == straight.keys()
        assert restarted["n_averaged"] == 20
        for key in straight:
            torch.testing.assert_close(restarted[key], straight[key], rtol=1e-3, atol=1e-5)
