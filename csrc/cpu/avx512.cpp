// x86-64 with AVX-512 F, BW, DQ and VL: 16 lanes.
#include "span.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace swafast::cpu {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16;

  template <Blend::Branch kBranch>
  static auto make_lerp(const Blend& blend) {
    const __m512 weight = _mm512_set1_ps(blend.weight);
    const __m512 complement = _mm512_set1_ps(blend.complement);
    return [weight, complement](__m512 average, __m512 param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      const __m512 difference = _mm512_sub_ps(param, average);
      if constexpr (kBranch == Blend::kNear) return _mm512_fmadd_ps(weight, difference, average);
      return _mm512_fnmadd_ps(difference, complement, param);
    };
  }

  static __m512 load(Float32, const float* p) { return _mm512_loadu_ps(p); }
  static __m512 load(BFloat16, const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(p), 16)); }
  static __m512 load(Float16, const uint16_t* p) { return _mm512_cvtph_ps(load_half(p)); }

  static __m512 load_average(FormatFloat32, const float* a, const void*, int64_t i) { return _mm512_loadu_ps(a + i); }
  static __m512 load_average(FormatMirrored, const uint16_t* copy, const float* a, int64_t i) {
    const __m512 average = _mm512_loadu_ps(a + i);
    const __m256i half = load_half(copy + i);
    const __mmask16 written = _mm256_cmpneq_epi16_mask(half, to_half(average));
    return _mm512_mask_cvtph_ps(average, written, half);
  }
  static __m512 load_average(FormatExact, const uint16_t* a, const int16_t* r, int64_t i) {
    return joined(_mm512_slli_epi32(widen(a + i), 16), _mm512_cvtepi16_epi32(load_half(r + i)));
  }

  static void store_average(FormatFloat32, float* a, void*, int64_t i, __m512 value) { _mm512_storeu_ps(a + i, value); }
  static void store_average(FormatMirrored, uint16_t* copy, float* a, int64_t i, __m512 value) {
    _mm512_storeu_ps(a + i, value);
    store_half(copy + i, to_half(value));
  }
  static void store_average(FormatExact, uint16_t* a, int16_t* r, int64_t i, __m512 value) {
    const __m512i bits = quieted(value);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    store_half(a + i, _mm512_cvtepi32_epi16(rounded));
    store_half(r + i, _mm512_cvtepi32_epi16(bits));
  }

  static __m512 load_average(FormatCompact, const uint16_t* a, const int8_t* r, int64_t i) {
    const __m128i remainders = _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + i));
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepi8_epi32(remainders), 8);
    return joined(_mm512_slli_epi32(widen(a + i), 16), low);
  }
  static __m512 load_average(FormatHalf, const uint16_t* a, const void*, int64_t i) {
    return as_float(_mm512_slli_epi32(widen(a + i), 16));
  }

  // Random bits of 16 elements from one on; the upper 16 bits of each are fit for use.
  struct Drawer {
    __m512i lanes, first, second, turn;
    uint32_t index_step;

    __m512i at(int64_t i) const {
      __m512i x = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(i) * index_step)));
      x = _mm512_xor_si512(x, first);
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
      x = _mm512_xor_si512(x, second);
      x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
      x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
      return _mm512_add_epi32(x, turn);
    }
  };
  static Drawer make_drawer(const Draws& draws) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i along = _mm512_mullo_epi32(lane, all(draws.index_step));
    return {_mm512_add_epi32(along, all(draws.first)), all(draws.draw.first), all(draws.draw.second),
            all(draws.draw.turn), draws.index_step};
  }
  static void store_at_random(FormatCompact, uint16_t* a, int8_t* r, int64_t i, __m512 value, __m512i random) {
    const __m512i bits = rounded(value, _mm512_srli_epi32(random, 24));
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    store_half(a + i, _mm512_cvtepi32_epi16(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(r + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
  }
  static void store_at_random(FormatHalf, uint16_t* a, void*, int64_t i, __m512 value, __m512i random) {
    const __m512i bits = rounded(value, _mm512_srli_epi32(random, 16));
    store_half(a + i, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }

  template <Blend::Branch kBranch>
  static auto make_precise_lerp(const Blend& blend) {
    const __m512d weight = _mm512_set1_pd(blend.precise);
    return [weight](__m512d average, __m512d param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      return _mm512_add_pd(average, _mm512_mul_pd(weight, _mm512_sub_pd(param, average)));
    };
  }
  // Whether the compensation is fresh is seen in float32: where it could make a difference, the float64 sum is exact. A
  // stale one becomes -0, which added to anything leaves it as it is.
  template <class Lerp>
  static void update_precise(float* average, float* compensation, __m512 param, const Lerp& lerp_of) {
    const __m512 old = _mm512_loadu_ps(average), saved = _mm512_loadu_ps(compensation);
    const __mmask16 fresh = _mm512_cmp_ps_mask(_mm512_add_ps(old, saved), old, _CMP_EQ_OQ);
    const __m512 rest = _mm512_mask_mov_ps(_mm512_set1_ps(-0.0f), fresh, saved);
    update_eight(average, compensation, lower(old), lower(rest), lower(param), lerp_of);
    update_eight(average + 8, compensation + 8, upper(old), upper(rest), upper(param), lerp_of);
  }

  // bfloat16 into `exact`: 32 elements a turn, of 16 bits wherever 32 are not needed, since widening and narrowing cost
  // more than the arithmetic. Unpacking leaves the lanes in an order of its own, alike for both, which packing undoes.
  template <class Param, class Format>
  static constexpr bool packed(Param, Format) {
    return false;
  }
  static constexpr bool packed(BFloat16, FormatExact) { return true; }

  template <class Lerp>
  static void update_packed(const uint16_t* param, uint16_t* average, int16_t* remainder, const Lerp& lerp_of) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i newest = _mm512_loadu_si512(param);
    __m512i high = _mm512_loadu_si512(average);
    __m512i low = _mm512_loadu_si512(remainder);
    high = _mm512_add_epi16(high, _mm512_srai_epi16(low, 15));  // a negative remainder borrows
    const __m512 value0 =
        lerp_of(as_float(_mm512_unpacklo_epi16(low, high)), as_float(_mm512_unpacklo_epi16(zero, newest)));
    const __m512 value1 =
        lerp_of(as_float(_mm512_unpackhi_epi16(low, high)), as_float(_mm512_unpackhi_epi16(zero, newest)));
    // NaNs are rare, a stale remainder's too, and looked at apart.
    if (__builtin_expect(_mm512_cmp_ps_mask(value0, value1, _CMP_UNORD_Q) != 0, 0)) {
      for (int64_t i = 0; i < 2 * kLanes; i += kLanes) {
        const __m512 old = load_average(FormatExact{}, average, remainder, i);
        store_average(FormatExact{}, average, remainder, i, lerp_of(old, load(BFloat16{}, param + i)));
      }
      return;
    }
    const __m512i bits0 = _mm512_castps_si512(value0), bits1 = _mm512_castps_si512(value1);
    const __m512i low_half = _mm512_set1_epi32(0xffff);
    low = _mm512_packus_epi32(_mm512_and_si512(bits0, low_half), _mm512_and_si512(bits1, low_half));
    high = _mm512_packus_epi32(_mm512_srli_epi32(bits0, 16), _mm512_srli_epi32(bits1, 16));
    _mm512_storeu_si512(average, _mm512_add_epi16(high, _mm512_srli_epi16(low, 15)));  // rounded half up
    _mm512_storeu_si512(remainder, low);
  }

 private:
  // A pair that reads as NaN where its upper half is none has a stale remainder.
  static __m512 joined(__m512i high, __m512i low) {
    const __m512 value = as_float(_mm512_add_epi32(high, low));
    const __mmask16 stale = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(value, stale, as_float(high));
  }
  static __m512i all(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static __m256 lower(__m512 lanes) { return _mm512_castps512_ps256(lanes); }
  static __m256 upper(__m512 lanes) { return _mm512_extractf32x8_ps(lanes, 1); }

  template <class Lerp>
  static void update_eight(float* average, float* compensation, __m256 old, __m256 rest, __m256 param,
                           const Lerp& lerp_of) {
    const __m512d joined = _mm512_add_pd(_mm512_cvtps_pd(old), _mm512_cvtps_pd(rest));
    const __m512d value = lerp_of(joined, _mm512_cvtps_pd(param));
    const __m256 moved = _mm512_cvtpd_ps(value);
    const __m512d over = _mm512_sub_pd(value, _mm512_cvtps_pd(moved));
    const __m512i kept = _mm512_set1_epi64(~int64_t{0x1fffffff});  // cut_to_float
    const __m256 left_over = _mm512_cvtpd_ps(_mm512_and_pd(over, _mm512_castsi512_pd(kept)));
    constexpr int kNanOrInfinity = 0x99;
    const __mmask8 nonfinite = _mm256_fpclass_ps_mask(moved, kNanOrInfinity);
    _mm256_storeu_ps(average, moved);
    _mm256_storeu_ps(compensation, _mm256_mask_mov_ps(left_over, nonfinite, _mm256_setzero_ps()));
  }
  // round_at_random. Values that are no numbers, or that could round up to an infinity, are rare, and looked at apart.
  static __m512i rounded(__m512 value, __m512i random) {
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(value), random);
    const __mmask16 special = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(0x1p127f), _CMP_NLT_UQ);
    return __builtin_expect(special != 0, 0) ? rounded_specially(value, random) : up;
  }
  static __m512i rounded_specially(__m512 value, __m512i random) {
    const __m512i bits = quieted(value), infinity = _mm512_set1_epi32(0x7f800000);
    const __m512i up = _mm512_add_epi32(bits, random);
    return _mm512_mask_mov_epi32(up, _mm512_cmpeq_epi32_mask(_mm512_and_si512(up, infinity), infinity), bits);
  }
  static __m512 as_float(__m512i bits) { return _mm512_castsi512_ps(bits); }
  // The bits of a float32, but a NaN keeps its sign and nothing else.
  static __m512i quieted(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MIN));
    return _mm512_mask_or_epi32(bits, nan, sign, _mm512_set1_epi32(0x7fc00000));
  }
  static __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_half(void* p, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }
  static __m256i to_half(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m512i widen(const uint16_t* p) { return _mm512_cvtepu16_epi32(load_half(p)); }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = make_kernels<Avx512>("avx512");
  return &kernels;
}

}  // namespace swafast::cpu

#else

namespace swafast::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace swafast::cpu

#endif
