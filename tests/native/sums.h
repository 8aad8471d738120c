// The sums of files' averages: on memory that ends where the elements do, with whole numbers, so that every result is
// known. tests/test_summing.py has their rounding.
#pragma once

#include <cstdint>
#include <cstring>

#include "swafast.h"
#include "tensors.h"

namespace sums {

constexpr int64_t kItemsizes[SWAFAST_NUM_ELEMENTS] = {4, 2, 2, 8};

// A whole number below 256, as an element.
inline uint64_t encoded(int32_t element, uint32_t number) {
  const float narrow = static_cast<float>(number);
  const double wide = number;
  uint32_t bits;
  uint64_t wide_bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  std::memcpy(&wide_bits, &wide, sizeof wide_bits);
  switch (element) {
    case SWAFAST_ELEMENT_FLOAT32:
      return bits;
    case SWAFAST_ELEMENT_BFLOAT16:
      return bits >> 16;
    case SWAFAST_ELEMENT_FLOAT16:
      return number == 0 ? 0 : (bits >> 13) - ((127 - 15) << 10);
    default:
      return wide_bits;
  }
}

inline uint32_t number_at(int64_t i, int input) { return static_cast<uint32_t>(i * 7 + input * 13) % 100; }

inline void check(int32_t element, int64_t numel, int64_t shift) {
  const int64_t itemsize = kItemsizes[element];
  Guarded elements(numel * itemsize, shift * itemsize, 0x5a), total(numel * 8, shift * 8, 0xa5);
  auto* sums = reinterpret_cast<double*>(total.data());
  for (int input = 0; input < 2; ++input) {
    for (int64_t i = 0; i < numel; ++i) {
      const uint64_t bits = encoded(element, number_at(i, input));
      std::memcpy(elements.data() + i * itemsize, &bits, static_cast<size_t>(itemsize));  // little-endian
    }
    elements.remember();
    require(swafast_cpu_accumulate(sums, elements.data(), numel, element, 2.0, input == 0) == SWAFAST_OK,
            "sums of element %d were refused", element);
    require(elements.unchanged() && elements.intact() && total.intact(), "a sum of element %d wrote elsewhere",
            element);
  }
  total.remember();
  Guarded out(numel * itemsize, shift * itemsize, 0x3c);
  int64_t nonfinite = 0;
  require(swafast_cpu_finish(sums, out.data(), numel, element, 2.0, &nonfinite) == SWAFAST_OK && nonfinite == -1,
          "the rounding of element %d was refused", element);
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t bits = encoded(element, number_at(i, 0) + number_at(i, 1));
    require(std::memcmp(out.data() + i * itemsize, &bits, static_cast<size_t>(itemsize)) == 0,
            "sum %lld of %lld of element %d is wrong", static_cast<long long>(i), static_cast<long long>(numel),
            element);
  }
  require(total.unchanged() && total.intact() && out.intact(), "a rounding of element %d wrote elsewhere", element);
}

}  // namespace sums

inline void check_sums() {
  for (int32_t element = 0; element < SWAFAST_NUM_ELEMENTS; ++element) {
    for (const int64_t numel : {0, 1, 7, 8, 9, 31, 33, 255, 256, 257, 1031}) {
      for (const int64_t shift : {0, 1, 3}) sums::check(element, numel, shift);
    }
  }
}
