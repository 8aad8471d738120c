"""Updates of a launch without a plan, for tests of backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swafast import Rule
from swafast.backends.contract import Launch, Update
from swafast.terms.rules import terms_of


def run_update(
    launch: Launch,
    params: Sequence[Tensor],
    rules: Sequence[Rule],
    counters: Sequence[Tensor],
    advance: int = 1,
    **options: Any,
) -> None:
    """Run one update of a launch. ``rules`` must have kernel terms."""
    terms = tuple(terms_of(rule) for rule in rules)
    assert None not in terms
    launch.update(params, Update(terms, tuple(counters), advance, **options))  # type: ignore[arg-type]
