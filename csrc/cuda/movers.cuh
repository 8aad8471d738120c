// What happens to a group of elements, without a word about which thread does it: a mover loads a thread's share of
// every array into registers, and stores what becomes of it. kernels.cuh runs movers over chunks.
#pragma once

#include "../random.h"
#include "memory.cuh"

namespace swafast::cuda {

// dtypes of a param
struct Float32 {
  static constexpr int kBytes = 4;
  static constexpr uint32_t kExponent = 0x7f800000u;
  __device__ __forceinline__ static float value(uint32_t bits) { return float_of(bits); }
};
struct BFloat16 {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kExponent = 0x7f80u;
  __device__ __forceinline__ static float value(uint32_t bits) { return from_bfloat16(static_cast<uint16_t>(bits)); }
};
struct Float16 {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kExponent = 0x7c00u;
  __device__ __forceinline__ static float value(uint32_t bits) { return from_float16(static_cast<uint16_t>(bits)); }
};

// The bits of one element of an average, in the planes of its format.
struct Planes {
  uint32_t first, second;
};

// formats of an average; kRandom is how many random bits decide what an element is rounded to
struct FormatFloat32 {
  static constexpr int kFirst = 4, kSecond = 0, kRandom = 0;
  __device__ __forceinline__ static float decode(Planes planes) { return float_of(planes.first); }
  __device__ __forceinline__ static Planes encode(float value, uint32_t) { return {bits_of(value), 0}; }
};
struct FormatExact {
  static constexpr int kFirst = 2, kSecond = 2, kRandom = 0;
  __device__ __forceinline__ static float decode(Planes planes) {
    return decode_exact({static_cast<uint16_t>(planes.first), static_cast<int16_t>(planes.second)});
  }
  __device__ __forceinline__ static Planes encode(float value, uint32_t) {
    const ExactPlanes planes = encode_exact(value);
    return {planes.average, static_cast<uint16_t>(planes.remainder)};
  }
};
struct FormatMirrored {
  static constexpr int kFirst = 2, kSecond = 4, kRandom = 0;
  __device__ __forceinline__ static float decode(Planes planes) {
    return decode_mirrored(static_cast<uint16_t>(planes.first), float_of(planes.second));
  }
  __device__ __forceinline__ static Planes encode(float value, uint32_t) { return {to_float16(value), bits_of(value)}; }
};
struct FormatCompact {
  static constexpr int kFirst = 2, kSecond = 1, kRandom = 8;
  __device__ __forceinline__ static float decode(Planes planes) {
    return decode_compact({static_cast<uint16_t>(planes.first), static_cast<int8_t>(planes.second)});
  }
  __device__ __forceinline__ static Planes encode(float value, uint32_t random) {
    const CompactPlanes planes = encode_compact(value, random);
    return {planes.average, static_cast<uint8_t>(planes.remainder)};
  }
};
struct FormatCompensated {
  static constexpr int kFirst = 4, kSecond = 4, kRandom = 0;
  __device__ __forceinline__ static double decode(Planes planes) {
    return decode_compensated({float_of(planes.first), float_of(planes.second)});
  }
  __device__ __forceinline__ static Planes encode(double value, uint32_t) {
    const CompensatedPlanes planes = encode_compensated(value);
    return {bits_of(planes.average), bits_of(planes.compensation)};
  }
};
struct FormatHalf {
  static constexpr int kFirst = 2, kSecond = 0, kRandom = 16;
  __device__ __forceinline__ static float decode(Planes planes) {
    return from_bfloat16(static_cast<uint16_t>(planes.first));
  }
  __device__ __forceinline__ static Planes encode(float value, uint32_t random) {
    return {encode_half(value, random), 0};
  }
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Bytes of one element in the narrowest array.
template <int... kBytes>
constexpr int narrowest() {
  int least = 16;
  ((least = kBytes != 0 ? smaller(least, kBytes) : least), ...);
  return least;
}

// How the elements of a run move. What they share of their random bits, and their indices in the whole param, are there
// for the formats that are rounded at random alone.
struct Move {
  Blend blend;
  Draw draw;
  uint32_t first_index, index_step;
};

// average += weight * (param - average)
template <class Dtype, class Format, bool kWide>
struct Update {
  static constexpr int kLeast = narrowest<Dtype::kBytes, Format::kFirst, Format::kSecond>();
  // As many elements in a group as fill 16 bytes of the narrowest array.
  static constexpr int kNumel = kWide ? 16 / kLeast : 1;
  static constexpr int kGroupBytes = kNumel * (Dtype::kBytes + Format::kFirst + Format::kSecond);
  // 64 to 128 bytes of loads in flight a thread: with 1024 threads on a multiprocessor more than the 48 KiB that keep
  // an H200's memory busy, and the registers for them are there.
  static constexpr bool kMuchToDo = Format::kSecond != 0 || Format::kRandom != 0;
  static constexpr int kUnroll = kGroupBytes > 48 ? 1 : (kGroupBytes > 32 || kMuchToDo) ? 2 : 4;

