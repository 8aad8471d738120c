"""The ``triton`` backend."""

from __future__ import annotations

from collections.abc import Sequence

from . import Launch, Pair, Unavailable

name = "triton"
device_types = frozenset({"cuda"})
exchanges = True


def unavailable() -> Unavailable | None:
    return Unavailable("not written yet", expected=True)


def describe() -> str:
    return ""


def serves(pair: Pair) -> bool:
    return False


def prepare(pairs: Sequence[Pair]) -> Launch:
    raise NotImplementedError
