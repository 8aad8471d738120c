"""Averages of a model that ZeRO-3 has partitioned, by a stand-in; `tests/frameworks/test_zero.py` has the real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swafast import EqualAverage, ExponentialAverage, FusedAveragedModel, ShardedAveragedModel, Snapshots, posthoc
from swafast.op.plan import Plan
from swafast.optim.batchnorm import _ranks_of
from swafast.sharded.parts import zero
from tests.ranks import RankFailedError, planted, run_ranks
from tests.support import require_same
from tests.test_sharded_modes import Seen
from tests.zero_stand_in import Engine

pytestmark = pytest.mark.distributed


class Net(nn.Module):
    """Params that ranks cannot divide evenly, one with fewer elements than ranks, tied ones and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 5)
        self.scale, self.frozen = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(7), requires_grad=False)
        self.again = self.last
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.again(self.last(self.first(x.to(self.scale.dtype)))) * self.scale + self.frozen.sum()


def net_with(state: dict[str, Tensor], dtype: torch.dtype) -> Net:
    """Return a whole net with these params."""
    net = Net().to(dtype)
    net.load_state_dict(state, strict=False)
    return net


def updated(engine: Engine, steps: int = 3, **options: Any) -> tuple[ShardedAveragedModel, FusedAveragedModel]:
    """Return an average after some steps, and an unsharded one of the gathered masters."""
    options.setdefault("rule", ExponentialAverage(0.9))
    averaged = ShardedAveragedModel(engine.module, **options)
    reference = net_with(engine.masters(), torch.float32)
    frozen = engine.masters()["frozen"]
    reference.frozen.data = frozen.clone()
    expected = FusedAveragedModel(reference, **options)
    seen = Seen()
    for step in range(steps):
        engine.step(step)
        engine.module(torch.ones(2, 3))
        before = engine.gathers
        with seen:
            averaged.update_parameters(engine.module)
        assert (seen.collectives, engine.gathers) == ([], before)
        for name, whole in engine.masters().items():
            reference.get_parameter(name).data = whole
        reference.calls.fill_(engine.module.calls)  # type: ignore[operator]
        expected.update_parameters(reference)
    return averaged, expected


def follows(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    engine = Engine(Net(), dtype)
    averaged, expected = updated(engine)
    require_same(averaged.full_state_dict(), expected.state_dict(), "averages")
    exported, x = averaged.averaged_state_dict(), torch.ones(2, 3)
    own, plain = engine.masters(), engine.module(x)
    try:
        with averaged.swapped_into(engine.module):
            assert torch.equal(engine.module(x), net_with(exported, dtype)(x))
            with pytest.raises(RuntimeError, match=r"a step of the optimizer must wait"):
                engine.step(9)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert torch.equal(engine.module(x), plain)
    require_same(engine.masters(), own, "masters after the swap")
    averaged.copy_to(engine.module)
    wanted = {name: exported[name].to(whole.dtype) for name, whole in own.items()}
    require_same(engine.masters(), wanted, "masters after copy_to")
    assert torch.equal(engine.module(x), net_with(exported, dtype)(x))
    assert _ranks_of(engine.module, None) is not None  # `update_bn` is collective
    swapped = averaged.swapped_into(engine.module)
    written = pytest.raises(RuntimeError, match=r"must not be written while swapped, got writes into 'first.weight'")
    with written, swapped, engine.gathered("first.weight") as weight:
        weight.data.zero_()
    assert torch.equal(engine.module(x), net_with(exported, dtype)(x))


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.bfloat16), (3, torch.float32)])
def test_averages_are_those_of_the_masters(world: int, dtype: torch.dtype) -> None:
    run_ranks(world, follows, dtype)


def reads_working_runs() -> None:
    """Plant: an update reads what a forward pass reads."""
    zero.Masters.local = property(lambda self: torch.cat([  # type: ignore[assignment]
        param.ds_tensor.float() for param in self._optimizer().module.parameters()
        if self._optimizer().grad_position.get(param.ds_id, [-1])[0] == self._group
    ]))  # fmt: skip


def forgets_gathered() -> None:
    """Plant: what was gathered stays."""
    zero.free = lambda params: None


def leaves_masters() -> None:
    """Plant: `copy_to` does not write the masters, which are float32."""
    copies = Plan.copy_to
    Plan.copy_to = lambda self, pairs: copies(  # type: ignore[method-assign]
        self, [pair for pair in pairs if pair.param.dtype != torch.float32]
    )


@pytest.mark.parametrize(
    ("plant", "failure"),
    [(reads_working_runs, "averages"), (forgets_gathered, "assert"), (leaves_masters, "masters after copy_to")],
)
def test_planted(plant: Callable[[], None], failure: str) -> None:
    with planted(plant), pytest.raises(RankFailedError, match=failure):
        run_ranks(2, follows, torch.bfloat16)


# One process


@pytest.fixture
def engine() -> Iterator[Engine]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(3)
    yield Engine(Net(), torch.bfloat16)
    dist.destroy_process_group()


def without_optimizer(engine: Engine) -> None:
    for param in engine.module.parameters():
        del param._z3_optimizer  # type: ignore[attr-defined]


def of_another_engine(engine: Engine) -> None:
    engine.module.last = Engine(nn.Linear(5, 5)).module


def not_of_the_engine(engine: Engine) -> None:
    engine.module.last.bias = nn.Parameter(torch.ones(5))


