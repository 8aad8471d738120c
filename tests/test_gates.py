"""Each gate kills a bug: planted here, and the test that guards against it must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from swafast.average import averaged_model, matching, planes, states
from swafast.backends import Unavailable, cpu
from swafast.op import buckets, checks, plan, tree_check
from swafast.op.exchange import Exchange
from swafast.op.tree_check import TreeCheck
from swafast.terms import draws, names, rules
from swafast.terms.boxes import Box
from swafast.terms.formats import COMPACT
from tests import (
    test_averaged_model,
    test_bad_input,
    test_draws,
    test_formats,
    test_state,
    test_swap,
)
from tests.conftest import EveryKind

Plant = Callable[[pytest.MonkeyPatch], None]
Failed = pytest.fail.Exception


def drop_the_last_chunk(patch: pytest.MonkeyPatch) -> None:
    cut = cpu.cut_chunks
    patch.setattr(cpu, "cut_chunks", lambda runs, size: cut(runs, size)[:-1].contiguous())


def shift_the_weight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rules.EqualAverage, "kernel_terms", lambda self: rules.KernelTerms.constant(0.5))


def update_twice(patch: pytest.MonkeyPatch) -> None:
    update = cpu.NativeLaunch.update

    def twice(self: cpu.NativeLaunch, *arguments: Any, **more: Any) -> None:
        for _ in range(2):
            update(self, *arguments, **more)

    patch.setattr(cpu.NativeLaunch, "update", twice)


def forget_versions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "bump_versions", lambda tensors: None)


def tell_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "tell", lambda tensors: True)


def go_by_addresses_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "_views_of", lambda tensors: [])
    patch.setattr(plan, "make_metadata_check", lambda tensors: None)
    patch.setattr(tree_check, "load", lambda: Unavailable("a plant has left it out"))


def believe_the_native_pass(patch: pytest.MonkeyPatch) -> None:
    make = TreeCheck.__init__

    def note(self: Any, roots: Any, groups: Any, **options: Any) -> None:
        make(self, roots, groups, **options)
        self.noted = groups

    patch.setattr(TreeCheck, "__init__", note)
    patch.setattr(TreeCheck, "find", lambda self, count: self.noted[:count])


def keep_whole_buckets(patch: pytest.MonkeyPatch) -> None:
    # Views of the bucket instead of storages of their own: each pickled average then drags the bucket along.
    def view(bucket, like, slot):
        return torch.empty(0, dtype=like.dtype).set_(bucket, slot.offset, like.shape, like.stride)

    patch.setattr(buckets, "stand_on_own_storage", view)


def cast_as_torch_does(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planes.Recast, "__call__", lambda self, tensor: self._fn(tensor))


def load_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(averaged_model, "load_whole", lambda root, averaged, load, state, **options: load(state, **options))


def load_untranslated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states, "translate_state", lambda *args, **options: None)


def never_swap_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Exchange, "back", lambda self: setattr(self, "is_back", True))


def keep_wrappers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(names, "canonical", lambda name: name)
    patch.setattr(matching, "unwrap", lambda model: model)


def match_by_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(matching, "require_same_names", lambda kind, averages, params: None)


def allow_overlap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "check_overlap", lambda pairs: None)


def round_to_even(patch: pytest.MonkeyPatch) -> None:
    def encode(value):
        average = value.to(torch.bfloat16)
        high = average.view(torch.int16).int() << 16
        return average, (value.view(torch.int32) - high).to(torch.int16)

    patch.setattr(test_formats, "encode_exact", encode)


def believe_stale_remainders(patch: pytest.MonkeyPatch) -> None:
    def decode(pair):
        return ((pair[0].view(torch.int16).int() << 16) + pair[1].int()).view(torch.float32)

    patch.setattr(test_formats, "decode_exact", decode)


def forget_include(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(averaged_model.FusedAveragedModel, "_includes", lambda self, name, param: True)


def ignore_the_offset(patch: pytest.MonkeyPatch) -> None:
    of_box = draws._runs_of_box
    patch.setattr(
        draws, "_runs_of_box", lambda box, stride: of_box(Box((0, 0, 0), box.sizes, box.start, box.order), stride)
    )


def one_run_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draws, "_runs_of_box", lambda box, stride: torch.tensor([[box.start, box.numel, 0, 1]]))


def like_torch(**changes: object) -> None:
    test_averaged_model.test_gives_what_torchs_class_gives(EveryKind(), {}, False, "cpu", 64)


@dataclass(frozen=True)
class Gate:
    """A bug, the test that kills it, and how that test fails then."""

    plant: Plant
    test: Callable[[], None]
    says: str  # a regular expression
    error: type[BaseException] = AssertionError


DIFFERS, UNEQUAL, SILENT = r"== \[\]", "torch.equal", "DID NOT RAISE"
GATES = [
    Gate(drop_the_last_chunk, like_torch, UNEQUAL),
    Gate(shift_the_weight, like_torch, "Tensor-likes are not close"),
    Gate(update_twice, like_torch, "assert 16 == 8"),
    *(
        Gate(
            forget,
            lambda: test_averaged_model.test_writes_are_seen_by_autograd("cpu"),
            f"{SILENT} RuntimeError",
            Failed,
        )
        for forget in (forget_versions, tell_nobody)
    ),
    Gate(
        believe_the_native_pass,
        test_averaged_model.test_a_view_of_other_shape_at_the_same_address_is_noticed,
        f"{SILENT} ValueError",
        Failed,
    ),
    Gate(
        go_by_addresses_alone,
        test_averaged_model.test_a_view_of_other_shape_at_the_same_address_is_noticed,
        f"{SILENT} ValueError",
        Failed,
    ),
    Gate(keep_whole_buckets, test_averaged_model.test_each_average_is_written_once, r"< \(1.25 \* 200000\)"),
    Gate(cast_as_torch_does, lambda: test_state.test_casts_lose_nothing(EveryKind(), torch.bfloat16), DIFFERS),
    Gate(
        load_unchecked,
        lambda: test_state.test_a_failed_load_changes_nothing(EveryKind(), test_state._drop_a_key, False),
        "has changed",
    ),
    Gate(
        load_untranslated,
        lambda: test_state.test_a_state_of_another_format_keeps_its_precision(
            EveryKind(), torch.float32, torch.bfloat16
        ),
        "Missing key",
        RuntimeError,
    ),
    Gate(never_swap_back, lambda: test_swap.test_comes_back_after_an_exception(EveryKind()), "has changed"),
    Gate(
        keep_wrappers,
        lambda: test_averaged_model.test_wrappers_on_either_side_do_not_matter("inner", "model"),
        "unexpected '1._orig_mod.0.weight'",
        ValueError,
    ),
    Gate(
        match_by_order,
        lambda: test_bad_input.test_a_model_that_does_not_match_changes_nothing(EveryKind(), "surplus", True, "cpu"),
        f"{SILENT} ValueError",
        Failed,
    ),
    Gate(
        allow_overlap,
        test_bad_input.test_an_average_that_overlaps_another_or_itself_is_refused,
        f"{SILENT} ValueError",
        Failed,
    ),
    Gate(round_to_even, test_formats.test_exact_bfloat16_plane_is_the_average_rounded_half_up, r"all\(\)|method all"),
    Gate(believe_stale_remainders, test_formats.test_exact_with_a_stale_remainder_stays_within_half_an_ulp, UNEQUAL),
    Gate(ignore_the_offset, lambda: test_draws.test_runs_of_boxes_give_each_element_its_index((0, 1, 2)), UNEQUAL),
    Gate(
        ignore_the_offset, lambda: test_draws.test_the_parts_of_a_param_are_rounded_as_the_whole(cpu, COMPACT), UNEQUAL
    ),
    Gate(one_run_for_all, lambda: test_draws.test_runs_give_each_element_its_index("channels_last"), UNEQUAL),
    Gate(forget_include, lambda: test_averaged_model.test_include_picks_what_is_averaged(EveryKind(), "cpu"), UNEQUAL),
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.plant.__name__)
def test_the_gate_kills_the_bug(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_CHUNK_NUMEL", 64)
    gate.test()
    gate.plant(monkeypatch)
    with pytest.raises(gate.error, match=gate.says):
        gate.test()
