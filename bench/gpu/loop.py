"""What an average that follows the optimizer adds to the training step of a GPT-2 medium, on one GPU.

``python -m bench.gpu.loop --device cuda --backend cuda --backend triton --seconds 40 --out FILE`` measures on each
backend, and with the averages in the host's memory. It is a process of its own, as the one that takes the other times.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.loop import ATTACHED, NONE, OFFLOAD, OVERLAP, Followed, Named, measure_work
from bench.memory import available_bytes
from bench.steps import Shape, Work, decoder_work
from bench.tables import milliseconds
from bench.workloads import WORKLOADS

# GPT-2 medium's, in bf16 by autocast over fp32 params. 8192 tokens are 17 TFLOP a step, forward and backward.
SHAPE = Shape(vocabulary=50257, width=1024, depth=24, heads=16, length=1024, batch=8)
DRY_SHAPE = Shape(vocabulary=31, width=16, depth=2, heads=2, length=8, batch=2)
STEPS_PER_SAMPLE, DRY_STEPS_PER_SAMPLE = 4, 1
MIN_ROUNDS, DRY_MIN_ROUNDS = 8, 2
# Of each way: param, gradient, AdamW's two moments, average. Beside all: activations and logits of one step, and room.
BYTES_PER_PARAM = 5 * 4
BESIDE_BYTES = 24 << 30


def work_on(device: torch.device) -> Work:
    if device.type == "cpu":
        return decoder_work("a decoder", DRY_SHAPE, DRY_STEPS_PER_SAMPLE)
    return decoder_work("GPT-2 medium", SHAPE, STEPS_PER_SAMPLE, torch.bfloat16)


def ways_on(backends: list[str]) -> tuple[Named, ...]:
    """Give the ways: on each backend plain and with overlap, and offloaded on the CPU's."""
    ours = [Named(way, backend) for backend in backends for way in (ATTACHED, OVERLAP)]
    return (Named(NONE), *ours, Named(OFFLOAD))


def short_of_memory(device: torch.device, num_ways: int) -> str | None:
    """Say why the trainings do not fit, or None."""
    needed = WORKLOADS["gpt2_medium"].num_params * BYTES_PER_PARAM * num_ways + BESIDE_BYTES
    free = available_bytes(device)
    if device.type == "cpu" or free >= needed:
        return None
    return f"{num_ways} trainings take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def summary(rows: list[Followed]) -> str:
    """Say in one line what each way adds, on one backend after the other."""
    added = [
        f"{short} {'/'.join(f'{row.exposed(rows[0]).share:.2%}' for row in rows if row.way == way)}"
        for way, short in ((ATTACHED, "plain"), (OVERLAP, "overlap"), (OFFLOAD, "offload"))
    ]
    off = sum(row.differing or 0 for row in rows)
    return f"{', '.join(added)} of a step of {milliseconds(rows[0].seconds)} ms; {off} elements off"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the rows, and give 1 where an average is not the plain one, bit for bit."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append", required=True)
    parser.add_argument("--seconds", type=float, default=0.0, help="For the samples; a few are always taken.")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    device, ways = torch.device(given.device), ways_on(given.backend)
    why_not = short_of_memory(device, len(ways))
    if why_not is not None:
        sys.stdout.write(f"{why_not}\n")
        return 0
    min_rounds = DRY_MIN_ROUNDS if device.type == "cpu" else MIN_ROUNDS
    rows = measure_work(work_on(device), ways, device, given.seconds, min_rounds=min_rounds)
    given.out.write_text(json.dumps([asdict(row) for row in rows]))
    sys.stdout.write(f"{summary(rows)}\n")
    return int(any(row.differing for row in rows))


if __name__ == "__main__":
    if "cpu" in sys.argv:
        # A dry run: nothing that counts is timed, and others may be at work on this machine.
        torch.set_num_threads(1)
    sys.exit(main())
