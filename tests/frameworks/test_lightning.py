"""Lightning: the kit, and what is Lightning's own."""

from __future__ import annotations

import pytest

from tests.frameworks.kit import Kit, Resumes
from tests.frameworks.lightning_kit import Ddp, Fsdp2, Lightning, WholeFiles

pytestmark = pytest.mark.frameworks


class TestLightning(Kit):
    framework = Lightning()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()

    test_half_a_state_is_refused = Kit.test_half_a_state_is_refused
    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one
    test_a_resumed_average_that_starts_late_is_as_without_a_stop = (
        Kit.test_a_resumed_average_that_starts_late_is_as_without_a_stop
    )
    test_one_of_several_averages_is_evaluated = Kit.test_one_of_several_averages_is_evaluated


class TestWholeFiles(Resumes):
    framework = WholeFiles()
    kinds = ("compact",)
