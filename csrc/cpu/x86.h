// The vectors of x86-64, written once over what an instruction set calls its own: T names the types of a vector and the
// few operations that AVX2 and AVX-512 do differently. Whatever both do alike stands here, in the compiler's operators.
//
// T has kLanes lanes of 32 bits, and
//   Floats, Doubles, HalfFloats   vectors of float, of half as many doubles, and of half as many floats
//   Ints, HalfInts                any integers: a whole vector, and half of one
//   Mask                          one truth for each lane of 32 bits
#pragma once

#include <immintrin.h>

#include "span.h"

namespace swafast::cpu {
namespace {

template <class Lane, int64_t kBytes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(kBytes)));
};

template <class T>
struct X86 {
  static constexpr int64_t kLanes = T::kLanes;
  using Floats = typename T::Floats;
  using Doubles = typename T::Doubles;
  using HalfFloats = typename T::HalfFloats;
  using HalfInts = typename T::HalfInts;
  // Lanes of 32, of 16 and of 64 bits, for the operators.
  using Words = typename VectorOf<uint32_t, 4 * kLanes>::type;
  using Shorts = typename VectorOf<int16_t, 4 * kLanes>::type;
  using UnsignedShorts = typename VectorOf<uint16_t, 4 * kLanes>::type;
  using Longs = typename VectorOf<int64_t, 4 * kLanes>::type;

  template <Blend::Branch kBranch>
  static auto make_lerp(const Blend& blend) {
    const Floats weight = T::all(blend.weight), complement = T::all(blend.complement);
    return [weight, complement](Floats average, Floats param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      const Floats difference = param - average;
      if constexpr (kBranch == Blend::kNear) return T::fmadd(weight, difference, average);
      return T::fnmadd(difference, complement, param);
    };
  }

  static Floats load(Float32, const float* p) { return T::load(p); }
  static Floats load(BFloat16, const uint16_t* p) { return as_floats(upper_halves(p)); }
  static Floats load(Float16, const uint16_t* p) { return T::from_half(T::load_half(p)); }

  static Floats load_average(FormatFloat32, const float* a, const void*, int64_t i) { return T::load(a + i); }
  static Floats load_average(FormatMirrored, const uint16_t* copy, const float* a, int64_t i) {
    const Floats average = T::load(a + i);
    const HalfInts half = T::load_half(copy + i);
    const auto own = T::equal_halves(half, T::to_half(average));
    return T::select(own, average, T::from_half(half));
  }
  static Floats load_average(FormatExact, const uint16_t* a, const int16_t* r, int64_t i) {
    return joined(upper_halves(a + i), words(T::widen_signed(r + i)));
  }
  static Floats load_average(FormatCompact, const uint16_t* a, const int8_t* r, int64_t i) {
    return joined(upper_halves(a + i), words(T::widen_signed(r + i)) << 8);
  }
  static Floats load_average(FormatHalf, const uint16_t* a, const void*, int64_t i) { return load(BFloat16{}, a + i); }

  static void store_average(FormatFloat32, float* a, void*, int64_t i, Floats value) { T::store(a + i, value); }
  static void store_average(FormatMirrored, uint16_t* copy, float* a, int64_t i, Floats value) {
    T::store(a + i, value);
    T::store_half(copy + i, T::to_half(value));
  }
  static void store_average(FormatExact, uint16_t* a, int16_t* r, int64_t i, Floats value) {
    const Words bits = quieted(value);
    store_upper(a + i, bits + 0x8000u);
    T::store_half(r + i, T::low_halves(ints(bits)));
  }

  // Random bits of kLanes elements from one on; the upper 16 bits of each are fit for use.
  struct Drawer {
    Words lanes, first, second, turn;
    uint32_t index_step;

    Words at(int64_t i) const {
      Words x = lanes + static_cast<uint32_t>(i) * index_step;
      x ^= first;
      x = (x ^ x >> 16) * 0x7feb352du;
      x ^= second;
      x = (x ^ x >> 15) * 0x846ca68bu;
      return x + turn;
    }
  };
  static Drawer make_drawer(const Draws& draws) {
    Words lane;
    for (uint32_t i = 0; i < kLanes; ++i) lane[i] = i;
    const Words none = {};
    return {lane * draws.index_step + draws.first, none + draws.draw.first, none + draws.draw.second,
            none + draws.draw.turn, draws.index_step};
  }
  static void store_at_random(FormatCompact, uint16_t* a, int8_t* r, int64_t i, Floats value, Words random) {
    const Words bits = rounded(value, random >> 24);
    store_upper(a + i, bits + 0x8000u);
    T::store_bytes(r + i, ints(bits >> 8));
  }
  static void store_at_random(FormatHalf, uint16_t* a, void*, int64_t i, Floats value, Words random) {
    store_upper(a + i, rounded(value, random >> 16));
  }

