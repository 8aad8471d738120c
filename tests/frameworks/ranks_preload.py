"""The imports of a rank that trains with a framework, before it is forked. See `tests.ranks_preload`."""

# ruff: noqa: E402, F401
from tests.frameworks.shims import shim_deepspeed, shim_torchtitan, shim_torchvision, stay_offline

stay_offline()
shim_torchvision()
shim_torchtitan()
shim_deepspeed()

import gc

import accelerate
import composer
import deepspeed
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # compiles a function, so it imports much of torch
import lightning.pytorch
import transformers
import transformers.trainer

import tests.frameworks.kit

gc.collect()
gc.freeze()
