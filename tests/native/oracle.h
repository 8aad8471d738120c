// What an update has to make of one element, worked out another way than csrc/element.h does: in double with rounding
// to odd where that uses a fused multiply-add, in signed integers where it shifts bits, and by quotient and rest where
// it rounds at random. It shares nothing with it.
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

// splitmix64's steps: a state, and what the generator gives for it.
constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
inline uint64_t splitmix64(uint64_t state) {
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The key seeds a splitmix64 of which one number serves 16 updates; added to it, the upper half of the index is one
// more state. What comes of that goes half before and half between the rounds of a 32-bit hash. To the hash is added
// how many sixteenths this update of the 16 is on.
inline uint32_t random_bits(uint64_t key, int64_t num_averaged, int64_t index) {
  constexpr uint64_t k32 = uint64_t{1} << 32;
  const uint64_t update = splitmix64(key + (static_cast<uint64_t>(num_averaged) / 16 + 1) * kGamma);
  const uint64_t draw = splitmix64(update + static_cast<uint64_t>(index) / k32);
  uint64_t x = (static_cast<uint64_t>(index) ^ draw) % k32;
  x = (x ^ x / 65536) * 0x7feb352du % k32;
  x ^= draw / k32;
  const uint64_t sixteenths[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  return static_cast<uint32_t>(((x ^ x / 32768) * 0x846ca68bu + sixteenths[num_averaged % 16] * (k32 / 16)) % k32);
}

// The magnitude counts units of the last place kept, 2^cut to each. The rest of a division decides: of the 2^cut values
// that `random` may have, as many as the rest round up. Nothing finite becomes an infinity.
inline uint32_t round_at_random(float value, int cut, uint32_t random) {
  const uint32_t bits = bits_of(value), unit = 1u << cut, sign = bits / 0x80000000u * (0x80000000u / unit);
  if (is_nan(bits)) return sign + 0x7fc00000u / unit;
  const uint32_t count = (bits & 0x7fffffffu) / unit, rest = (bits & 0x7fffffffu) % unit;
  const bool up = random >= unit - rest && count + 1 < 0x7f800000u / unit;
  return sign + count + (up ? 1 : 0);
}

struct Compact {
  uint16_t average;
  int8_t remainder;
};

// As in `exact`, with units of 2^8 in the bf16 and single ones in the remainder.
inline float decode_compact(Compact planes) {
  const int64_t high = planes.average & 0x7fff;
  const bool stale = (high == 0 && planes.remainder < 0) || (high == 0x7f80 && planes.remainder > 0);
  const int64_t magnitude = high * 256 + (stale ? 0 : planes.remainder);
  return float_of(static_cast<uint32_t>(magnitude) * 256u + (planes.average & 0x8000u) * 65536u);
}

inline Compact encode_compact(float value, uint32_t random) {
  const uint32_t rounded = round_at_random(value, 8, random / 0x1000000u);
  const uint32_t sign = rounded / 0x800000u * 0x8000u;
  const int64_t magnitude = rounded % 0x800000u;
  const int64_t high = (magnitude + 128) / 256;  // half up
  return {static_cast<uint16_t>(sign + static_cast<uint32_t>(high)), static_cast<int8_t>(magnitude - high * 256)};
}

inline uint16_t encode_half(float value, uint32_t random) {
  return static_cast<uint16_t>(round_at_random(value, 16, random / 0x10000u));
}

// Sum and product as fused operations of which one half does nothing, so that no compiler can fuse two of them.
inline double sum(double x, double y) { return std::fma(1.0, x, y); }
inline double product(double x, double y) { return std::fma(x, y, -0.0); }

inline double lerp(double average, float param, double weight) {
  if (weight == 1.0) return param;
  return sum(average, product(weight, sum(param, -average)));
}

struct Compensated {
  float average, compensation;
};

// What the float32 leaves over, with the digits that are too many for another one cut off.
inline Compensated encode_compensated(double value) {
  const auto average = static_cast<float>(value);
  if (!std::isfinite(average)) return {average, 0.0f};
  int exponent;
  const double digits = std::frexp(sum(value, -static_cast<double>(average)), &exponent);
  return {average, static_cast<float>(std::ldexp(std::trunc(std::ldexp(digits, 24)), exponent - 24))};
}

// A compensation that does not round away beside its float32 is stale.
inline double decode_compensated(Compensated planes) {
  const double together = sum(planes.average, planes.compensation);
  return static_cast<float>(together) == planes.average ? together : planes.average;
}

}  // namespace oracle
