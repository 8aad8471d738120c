// What an update has to make of one element, worked out another way than csrc/element.h does: in double with rounding
// to odd where that uses a fused multiply-add, and in signed integers where it shifts bits. It shares nothing with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace oracle {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// x * y + z rounded once. The product of two float32 is exact in double. The sum is rounded to odd, so that rounding it
// to float32 is the only rounding that shows (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums",
// 2008).
inline float fused(float x, float y, float z) {
  const double product = static_cast<double>(x) * static_cast<double>(y);
  const double sum = product + z;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double part = sum - product;
  const double error = (product - (sum - part)) + (z - part);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (error == 0.0 || (bits & 1u) != 0) return static_cast<float>(sum);
  return static_cast<float>(std::nextafter(sum, error > 0.0 ? HUGE_VAL : -HUGE_VAL));
}

// torch.lerp in float32; at weight 1 an exact copy. A difference of two float32 comes out the same when it is rounded
// to double before it is rounded to float32: 53 bits are more than twice 24.
inline float lerp(float average, float param, double rule_weight) {
  const auto weight = static_cast<float>(rule_weight);
  if (weight == 1.0f) return param;
  const auto difference = static_cast<float>(static_cast<double>(param) - static_cast<double>(average));
  if (weight < 0.5f) return fused(weight, difference, average);
  return fused(-difference, static_cast<float>(1.0 - static_cast<double>(weight)), param);
}

inline float from_bfloat16(uint16_t bits) { return float_of(bits * 65536u); }

inline float from_float16(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  // A signalling NaN becomes a quiet one with the same sign and payload.
  if (exponent == 31 && mantissa != 0)
    return float_of((half & 0x8000u) * 65536u + 0x7fc00000u + (mantissa & 511) * 8192u);
  const double magnitude = exponent == 31  ? HUGE_VAL
                           : exponent != 0 ? std::ldexp(1024.0 + mantissa, exponent - 25)
                                           : std::ldexp(static_cast<double>(mantissa), -24);
  return static_cast<float>((half & 0x8000u) != 0 ? -magnitude : magnitude);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits / 0x80000000u * 0x8000u;
  if (is_nan(bits)) return static_cast<uint16_t>(sign + 0x7e00u + (bits & 0x3fffffu) / 8192u);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0.0) return static_cast<uint16_t>(sign);
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign + 0x7c00u);
  int exponent;
  std::frexp(magnitude, &exponent);
  // Units of the last place, 1024 to 2048 of them in a binade; the lowest binade has the subnormals below it. A count
  // of 2048 carries into the exponent field by itself.
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
  const auto count = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return static_cast<uint16_t>(sign + static_cast<uint32_t>(unit + 24) * 1024u + count);
}

struct Exact {
  uint16_t average;
  int16_t remainder;
};

// The magnitude counts units of 2^16 in the bf16 and single ones in the remainder, which is signed with it.
inline float decode_exact(Exact planes) {
  const int64_t high = planes.average & 0x7fff;
  const bool stale = (high == 0 && planes.remainder < 0) || (high == 0x7f80 && planes.remainder > 0);
  const int64_t magnitude = high * 65536 + (stale ? 0 : planes.remainder);
  return float_of(static_cast<uint32_t>(magnitude) + (planes.average & 0x8000u) * 65536u);
}

inline Exact encode_exact(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits / 0x80000000u * 0x8000u;
  if (is_nan(bits)) return {static_cast<uint16_t>(sign + 0x7fc0u), 0};
  const int64_t magnitude = bits & 0x7fffffffu;
  const int64_t high = (magnitude + 32768) / 65536;  // half up
  return {static_cast<uint16_t>(sign + static_cast<uint32_t>(high)), static_cast<int16_t>(magnitude - high * 65536)};
}

}  // namespace oracle
