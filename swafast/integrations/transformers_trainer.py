"""What ``WeightAverage`` asks of a Trainer of Transformers, and how that one's model is saved with an average."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from ..loop.schedule import Span
from ..terms.names import canonical
from .lengths import needed_lengths

_REFUSED = ("DEEPSPEED", "MEGATRON_LM", "XLA")  # their engines step without torch's optimizers, or hold no params


def check_trainer(trainer: Any, kind: Any) -> None:
    """Raise unless averages can follow a trainer.

    Raises:
        TypeError: it is not of this class.
        NotImplementedError: it trains with an engine that is not supported.
    """
    if not isinstance(trainer, kind):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    used = trainer.accelerator.distributed_type
    if used.name in _REFUSED:
        advice = ", or in a loop of your own with swafast.integrations.deepspeed" if used.name == "DEEPSPEED" else ""
        raise NotImplementedError(
            f"trainer must train with torch alone, with DDP or with FSDP, got {used}: its engine steps in another way. "
            f"Train without WeightAverage{advice}"
        )


def refuse_own_averages(optimizers: Sequence[Optimizer]) -> None:
    """Raise NotImplementedError for an optimizer that writes params before an evaluation, such as a schedule-free one.

    The Trainer calls its ``eval`` then.
    """
    for each in optimizers:
        if callable(getattr(each, "eval", None)):
            raise NotImplementedError(
                f"optimizer must leave the params alone in an evaluation, got {type(each).__name__}, which puts "
                "averages of its own into them: train without WeightAverage, or with another optimizer"
            )


def has_adapters(model: Module) -> bool:
    """Return whether a model has adapters of PEFT."""
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)


def lengths_of(trainer: Any, spans: Mapping[str, object]) -> dict[str, Span]:
    """Return what :func:`.lengths.needed_lengths` asks of a Trainer."""
    loader, accumulated = trainer.callback_handler.train_dataloader, trainer.args.gradient_accumulation_steps
    return needed_lengths(
        spans,
        duration=lambda: trainer.state.max_steps,
        steps_per_epoch=lambda: len(loader) / accumulated if hasattr(loader, "__len__") else None,
    )


@contextmanager
def with_whole_states(trainer: Any) -> Iterator[None]:
    """Have ``save_model`` write whole tensors under FSDP. With shards in checkpoints, it writes nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


def save_in(dtype: torch.dtype, trainer: Any, averaged: Any, folder: Path, *, is_of_shards: bool) -> None:
    """Write an average in a dtype, for ``from_pretrained``, with what it leaves out. Collective if it is of shards.

    Raises:
        ValueError: ``dtype`` is not a floating dtype.
    """
    if is_of_shards:
        averages = averaged.averaged_state_dict(dtype, rank0_only=True, cpu_offload=True)
        own = trainer.accelerator.get_state_dict(trainer.model)
        state = {canonical(name): each.to(dtype) if each.is_floating_point() else each for name, each in own.items()}
        state |= averages
    else:
        state = averaged.averaged_state_dict(dtype, frozen=not has_adapters(trainer.model))
    trainer._save(str(folder), state_dict=state)
    config = folder / "config.json"
    if not trainer.args.should_save or not config.exists():
        return
    # `save_pretrained` writes the dtype of the model there, and `from_pretrained` would load the weights in that.
    values = json.loads(config.read_text(encoding="utf-8"))
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        part.update({key: str(dtype).removeprefix("torch.") for key in {"dtype", "torch_dtype"} & part.keys()})
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def scales_gradients(trainer: Any) -> bool:
    """Return whether the trainer counts steps that its gradient scaler may skip."""
    return getattr(trainer.accelerator, "scaler", None) is not None
