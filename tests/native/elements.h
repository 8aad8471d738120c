// One element of a param with its average: the bits it may have, and whether an update made of it what it has to.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "oracle.h"
#include "swafast.h"

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() { return oracle::splitmix64(state_ += oracle::kGamma); }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(next() >> 32) % limit; }

 private:
  uint64_t state_;
};

inline int64_t param_itemsize(int32_t dtype) {
  const int64_t itemsizes[SWAFAST_NUM_DTYPES] = {4, 2, 2, 1};
  return itemsizes[dtype];
}

inline int64_t plane_itemsize(int32_t format, int plane) {
  const int64_t itemsizes[SWAFAST_NUM_FORMATS][2] = {{4, 0}, {2, 2}, {2, 4}, {1, 0}, {2, 1}, {4, 4}, {2, 0}, {4, 0}};
  return itemsizes[format][plane];
}

// The bits of one param and of its average's planes.
struct Element {
  uint32_t param = 0;
  uint32_t planes[2] = {0, 0};
};

// By a constant size each: a call of memcpy for every element took a tenth of the test's time.
template <class Bits>
uint32_t word_at(const uint8_t* base, int64_t i) {
  Bits bits;
  std::memcpy(&bits, base + i * static_cast<int64_t>(sizeof bits), sizeof bits);
  return bits;
}

inline uint32_t bits_at(const uint8_t* base, int64_t itemsize, int64_t i) {
  if (itemsize == 0) return 0;
  return itemsize == 1   ? word_at<uint8_t>(base, i)
         : itemsize == 2 ? word_at<uint16_t>(base, i)
                         : word_at<uint32_t>(base, i);
}

template <class Bits>
void put_word(uint8_t* base, int64_t i, uint32_t bits) {
  const auto word = static_cast<Bits>(bits);
  std::memcpy(base + i * static_cast<int64_t>(sizeof word), &word, sizeof word);
}

inline void put_bits(uint8_t* base, int64_t itemsize, int64_t i, uint32_t bits) {
  if (itemsize == 1) put_word<uint8_t>(base, i, bits);
  if (itemsize == 2) put_word<uint16_t>(base, i, bits);
  if (itemsize == 4) put_word<uint32_t>(base, i, bits);
}

inline float param_value(int32_t dtype, uint32_t bits) {
  if (dtype == SWAFAST_FLOAT32) return oracle::float_of(bits);
  const auto narrow = static_cast<uint16_t>(bits);
  return dtype == SWAFAST_BFLOAT16 ? oracle::from_bfloat16(narrow) : oracle::from_float16(narrow);
}

inline float average_value(int32_t format, const uint32_t (&planes)[2]) {
  if (format == SWAFAST_FORMAT_FLOAT32) return oracle::float_of(planes[0]);
  const auto narrow = static_cast<uint16_t>(planes[0]);
  if (format == SWAFAST_FORMAT_EXACT) return oracle::decode_exact({narrow, static_cast<int16_t>(planes[1])});
  if (format == SWAFAST_FORMAT_COMPACT) return oracle::decode_compact({narrow, static_cast<int8_t>(planes[1])});
  if (format == SWAFAST_FORMAT_HALF) return oracle::from_bfloat16(narrow);
  const float average = oracle::float_of(planes[1]);
  return narrow == oracle::to_float16(average) ? average : oracle::from_float16(narrow);
}

inline bool follows_compensated(float param, const Element& before, double weight, const uint32_t (&planes)[2]) {
  const double average =
      oracle::decode_compensated({oracle::float_of(before.planes[0]), oracle::float_of(before.planes[1])});
  const oracle::Compensated expected = oracle::encode_compensated(oracle::lerp(average, param, weight));
  if (std::isnan(expected.average)) return oracle::is_nan(planes[0]) && planes[1] == 0;
  return planes[0] == oracle::bits_of(expected.average) && planes[1] == oracle::bits_of(expected.compensation);
}

// Whether these planes are what an update by this weight makes, with these random bits. The sign and payload of a NaN
// count in a copy alone.
inline bool follows(int32_t dtype, int32_t format, const Element& before, double weight, uint32_t random,
                    const uint32_t (&planes)[2]) {
  if (format == SWAFAST_FORMAT_COPIED) return planes[0] == before.param;
  const float param = param_value(dtype, before.param);
  if (format == SWAFAST_FORMAT_COMPENSATED) return follows_compensated(param, before, weight, planes);
  const uint32_t expected = oracle::bits_of(oracle::lerp(average_value(format, before.planes), param, weight));
  const bool any_nan = oracle::is_nan(expected) && static_cast<float>(weight) != 1.0f;
  switch (format) {
    case SWAFAST_FORMAT_FLOAT32:
      return any_nan ? oracle::is_nan(planes[0]) : planes[0] == expected;
    case SWAFAST_FORMAT_EXACT: {
      const oracle::Exact encoded = oracle::encode_exact(oracle::float_of(expected));
      const uint32_t ignored = any_nan ? 0x8000u : 0u;
      return (planes[0] | ignored) == (encoded.average | ignored) &&
             static_cast<int16_t>(planes[1]) == encoded.remainder;
    }
    case SWAFAST_FORMAT_COMPACT: {
      const oracle::Compact encoded = oracle::encode_compact(oracle::float_of(expected), random);
      const uint32_t ignored = any_nan ? 0x8000u : 0u;
      return (planes[0] | ignored) == (encoded.average | ignored) &&
             static_cast<int8_t>(planes[1]) == encoded.remainder;
    }
    case SWAFAST_FORMAT_HALF: {
      const uint32_t ignored = any_nan ? 0x8000u : 0u;
      return (planes[0] | ignored) == (oracle::encode_half(oracle::float_of(expected), random) | ignored);
    }
    default:
      return (any_nan ? oracle::is_nan(planes[1]) : planes[1] == expected) &&
             planes[0] == oracle::to_float16(oracle::float_of(planes[1]));
  }
}