  struct Group {
    Lanes<Dtype::kBytes, kNumel> param;
    Lanes<Format::kFirst, kNumel> first;
    Lanes<Format::kSecond, kNumel> second;
  };

  const void* param;
  void* first;
  void* second;
  Move move;

  __device__ __forceinline__ void load(Group& group, int64_t index) const {
    load_param(group.param, param, index);
    load_average(group.first, first, index);
    load_average(group.second, second, index);
  }
  __device__ __forceinline__ void store(const Group& group, int64_t index) const {
    Lanes<Format::kFirst, kNumel> new_first;
    Lanes<Format::kSecond, kNumel> new_second;
    const uint32_t first_index = move.first_index + static_cast<uint32_t>(index * kNumel) * move.index_step;
    SWAFAST_UNROLL
    for (int i = 0; i < kNumel; ++i) {
      const auto average = Format::decode({group.first.get(i), group.second.get(i)});
      uint32_t random = 0;
      if constexpr (Format::kRandom != 0) {
        random = random_bits(move.draw, first_index + i * move.index_step) >> (32 - Format::kRandom);
      }
      const Planes planes = Format::encode(lerp(average, Dtype::value(group.param.get(i)), move.blend), random);
      new_first.set(i, planes.first);
      new_second.set(i, planes.second);
    }
    store_average(new_first, first, index);
    store_average(new_second, second, index);
  }
};

// average = param, whatever the bytes mean
template <int kBytes, bool kWide>
struct Copy {
  static constexpr int kNumel = kWide ? 16 / kBytes : 1;
  static constexpr int kUnroll = 4;
  struct Group {
    Lanes<kBytes, kNumel> param;
  };

  const void* param;
  void* average;

  __device__ __forceinline__ void load(Group& group, int64_t index) const { load_param(group.param, param, index); }
  __device__ __forceinline__ void store(const Group& group, int64_t index) const {
    store_average(group.param, average, index);
  }
};

// param and average change places
template <int kBytes, bool kWide>
struct Exchange {
  static constexpr int kNumel = kWide ? 16 / kBytes : 1;
  static constexpr int kUnroll = 2;
  struct Group {
    Lanes<kBytes, kNumel> param, average;
  };

  void* param;
  void* average;

  __device__ __forceinline__ void load(Group& group, int64_t index) const {
    load_param(group.param, param, index);
    load_average(group.average, average, index);
  }
  __device__ __forceinline__ void store(const Group& group, int64_t index) const {
    store_param(group.average, param, index);
    store_average(group.param, average, index);
  }
};

// *bad |= whether a param holds a NaN or an infinity: an exponent of all ones
template <class Dtype, bool kWide>
struct FindNonfinite {
  static constexpr int kNumel = kWide ? 16 / Dtype::kBytes : 1;
  static constexpr int kUnroll = 4;
  struct Group {
    Lanes<Dtype::kBytes, kNumel> param;
  };

  const void* param;
  bool* bad;

  __device__ __forceinline__ void load(Group& group, int64_t index) const { load_param(group.param, param, index); }
  __device__ __forceinline__ void store(const Group& group, int64_t) const {
    SWAFAST_UNROLL
    for (int i = 0; i < kNumel; ++i) *bad |= (group.param.get(i) & Dtype::kExponent) == Dtype::kExponent;
  }
};

}  // namespace swafast::cuda
