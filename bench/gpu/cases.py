"""What a GPU run goes through: workloads, dtypes and formats, and the providers of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.gpu.ours import ours_on
from bench.provider import Provider
from bench.providers import CompiledForeach, Foreach, LerpFloat, MulAdd, TorchClass, TorchClassBf16, TorchEma
from bench.workloads import WORKLOADS, Entry, Workload

# Bytes that an update must move for each element, by the dtype of the params and the format of the averages: read the
# param, read and write each plane; the mirrored float16 is only written.
COUNTED_BYTES = {
    ("float32", "float32"): 4 + 2 * 4,
    ("bfloat16", "exact"): 2 + 2 * 4,
    ("bfloat16", "float32"): 2 + 2 * 4,
    ("float16", "mirrored"): 2 + 2 * 4 + 2,
    ("bfloat16", "compact"): 2 + 2 * 3,
    ("bfloat16", "compensated"): 2 + 2 * 8,
    ("bfloat16", "half"): 2 + 2 * 2,
    ("float32", "compensated"): 4 + 2 * 8,
    ("float32", "compact"): 4 + 2 * 3,
}
# Bytes that one param and its average hold.
HELD_BYTES = {
    ("float32", "float32"): 8,
    ("bfloat16", "exact"): 6,
    ("bfloat16", "float32"): 6,
    ("float16", "mirrored"): 8,
    ("bfloat16", "compact"): 5,
    ("bfloat16", "compensated"): 10,
    ("bfloat16", "half"): 4,
    ("float32", "compensated"): 12,
    ("float32", "compact"): 7,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BILLION = 10**9


def _one_tensor(numel: int) -> Workload:
    def params(depth: int) -> Iterator[Entry]:
        yield "weight", (numel,)

    return Workload("1e9", "1e9 params in one tensor", params, 1, numel)


GPU_WORKLOADS = {"1e9": _one_tensor(BILLION), **WORKLOADS}


def _tiny(name: str, title: str, shapes: tuple[tuple[int, ...], ...], count: int) -> Workload:
    entries = [(f"{index}.weight", shape) for index, shape in enumerate(shapes * count)]
    total = sum(torch.Size(shape).numel() for _, shape in entries)
    return Workload(name, title, lambda depth: iter(entries), 1, total)


# For dry runs: they show that the machinery works, not how fast anything is.
DRY_WORKLOADS = {
    workload.name: workload
    for workload in (
        _tiny("dry_one", "one tensor", ((300_000,),), 1),
        _tiny("dry_few", "few tensors", ((200, 33), (1,), (5, 3, 7)), 3),
        _tiny("dry_many", "many tensors", ((64,),), 100),
    )
}


@dataclass(frozen=True)
class Case:
    """One workload with params of one dtype, and averages of one format: one of them, or several in one pass.

    The compiled providers have cases of their own: how long a compiler takes is the least certain.
    """

    workload: str
    dtype: str
    format: str
    compiled: bool = False
    averages: int = 1

    def find_workload(self) -> Workload:
        return (GPU_WORKLOADS | DRY_WORKLOADS)[self.workload]

    @property
    def counted_bytes(self) -> int:
        return self._with_each_average(COUNTED_BYTES[self.dtype, self.format])

    @property
    def held_bytes(self) -> int:
        return self._with_each_average(HELD_BYTES[self.dtype, self.format])

    def _with_each_average(self, nbytes: int) -> int:
        """Give the bytes of all averages beside one param, of those of one average beside it."""
        param = DTYPES[self.dtype].itemsize
        return param + self.averages * (nbytes - param)


DEFAULTS = (("float32", "float32"), ("bfloat16", "exact"))
OTHERS = (("float16", "mirrored"), ("bfloat16", "float32"))
# Those of other sizes, and those that are rounded at random.
SMALLER_AND_LARGER = (
    ("bfloat16", "compact"),
    ("bfloat16", "compensated"),
    ("bfloat16", "half"),
    ("float32", "compensated"),
    ("float32", "compact"),
)
# So many averages in one pass, and where.
SEVERAL, SEVERAL_ON = 3, ("gpt2_medium", "1e9", "llama3_8b")


def gpu_cases() -> list[Case]:
    """Give all cases, those with a bar first: a run that is short of time leaves out the last ones."""
    largest, small = ("1e9", "llama3_8b"), ("resnet50", "2000x64x64", "3000x64", "vit_l_16")
    cases = [Case(name, *kind) for kind in DEFAULTS for name in largest]
    cases += [Case(name, *DEFAULTS[0]) for name in small]
    cases += [Case(name, *DEFAULTS[0], compiled=True) for name in ("resnet50", "1e9")]
    cases += [Case("gpt2_medium", *kind) for kind in DEFAULTS]
    cases += [Case(name, *kind, averages=SEVERAL) for name in SEVERAL_ON for kind in DEFAULTS]
    cases += [Case(name, *DEFAULTS[1]) for name in small]
    others = (*SMALLER_AND_LARGER, *OTHERS)
    return cases + [Case(name, *other) for name in ("1e9", "gpt2_medium") for other in others]


def dry_cases() -> list[Case]:
    cases = [Case(name, *kind) for name in DRY_WORKLOADS for kind in DEFAULTS]
    cases += [Case("dry_one", *kind, averages=SEVERAL) for kind in DEFAULTS]
    cases += [Case("dry_one", *kind) for kind in SMALLER_AND_LARGER]
    return [*cases, Case("dry_one", *OTHERS[0]), Case("dry_one", *DEFAULTS[0], compiled=True)]


def providers_of(case: Case, backends: tuple[str, ...]) -> list[type[Provider]]:
    """Give the providers of a case, ours first."""
    if case.compiled:
        return [CompiledForeach]
    ours: list[type[Provider]] = [ours_on(backend, case.format, case.averages) for backend in backends]
    if case.averages > 1:
        return ours
    others: dict[tuple[str, str], list[type[Provider]]] = {
        ("float32", "float32"): [TorchClass, TorchEma, Foreach],
        ("bfloat16", "exact"): [TorchClassBf16, MulAdd, LerpFloat],
        ("float16", "mirrored"): [LerpFloat],
    }
    return ours + others.get((case.dtype, case.format), [])
