// x86-64 with AVX2, FMA and F16C: 8 lanes.
#include "span.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace swafast::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8;

  template <Blend::Branch kBranch>
  static auto make_lerp(const Blend& blend) {
    const __m256 weight = _mm256_set1_ps(blend.weight);
    const __m256 complement = _mm256_set1_ps(blend.complement);
    return [weight, complement](__m256 average, __m256 param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      const __m256 difference = _mm256_sub_ps(param, average);
      if constexpr (kBranch == Blend::kNear) return _mm256_fmadd_ps(weight, difference, average);
      return _mm256_fnmadd_ps(difference, complement, param);
    };
  }

  static __m256 load(Float32, const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load(BFloat16, const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(widen(p), 16)); }
  static __m256 load(Float16, const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }

  static __m256 load_average(FormatFloat32, const float* a, const void*, int64_t i) { return _mm256_loadu_ps(a + i); }
  static __m256 load_average(FormatMirrored, const uint16_t* copy, const float* a, int64_t i) {
    const __m256 average = _mm256_loadu_ps(a + i);
    const __m128i half = load_half(copy + i);
    const __m256i kept = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(half, to_half(average)));
    return _mm256_blendv_ps(_mm256_cvtph_ps(half), average, _mm256_castsi256_ps(kept));
  }
  static __m256 load_average(FormatExact, const uint16_t* a, const int16_t* r, int64_t i) {
    return joined(_mm256_slli_epi32(widen(a + i), 16), _mm256_cvtepi16_epi32(load_half(r + i)));
  }

  static void store_average(FormatFloat32, float* a, void*, int64_t i, __m256 value) { _mm256_storeu_ps(a + i, value); }
  static void store_average(FormatMirrored, uint16_t* copy, float* a, int64_t i, __m256 value) {
    _mm256_storeu_ps(a + i, value);
    store_half(copy + i, to_half(value));
  }
  static void store_average(FormatExact, uint16_t* a, int16_t* r, int64_t i, __m256 value) {
    const __m256i bits = quieted(value);
    store_half(a + i, narrow(_mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16)));
    store_half(r + i, narrow(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff))));
  }

  static __m256 load_average(FormatCompact, const uint16_t* a, const int8_t* r, int64_t i) {
    const __m128i remainders = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(r + i));
    return joined(_mm256_slli_epi32(widen(a + i), 16), _mm256_slli_epi32(_mm256_cvtepi8_epi32(remainders), 8));
  }
  static __m256 load_average(FormatHalf, const uint16_t* a, const void*, int64_t i) { return load(BFloat16{}, a + i); }

  // Random bits of 8 elements from one on; the upper 16 bits of each are fit for use.
  struct Drawer {
    __m256i lanes, first, second, turn;
    uint32_t index_step;

    __m256i at(int64_t i) const {
      __m256i x = _mm256_add_epi32(lanes, all(static_cast<uint32_t>(i) * index_step));
      x = _mm256_xor_si256(x, first);
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
      x = _mm256_mullo_epi32(x, all(0x7feb352du));
      x = _mm256_xor_si256(x, second);
      x = _mm256_xor_si256(x, _mm256_srli_epi32(x, 15));
      x = _mm256_mullo_epi32(x, all(0x846ca68bu));
      return _mm256_add_epi32(x, turn);
    }
  };
  static Drawer make_drawer(const Draws& draws) {
    const __m256i along = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), all(draws.index_step));
    return {_mm256_add_epi32(along, all(draws.first)), all(draws.draw.first), all(draws.draw.second),
            all(draws.draw.turn), draws.index_step};
  }
  static void store_at_random(FormatCompact, uint16_t* a, int8_t* r, int64_t i, __m256 value, __m256i random) {
    const __m256i bits = rounded(value, _mm256_srli_epi32(random, 24));
    store_half(a + i, narrow(_mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16)));
    const __m128i low = narrow(_mm256_and_si256(_mm256_srli_epi32(bits, 8), _mm256_set1_epi32(0xff)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(r + i), _mm_packus_epi16(low, low));
  }
  static void store_at_random(FormatHalf, uint16_t* a, void*, int64_t i, __m256 value, __m256i random) {
    store_half(a + i, narrow(_mm256_srli_epi32(rounded(value, _mm256_srli_epi32(random, 16)), 16)));
  }

  template <Blend::Branch kBranch>
  static auto make_precise_lerp(const Blend& blend) {
    const __m256d weight = _mm256_set1_pd(blend.precise);
    return [weight](__m256d average, __m256d param) {
      if constexpr (kBranch == Blend::kCopy) return param;
      return _mm256_add_pd(average, _mm256_mul_pd(weight, _mm256_sub_pd(param, average)));
    };
  }
  // avx512.cpp says why a stale compensation is seen in float32, and what becomes of it.
  template <class Lerp>
  static void update_precise(float* average, float* compensation, __m256 param, const Lerp& lerp_of) {
    const __m256 old = _mm256_loadu_ps(average), saved = _mm256_loadu_ps(compensation);
    const __m256 fresh = _mm256_cmp_ps(_mm256_add_ps(old, saved), old, _CMP_EQ_OQ);
    const __m256 rest = _mm256_blendv_ps(_mm256_set1_ps(-0.0f), saved, fresh);
    update_four(average, compensation, lower(old), lower(rest), lower(param), lerp_of);
    update_four(average + 4, compensation + 4, upper(old), upper(rest), upper(param), lerp_of);
  }

  // bfloat16 into `exact`, 16 elements a turn; avx512.cpp says why and how.
  template <class Param, class Format>
  static constexpr bool packed(Param, Format) {
    return false;
  }
  static constexpr bool packed(BFloat16, FormatExact) { return true; }

  template <class Lerp>
  static void update_packed(const uint16_t* param, uint16_t* average, int16_t* remainder, const Lerp& lerp_of) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i newest = load_whole(param);
    __m256i high = load_whole(average);
    __m256i low = load_whole(remainder);
    high = _mm256_add_epi16(high, _mm256_srai_epi16(low, 15));  // a negative remainder borrows
    const __m256 value0 = lerp_of(_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)),
                                  _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, newest)));
    const __m256 value1 = lerp_of(_mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)),
                                  _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, newest)));
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(value0, value1, _CMP_UNORD_Q)) != 0, 0)) {
      for (int64_t i = 0; i < 2 * kLanes; i += kLanes) {
        const __m256 old = load_average(FormatExact{}, average, remainder, i);
        store_average(FormatExact{}, average, remainder, i, lerp_of(old, load(BFloat16{}, param + i)));
      }
      return;
    }
    const __m256i bits0 = _mm256_castps_si256(value0), bits1 = _mm256_castps_si256(value1);
    const __m256i low_half = _mm256_set1_epi32(0xffff);
    low = _mm256_packus_epi32(_mm256_and_si256(bits0, low_half), _mm256_and_si256(bits1, low_half));
    high = _mm256_packus_epi32(_mm256_srli_epi32(bits0, 16), _mm256_srli_epi32(bits1, 16));
    store_whole(average, _mm256_add_epi16(high, _mm256_srli_epi16(low, 15)));  // rounded half up
    store_whole(remainder, low);
  }

 private:
  // avx512.cpp says what a NaN means here.
  static __m256 joined(__m256i high, __m256i low) {
    const __m256 value = _mm256_castsi256_ps(_mm256_add_epi32(high, low));
    const __m256 stale = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_blendv_ps(value, _mm256_castsi256_ps(high), stale);
  }
  static __m256i all(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
  static __m128 lower(__m256 lanes) { return _mm256_castps256_ps128(lanes); }
  static __m128 upper(__m256 lanes) { return _mm256_extractf128_ps(lanes, 1); }

  template <class Lerp>
  static void update_four(float* average, float* compensation, __m128 old, __m128 rest, __m128 param,
                          const Lerp& lerp_of) {
    const __m256d joined = _mm256_add_pd(_mm256_cvtps_pd(old), _mm256_cvtps_pd(rest));
    const __m256d value = lerp_of(joined, _mm256_cvtps_pd(param));
    const __m128 moved = _mm256_cvtpd_ps(value);
    const __m128 finite = _mm_cmpeq_ps(_mm_sub_ps(moved, moved), _mm_setzero_ps());
    const __m256d over = _mm256_sub_pd(value, _mm256_cvtps_pd(moved));
    const __m256d kept = _mm256_castsi256_pd(_mm256_set1_epi64x(~int64_t{0x1fffffff}));  // cut_to_float
    const __m128 left_over = _mm256_cvtpd_ps(_mm256_and_pd(over, kept));
    _mm_storeu_ps(average, moved);
    _mm_storeu_ps(compensation, _mm_and_ps(finite, left_over));
  }
  // round_at_random. Values that are no numbers, or that could round up to an infinity, are rare, and looked at apart.
  static __m256i rounded(__m256 value, __m256i random) {
    const __m256i up = _mm256_add_epi32(_mm256_castps_si256(value), random);
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
    const int special = _mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p127f), _CMP_NLT_UQ));
    return __builtin_expect(special != 0, 0) ? rounded_specially(value, random) : up;
  }
  static __m256i rounded_specially(__m256 value, __m256i random) {
    const __m256i bits = quieted(value), infinity = _mm256_set1_epi32(0x7f800000);
    const __m256i up = _mm256_add_epi32(bits, random);
    return _mm256_blendv_epi8(up, bits, _mm256_cmpeq_epi32(_mm256_and_si256(up, infinity), infinity));
  }
  static __m256i load_whole(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_whole(void* p, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }
  // The bits of a float32, but a NaN keeps its sign and nothing else.
  static __m256i quieted(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MIN));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_epi8(bits, quiet, _mm256_castps_si256(nan));
  }
  static __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_half(void* p, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(p), value); }
  static __m128i to_half(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i widen(const uint16_t* p) { return _mm256_cvtepu16_epi32(load_half(p)); }
  // Lanes that fit 16 bits, packed; packus works within 128-bit halves, so the halves are put side by side after it.
  static __m128i narrow(__m256i lanes) {
    const __m256i packed = _mm256_packus_epi32(lanes, lanes);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = make_kernels<Avx2>("avx2");
  return &kernels;
}

}  // namespace swafast::cpu

#else

namespace swafast::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace swafast::cpu

#endif
