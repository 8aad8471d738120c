"""What ``python -m bench files`` runs beside ours: ``python -m bench.file_scripts WAY OUT IN...``.

The two ways with torch are what people write by hand. The third only moves the bytes: no averaging can be faster.
"""

from __future__ import annotations

import os
import sys

# At a time: larger pieces were no faster.
PIECE = 8 << 20


def running_sum(out: str, inputs: list[str]) -> None:
    """Load one checkpoint after the other, and add it to a float32 sum."""
    import torch
    from safetensors.torch import load_file, save_file

    sums, dtypes = {}, {}
    for path in inputs:
        for name, value in load_file(path).items():
            if name not in sums:
                sums[name], dtypes[name] = value.to(torch.float32, copy=True), value.dtype
            else:
                sums[name] += value
    save_file({name: (value / len(inputs)).to(dtypes[name]) for name, value in sums.items()}, out)


def stack_and_mean(out: str, inputs: list[str]) -> None:
    """Load all checkpoints, and average each tensor of theirs."""
    import torch
    from safetensors.torch import load_file, save_file

    states = [load_file(path) for path in inputs]
    means = {}
    for name, first in states[0].items():
        means[name] = torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
    save_file(means, out)


def read_and_write(out: str, inputs: list[str]) -> None:
    """Read all bytes, and write as many as one input has to the disk."""
    piece = memoryview(bytearray(PIECE))
    with open(out, "wb", buffering=0) as written:
        for path in inputs:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(piece):
                    if path == inputs[-1]:
                        written.write(piece[:count])
        os.fsync(written.fileno())


WAYS = {each.__name__: each for each in (running_sum, stack_and_mean, read_and_write)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](sys.argv[2], sys.argv[3:])