// Values where rounding, range or meaning changes: of float32, of bf16 (ties, the last finite) and of float16 alike.
inline const uint32_t kSpecials[] = {0x00000000, 0x00000001, 0x00007fff, 0x00008000, 0x0000ffff, 0x007fffff, 0x00800000,
                                     0x33000000, 0x33000001, 0x33800000, 0x387fc000, 0x387fe000, 0x387fffff, 0x38800000,
                                     0x3eaaaaab, 0x3f000000, 0x3f7fffff, 0x3f800000, 0x3f807fff, 0x3f808000, 0x3f808001,
                                     0x3f818000, 0x3f801000, 0x3f803000, 0x477fe000, 0x477fefff, 0x477ff000, 0x477fffff,
                                     0x47800000, 0x4b800000, 0x7f7f7fff, 0x7f7f8000, 0x7f7fffff, 0x7f800000, 0x7f800001,
                                     0x7f808000, 0x7fc00000, 0x7fc12345, 0x7fff8000, 0x7fffffff};
constexpr uint32_t kNumSpecials = sizeof kSpecials / sizeof kSpecials[0];

inline uint32_t random_float32(Random& random) {
  const auto bits = static_cast<uint32_t>(random.next());
  switch (random.below(4)) {
    case 0:
      return kSpecials[random.below(kNumSpecials)] | (bits & 0x80000000u);
    case 1:
      return bits;
    default:  // near one another, where a lerp rounds
      return (bits & 0x807fffffu) | ((124 + random.below(6)) << 23);
  }
}

// A float64 average that rounds to this float32; or a tie between it and a neighbour; or anything beside it.
inline uint32_t random_compensation(uint32_t average, Random& random) {
  const float value = oracle::float_of(average);
  const uint32_t any = random_float32(random);
  if (random.below(4) == 0 || !std::isfinite(value)) return any;
  const double half_ulp = (static_cast<double>(std::nextafter(std::fabs(value), HUGE_VALF)) - std::fabs(value)) / 2.0;
  const double part = random.below(8) == 0 ? 1.0 : static_cast<double>(any) * 0x1p-32;
  const double compensation = std::isfinite(half_ulp) ? half_ulp * part : 0.0;
  return oracle::bits_of(static_cast<float>(random.below(2) == 0 ? compensation : -compensation));
}

inline Element random_element(int32_t dtype, int32_t format, Random& random) {
  Element element;
  const bool raw = random.below(2) == 0;
  const uint32_t value = random_float32(random), bits = static_cast<uint32_t>(random.next());
  element.param = dtype == SWAFAST_FLOAT32 ? value : raw ? bits : value >> 16;
  if (dtype == SWAFAST_FLOAT16 && !raw) element.param = oracle::to_float16(oracle::float_of(value));
  const bool own = random.below(4) != 0;
  const uint32_t average = random_float32(random);
  const oracle::Exact encoded = oracle::encode_exact(oracle::float_of(average));
  const auto other = static_cast<uint32_t>(random.next());
  switch (format) {
    case SWAFAST_FORMAT_EXACT:  // or a bf16 that somebody wrote beside a remainder that is now stale
      element.planes[0] = own ? encoded.average : random_float32(random) >> 16;
      element.planes[1] = own ? static_cast<uint16_t>(encoded.remainder) : other & 0xffffu;
      break;
    case SWAFAST_FORMAT_MIRRORED:  // or a float16 that somebody wrote
      element.planes[0] = own ? oracle::to_float16(oracle::float_of(average)) : other & 0xffffu;
      element.planes[1] = average;
      break;
    case SWAFAST_FORMAT_COMPACT: {
      const oracle::Compact encoded_compact = oracle::encode_compact(oracle::float_of(average), other);
      element.planes[0] = own ? encoded_compact.average : random_float32(random) >> 16;
      element.planes[1] = own ? static_cast<uint8_t>(encoded_compact.remainder) : other & 0xffu;
      break;
    }
    case SWAFAST_FORMAT_COMPENSATED:
      element.planes[0] = average;
      element.planes[1] = random_compensation(average, random);
      break;
    case SWAFAST_FORMAT_HALF:
      element.planes[0] = average >> 16;
      break;
    default:
      element.planes[0] = average;
  }
  return element;
}

// A good many of them, made once for each dtype and format: to make them anew for each test took a third of its time.
inline const std::vector<Element>& random_elements(int32_t dtype, int32_t format) {
  constexpr size_t kCount = 65521;  // a prime, so that nothing has its period
  static std::vector<Element> made[SWAFAST_NUM_DTYPES][SWAFAST_NUM_FORMATS];
  std::vector<Element>& elements = made[dtype][format];
  Random random(static_cast<uint64_t>(dtype * SWAFAST_NUM_FORMATS + format));
  while (elements.size() < kCount) elements.push_back(random_element(dtype, format, random));
  return elements;
}
