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
