"""Formats: encode and decode against plain integer arithmetic."""

from __future__ import annotations

import torch

from swafast.terms.formats import EXACT, FLOAT32, MIRRORED, decode_exact, encode_exact, format_of, stored_dtype

INTERESTING = [
    *(0x00000000, 0x80000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x0000FFFF, 0x007FFFFF, 0x00800000),
    *(0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000),
    *(0xBF808000, 0xFF7FFFFF, 0xFF800000, 0x80008000, 0x80007FFF),
]


def test_exact_splits_bits_as_the_formula_says() -> None:
    bits = torch.cat([torch.tensor(INTERESTING), torch.randint(0, 2**32, (2_000_000,))])
    value = bits.int().view(torch.float32)
    average, remainder = encode_exact(value)
    again = decode_exact((average, remainder))
    assert torch.equal(value.isnan(), again.isnan())
    numbers = ~value.isnan()
    bits, high, low = bits[numbers], average.view(torch.int16).long()[numbers] & 0xFFFF, remainder.long()[numbers]
    assert torch.equal(high, ((bits + 0x8000) >> 16) & 0xFFFF)
    assert torch.equal(((high << 16) + low) & 0xFFFFFFFF, bits)
    assert torch.equal(again.view(torch.int32)[numbers], value.view(torch.int32)[numbers])


def test_exact_keeps_the_sign_of_a_nan_and_nothing_else() -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).int().view(torch.float32)
    average, remainder = encode_exact(nans)
    assert [h & 0xFFFF for h in average.view(torch.int16).tolist()] == [0x7FC0, 0x7FC0, 0xFFC0, 0xFFC0]
    assert remainder.tolist() == [0, 0, 0, 0]


def test_exact_bfloat16_plane_is_the_average_rounded_half_up() -> None:
    ties = (torch.arange(0x3F80, 0x4080).int() << 16 | 0x8000).view(torch.float32)
    assert ((encode_exact(ties)[0].float() - ties) > 0).all()
    value = torch.randn(100_000)
    average, _ = encode_exact(value)
    ulp = (average.float().abs() * 2**-7).clamp(min=2**-133)
    assert ((average.float() - value).abs() <= ulp / 2).all()


def test_exact_with_a_stale_remainder_stays_within_half_an_ulp() -> None:
    # Somebody writes the bfloat16 plane behind our back: every remainder may stand beside every value.
    written = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    finite = written.isfinite()
    for remainder in (-(2**15), -1, 0, 1, 2**15 - 1):
        value = decode_exact((written, torch.full(written.shape, remainder, dtype=torch.int16)))
        assert torch.equal(value.isnan(), written.isnan())
        following = (written.view(torch.int16)[finite] + 1).view(torch.bfloat16).double()
        ulp = (following - written[finite].double()).abs()
        ulp = torch.where(ulp.isfinite(), ulp, torch.full_like(ulp, 2.0**120))
        assert ((value[finite].double() - written[finite].double()).abs() <= ulp / 2).all()


def test_mirrored_believes_a_copy_that_somebody_wrote() -> None:
    average = torch.tensor([1.0001, 70000.0, 1e-9, float("nan")])
    copy, plane = MIRRORED.encode(average)
    assert torch.equal(MIRRORED.decode((copy, plane))[:3], average[:3])
    copy[0] = 5.0
    assert MIRRORED.decode((copy, plane)).tolist()[:2] == [5.0, 70000.0]


def test_the_dtype_chooses_the_format_and_the_format_the_dtype() -> None:
    assert format_of(None, torch.float32) is FLOAT32
    assert format_of(None, torch.bfloat16) is EXACT
    assert format_of(None, torch.float16) is MIRRORED
    assert format_of("float32", torch.bfloat16) is EXACT
    assert format_of(None, torch.float8_e4m3fn) is None
    assert stored_dtype("float32", torch.bfloat16) == torch.float32
    assert stored_dtype("exact", torch.float32) == torch.bfloat16
    assert stored_dtype("exact", torch.float64) == torch.float64
    assert stored_dtype("exact", torch.int64) == torch.int64
