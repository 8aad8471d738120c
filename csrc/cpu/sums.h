// Weighted sums of elements in float64, and their one rounding at the end: what averages of files are made of.
//
// Plain loops, which compilers make vectors of. Only float16 goes through an instruction set's own conversions.
#pragma once

#include "span.h"

namespace swafast::cpu {
namespace {

// Elements that are converted at a time: they stay in the first-level cache.
constexpr int64_t kSumWindow = 256;

template <class V, class Element>
inline void widen_elements(const typename Element::storage* elements, float* values, int64_t numel) {
  int64_t i = 0;
  if constexpr (V::kLanes > 1) {
    for (; i + V::kLanes <= numel; i += V::kLanes) {
      V::store_average(FormatFloat32{}, values, nullptr, i, V::load(Element{}, elements + i));
    }
  }
  for (; i < numel; ++i) values[i] = Element::load(elements + i);
}

template <class Value>
inline void accumulate_values(double* sums, const Value* values, int64_t numel, double coefficient, bool begin) {
  if (begin) {
    for (int64_t i = 0; i < numel; ++i) sums[i] = coefficient * static_cast<double>(values[i]);
  } else {
    for (int64_t i = 0; i < numel; ++i) sums[i] += coefficient * static_cast<double>(values[i]);
  }
}

template <class V, class Element>
void accumulate_span(double* sums, const void* elements, int64_t numel, double coefficient, bool begin) {
  float values[kSumWindow];
  const auto* first = static_cast<const typename Element::storage*>(elements);
  for (int64_t done = 0; done < numel; done += kSumWindow) {
    const int64_t size = numel - done < kSumWindow ? numel - done : kSumWindow;
    widen_elements<V, Element>(first + done, values, size);
    accumulate_values(sums + done, values, size, coefficient, begin);
  }
}

template <class Value>
void accumulate_wide_span(double* sums, const void* elements, int64_t numel, double coefficient, bool begin) {
  accumulate_values(sums, static_cast<const Value*>(elements), numel, coefficient, begin);
}

// A float64 rounded to so many significant bits, ties to even, and to fewer below the smallest normal number,
// 2^kLowest. Adding a number whose last place is the wanted one rounds in hardware, and once: float32 in between would
// round twice.
template <int kBits, int kLowest>
inline float rounded_to(double value) {
  uint64_t bits, magic_bits;
  memcpy(&bits, &value, sizeof bits);
  constexpr int64_t kBias = 1023, kMost = 1023 + 512;  // above it the result is an infinity in any case
  int64_t exponent = static_cast<int64_t>(bits >> 52 & 0x7ff);
  exponent = exponent < kBias + kLowest ? kBias + kLowest : exponent;
  exponent = exponent > kMost ? kMost : exponent;
  magic_bits = static_cast<uint64_t>(exponent + 53 - kBits) << 52 | uint64_t{1} << 51;
  double magic;
  memcpy(&magic, &magic_bits, sizeof magic);
  const float result = static_cast<float>((value + magic) - magic);
  // The sum loses the sign of a zero.
  return float_of(bits_of(result) | (static_cast<uint32_t>(bits >> 32) & 0x80000000u));
}

// What a sum is rounded to: `convert` fills in a window of the output.
struct ToFloat64 {
  using storage = double;
  static bool finite(double value) { return value - value == 0.0; }
  template <class V>
  static void convert(const double* values, double* out, int64_t numel) {
    memcpy(out, values, static_cast<size_t>(numel) * sizeof(double));
  }
};
struct ToFloat32 {
  using storage = float;
  static bool finite(float value) { return value - value == 0.0f; }
  template <class V>
  static void convert(const double* values, float* out, int64_t numel) {
    for (int64_t i = 0; i < numel; ++i) out[i] = static_cast<float>(values[i]);
  }
};
struct ToBFloat16 {
  using storage = uint16_t;
  static bool finite(uint16_t bits) { return (bits & 0x7f80u) != 0x7f80u; }
  template <class V>
  static void convert(const double* values, uint16_t* out, int64_t numel) {
    for (int64_t i = 0; i < numel; ++i) out[i] = static_cast<uint16_t>(bits_of(rounded_to<8, -126>(values[i])) >> 16);
  }
};
struct ToFloat16 {
  using storage = uint16_t;
  static bool finite(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }
  // Values that are rounded already convert exactly.
  template <class V>
  static void convert(const double* values, uint16_t* out, int64_t numel) {
    float rounded[kSumWindow];
    for (int64_t i = 0; i < numel; ++i) rounded[i] = rounded_to<11, -14>(values[i]);
    int64_t i = 0;
    if constexpr (V::kLanes > 1) {
      for (; i + V::kLanes <= numel; i += V::kLanes) {
        V::store_average(FormatMirrored{}, out, rounded, i, V::load(Float32{}, rounded + i));
      }
    }
    for (; i < numel; ++i) out[i] = to_float16(rounded[i]);
  }
};

template <class V, class To>
int64_t finish_span(const double* sums, void* out, int64_t numel, double divisor) {
  auto* results = static_cast<typename To::storage*>(out);
  double values[kSumWindow];
  int64_t nonfinite = -1;
  for (int64_t done = 0; done < numel; done += kSumWindow) {
    const int64_t size = numel - done < kSumWindow ? numel - done : kSumWindow;
    // A division takes more time than all else, and one by 1 changes nothing.
    for (int64_t i = 0; divisor != 1.0 && i < size; ++i) values[i] = sums[done + i] / divisor;
    To::template convert<V>(divisor != 1.0 ? values : sums + done, results + done, size);
    uint32_t bad = 0;  // without a branch in the loop, as all_finite_span
    for (int64_t i = done; i < done + size; ++i) bad |= static_cast<uint32_t>(!To::finite(results[i]));
    for (int64_t i = done; bad != 0 && nonfinite < 0; ++i) nonfinite = To::finite(results[i]) ? -1 : i;
  }
  return nonfinite;
}

template <class V>
Kernels with_sums(Kernels kernels) {
  kernels.accumulate[SWAFAST_ELEMENT_FLOAT32] = accumulate_wide_span<float>;
  kernels.accumulate[SWAFAST_ELEMENT_BFLOAT16] = accumulate_span<V, BFloat16>;
  kernels.accumulate[SWAFAST_ELEMENT_FLOAT16] = accumulate_span<V, Float16>;
  kernels.accumulate[SWAFAST_ELEMENT_FLOAT64] = accumulate_wide_span<double>;
  kernels.finish[SWAFAST_ELEMENT_FLOAT32] = finish_span<V, ToFloat32>;
  kernels.finish[SWAFAST_ELEMENT_BFLOAT16] = finish_span<V, ToBFloat16>;
  kernels.finish[SWAFAST_ELEMENT_FLOAT16] = finish_span<V, ToFloat16>;
  kernels.finish[SWAFAST_ELEMENT_FLOAT64] = finish_span<V, ToFloat64>;
  return kernels;
}

}  // namespace
}  // namespace swafast::cpu
