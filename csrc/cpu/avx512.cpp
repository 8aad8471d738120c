// x86-64 with AVX-512 F, BW, DQ and VL: 16 lanes.
#include "span.h"
#include "spread.h"
#include "sums.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "x86.h"

namespace swafast::cpu {
namespace {

struct Avx512 {
  static constexpr int64_t kLanes = 16;
  using Floats = __m512;
  using Doubles = __m512d;
  using HalfFloats = __m256;
  using Ints = __m512i;
  using HalfInts = __m256i;
  using Mask = __mmask16;

  static Floats all(float value) { return _mm512_set1_ps(value); }
  static Doubles all(double value) { return _mm512_set1_pd(value); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats value) { _mm512_storeu_ps(p, value); }
  static void store(float* p, HalfFloats value) { _mm256_storeu_ps(p, value); }
  static Ints load_whole(const void* p) { return _mm512_loadu_si512(p); }
  static void store_whole(void* p, Ints value) { _mm512_storeu_si512(p, value); }
  static HalfInts load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_half(void* p, HalfInts value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }

  static Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

  static Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Mask equal_halves(HalfInts a, HalfInts b) { return _mm256_cmpeq_epi16_mask(a, b); }
  static Mask unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static Mask not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static bool any(Mask mask) { return mask != 0; }
  static Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }
  static Ints select(Mask mask, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, mask, yes); }

  static Floats from_half(HalfInts half) { return _mm512_cvtph_ps(half); }
  static HalfInts to_half(Floats value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Ints widen_unsigned(const uint16_t* p) { return _mm512_cvtepu16_epi32(load_half(p)); }
  static Ints widen_signed(const int16_t* p) { return _mm512_cvtepi16_epi32(load_half(p)); }
  static Ints widen_signed(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static HalfInts high_halves(Ints lanes) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(lanes, 16)); }
  static HalfInts low_halves(Ints lanes) { return _mm512_cvtepi32_epi16(lanes); }
  static void store_bytes(int8_t* p, Ints lanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(lanes));
  }
  static Ints unpack_low(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
  static Ints unpack_high(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }
  static Ints pack(Ints a, Ints b) { return _mm512_packus_epi32(a, b); }

  static Doubles widen(HalfFloats value) { return _mm512_cvtps_pd(value); }
  static HalfFloats narrow(Doubles value) { return _mm512_cvtpd_ps(value); }
  static HalfFloats lower(Floats lanes) { return _mm512_castps512_ps256(lanes); }
  static HalfFloats upper(Floats lanes) { return _mm512_extractf32x8_ps(lanes, 1); }
  static HalfFloats zero_unless_finite(HalfFloats value, HalfFloats result) {
    constexpr int kNanOrInfinity = 0x99;
    return _mm256_mask_mov_ps(result, _mm256_fpclass_ps_mask(value, kNanOrInfinity), _mm256_setzero_ps());
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = with_spread<X86<Avx512>>(with_sums<X86<Avx512>>(make_kernels<X86<Avx512>>("avx512")));
  return &kernels;
}

}  // namespace swafast::cpu

#else

namespace swafast::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace swafast::cpu

#endif
