"""Composer: the kit."""

from __future__ import annotations

import pytest

from tests.frameworks.composer_kit import Composer, Ddp, Fsdp2, Sharded
from tests.frameworks.kit import Kit, Resumes

pytestmark = pytest.mark.frameworks


class TestComposer(Kit):
    framework = Composer()


class Shorter(Resumes):
    """What checkpoints and wrappers may change; each test starts ranks."""

    test_the_model_trains_as_without_averages = None
    test_every_batch_of_two_sets_sees_the_average = None
    test_the_model_has_the_average_at_the_end = None


class TestDdp(Shorter):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()
    kinds = ("float32",)

    test_half_a_state_is_refused = Kit.test_half_a_state_is_refused


class TestSharded(Shorter):
    framework = Sharded()
    kinds = ("compact",)
