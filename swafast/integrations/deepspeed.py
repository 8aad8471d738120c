"""Weight averaging in a training with DeepSpeed: its engine with ZeRO stages 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from ..sharded.parts.rendezvous import shared_ranks
from ..terms.names import unwrap
from ..terms.warn import warn_user
from . import deepspeed_engine as engines
from .inside import run_inside
from .installed import framework
from .state_folder import FOLDER, resume_from, write_averages
from .weight_average import Contract, refuse_second

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_deepspeed: Any = framework("deepspeed", "0.15")


class WeightAverage(Contract):
    """Averages of the model that a DeepSpeed engine trains.

    They update after each ``engine.step()`` that has changed the params: not after the batches between, nor after a
    step that overflowed. ``engine.save_checkpoint`` and ``engine.load_checkpoint`` save and load them too, in a folder
    ``swafast`` of the checkpoint. From ZeRO stage 1 on, each rank has a part of the averages.

    Example::

        engine, _, _, _ = deepspeed.initialize(model=model, config=config)
        average = WeightAverage(ExponentialAverage(0.999)).install(engine)
        train(engine)
        with average.swapped():
            evaluate(engine)
        average.finish()
    """

    _engine: Any = None

    def install(self, engine: DeepSpeedEngine) -> WeightAverage:
        """Make the averages, and follow the engine's steps. Return this object. Collective.

        Args:
            engine: of ``deepspeed.initialize``, or that of Accelerate's ``prepare``.

        Raises:
            TypeError: ``engine`` is not an engine of DeepSpeed.
            ValueError: it has no optimizer, or averages; this object is installed in another one; or an average is
                attached to the engine's optimizer itself.
            NotImplementedError: it trains with pipeline or tensor parallelism, experts or ZenFlow; its checkpoints are
                in parts on the nodes' own disks; or ZeRO stage 3 does not take these options.
            RuntimeError: the call was refused on another rank.
        """
        with (ranks := shared_ranks(call="install")).lock, ranks.settled("install"):  # else the others would wait
            is_sharded = self._checked(engine)
        steps, others = engines.applied_steps(engine), vars(engine).setdefault("_swafast_averages", [])
        self._engine, sharded, self._sharded = engine, self._sharded, is_sharded
        try:
            self.make(engine.module)
            self.follow([counted := engines.EngineSteps(engine.module)], engine.module, step=steps)
        except BaseException:
            self.averaged, self._engine, self._sharded = None, None, sharded
            raise
        self._counted = counted
        if steps:
            warn_user(
                f"the engine has made {steps} steps already, and the average begins after them: to resume a training, "
                "call install before load_checkpoint"
            )
        others.append(self)
        for name, around in (
            ("step", self._stepping),
            ("save_checkpoint", self._saving),
            ("load_checkpoint", self._loading),
        ):
            run_inside(engine, name, around)
        return self

    def _checked(self, engine: DeepSpeedEngine) -> bool:
        """Return whether the averages are to be shards, or raise as :meth:`install`."""
        engines.check_engine(engine, _deepspeed.DeepSpeedEngine, _deepspeed.PipelineEngine)
        engines.refuse_beside(engine, bool(self._when.get("overlap")), self._when.get("offload"))
        is_sharded = engine.zero_optimization_stage() > 0 if self._sharded == "auto" else bool(self._sharded)
        engines.refuse_node_local(engine, is_sharded)
        if self._engine is not None:
            raise ValueError("a WeightAverage must be installed once, got a second call: make another one")
        refuse_second([self, *vars(engine).get("_swafast_averages", ())], "one engine")
        return is_sharded

    # Their use

    def swapped(self, model: Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which the engine's model has the averages, if there are any. Collective with shards."""
        return super().swapped(self._checked_model(model))

    def finish(self, model: Module | None = None) -> None:
        """End the training: follow the engine no more, and leave the averages in its model if asked to.

        The engine's own float32 copies of the params become the averages too.
        """
        super().finish(self._checked_model(model))
        if self._has_copied:
            engines.refresh_masters(self._engine)

    def averaged_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the averages as whole tensors on the first rank, for export; elsewhere an empty dict. Collective.

        Args:
            dtype: as for :meth:`~swafast.FusedAveragedModel.averaged_state_dict`.

        Raises:
            RuntimeError: no model is in the averages yet.
            ValueError: ``dtype`` is not a floating dtype.
        """
        self._checked_model(None)
        if not self.has_models:
            raise RuntimeError("the average must hold a model before it is exported, got none: no update was made yet")
        if self.holds_shards:
            return dict(self.evaluated.averaged_state_dict(dtype, rank0_only=True, cpu_offload=True))
        return self.evaluated.averaged_state_dict(dtype) if self._engine.global_rank == 0 else {}

    def _checked_model(self, model: Module | None) -> Module:
        if self._engine is None:
            raise RuntimeError("the average must be installed first: call install(engine)")
        own = self._engine.module
        if model is not None and model is not self._engine and unwrap(model) is not unwrap(own):
            raise ValueError(f"model must be the engine, or its module, got another {type(model).__name__}")
        return own

    # What the engine does

    @contextmanager
    def _stepping(self, *_: Any, **__: Any) -> Iterator[None]:
        assert self.attachment is not None
        self.attachment.before_step()
        yield
        if self._engine.was_step_applied():
            self._counted.step()

    @contextmanager
    def _saving(self, save_dir: Any, tag: Any = None, *_: Any, **__: Any) -> Iterator[None]:
        engine = self._engine
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)  # as the engine does
        writes = engine.local_rank == 0 if engine.use_node_local_storage() else engine.global_rank == 0
        # Before the engine names the checkpoint in its file `latest`: it is whole by then.
        write_averages(self, Path(save_dir) / tag / FOLDER, writes=writes)
        yield

    @contextmanager
    def _loading(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: Any = True,
        load_optimizer_states: Any = True,
        load_lr_scheduler_states: Any = True,
        load_module_only: bool = False,
        *_: Any,
        **__: Any,
    ) -> Iterator[None]:
        assert self.attachment is not None
        self.averaged._guard.refuse_while_swapped("load_checkpoint")
        self.attachment.join()  # the engine loads into params that an update beside the next forward may read
        checkpoint = engines.checkpoint_of(self._engine, load_dir, tag)
        if checkpoint is None or load_module_only:
            yield
            return
        is_there = (checkpoint / FOLDER).exists()
        if is_there:
            resume_from(self, checkpoint / FOLDER, checkpoint)
        yield
        steps = engines.applied_steps(self._engine)
        if is_there:
            self.compare_steps(checkpoint, steps, may_skip=False)
        else:
            resume_from(self, checkpoint / FOLDER, checkpoint, step=steps)
