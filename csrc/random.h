// Random bits for formats that are rounded at random. They follow from the param's key, the update and the element's
// index in the whole param alone: the same bits on every backend, and however the param is spread over ranks.
// swafast/terms/draws.py states the same functions for torch.
#pragma once

#include <cstdint>

#include "checksum.h"
#include "element.h"

namespace swafast {

// What the elements of one chunk have in common.
struct Draw {
  uint32_t first, second;  // keys of the hash: those of kStratum updates in a row
  uint32_t turn;           // what this update among them adds
};

// An element's random bits of 16 updates in a row are spread evenly, one in each sixteenth: what rounding adds to an
// average then cancels for the most part within them. The bits of each update are as even as ever by themselves.
constexpr int kStratumLog2 = 4;

// 0 to 15 with its bits in reverse order, in the upper bits of a word: each half, quarter and eighth of 16 turns is
// spread evenly too.
SWAFAST_HD uint32_t turn_of(int64_t num_averaged) {
  const auto n = static_cast<uint32_t>(num_averaged);
  return ((n & 1u) << 31) | ((n & 2u) << 29) | ((n & 4u) << 27) | ((n & 8u) << 25);
}

// `num_averaged` stands for the update, and `first_index` for the chunk: its upper 32 bits are those of all in it.
SWAFAST_HD Draw draw_of(uint64_t key, int64_t num_averaged, int64_t first_index) {
  const uint64_t update = mix(key, start_of(static_cast<uint64_t>(num_averaged) >> kStratumLog2));
  const uint64_t bits = mix(update, static_cast<uint64_t>(first_index) >> 32);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), turn_of(num_averaged)};
}

// The random bits of the element with this index, its lower 32 bits. The multipliers and shifts are those of the hash
// that Chris Wellons found and calls lowbias32 (https://github.com/skeeto/hash-prospector), with the second half of the
// draw between its rounds. Its last shift is left out: it does not reach the upper 16 bits, and we use no others.
SWAFAST_HD uint32_t random_bits(const Draw& draw, uint32_t index) {
  uint32_t x = index ^ draw.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x ^= draw.second;
  return (x ^ (x >> 15)) * 0x846ca68bu + draw.turn;
}

}  // namespace swafast
