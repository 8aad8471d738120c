// Normal random numbers: the same bits on every machine and backend, and however a param is spread over ranks.
// swafast/terms/normals.py states the same functions for torch, with the papers that they come from: the operations are
// the same in the same order, and a test holds the two together.
//
// Nothing here branches, and choices are made by bits: so a compiler makes vectors of a loop over elements, and need
// not know that no operation traps.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace swafast {

// The streams of one key.
enum NormalStream : uint32_t { kElements = 0, kColumns = 1 };

// Four words of random bits: those of the elements 4 * block to 4 * block + 3 of a param.
struct RandomBlock {
  uint32_t words[4];
};

SWAFAST_HD uint32_t upper_word(uint64_t value) { return static_cast<uint32_t>(value >> 32); }

// Philox4x32-10.
SWAFAST_HD RandomBlock philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = upper_word(key);
  SWAFAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xd2511f53u} * c0, second = uint64_t{0xcd9e8d57u} * c2;
    c0 = upper_word(second) ^ c1 ^ k0;
    c2 = upper_word(first) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random bits of four elements; `block` is the row-major index in the whole param of the first, divided by 4.
SWAFAST_HD RandomBlock random_block(uint64_t key, uint32_t sample, uint64_t block) {
  return philox(static_cast<uint32_t>(block), upper_word(block), sample, kElements, key);
}

// Those of one element, by its row-major index in the whole param.
SWAFAST_HD uint32_t random_word(uint64_t key, uint32_t sample, uint64_t index) {
  const RandomBlock block = random_block(key, sample, index >> 2);
  const uint32_t even = (index & 2) != 0 ? block.words[2] : block.words[0];
  const uint32_t odd = (index & 2) != 0 ? block.words[3] : block.words[1];
  return (index & 1) != 0 ? odd : even;
}

// -log(value) of a value in (0, 1], with the polynomial of Cephes' logf.
SWAFAST_HD float negative_log(float value) {
  const uint32_t bits = bits_of(value);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = float_of(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float square = f * f;
  float series = 7.0376836292e-2f;
  series = fmaf(series, f, -1.1514610310e-1f);
  series = fmaf(series, f, 1.1676998740e-1f);
  series = fmaf(series, f, -1.2420140846e-1f);
  series = fmaf(series, f, 1.4249322787e-1f);
  series = fmaf(series, f, -1.6668057665e-1f);
  series = fmaf(series, f, 2.0000714765e-1f);
  series = fmaf(series, f, -2.4999993993e-1f);
  series = fmaf(series, f, 3.3333331174e-1f);
  const float exponents = static_cast<float>(exponent);
  float rest = fmaf(exponents, -2.12194440e-4f, series * f * square);
  rest = fmaf(square, -0.5f, rest);
  return -fmaf(exponents, 0.693359375f, f + rest);
}

// `yes` where all bits of the mask are 1, `no` where all are 0.
SWAFAST_HD float choose(uint32_t mask, float yes, float no) {
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// A normal number for 32 random bits. Both ends of the distribution are worked out, and one is chosen.
SWAFAST_HD float normal_of(uint32_t word) {
  const uint32_t sign = word & 0x80000000u, negative = 0u - (word >> 31);
  const int32_t magnitude = static_cast<int32_t>(word ^ negative);
  const float half = (static_cast<float>(magnitude) + 0.5f) * 0x1p-32f;                 // |p - 1/2|
  const float tail = static_cast<float>(0x7fffffff - magnitude) * 0x1p-32f + 0x1p-33f;  // 1/2 - that, not rounded away
  const float c = fmaf(-half, half, 0.180625f);
  const float t = sqrtf(negative_log(tail)) - 1.6f;
  float inner = fmaf(5.9109374720e1f, c, 1.5929113202e2f);
  inner = fmaf(inner, c, 5.0434271938e1f);
  inner = fmaf(inner, c, 3.3871327179f) * half;
  float inner_divisor = fmaf(6.7187563600e1f, c, 7.8757757664e1f);
  inner_divisor = fmaf(inner_divisor, c, 1.7895169469e1f);
  inner_divisor = fmaf(inner_divisor, c, 1.0f);
  float outer = fmaf(1.7023821103e-1f, t, 1.3067284816f);
  outer = fmaf(outer, t, 2.7568153900f);
  outer = fmaf(outer, t, 1.4234372777f);
  float outer_divisor = fmaf(1.2021132975e-1f, t, 7.3700164250e-1f);
  outer_divisor = fmaf(outer_divisor, t, 1.0f);
  const uint32_t is_inner = 0u - static_cast<uint32_t>(half <= 0.425f);
  const float normal = choose(is_inner, inner, outer) / choose(is_inner, inner_divisor, outer_divisor);
  return float_of(bits_of(normal) ^ sign);
}

}  // namespace swafast
