// The arithmetic of one element, stated once for every kernel: it compiles as host code and as device code, so that a
// CPU, a GPU and the shim that runs the GPU source on a CPU give the same bits.
//
// Nothing here may be contracted or reassociated by a compiler: every fused multiply-add is written out as fmaf, and
// the library is built with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Internal linkage: the linker must not merge copies of one function that were compiled for different instruction sets,
// or a processor without AVX-512 could be handed AVX-512 code.
#if defined(__CUDA_ARCH__)
#define SWAFAST_UNROLL _Pragma("unroll")
#define SWAFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define SWAFAST_UNROLL
#define SWAFAST_NO_UNROLL
#endif
#if defined(__CUDACC__)
#define SWAFAST_HD static __host__ __device__ __forceinline__
#else
#define SWAFAST_HD static inline
#endif

namespace swafast {

// What the lerp of each element takes from a weight, worked out once per update.
struct Blend {
  double precise;  // the weight as the rule gives it, for averages that are kept in more than float32
  float weight;
  float complement;  // 1 - weight, rounded to float32 as torch.lerp rounds it
  float factor;      // weight or -complement: what the difference is multiplied by
  enum Branch : int32_t { kCopy, kNear, kFar } branch;
};

SWAFAST_HD Blend make_blend(double weight) {
  Blend blend;
  blend.precise = weight;
  blend.weight = static_cast<float>(weight);
  blend.complement = 1.0f - blend.weight;
  // A lerp at weight 1 gives NaN for an infinite average and loses a small param beside a large average; a first
  // update has to be an exact copy.
  blend.branch = blend.weight == 1.0f ? Blend::kCopy : (blend.weight < 0.5f ? Blend::kNear : Blend::kFar);
  blend.factor = blend.branch == Blend::kNear ? blend.weight : -blend.complement;
  return blend;
}

// torch.lerp's two branches: the nearer end carries the rounding, so the result is monotonic and exact at both ends.
// Written as one multiplication and two choices, so that a GPU's compiler may select between values and not branch.
SWAFAST_HD float lerp(float average, float param, const Blend& blend) {
  const float moved = fmaf(blend.factor, param - average, blend.branch == Blend::kNear ? average : param);
  return blend.branch == Blend::kCopy ? param : moved;
}

// In float64, product and sum rounded one by one, as every machine has them. Nothing small is lost here beside
// something large, so one form serves every weight but 1, which has to be an exact copy.
SWAFAST_HD double lerp(double average, float param, const Blend& blend) {
  const double newest = static_cast<double>(param);
  const double distance = blend.precise * (newest - average);
  return blend.precise == 1.0 ? newest : average + distance;
}

SWAFAST_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SWAFAST_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SWAFAST_HD float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Every binary16 value is a binary32 value, so this is exact. A signalling NaN becomes quiet, as in hardware. A GPU has
// an instruction for it, which may give a NaN another payload.
SWAFAST_HD float from_float16(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero: an exact product
  return float_of(sign | bits_of(magnitude));
#endif
}

// Round to nearest, ties to even, as hardware and torch do.
SWAFAST_HD uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lines the float32 mantissa up with units of 2^-24.
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
#endif
}

// Likewise to bfloat16. A NaN stays one, and quiet: rounding its payload up could run over into the sign.
SWAFAST_HD uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((value != value ? bits | 0x400000u : rounded) >> 16);
}

// The `exact` format: the float32 average as a bf16 and the int16 that, added to it as bits, gives the float32 back.
struct ExactPlanes {
  uint16_t average;   // bf16, the float32 rounded half up in magnitude
  int16_t remainder;  // the low 16 bits of the float32
};

SWAFAST_HD ExactPlanes encode_exact(float value) {
  uint32_t bits = bits_of(value);
  // A NaN keeps its sign and nothing else: rounding its payload up could run over into the sign.
  if (value != value) bits = (bits & 0x80000000u) | 0x7fc00000u;
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<int16_t>(static_cast<uint16_t>(bits))};
}

