"""Layout: pure functions of ints."""

from __future__ import annotations

import pytest
import torch

from swafast.terms.layout import cut_chunks, extent, is_dense, lay_out, same_order, whole_runs


def test_slots_do_not_overlap_are_aligned_and_keep_their_order() -> None:
    numels = [5, 0, 33, 32, 1, 100, 7]
    keys = ["a", "a", "b", "a", "b", "a", "a"]
    buckets = lay_out(numels, keys, max_numel=128, alignment=32)
    seen = sorted(slot.index for bucket in buckets for slot in bucket.slots)
    assert seen == list(range(7))
    for bucket in buckets:
        end = 0
        for slot in bucket.slots:
            assert keys[slot.index] == bucket.key
            assert slot.numel == numels[slot.index]
            assert slot.offset % 32 == 0
            assert slot.offset >= end
            end = slot.offset + slot.numel
        assert end <= bucket.numel <= 128


def test_a_large_plane_has_a_bucket_of_its_own() -> None:
    buckets = lay_out([10, 1000, 10], ["k"] * 3, max_numel=100, alignment=1)
    assert [[slot.index for slot in bucket.slots] for bucket in buckets] == [[0], [1], [2]]
    assert buckets[1].numel == 1000


def gpt2() -> list[int]:
    width = 768
    layer = [width, width, 3 * width**2, 3 * width, width**2, width, width, width]
    layer += [4 * width**2, 4 * width, 4 * width**2, width]
    return [50257 * width, 1024 * width, *(layer * 12), width, width]


def llama_3_8b() -> list[int]:
    width, hidden, narrow, words = 4096, 14336, 1024, 128256
    layer = [width**2, narrow * width, narrow * width, width**2, *[hidden * width] * 3, width, width]
    return [words * width, *(layer * 32), width, words * width]


MODELS = {
    "GPT-2": (gpt2(), 1.02),
    "Llama-3-8B": (llama_3_8b(), 1.001),
    "1025x1025": ([1025**2] * 100, 1.06),  # alone 2.0
    "a few small ones": ([5, 0, 33, 32, 1, 100, 7], 3.0),  # each begins at a multiple of 64
    "empty": ([0, 0], 1.0),
}


@pytest.mark.parametrize("model", MODELS)
def test_pinned_buckets_are_powers_of_two_and_full(model: str) -> None:
    numels, most = MODELS[model]
    buckets = lay_out([*numels, 3], [*["pinned"] * len(numels), "other"], pinned=["pinned"])
    assert [bucket.numel for bucket in buckets if bucket.key == "other"] == [3]
    pinned = [bucket for bucket in buckets if bucket.key == "pinned"]
    slots = [slot for bucket in pinned for slot in bucket.slots]
    assert sorted((slot.index, slot.numel) for slot in slots) == list(enumerate(numels))
    for bucket in pinned:
        assert bucket.numel & (bucket.numel - 1) == 0
        end = 0
        for slot in bucket.slots:
            assert slot.offset % 64 == 0
            assert slot.offset >= end
            end = slot.offset + slot.numel
        assert end <= bucket.numel
    assert sum(bucket.numel for bucket in pinned) <= most * max(1, sum(numels))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_cover_each_element_once(chunk: int) -> None:
    numels = [0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 7, 0]
    rows = cut_chunks(whole_runs(numels), chunk)
    assert rows.dtype == torch.int64
    assert rows.is_contiguous()
    covered = {(t, i) for t, offset, numel, *_ in rows.tolist() for i in range(offset, offset + numel)}
    assert covered == {(t, i) for t, numel in enumerate(numels) for i in range(numel)}
    assert int(rows[:, 2].sum()) == sum(numels)
    assert int(rows[:, 2].max()) <= chunk


def test_no_tensors_no_chunks() -> None:
    assert cut_chunks(whole_runs([]), 64).shape == (0, 5)
    assert lay_out([], []) == []


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 4)[:, :2], False),
        (torch.empty(3, 1).expand(3, 4), False),
        (torch.empty(()), True),
        (torch.empty(0, 4), True),
        (torch.empty(3, 4)[:1, :], True),
        (torch.empty(3, 4)[:, :1], False),
    ],
)
def test_dense(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor.shape, tensor.stride()) == dense
    assert (extent(tensor.shape, tensor.stride()) == tensor.numel()) == dense


def test_a_dimension_of_one_has_no_say_in_the_order() -> None:
    assert same_order((1, 4), (4, 1), (99, 1))
    assert not same_order((2, 4), (4, 1), (1, 2))
