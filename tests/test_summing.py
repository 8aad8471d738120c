"""Sums of elements of files: every way to sum, bit for bit against float64 of numpy rounded once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from swafast.backends import Unavailable, library
from swafast.files import summing
from tests.conftest import NO_LIBRARY

ISAS = ("generic", "avx2", "avx512")
LENGTHS = (1, 7, 255, 256, 257, 1000)
#: Significant bits, the exponent of the smallest normal number, and the largest number.
NARROW = {"BF16": (8, -126, 3.3895313892515355e38), "F16": (11, -14, 65504.0)}
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def rounded_once(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to a dtype, as float64 values: by scaling, which is exact, and by rint."""
    if dtype in ("F64", "F32"):
        return values.astype(NUMPY[dtype]).astype(np.float64)
    bits, lowest, largest = NARROW[dtype]
    _, exponents = np.frexp(values)
    units = np.maximum(exponents, lowest + 1) - bits
    found = np.ldexp(np.rint(np.ldexp(values, -units)), units)
    return np.where(np.abs(found) > largest, np.copysign(np.inf, found), found)


def to_float64(elements: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (elements.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return elements.astype(np.float64)


def some_elements(dtype: str, numel: int, seed: int) -> np.ndarray:
    """Return elements of every size: subnormal, near ties, and large ones."""
    generator = np.random.default_rng(seed)
    exponents = {"F64": 60, "F32": 60, "BF16": 60, "F16": 10}[dtype]
    values = generator.standard_normal(numel) * np.exp2(generator.integers(-exponents, exponents // 2, numel))
    values[::5] *= {"F64": 1.0, "F32": 2.0**-100, "BF16": 2.0**-100, "F16": 2.0**-12}[dtype]
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(NUMPY[dtype])


def native(isa: str) -> Callable[[], summing.Summing]:
    found = library.load()
    if isinstance(found, Unavailable):
        pytest.skip(f"{NO_LIBRARY}: {found}")
    before = found.swafast_cpu_isa()
    if found.swafast_cpu_use_isa(isa.encode()) != 0:
        pytest.skip(f"this processor has no {isa}")
    found.swafast_cpu_use_isa(before)

    class OfIsa(summing.NativeSumming):
        def add(self, dtype: str, numel: int, coefficient: float, *, begin: bool) -> None:
            found.swafast_cpu_use_isa(isa.encode())
            super().add(dtype, numel, coefficient, begin=begin)

        def finish(self, dtype: str, numel: int, divisor: float) -> int | None:
            nonfinite = super().finish(dtype, numel, divisor)
            found.swafast_cpu_use_isa(before)
            return nonfinite

    return OfIsa


@pytest.fixture(params=[*ISAS, "numpy", "torch"])
def sums(request: pytest.FixtureRequest) -> summing.Summing:
    others = {"numpy": summing.NumpySumming, "torch": summing.TorchSumming}
    return others[request.param]() if request.param in others else native(request.param)()


def put(sums: summing.Summing, elements: np.ndarray) -> None:
    sums.buffer[: elements.nbytes] = elements.tobytes()


def result(sums: summing.Summing, dtype: str, numel: int) -> np.ndarray:
    itemsize = np.dtype(NUMPY[dtype]).itemsize
    return to_float64(np.frombuffer(bytes(sums.buffer[: numel * itemsize]), NUMPY[dtype]), dtype)


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.int64).tolist()


@pytest.mark.parametrize("out", NUMPY)
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("equal", [True, False])
def test_sums_are_float64_rounded_once(sums: summing.Summing, dtype: str, out: str, equal: bool) -> None:
    coefficients = [1.0] * 3 if equal else [0.3, 0.45, 0.25]
    divisor = 3.0 if equal else 1.0
    for numel in LENGTHS:
        inputs = [some_elements(dtype, numel, seed) for seed in range(3)]
        total = np.zeros(numel)
        for place, (elements, coefficient) in enumerate(zip(inputs, coefficients, strict=True)):
            product = to_float64(elements, dtype) * coefficient
            total = product if place == 0 else total + product
            put(sums, elements)
            sums.add(dtype, numel, coefficient, begin=place == 0)
        expected = rounded_once(total / divisor, out)
        nonfinite = sums.finish(out, numel, divisor)
        assert bits(result(sums, out, numel)) == bits(expected)
        bad = np.flatnonzero(~np.isfinite(expected))
        assert nonfinite == (int(bad[0]) if len(bad) else None)


#: Values between two bfloat16 or float16, as exact as float64 is: ties, and beside ties by less than float32 sees.
@pytest.mark.parametrize("dtype", NARROW)
def test_ties_go_to_even_and_no_float32_stands_between(sums: summing.Summing, dtype: str) -> None:
    bits_kept, lowest, largest = NARROW[dtype]
    unit = 2.0 ** (1 - bits_kept)
    smallest = 2.0 ** (lowest + 1 - bits_kept)
    ties = [1 + unit / 2, 1 + 3 * unit / 2, smallest / 2, 3 * smallest / 2, 1.0]
    values = np.array([x * (1 + e) for x in ties for e in (0.0, 2.0**-40, -(2.0**-40))] + [largest, largest * 1.01])
    values = np.concatenate([values, -values, [0.0, -0.0]])
    put(sums, values)
    sums.add("F64", len(values), 1.0, begin=True)
    nonfinite = sums.finish(dtype, len(values), 1.0)
    assert bits(result(sums, dtype, len(values))) == bits(rounded_once(values, dtype))
    assert nonfinite == 16  # the first that is too large


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_found(sums: summing.Summing, dtype: str, value: float) -> None:
    for place in (0, 255, 256, 700):
        values = np.ones(701)
        values[[place, 700]] = value
        put(sums, values)
        sums.add("F64", 701, 1.0, begin=True)
        assert sums.finish(dtype, 701, 1.0) == place
        found = result(sums, dtype, 701)
        assert np.array_equal(found[place], value, equal_nan=True)
        assert np.isfinite(found).sum() == 701 - len({place, 700})


def test_bad_arguments_are_refused_by_the_library() -> None:
    native("generic")
    loaded, memory, out = library.loaded(), (ctypes.c_double * 4)(), ctypes.c_int64(7)
    where = ctypes.addressof(memory)
    for element, numel in ((-1, 1), (4, 1), (0, -1)):
        assert loaded.swafast_cpu_accumulate(where, where, numel, element, 1.0, 1) != 0
        assert loaded.swafast_cpu_finish(where, where, numel, element, 1.0, ctypes.byref(out)) != 0
    assert out.value == 7
    assert list(memory) == [0.0] * 4


def test_without_a_library_numpy_sums_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: Unavailable("no libgomp"))
    assert summing.choose_summing() == (summing.NumpySumming, "numpy, since no libgomp")
    monkeypatch.setattr(summing.importlib.util, "find_spec", lambda name: None if name == "numpy" else object())
    assert summing.choose_summing() == (summing.TorchSumming, "torch, since there is no numpy, and no libgomp")
    monkeypatch.setattr(summing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"need the native library, numpy or torch: install numpy \(no libgomp\)"):
        summing.choose_summing()


@pytest.mark.filterwarnings("error")
def test_infinities_of_both_signs_warn_nobody() -> None:
    sums = summing.NumpySumming()
    for value in (np.inf, -np.inf):
        sums.buffer[:8] = np.float64(value).tobytes()
        sums.add("F64", 1, 1.0, begin=value > 0)
    assert sums.finish("F64", 1, 2.0) == 0


@pytest.mark.parametrize("planted", ["cut", "over float32", "sign of zero"])
def test_planted_roundings_are_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "cut": lambda values, bits, lowest, *_: (values.view(np.int64) & -(1 << 53 - bits)).view(np.float64),
        "over float32": lambda values, *rest: summing_rounded(values.astype(np.float32).astype(np.float64), *rest),
        "sign of zero": lambda values, *rest: summing_rounded(values, *rest) + 0.0,
    }[planted]
    summing_rounded = summing._rounded
    monkeypatch.setattr(summing, "_rounded", wrong)
    with pytest.raises(AssertionError):
        test_ties_go_to_even_and_no_float32_stands_between(summing.NumpySumming(), "BF16")
