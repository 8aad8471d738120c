"""The parameter lists are those of the real models."""

import math

import pytest
import torch

from bench.workloads import LLAMA_LAYER_PARAMS, LLAMA_LAYERS, WORKLOADS, Workload, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_shapes_add_up_to_the_known_total(workload: Workload) -> None:
    entries = list(workload.params(workload.full_depth))
    assert sum(math.prod(shape) for _, shape in entries) == workload.num_params
    assert len({name for name, _ in entries}) == len(entries)


def test_llama_layer_adds_up() -> None:
    entries = WORKLOADS["llama3_8b"].params(1)
    assert sum(math.prod(shape) for _, shape in entries) == LLAMA_LAYER_PARAMS


def test_resnet50_is_built_with_its_buffers() -> None:
    model = build(WORKLOADS["resnet50"], torch.bfloat16, CPU)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 161
    assert names[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert "layer4.2.bn3.running_var" in dict(model.named_buffers())
    assert model.get_buffer("bn1.num_batches_tracked").dtype == torch.int64
    assert len(list(model.buffers())) == 3 * 53
    assert all(param.dtype == torch.bfloat16 and param.isfinite().all() and param.any() for param in model.parameters())


def test_build_refuses_a_wrong_total() -> None:
    short = Workload("short", "short", lambda depth: iter([("weight", (3,))]), 1, num_params=4)
    with pytest.raises(RuntimeError, match="short must have 4 params, got 3"):
        build(short, torch.float32, CPU)


def test_memory_decides_the_layers_of_llama_and_nothing_else() -> None:
    llama, gpt2 = WORKLOADS["llama3_8b"], WORKLOADS["gpt2_medium"]
    assert llama.depth_within(1e12) == LLAMA_LAYERS
    assert 0 < llama.depth_within(12e9) < LLAMA_LAYERS
    assert llama.depth_within(1e9) == 0
    assert gpt2.depth_within(12e9) == gpt2.full_depth
    assert gpt2.depth_within(4e9) == 0
    assert "3 of 32 layers" in llama.title_at(3)
