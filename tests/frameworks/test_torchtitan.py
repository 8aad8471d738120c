"""`swafast.integrations.torchtitan` with the Trainer of torchtitan as it is, on CPUs."""

from __future__ import annotations

import pytest

from tests.frameworks.kit import Kit, Resumes
from tests.frameworks.torchtitan_kit import Fsdp, FsdpAsync, Titan, TitanAsync

pytestmark = pytest.mark.frameworks


class TestTitan(Kit):
    framework = Titan()


class TestFsdp(Resumes):
    framework = Fsdp()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one
