// x86-64 with AVX2, FMA and F16C: 8 lanes.
#include "span.h"
#include "spread.h"
#include "sums.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "x86.h"

namespace swafast::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kLanes = 8;
  using Floats = __m256;
  using Doubles = __m256d;
  using HalfFloats = __m128;
  using Ints = __m256i;
  using HalfInts = __m128i;
  using Mask = __m256;

  static Floats all(float value) { return _mm256_set1_ps(value); }
  static Doubles all(double value) { return _mm256_set1_pd(value); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats value) { _mm256_storeu_ps(p, value); }
  static void store(float* p, HalfFloats value) { _mm_storeu_ps(p, value); }
  static Ints load_whole(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_whole(void* p, Ints value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }
  static HalfInts load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_half(void* p, HalfInts value) { _mm_storeu_si128(static_cast<__m128i*>(p), value); }

  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

  static Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Mask equal(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
  static Mask equal_halves(HalfInts a, HalfInts b) {
    return _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_cmpeq_epi16(a, b)));
  }
  static Mask unordered(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  static Mask not_below(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
  static Floats select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }
  static Ints select(Mask mask, Ints yes, Ints no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(mask)); }

  static Floats from_half(HalfInts half) { return _mm256_cvtph_ps(half); }
  static HalfInts to_half(Floats value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Ints widen_unsigned(const uint16_t* p) { return _mm256_cvtepu16_epi32(load_half(p)); }
  static Ints widen_signed(const int16_t* p) { return _mm256_cvtepi16_epi32(load_half(p)); }
  static Ints widen_signed(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static HalfInts high_halves(Ints lanes) { return narrow_ints(_mm256_srli_epi32(lanes, 16)); }
  static HalfInts low_halves(Ints lanes) { return narrow_ints(_mm256_and_si256(lanes, _mm256_set1_epi32(0xffff))); }
  static void store_bytes(int8_t* p, Ints lanes) {
    const __m128i low = narrow_ints(_mm256_and_si256(lanes, _mm256_set1_epi32(0xff)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
  }
  static Ints unpack_low(Ints a, Ints b) { return _mm256_unpacklo_epi16(a, b); }
  static Ints unpack_high(Ints a, Ints b) { return _mm256_unpackhi_epi16(a, b); }
  static Ints pack(Ints a, Ints b) { return _mm256_packus_epi32(a, b); }

  static Doubles widen(HalfFloats value) { return _mm256_cvtps_pd(value); }
  static HalfFloats narrow(Doubles value) { return _mm256_cvtpd_ps(value); }
  static HalfFloats lower(Floats lanes) { return _mm256_castps256_ps128(lanes); }
  static HalfFloats upper(Floats lanes) { return _mm256_extractf128_ps(lanes, 1); }
  static HalfFloats zero_unless_finite(HalfFloats value, HalfFloats result) {
    return _mm_and_ps(_mm_cmpeq_ps(_mm_sub_ps(value, value), _mm_setzero_ps()), result);
  }

 private:
  // Lanes that fit 16 bits, packed; packus works within 128-bit halves, so the halves are put side by side after it.
  static HalfInts narrow_ints(Ints lanes) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08));
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = with_spread<X86<Avx2>>(with_sums<X86<Avx2>>(make_kernels<X86<Avx2>>("avx2")));
  return &kernels;
}

}  // namespace swafast::cpu

#else

namespace swafast::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace swafast::cpu

#endif
