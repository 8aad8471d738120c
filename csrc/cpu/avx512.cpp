// x86-64 with AVX-512 F, BW, DQ and VL: 16 lanes.
#include "span.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace swafast::cpu {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16;

  template <Step::Branch kBranch>
  static auto make_lerp(const Step& step) {
    const __m512 weight = _mm512_set1_ps(step.weight);
    const __m512 complement = _mm512_set1_ps(step.complement);
    return [weight, complement](__m512 average, __m512 param) {
      if constexpr (kBranch == Step::kCopy) return param;
      const __m512 difference = _mm512_sub_ps(param, average);
      if constexpr (kBranch == Step::kNear) return _mm512_fmadd_ps(weight, difference, average);
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
    const __m512i average = widen(a + i);
    const __m512i remainder = _mm512_cvtepi16_epi32(load_half(r + i));
    const __m512i magnitude = _mm512_and_si512(average, _mm512_set1_epi32(0x7fff));
    const __m512i zero = _mm512_setzero_si512();
    const __mmask16 stale_zero =
        _mm512_mask_cmplt_epi32_mask(_mm512_cmpeq_epi32_mask(magnitude, zero), remainder, zero);
    const __mmask16 stale_infinity =
        _mm512_mask_cmpgt_epi32_mask(_mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f80)), remainder, zero);
    const __mmask16 fresh = _knot_mask16(_kor_mask16(stale_zero, stale_infinity));
    const __m512i high = _mm512_slli_epi32(average, 16);
    return _mm512_castsi512_ps(_mm512_mask_add_epi32(high, fresh, high, remainder));
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
    const __m512i high = _mm512_slli_epi32(widen(a + i), 16);
    const __m128i remainders = _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + i));
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepi8_epi32(remainders), 8);
    const __m512 value = as_float(_mm512_add_epi32(high, low));
    const __mmask16 stale = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(value, stale, as_float(high));
  }
  static __m512 load_average(FormatHalf, const uint16_t* a, const void*, int64_t i) {
    return as_float(_mm512_slli_epi32(widen(a + i), 16));
  }

  // Random bits of the lanes from element i on; the upper 16 of each are fit for use.
  static __m512i draw(const Draws& draws, int64_t i) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i step = _mm512_set1_epi32(static_cast<int>(draws.step));
    const __m512i start = _mm512_set1_epi32(static_cast<int>(draws.first + static_cast<uint32_t>(i) * draws.step));
    __m512i x = _mm512_add_epi32(start, _mm512_mullo_epi32(lane, step));
    x = _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(draws.draw.first)));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(draws.draw.second)));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
    return _mm512_add_epi32(x, _mm512_set1_epi32(static_cast<int>(draws.draw.turn)));
  }
  static void store_at_random(FormatCompact, uint16_t* a, int8_t* r, int64_t i, __m512 value, __m512i random) {
    const __m512i bits = _mm512_srli_epi32(rounded(value, _mm512_srli_epi32(random, 24)), 8);
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x80)), 8);
    store_half(a + i, _mm512_cvtepi32_epi16(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(r + i), _mm512_cvtepi32_epi8(bits));
  }
  static void store_at_random(FormatHalf, uint16_t* a, void*, int64_t i, __m512 value, __m512i random) {
    const __m512i bits = rounded(value, _mm512_srli_epi32(random, 16));
    store_half(a + i, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }

  static auto make_precise_lerp(const Step& step) {
    const __m512d weight = _mm512_set1_pd(step.precise);
    const __mmask8 copies = step.precise == 1.0 ? 0xff : 0;
    return [weight, copies](__m512d average, __m512d param) {
      const __m512d distance = _mm512_mul_pd(weight, _mm512_sub_pd(param, average));
      return _mm512_mask_mov_pd(_mm512_add_pd(average, distance), copies, param);
    };
  }
  template <class Lerp>
  static void update_precise(float* average, float* compensation, __m512 param, const Lerp& lerp_of) {
    update_eight(average, compensation, _mm512_castps512_ps256(param), lerp_of);
    update_eight(average + 8, compensation + 8, _mm512_extractf32x8_ps(param, 1), lerp_of);
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
    const __m512i magnitude = _mm512_and_si512(high, _mm512_set1_epi16(0x7fff));
    const __mmask32 is_zero = _mm512_cmpeq_epi16_mask(magnitude, zero);
    const __mmask32 is_infinite = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f80));
    const __mmask32 stale =
        _mm512_mask_cmplt_epi16_mask(is_zero, low, zero) | _mm512_mask_cmpgt_epi16_mask(is_infinite, low, zero);
    low = _mm512_maskz_mov_epi16(~stale, low);
    high = _mm512_add_epi16(high, _mm512_srai_epi16(low, 15));  // a negative remainder borrows
    const __m512 value0 =
        lerp_of(as_float(_mm512_unpacklo_epi16(low, high)), as_float(_mm512_unpacklo_epi16(zero, newest)));
    const __m512 value1 =
        lerp_of(as_float(_mm512_unpackhi_epi16(low, high)), as_float(_mm512_unpackhi_epi16(zero, newest)));
    const __m512i bits0 = quieted(value0), bits1 = quieted(value1);
    const __m512i low_half = _mm512_set1_epi32(0xffff);
    low = _mm512_packus_epi32(_mm512_and_si512(bits0, low_half), _mm512_and_si512(bits1, low_half));
    high = _mm512_packus_epi32(_mm512_srli_epi32(bits0, 16), _mm512_srli_epi32(bits1, 16));
    _mm512_storeu_si512(average, _mm512_add_epi16(high, _mm512_srli_epi16(low, 15)));  // rounded half up
    _mm512_storeu_si512(remainder, low);
  }

 private:
  template <class Lerp>
  static void update_eight(float* average, float* compensation, __m256 param, const Lerp& lerp_of) {
    const __m256 old = _mm256_loadu_ps(average);
    const __m512d known = _mm512_cvtps_pd(old);
    const __m512d joined = _mm512_add_pd(known, _mm512_cvtps_pd(_mm256_loadu_ps(compensation)));
    const __mmask8 fresh = _mm256_cmp_ps_mask(_mm512_cvtpd_ps(joined), old, _CMP_EQ_OQ);
    const __m512d value = lerp_of(_mm512_mask_mov_pd(known, fresh, joined), _mm512_cvtps_pd(param));
    const __m256 moved = _mm512_cvtpd_ps(value);
    const __mmask8 finite = _mm256_cmp_ps_mask(_mm256_sub_ps(moved, moved), _mm256_setzero_ps(), _CMP_EQ_OQ);
    const __m512d rest = _mm512_sub_pd(value, _mm512_cvtps_pd(moved));
    const __m512i kept = _mm512_set1_epi64(~int64_t{0x1fffffff});  // cut_to_float
    const __m256 left_over = _mm512_cvtpd_ps(_mm512_and_pd(rest, _mm512_castsi512_pd(kept)));
    _mm256_storeu_ps(average, moved);
    _mm256_storeu_ps(compensation, _mm256_maskz_mov_ps(finite, left_over));
  }
  // round_at_random
  static __m512i rounded(__m512 value, __m512i random) {
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
