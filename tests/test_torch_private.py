"""Each private name of torch that `core.py` and `optimizers.py` rely on; a failure here names the one that changed."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.optim import swa_utils

from swafast.torch_private import core, optimizers


def test_disable_dynamo() -> None:
    assert hasattr(torch, "_disable_dynamo"), "torch._disable_dynamo is gone"


def test_tensor_guards() -> None:
    assert core._guards_work(), "torch._C._dynamo.guards.TensorGuards is gone, or checks other things"


def test_without_guards_the_public_check_serves(monkeypatch) -> None:
    from tests import test_averaged_model

    monkeypatch.setattr(core, "_guards_work", lambda: False)
    test_averaged_model.test_a_view_of_other_shape_at_the_same_address_is_noticed()


def test_disabled_torch_dispatch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    class Named(torch.Tensor):
        pass

    assert hasattr(torch._C, "_disabled_torch_dispatch_impl"), "torch._C._disabled_torch_dispatch_impl is gone"
    assert core.has_own_dispatch(TwoTensor(torch.zeros(1), torch.zeros(1)))
    for plain in (torch.zeros(1), nn.Parameter(torch.zeros(1)), nn.Buffer(torch.zeros(1))):
        assert not core.has_own_dispatch(plain)


def test_who_holds_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(torch._C, "_storage_Use_Count"), "torch._C._storage_Use_Count is gone"
    tensor = nn.Parameter(torch.zeros(3))
    assert not core.is_held_elsewhere(tensor)
    state = tensor.detach()
    assert core.is_held_elsewhere(tensor)
    del state
    assert not core.is_held_elsewhere(tensor)
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert core.is_held_elsewhere(tensor)


def test_closures_of_torchs_averaging_functions() -> None:
    for factory in core.SWA_FACTORIES:
        assert core.closure_of(factory, factory()) == {}, f"{factory.__name__} is built otherwise now"
    for factory in core.EMA_FACTORIES:
        assert core.closure_of(factory, factory(0.25)) == {"decay": 0.25}, f"{factory.__name__} is built otherwise now"
    assert core.closure_of(swa_utils.get_swa_avg_fn, swa_utils.get_ema_avg_fn(0.5)) is None


def test_the_functions_that_are_looked_for_in_the_stack() -> None:
    assert state_dict.__name__ == optimizers._STATES
    for name in ("_init_optim_state", optimizers._LOADS_STATE, optimizers._GETS_STATE):
        assert inspect.unwrap(getattr(state_dict, name)).__code__.co_name == name, f"{name} is gone"
    assert "info" in inspect.signature(state_dict._get_optim_state_dict).parameters, "its argument is renamed"
    named = importlib.import_module(optimizers._MAKE_STATE["init_state"])._NamedOptimizer
    assert named.init_state.__globals__["__name__"] == named.__module__, "_NamedOptimizer.init_state has moved"
    assert "state_dict" in inspect.signature(state_dict._load_optim_state_dict).parameters, "its argument is renamed"
    assert optimizers._HOOKED is not None, "Optimizer.profile_hook_step is gone"


def test_hooks_of_optimizers() -> None:
    optimizer, seen = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizers.is_step(optimizer)))
    optimizer.register_state_dict_post_hook(seen.append)
    optimizer.step()
    assert seen == [True]
    assert optimizers.owners_of_state_hooks(optimizer) == [seen]