def has(name: str, value: Any = True) -> Callable[[Engine], None]:
    def change(engine: Engine) -> None:
        setattr(engine.module.first.weight, name, value)

    return change


def engine_has(name: str) -> Callable[[Engine], None]:
    return lambda engine: setattr(engine, name, True)


def quantized(engine: Engine) -> None:
    engine.module.first.weight.ds_tensor.ds_quant_scale = 1.0  # type: ignore[union-attr]


REFUSED: dict[str, tuple[Callable[[Engine], None], type[Exception], str]] = {
    "no optimizer": (without_optimizer, ValueError, r"'scale' must belong to a DeepSpeed engine with an optimizer"),
    "two engines": (of_another_engine, ValueError, r"one DeepSpeed engine, got 'last.weight' of another"),
    "a plain param": (not_of_the_engine, ValueError, r"'last.bias' must be partitioned by ZeRO-3"),
    "hpZ": (has("ds_secondary_tensor"), NotImplementedError, r"'first.weight' .*set zero_hpz_partition_size to 1"),
    "NVMe": (has("nvme_swapper"), NotImplementedError, r"'first.weight' .*params offloaded to NVMe"),
    "masters on NVMe": (engine_has("swap_optimizer"), NotImplementedError, r"'scale' .*masters offloaded to NVMe"),
    "MiCS": (has("comm"), NotImplementedError, r"'first.weight' .*without mics_shard_size"),
    "quantized": (quantized, NotImplementedError, r"'first.weight' .*quantized weights"),
    "ZenFlow": (engine_has("zenflow"), NotImplementedError, r"ZenFlow"),
    "SuperOffload": (engine_has("superoffload_cpu_optimizer"), NotImplementedError, r"SuperOffload"),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(engine: Engine, change: Callable[[Engine], None], kind: type[Exception], message: str) -> None:
    change(engine)
    with pytest.raises(kind, match=message):
        ShardedAveragedModel(engine.module)


def test_a_group_of_its_own_is_refused() -> None:
    run_ranks(2, group_is_refused)


def group_is_refused() -> None:
    engine = Engine(Net())
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    engine.module.last.weight.ds_process_group = alone  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"process_group must be the ranks that 'last.weight' is partitioned over"):
        ShardedAveragedModel(engine.module)


def test_whole_models_refuse_it(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"'scale' empty, .*swafast\.ShardedAveragedModel"):
        FusedAveragedModel(engine.module)


def test_include_sees_whole_shapes(engine: Engine) -> None:
    engine.module.first.weight.kept = True  # type: ignore[union-attr]
    seen: dict[str, tuple[tuple[int, ...], bool, bool]] = {}

    def include(name: str, param: Tensor) -> bool:
        seen[name] = (tuple(param.shape), param.requires_grad, hasattr(param, "kept"))
        return param.dim() > 1

    averaged = ShardedAveragedModel(engine.module, include=include)
    assert seen["first.weight"] == ((5, 3), True, True)
    assert seen["frozen"] == ((7,), False, False)
    assert [key for key in averaged.averaged_state_dict() if key != "calls"] == [
        "first.weight",
        "last.weight",
        "again.weight",
    ]


def test_samples_and_snapshots(engine: Engine, tmp_path: Any) -> None:
    averaged, expected = updated(engine, rule=EqualAverage(), deviations=2)
    x = torch.ones(2, 3)
    reference = net_with(engine.masters(), torch.float32)
    expected.sample_to(reference, 4)
    sampled = dict(reference.named_parameters())
    with averaged.sampled_into(engine.module, 4):
        inside = engine.module(x)
    averaged.sample_to(engine.module, 4)
    wanted = {name: sampled[name].detach().to(whole.dtype) for name, whole in engine.masters().items()}
    require_same(engine.masters(), wanted, "a sample")
    assert torch.equal(inside, engine.module(x))
    averaged.copy_to(engine.module)
    made = averaged.subspace(1)
    placed = made.placed_into(engine.module, [0.0])
    with placed, pytest.raises(NotImplementedError, match=r"gradient must be .*got ZeRO-3"):
        made.gradient(engine.module)
    Snapshots(tmp_path).save(averaged)


def test_a_write_while_gathered_is_not_lost(engine: Engine) -> None:
    averaged, _ = updated(engine)
    engine.module.first.weight.data.add_(1)  # type: ignore[union-attr,operator]
    with (
        pytest.raises(RuntimeError, match=r"'first.weight' .*written while gathered"),
        averaged.swapped_into(engine.module),
    ):
        pass
    averaged.update_parameters(engine.module)  # reads masters alone


def test_an_engine_made_anew_is_found(engine: Engine) -> None:
    averaged, _ = updated(engine)
    masters = engine.masters()
    engine.gather()
    anew = Engine(engine.module, torch.bfloat16)
    anew.step(5)
    averaged.rule = ExponentialAverage(0.0)
    averaged.update_parameters(engine.module)
    found = averaged.averaged_state_dict()
    require_same({name: found[name].to(masters[name].dtype) for name in masters}, anew.masters(), "averages")


def test_states_without_values_are_not_merged(engine: Engine) -> None:
    state = engine.module.state_dict()
    with pytest.raises(ValueError, match=r"states\[0\] must hold values, got only empty tensors.*gather"):
        posthoc.merge([state, state])
