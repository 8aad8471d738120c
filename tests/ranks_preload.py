"""What a rank's process has imported when it is forked: nothing that starts threads."""

# ruff: noqa: F401
import pytest
import torch
import torch._dynamo  # FSDP imports it on first use, a second of work for each rank
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import swafast.sharded