  template <Blend::Branch kBranch>
  static auto make_precise_lerp(const Blend& blend) {
    const Doubles weight = T::all(blend.precise);
    return [weight](Doubles average, Doubles param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      return average + weight * (param - average);
    };
  }
  // Whether the compensation is fresh is seen in float32: where it could make a difference, the float64 sum is exact. A
  // stale one becomes -0, which added to anything leaves it as it is.
  template <class Lerp>
  static void update_precise(float* average, float* compensation, Floats param, const Lerp& lerp_of) {
    const Floats old = T::load(average), saved = T::load(compensation);
    const Floats rest = T::select(T::equal(old + saved, old), saved, T::all(-0.0f));
    update_half(average, compensation, T::lower(old), T::lower(rest), T::lower(param), lerp_of);
    update_half(average + kLanes / 2, compensation + kLanes / 2, T::upper(old), T::upper(rest), T::upper(param),
                lerp_of);
  }

  // bfloat16 into `exact`: two vectors a turn, of 16 bits wherever 32 are not needed, since widening and narrowing cost
  // more than the arithmetic. Unpacking leaves the lanes in an order of its own, alike for both, which packing undoes.
  template <class Param, class Format>
  static constexpr bool packed(Param, Format) {
    return false;
  }
  static constexpr bool packed(BFloat16, FormatExact) { return true; }

  template <class Lerp>
  static void update_packed(const uint16_t* param, uint16_t* average, int16_t* remainder, const Lerp& lerp_of) {
    const auto newest = T::load_whole(param), low = T::load_whole(remainder), zero = ints(Words{});
    // A negative remainder borrows.
    const auto borrow = (UnsignedShorts)((Shorts)low >> 15);
    const auto high = ints((UnsignedShorts)T::load_whole(average) + borrow);
    const Floats value0 = lerp_of(as_floats(T::unpack_low(low, high)), as_floats(T::unpack_low(zero, newest)));
    const Floats value1 = lerp_of(as_floats(T::unpack_high(low, high)), as_floats(T::unpack_high(zero, newest)));
    // NaNs are rare, a stale remainder's too, and looked at apart.
    if (__builtin_expect(T::any(T::unordered(value0, value1)), 0)) {
      for (int64_t i = 0; i < 2 * kLanes; i += kLanes) {
        const Floats old = load_average(FormatExact{}, average, remainder, i);
        store_average(FormatExact{}, average, remainder, i, lerp_of(old, load(BFloat16{}, param + i)));
      }
      return;
    }
    const Words bits0 = words(value0), bits1 = words(value1);
    const auto lows = T::pack(ints(bits0 & 0xffffu), ints(bits1 & 0xffffu));
    const auto highs = T::pack(ints(bits0 >> 16), ints(bits1 >> 16));
    const auto carry = (UnsignedShorts)lows >> 15;  // rounded half up
    T::store_whole(average, ints((UnsignedShorts)highs + carry));
    T::store_whole(remainder, lows);
  }

 private:
  template <class Vector>
  static Words words(Vector vector) {
    return (Words)vector;
  }
  template <class Vector>
  static typename T::Ints ints(Vector vector) {
    return (typename T::Ints)vector;
  }
  template <class Vector>
  static Floats as_floats(Vector vector) {
    return (Floats)vector;
  }

  // 16 bits a lane, in the upper halves of lanes of 32: bfloat16 as the float32 that it is.
  static Words upper_halves(const uint16_t* p) { return words(T::widen_unsigned(p)) << 16; }
  static void store_upper(uint16_t* p, Words bits) { T::store_half(p, T::high_halves(ints(bits))); }
  // A pair that reads as NaN where its upper half is none has a stale remainder.
  static Floats joined(Words high, Words low) {
    const Floats value = as_floats(high + low);
    return T::select(T::unordered(value, value), as_floats(high), value);
  }
  // The bits of a float32, but a NaN keeps its sign and nothing else.
  static Words quieted(Floats value) {
    const Words bits = words(value), quiet = (bits & 0x80000000u) | 0x7fc00000u;
    return words(T::select(T::unordered(value, value), ints(quiet), ints(bits)));
  }
  // round_at_random. Values that are no numbers, or that could round up to an infinity, are rare, and looked at apart.
  static Words rounded(Floats value, Words random) {
    const Floats magnitude = as_floats(words(value) & 0x7fffffffu);
    const bool special = T::any(T::not_below(magnitude, T::all(0x1p127f)));
    return __builtin_expect(special, 0) ? rounded_specially(value, random) : words(value) + random;
  }
  static Words rounded_specially(Floats value, Words random) {
    const Words bits = quieted(value), up = bits + random;
    const auto infinite = T::equal(ints(up & 0x7f800000u), ints(Words{} + 0x7f800000u));
    return words(T::select(infinite, ints(bits), ints(up)));
  }
  template <class Lerp>
  static void update_half(float* average, float* compensation, HalfFloats old, HalfFloats rest, HalfFloats param,
                          const Lerp& lerp_of) {
    const Doubles value = lerp_of(T::widen(old) + T::widen(rest), T::widen(param));
    const HalfFloats moved = T::narrow(value);
    const Longs over = (Longs)(value - T::widen(moved));
    T::store(average, moved);
    T::store(compensation, T::zero_unless_finite(moved, T::narrow((Doubles)(over & ~int64_t{0x1fffffff}))));
  }
};

}  // namespace
}  // namespace swafast::cpu
