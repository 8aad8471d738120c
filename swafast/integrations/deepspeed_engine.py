"""What ``WeightAverage`` asks of an engine of DeepSpeed, and the engine's steps as those of an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ..loop.attachment import Attachment
from ..torch_private.optimizers import owners_of_step_hooks


class EngineSteps(Optimizer):
    """The steps that an engine has applied. It changes no params: it is there for the hooks of averages.

    Hooks on the engine's own optimizer would run too early: the engine copies params into the model after its step.
    """

    def __init__(self, model: Module) -> None:
        super().__init__([param for param in model.parameters() if param.requires_grad], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count a step."""


def check_engine(engine: Any, kind: Any, pipeline: Any) -> None:
    """Raise unless averages can follow an engine.

    Raises:
        TypeError: it is not of this class.
        ValueError: it has no optimizer, or an average is attached to the one inside it.
        NotImplementedError: ranks have different params, other than by ZeRO; or params are written between steps.
    """
    if not isinstance(engine, kind):
        raise TypeError(f"engine must be that of deepspeed.initialize, got {type(engine).__name__}")
    inside = getattr(engine, "basic_optimizer", None)
    if not isinstance(inside, Optimizer):
        raise ValueError("engine must have an optimizer for averages to follow, got none: name one in its config")
    if any(isinstance(owner, Attachment) and owner.is_attached for owner in owners_of_step_hooks(inside)):
        raise ValueError(
            "engine must have an optimizer that no average is attached to, got one with an average, which would miss "
            "what the engine writes after that optimizer's step: call averaged.attachment.detach() first"
        )
    refused = {
        "pipeline parallelism, where each rank has other layers": isinstance(engine, pipeline),
        "tensor parallelism, where ranks have parts of params": _tensor_ranks(engine) > 1,
        "experts, which differ between ranks": bool(engine.has_moe_layers),
        "ZenFlow, which writes params between steps": bool(getattr(engine, "zenflow", False)),
    }
    for what, is_so in refused.items():
        if is_so:
            raise NotImplementedError(f"engine must train the same params on all ranks, got {what}: train without this")


def _tensor_ranks(engine: Any) -> int:
    autotp = engine.autotp_size() if hasattr(type(engine), "autotp_size") else 1
    return max(int(autotp), int(engine.mp_world_size))


def refuse_beside(engine: Any, overlap: bool, offload: object) -> None:
    """Raise NotImplementedError for updates beside the next forward of a model whose params ZeRO-3 has partitioned."""
    stage = engine.zero_optimization_stage()
    if stage == 3 and (overlap or offload is not None):
        raise NotImplementedError(
            f"overlap must be False and offload None with ZeRO stage 3, which moves params in a forward, got "
            f"overlap={overlap}, offload={offload!r}"
        )


def refuse_node_local(engine: Any, is_sharded: bool) -> None:
    """Raise NotImplementedError for shards in checkpoints on each node's own disk: a node could not read the others."""
    if is_sharded and engine.use_node_local_storage():
        raise NotImplementedError(
            "use_node_local_storage must be false for averages in shards, which all ranks read from one folder, got "
            "true: save to a disk that all nodes share, or with ZeRO stages 0 to 2 use sharded=False"
        )


def applied_steps(engine: Any) -> int:
    """Return how many steps have changed the params. The engine's ``global_steps`` has those that overflowed too."""
    return int(engine.global_steps) - int(engine.skipped_steps)


def refresh_masters(engine: Any) -> None:
    """Copy the model's params into the float32 copies that the engine trains, if it has any.

    Otherwise the next step, or a checkpoint, would bring the old ones back. With ZeRO stage 3 there is nothing to do:
    ``copy_to`` has written the averages into both, with all of their bits.
    """
    # Every wrapper of DeepSpeed has such copies. An optimizer that is not wrapped steps the model's params themselves.
    if engine.zero_optimization_stage() < 3 and engine.optimizer is not engine.basic_optimizer:
        engine.optimizer.refresh_fp32_params()


def checkpoint_of(engine: Any, folder: Any, tag: Any) -> Path | None:
    """Return the checkpoint that the engine loads; None if it finds no name of one."""
    if tag is None:
        latest = Path(folder) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    return Path(folder) / str(tag)
