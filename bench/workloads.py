"""Parameter lists of real models, without the models: modules that hold the true names, shapes and buffers.

The shapes follow from each architecture's numbers, and their sum is checked against its known total. So this needs no
model library and no download.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Entry = tuple[str, tuple[int, ...]]

# Period of the values that fill a module. Prime, so that a wrong offset of any size shows as wrong values.
FILL_PERIOD = 1_048_573
LLAMA_LAYERS, LLAMA_LAYER_PARAMS = 32, 218_112_000
# Of a shrunk tensor's dimensions, at most.
SHRUNK_SIZE = 4


@dataclass(frozen=True)
class Workload:
    """A named parameter list. ``params(depth)`` yields it with ``depth`` of its ``full_depth`` blocks."""

    name: str
    title: str
    params: Callable[[int], Iterator[Entry]]
    full_depth: int
    num_params: int  # when whole
    buffers: Callable[[], Iterator[Entry]] = lambda: iter(())
    bare: Callable[[int], Iterator[str]] = lambda depth: iter(())  # modules without tensors, such as activations
    tied: tuple[tuple[str, str], ...] = ()  # second names, each with the first name of the same param

    def depth_within(self, memory_bytes: float, per_param: float, beside: float) -> int:
        """Return the number of blocks that fit into ``memory_bytes``, or 0."""
        affordable = (memory_bytes - beside) / per_param
        if affordable >= self.num_params:
            return self.full_depth
        if self.name != "llama3_8b":
            return 0
        # One layer less than all of them where the embeddings, which go with all, do not fit.
        return min(self.full_depth - 1, max(0, int(affordable // LLAMA_LAYER_PARAMS)))

    def title_at(self, depth: int) -> str:
        if depth == self.full_depth:
            return self.title
        return f"{self.title}, {depth} of {self.full_depth} layers, no embeddings"


def _weight_bias(name: str, *shape: int) -> Iterator[Entry]:
    """Yield the weight of a norm or a linear layer, and a bias for each of its rows."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet50_norms() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (convolution, norm after it, shape of the convolution) in the order of the model."""
    yield "conv1", "bn1", (64, 3, 7, 7)
    channels = 64
    # Blocks and inner width of each stage; a block has four times as many outputs.
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            yield f"{at}.conv1", f"{at}.bn1", (width, channels, 1, 1)
            yield f"{at}.conv2", f"{at}.bn2", (width, width, 3, 3)
            yield f"{at}.conv3", f"{at}.bn3", (4 * width, width, 1, 1)
            if block == 0:
                yield f"{at}.downsample.0", f"{at}.downsample.1", (4 * width, channels, 1, 1)
            channels = 4 * width


def resnet50_params(depth: int) -> Iterator[Entry]:
    for conv, norm, shape in _resnet50_norms():
        yield f"{conv}.weight", shape
        yield from _weight_bias(norm, shape[0])
    yield from _weight_bias("fc", 1000, 2048)


def resnet50_buffers() -> Iterator[Entry]:
    for _, norm, shape in _resnet50_norms():
        yield f"{norm}.running_mean", (shape[0],)
        yield f"{norm}.running_var", (shape[0],)
        yield f"{norm}.num_batches_tracked", ()


def resnet50_bare(depth: int) -> Iterator[str]:
    yield from ("relu", "maxpool", "avgpool")
    yield from (norm.replace("bn1", "relu") for _, norm, _ in _resnet50_norms() if norm.endswith(".bn1"))


def vit_l_16_params(depth: int) -> Iterator[Entry]:
    width = 1024
    yield "class_token", (1, 1, width)
    yield from _weight_bias("conv_proj", width, 3, 16, 16)
    # 14 x 14 patches of a 224-pixel image, and the class token
    yield "encoder.pos_embedding", (1, 14 * 14 + 1, width)
    for layer in range(depth):
        at = f"encoder.layers.encoder_layer_{layer}"
        yield from _weight_bias(f"{at}.ln_1", width)
        yield f"{at}.self_attention.in_proj_weight", (3 * width, width)
        yield f"{at}.self_attention.in_proj_bias", (3 * width,)
        yield from _weight_bias(f"{at}.self_attention.out_proj", width, width)
        yield from _weight_bias(f"{at}.ln_2", width)
        yield from _weight_bias(f"{at}.mlp.0", 4 * width, width)
        yield from _weight_bias(f"{at}.mlp.3", width, 4 * width)
    yield from _weight_bias("encoder.ln", width)
    yield from _weight_bias("heads.head", 1000, width)


def vit_l_16_bare(depth: int) -> Iterator[str]:
    yield "encoder.dropout"
    for layer in range(depth):
        yield from (f"encoder.layers.encoder_layer_{layer}.{name}" for name in ("dropout", "mlp.1", "mlp.2", "mlp.4"))


def gpt2_medium_params(depth: int) -> Iterator[Entry]:
    width = 1024
    yield "transformer.wte.weight", (50257, width)
    yield "transformer.wpe.weight", (1024, width)
    for layer in range(depth):
        at = f"transformer.h.{layer}"
        # GPT-2 keeps its linear weights as (in, out), in multiples of the width
        for norm, linears in (
            ("ln_1", (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1))),
            ("ln_2", (("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1))),
        ):
            yield from _weight_bias(f"{at}.{norm}", width)
            for name, inner, out in linears:
                yield f"{at}.{name}.weight", (inner * width, out * width)
                yield f"{at}.{name}.bias", (out * width,)
    yield from _weight_bias("transformer.ln_f", width)


def gpt2_medium_bare(depth: int) -> Iterator[str]:
    yield "transformer.drop"
    for layer in range(depth):
        for name in ("attn.attn_dropout", "attn.resid_dropout", "mlp.act", "mlp.dropout"):
            yield f"transformer.h.{layer}.{name}"


def llama3_8b_params(depth: int) -> Iterator[Entry]:
    """Yield ``depth`` decoder layers, and the embeddings only with all of them: at 0.5e9 params each they come last."""
    width, kv_width, inner, vocabulary = 4096, 1024, 14336, 128256
    whole = depth == LLAMA_LAYERS
    if whole:
        yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(depth):
        at = f"model.layers.{layer}"
        for name, out in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width), ("o_proj", width)):
            yield f"{at}.self_attn.{name}.weight", (out, width)
        for name, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
            yield f"{at}.mlp.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (width,)
    if whole:
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (vocabulary, width)


