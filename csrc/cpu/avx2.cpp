// x86-64 with AVX2, FMA and F16C: 8 lanes.
#include "span.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace swafast::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8;

  template <Step::Branch kBranch>
  static auto make_lerp(const Step& step) {
    const __m256 weight = _mm256_set1_ps(step.weight);
    const __m256 complement = _mm256_set1_ps(step.complement);
    return [weight, complement](__m256 average, __m256 param) {
      if constexpr (kBranch == Step::kCopy) return param;
      const __m256 difference = _mm256_sub_ps(param, average);
      if constexpr (kBranch == Step::kNear) return _mm256_fmadd_ps(weight, difference, average);
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
    const __m256i average = widen(a + i);
    const __m256i remainder = _mm256_cvtepi16_epi32(load_half(r + i));
    const __m256i magnitude = _mm256_and_si256(average, _mm256_set1_epi32(0x7fff));
    const __m256i zero = _mm256_setzero_si256();
    const __m256i stale_zero =
        _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, zero), _mm256_cmpgt_epi32(zero, remainder));
    const __m256i stale_infinity =
        _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f80)), _mm256_cmpgt_epi32(remainder, zero));
    const __m256i fresh = _mm256_andnot_si256(_mm256_or_si256(stale_zero, stale_infinity), remainder);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(average, 16), fresh));
  }

  static void store_average(FormatFloat32, float* a, void*, int64_t i, __m256 value) { _mm256_storeu_ps(a + i, value); }
  static void store_average(FormatMirrored, uint16_t* copy, float* a, int64_t i, __m256 value) {
    _mm256_storeu_ps(a + i, value);
    store_half(copy + i, to_half(value));
  }
  static void store_average(FormatExact, uint16_t* a, int16_t* r, int64_t i, __m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MIN));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7fc00000));
    bits = _mm256_blendv_epi8(bits, quiet, _mm256_castps_si256(nan));
    store_half(a + i, narrow(_mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16)));
    store_half(r + i, narrow(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff))));
  }

 private:
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
