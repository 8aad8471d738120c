"""What a rank's process has imported when it is forked: nothing that starts threads."""

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
