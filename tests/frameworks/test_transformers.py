"""The Trainer of Transformers: the kit, and what is its own."""

from __future__ import annotations

import pytest

from tests.frameworks.kit import Kit, Resumes
from tests.frameworks.transformers_kit import Ddp, FullStates, ShardedStates, Transformers

pytestmark = pytest.mark.frameworks


class TestTransformers(Kit):
    framework = Transformers()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFullStates(Resumes):
    framework = FullStates()


class TestShardedStates(Resumes):
    framework = ShardedStates()