def llama3_8b_buffers() -> Iterator[Entry]:
    yield "model.rotary_emb.inv_freq", (64,)


def llama3_8b_bare(depth: int) -> Iterator[str]:
    yield from (f"model.layers.{layer}.mlp.act_fn" for layer in range(depth))


def listed(
    name: str, title: str, shapes: tuple[tuple[int, ...], ...], names: Callable[[int], str] = "{}.weight".format
) -> Workload:
    """Return a workload of tensors, by default each in a module of its own."""
    entries = [(names(index), shape) for index, shape in enumerate(shapes)]
    return Workload(name, title, lambda depth: iter(entries), 1, sum(math.prod(shape) for shape in shapes))


def _by_name(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


WORKLOADS = _by_name(
    Workload("resnet50", "ResNet-50", resnet50_params, 1, 25_557_032, resnet50_buffers, resnet50_bare),
    Workload("vit_l_16", "ViT-L/16", vit_l_16_params, 24, 304_326_632, bare=vit_l_16_bare),
    Workload(
        "gpt2_medium", "GPT-2 medium", gpt2_medium_params, 24, 354_823_168,
        bare=gpt2_medium_bare, tied=(("lm_head.weight", "transformer.wte.weight"),),
    ),
    Workload(
        "llama3_8b", "Llama-3-8B", llama3_8b_params, LLAMA_LAYERS, 8_030_261_248, llama3_8b_buffers, llama3_8b_bare,
    ),
    listed("2000x64x64", "2000 tensors of 64x64", ((64, 64),) * 2000, "params.{}".format),
    listed("3000x64", "3000 tensors of 64", ((64,),) * 3000, "params.{}".format),
)  # fmt: skip
QUICK = ("resnet50", "2000x64x64", "3000x64")
GPU_WORKLOADS = _by_name(listed("1e9", "1e9 params in one tensor", ((10**9,),)), *WORKLOADS.values())
# For dry runs: they show that the machinery works, not how fast anything is.
DRY_WORKLOADS = _by_name(
    listed("dry_one", "one tensor", ((300_000,),)),
    listed("dry_few", "few tensors", ((200, 33), (1,), (5, 3, 7)) * 3),
    listed("dry_many", "many tensors", ((64,),) * 100),
)


def build(workload: Workload, dtype: torch.dtype, device: torch.device, depth: int | None = None) -> nn.Module:
    """Build and fill a module with the params and buffers of ``workload``; touches all its memory.

    Raises:
        RuntimeError: the shapes do not add up to the model's known total.
    """
    depth = workload.full_depth if depth is None else depth
    root = nn.Module()
    for name, shape in workload.params(depth):
        owner, leaf = _owner(root, name)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
    for name, shape in workload.buffers():
        owner, leaf = _owner(root, name)
        buffer = torch.empty(shape, dtype=buffer_dtype(name, dtype), device=device)
        owner.register_buffer(leaf, buffer)
    for name in workload.bare(depth):
        owner, leaf = _owner(root, name)
        owner.add_module(leaf, nn.Identity())
    for name, first in workload.tied:
        owner, leaf = _owner(root, name)
        owner.register_parameter(leaf, root.get_parameter(first))
    total = sum(param.numel() for param in root.parameters())
    if depth == workload.full_depth and total != workload.num_params:
        raise RuntimeError(f"{workload.name} must have {workload.num_params:,} params, got {total:,}")
    _fill([*root.parameters(), *root.buffers()])
    return root


def shrunk(workload: Workload) -> Workload:
    """Return a workload with as many tensors of as many dimensions, but tiny: for times that no kernel is part of."""

    def capped(entries: Iterator[Entry]) -> Iterator[Entry]:
        return ((name, tuple(min(size, SHRUNK_SIZE) for size in shape)) for name, shape in entries)

    total = sum(math.prod(shape) for _, shape in capped(workload.params(workload.full_depth)))
    return replace(
        workload, num_params=total, params=lambda depth: capped(workload.params(depth)),
        buffers=lambda: capped(workload.buffers()),
    )  # fmt: skip


def buffer_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a buffer in a model whose params have ``dtype``."""
    return torch.int64 if name.endswith("num_batches_tracked") else dtype


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that holds ``name``, made where it is missing, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root, leaf


@torch.no_grad()
def _fill(tensors: list[Tensor]) -> None:
    """Run one periodic stream of random values in +-[0.5, 1.5) through all tensors; integers become 1."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(FILL_PERIOD, generator=generator) + 0.5
    values *= torch.randint(0, 2, (FILL_PERIOD,), generator=generator) * 2 - 1
    # Moved to the device once, not once for each run of values.
    values, at = values.to(tensors[0].device), 0
    for tensor in tensors:
        if not tensor.is_floating_point():
            tensor.fill_(1)
            continue
        flat, done = tensor.view(-1), 0
        while done < flat.numel():
            run = min(FILL_PERIOD - at, flat.numel() - done)
            flat[done : done + run].copy_(values[at : at + run])
            done, at = done + run, (at + run) % FILL_PERIOD