SWAFAST_HD float decode_exact(ExactPlanes planes) {
  const uint32_t high = static_cast<uint32_t>(planes.average) << 16;
  const float value = float_of(high + static_cast<uint32_t>(static_cast<int32_t>(planes.remainder)));
  // No encoder makes a pair that reads as NaN where the bf16 is none. Such a pair arises when somebody writes a zero or
  // an infinity into the bf16 plane behind our back: the remainder is stale.
  return value == value ? value : float_of(high);
}

// The `mirrored` format: a float32 average, and its float16 copy that the averaged module runs on. A copy that is not
// the average's own was written behind our back, and then it is what the user means the average to be.
SWAFAST_HD float decode_mirrored(uint16_t copy, float average) {
  return copy == to_float16(average) ? average : from_float16(copy);
}

// The `compensated` format: the float64 average as the float32 next to it and what that leaves over, another float32:
// 48 bits and more. The first is the averaged module's own parameter.
struct CompensatedPlanes {
  float average, compensation;
};

// The float64 cut to the 24 bits of a float32.
SWAFAST_HD double cut_to_float(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= ~uint64_t{0x1fffffff};
  memcpy(&value, &bits, sizeof bits);
  return value;
}

SWAFAST_HD CompensatedPlanes encode_compensated(double value) {
  const float average = static_cast<float>(value);
  // An infinity or a NaN leaves nothing over.
  const bool finite = average - average == 0.0f;
  // Cut, not rounded: rounded up to half a unit it could make the sum round to another float32 than the average.
  return {average, finite ? static_cast<float>(cut_to_float(value - static_cast<double>(average))) : 0.0f};
}

SWAFAST_HD double decode_compensated(CompensatedPlanes planes) {
  const double value = static_cast<double>(planes.average) + static_cast<double>(planes.compensation);
  // A compensation that the encoder would not have left: the first plane was written behind our back.
  return static_cast<float>(value) == planes.average ? value : static_cast<double>(planes.average);
}

// Formats narrower than float32 are rounded at random: up with the chance of what is cut off, in units of the last
// place kept, so that an average of many updates is right where each of them is not. `random` has as many bits as are
// cut off. What would round up to an infinity is cut; a NaN keeps its sign and nothing else, or its payload could be
// cut off.
SWAFAST_HD uint32_t round_at_random(float value, uint32_t random) {
  uint32_t bits = bits_of(value);
  if (value != value) bits = (bits & 0x80000000u) | 0x7fc00000u;
  const uint32_t rounded = bits + random;
  return (rounded & 0x7f800000u) == 0x7f800000u ? bits : rounded;
}

// The `compact` format: the upper 24 bits of the float32 average, as a bf16 and the int8 that, added to it as bits,
// gives them back.
struct CompactPlanes {
  uint16_t average;  // bf16, the 24 bits rounded half up in magnitude
  int8_t remainder;
};

SWAFAST_HD CompactPlanes encode_compact(float value, uint32_t random8) {
  const uint32_t bits = round_at_random(value, random8) >> 8;
  return {static_cast<uint16_t>((bits + 0x80u) >> 8), static_cast<int8_t>(static_cast<uint8_t>(bits))};
}

SWAFAST_HD float decode_compact(CompactPlanes planes) {
  const uint32_t high = static_cast<uint32_t>(planes.average) << 16;
  const float value = float_of(high + (static_cast<uint32_t>(static_cast<int32_t>(planes.remainder)) << 8));
  // As in `exact`: a pair that reads as NaN where the bf16 is none is one with a stale remainder.
  return value == value ? value : float_of(high);
}

// The `half` format: a bf16 alone.
SWAFAST_HD uint16_t encode_half(float value, uint32_t random16) {
  return static_cast<uint16_t>(round_at_random(value, random16) >> 16);
}

}  // namespace swafast
