"""The imports of a rank's process before it is forked. None of them starts a thread."""

# ruff: noqa: F401
import contextlib
import gc

import torch
import torch._dynamo  # FSDP imports it on first use, a second of work for each rank
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.serialization

import swafast.sharded
import tests.sharded_models
import tests.support

with contextlib.suppress(ImportError):
    import fsspec  # torch's checkpoints import it on first use

# Modules that are imported with the first public name take a tenth of a second in each rank.
for _name in swafast.__all__:
    getattr(swafast, _name)

# Else the first collection in a rank writes to, and so copies, every page that an object lies on.
gc.collect()
gc.freeze()
