// The loops over one chunk, written once over a vector type. Each instruction set has a file of its own that defines
// the vector type and instantiates them; only that file is compiled with the set's flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../checksum.h"
#include "../element.h"
#include "../random.h"
#include "../swafast.h"

namespace swafast::cpu {

// Where the random bits of a run's elements come from; each further element has an index that is `index_step` more.
struct Draws {
  Draw draw;
  uint32_t first, index_step;

  uint32_t at(int64_t i) const { return random_bits(draw, first + static_cast<uint32_t>(i) * index_step); }
};

using UpdateSpan = void (*)(const void* param, void* plane0, void* plane1, int64_t numel, const Blend& blend,
                            const Draws& draws);
using ExchangeSpan = void (*)(void* a, void* b, int64_t nbytes);
using FiniteSpan = bool (*)(const void* param, int64_t numel);
// `stride` counts words. The first word has this index in the whole tensor, each further one `index_step` more.
using ChecksumSpan = uint64_t (*)(const void* words, int64_t numel, int64_t stride, uint64_t index,
                                  uint64_t index_step);
// sums = coefficient * elements if `begin`, sums += coefficient * elements otherwise.
using AccumulateSpan = void (*)(double* sums, const void* elements, int64_t numel, double coefficient, bool begin);
// out = sums / divisor, rounded once; returns the index of the first result that is a NaN or an infinity, or -1.
using FinishSpan = int64_t (*)(const double* sums, void* out, int64_t numel, double divisor);

// A run of elements of a param, of its average and of its spread, each from its first element on.
struct SpreadRun {
  void* param;
  void* planes[2];
  float* variance;
  void* const* columns;  // whole: `offset` is the run's
  int64_t offset, numel;
  int32_t dtype, format, column_dtype;
};
// Move variance and column before the average moves; no columns: the variance alone.
using SpreadSpan = void (*)(const SpreadRun& run, int64_t column, const Blend& blend);

// Which normal numbers a run gets: the index of its first element in the whole param, and of each further one as above.
struct NormalRun {
  uint64_t key, first_index, index_step;
};
// Write the point into the param.
using DrawSpan = void (*)(const SpreadRun& run, const swafast_sample& sample, const NormalRun& normals);

// Words of 1, 2, 4 and 8 bytes.
constexpr int kNumWordSizes = 4;

// The kernels of one instruction set. A null entry is a pair of dtype and format that no kernel serves.
struct Kernels {
  const char* name;
  UpdateSpan update[SWAFAST_NUM_DTYPES][SWAFAST_NUM_FORMATS];
  ExchangeSpan exchange;
  FiniteSpan all_finite[SWAFAST_NUM_DTYPES];
  ChecksumSpan checksum[kNumWordSizes];
  AccumulateSpan accumulate[SWAFAST_NUM_ELEMENTS];
  FinishSpan finish[SWAFAST_NUM_ELEMENTS];
  SpreadSpan spread;
  DrawSpan draw;
};

const Kernels& generic_kernels();
// Null where the compiler could not build the instruction set. Called only on a processor that has it: even the code
// that fills the table is compiled with the set's flags.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// Internal linkage, for the reason that element.h gives.
namespace {

// Scalar forms of a param's dtype.
struct Float32 {
  using storage = float;
  static float load(const float* p) { return *p; }
};
struct BFloat16 {
  using storage = uint16_t;
  static float load(const uint16_t* p) { return from_bfloat16(*p); }
};
struct Float16 {
  using storage = uint16_t;
  static float load(const uint16_t* p) { return from_float16(*p); }
};

// Scalar forms of an average's format: V::load_average / V::store_average are the vector ones. One with kRandomBits is
// stored by V::store_at_random and that many random bits, and kPrecise is worked out in double, by V::update_precise.
struct FormatFloat32 {
  using plane0 = float;
  using plane1 = void;
  static constexpr int kRandomBits = 0;
  static constexpr bool kPrecise = false;
  static float load(const float* a, const void*, int64_t i) { return a[i]; }
  static void store(float* a, void*, int64_t i, float value) { a[i] = value; }
};
struct FormatExact {
  using plane0 = uint16_t;
  using plane1 = int16_t;
  static constexpr int kRandomBits = 0;
  static constexpr bool kPrecise = false;
  static float load(const uint16_t* a, const int16_t* r, int64_t i) { return decode_exact({a[i], r[i]}); }
  static void store(uint16_t* a, int16_t* r, int64_t i, float value) {
    const ExactPlanes planes = encode_exact(value);
    a[i] = planes.average;
    r[i] = planes.remainder;
  }
};
struct FormatMirrored {
  using plane0 = uint16_t;
  using plane1 = float;
  static constexpr int kRandomBits = 0;
  static constexpr bool kPrecise = false;
  static float load(const uint16_t* copy, const float* a, int64_t i) { return decode_mirrored(copy[i], a[i]); }
  static void store(uint16_t* copy, float* a, int64_t i, float value) {
    a[i] = value;
    copy[i] = to_float16(value);
  }
};

struct FormatCompact {
  using plane0 = uint16_t;
  using plane1 = int8_t;
  static constexpr int kRandomBits = 8;
  static constexpr bool kPrecise = false;
  static float load(const uint16_t* a, const int8_t* r, int64_t i) { return decode_compact({a[i], r[i]}); }
  static void store(uint16_t* a, int8_t* r, int64_t i, float value, uint32_t random) {
    const CompactPlanes planes = encode_compact(value, random);
    a[i] = planes.average;
    r[i] = planes.remainder;
  }
};
struct FormatHalf {
  using plane0 = uint16_t;
  using plane1 = void;
  static constexpr int kRandomBits = 16;
  static constexpr bool kPrecise = false;
  static float load(const uint16_t* a, const void*, int64_t i) { return from_bfloat16(a[i]); }
  static void store(uint16_t* a, void*, int64_t i, float value, uint32_t random) { a[i] = encode_half(value, random); }
};
struct FormatCompensated {
  using plane0 = float;
  using plane1 = float;
  static constexpr int kRandomBits = 0;
  static constexpr bool kPrecise = true;
  static double load(const float* a, const float* c, int64_t i) { return decode_compensated({a[i], c[i]}); }
  static void store(float* a, float* c, int64_t i, double value) {
    const CompensatedPlanes planes = encode_compensated(value);
    a[i] = planes.average;
    c[i] = planes.compensation;
  }
};

// One lane: what an instruction set without hand-written vectors gets, and the tail of every other.
struct Scalar {
  static constexpr int64_t kLanes = 1;
};

// One element from its planes to its planes.
template <class Param, class Format>
void update_one(const typename Param::storage* param, typename Format::plane0* plane0, typename Format::plane1* plane1,
                int64_t i, const Blend& blend, const Draws& draws) {
  const auto value = lerp(Format::load(plane0, plane1, i), Param::load(param + i), blend);
  if constexpr (Format::kRandomBits != 0) {
    Format::store(plane0, plane1, i, value, draws.at(i) >> (32 - Format::kRandomBits));
  } else {
    Format::store(plane0, plane1, i, value);
  }
}

// One vector, of a format that is not kPrecise. As a call of its own it would set up its constants for each vector.
template <class V, class Param, class Format, class Lerp, class Drawer>
__attribute__((always_inline)) inline void update_lanes(const typename Param::storage* param,
                                                        typename Format::plane0* plane0,
                                                        typename Format::plane1* plane1, int64_t i, const Lerp& lerp_of,
                                                        const Drawer& drawer) {
  const auto p = V::load(Param{}, param + i);
  const auto moved = lerp_of(V::load_average(Format{}, plane0, plane1, i), p);
  if constexpr (Format::kRandomBits != 0) {
    V::store_at_random(Format{}, plane0, plane1, i, moved, drawer.at(i));
  } else {
    V::store_average(Format{}, plane0, plane1, i, moved);
  }
}

// kBranch is a template argument so that the loop holds no test.
template <class V, class Param, class Format, Blend::Branch kBranch>
void update_branch(const typename Param::storage* param, typename Format::plane0* plane0,
                   typename Format::plane1* plane1, int64_t numel, const Blend& shared, const Draws& draws) {
  Blend blend = shared;
  blend.branch = kBranch;
  int64_t i = 0;
  if constexpr (V::kLanes > 1 && Format::kPrecise) {
    const auto lerp_of = V::template make_precise_lerp<kBranch>(blend);
    for (; i + V::kLanes <= numel; i += V::kLanes) {
      V::update_precise(plane0 + i, plane1 + i, V::load(Param{}, param + i), lerp_of);
    }
  } else if constexpr (V::kLanes > 1) {
    const auto lerp_of = V::template make_lerp<kBranch>(blend);
    const auto drawer = V::make_drawer(draws);
    // Two vectors a turn: the loads of the second are under way while the first is worked on.
    for (; i + 2 * V::kLanes <= numel; i += 2 * V::kLanes) {
      if constexpr (V::packed(Param{}, Format{})) {
        V::update_packed(param + i, plane0 + i, plane1 + i, lerp_of);
      } else if constexpr (Format::kRandomBits != 0) {
        update_lanes<V, Param, Format>(param, plane0, plane1, i, lerp_of, drawer);
        update_lanes<V, Param, Format>(param, plane0, plane1, i + V::kLanes, lerp_of, drawer);
      } else {
        const auto p0 = V::load(Param{}, param + i);
        const auto p1 = V::load(Param{}, param + i + V::kLanes);
        const auto a0 = V::load_average(Format{}, plane0, plane1, i);
        const auto a1 = V::load_average(Format{}, plane0, plane1, i + V::kLanes);
        V::store_average(Format{}, plane0, plane1, i, lerp_of(a0, p0));
        V::store_average(Format{}, plane0, plane1, i + V::kLanes, lerp_of(a1, p1));
      }
    }
    for (; i + V::kLanes <= numel; i += V::kLanes) {
      update_lanes<V, Param, Format>(param, plane0, plane1, i, lerp_of, drawer);
    }
  }
  for (; i < numel; ++i) update_one<Param, Format>(param, plane0, plane1, i, blend, draws);
}

template <class V, class Param, class Format>
void update_span(const void* param, void* plane0, void* plane1, int64_t numel, const Blend& blend, const Draws& draws) {
  const auto* p = static_cast<const typename Param::storage*>(param);
  auto* a0 = static_cast<typename Format::plane0*>(plane0);
  auto* a1 = static_cast<typename Format::plane1*>(plane1);
  if constexpr (Format::kPrecise) {  // the branch is one of float32 arithmetic
    return blend.precise == 1.0 ? update_branch<V, Param, Format, Blend::kCopy>(p, a0, a1, numel, blend, draws)
                                : update_branch<V, Param, Format, Blend::kNear>(p, a0, a1, numel, blend, draws);
  }
  switch (blend.branch) {
    case Blend::kCopy:
      return update_branch<V, Param, Format, Blend::kCopy>(p, a0, a1, numel, blend, draws);
    case Blend::kNear:
      return update_branch<V, Param, Format, Blend::kNear>(p, a0, a1, numel, blend, draws);
    case Blend::kFar:
      return update_branch<V, Param, Format, Blend::kFar>(p, a0, a1, numel, blend, draws);
  }
}

inline void copy_span(const void* param, void* plane0, void*, int64_t nbytes, const Blend&, const Draws&) {
  // memmove, since a copied buffer may be the very tensor it is copied from.
  memmove(plane0, param, static_cast<size_t>(nbytes));
}

inline void exchange_span(void* a, void* b, int64_t nbytes) {
  constexpr int64_t kWindow = 4096;  // stays in the first-level cache together with both its ends
  alignas(64) char window[kWindow];
  auto* x = static_cast<char*>(a);
  auto* y = static_cast<char*>(b);
  for (int64_t done = 0; done < nbytes; done += kWindow) {
    const auto size = static_cast<size_t>(nbytes - done < kWindow ? nbytes - done : kWindow);
    memcpy(window, x + done, size);
    memcpy(x + done, y + done, size);
    memcpy(y + done, window, size);
  }
}

// An exponent of all ones is an infinity or a NaN. OR-ing the outcomes keeps the loop free of branches.
template <class Bits, Bits kExponent>
bool all_finite_span(const void* param, int64_t numel) {
  const auto* p = static_cast<const Bits*>(param);
  Bits bad = 0;
  for (int64_t i = 0; i < numel; ++i) bad |= static_cast<Bits>((p[i] & kExponent) == kExponent);
  return bad == 0;
}

// Read byte by byte as far as the language goes, in one load as far as the processor does: a tensor on mapped memory
// need not be aligned.
template <class Word>
uint64_t checksum_words(const char* words, int64_t numel, int64_t stride, uint64_t index, uint64_t index_step) {
  const uint64_t start_stride = index_step * kIndexFactor;
  uint64_t start = start_of(index), sum = 0;
  for (int64_t i = 0; i < numel; ++i, start += start_stride) {
    Word word;
    memcpy(&word, words + i * stride * static_cast<int64_t>(sizeof word), sizeof word);
    sum += mix(start, word);
  }
  return sum;
}

// A stride that the compiler knows to be 1 makes vectors of the loop.
template <class Word>
uint64_t checksum_span(const void* words, int64_t numel, int64_t stride, uint64_t index, uint64_t index_step) {
  const auto* first = static_cast<const char*>(words);
  return stride == 1 ? checksum_words<Word>(first, numel, 1, index, index_step)
                     : checksum_words<Word>(first, numel, stride, index, index_step);
}

template <class V, class Param>
void set_updates(UpdateSpan (&update)[SWAFAST_NUM_FORMATS]) {
  update[SWAFAST_FORMAT_FLOAT32] = update_span<V, Param, FormatFloat32>;
  update[SWAFAST_FORMAT_EXACT] = update_span<V, Param, FormatExact>;
  update[SWAFAST_FORMAT_MIRRORED] = update_span<V, Param, FormatMirrored>;
  update[SWAFAST_FORMAT_COMPACT] = update_span<V, Param, FormatCompact>;
  update[SWAFAST_FORMAT_COMPENSATED] = update_span<V, Param, FormatCompensated>;
  update[SWAFAST_FORMAT_HALF] = update_span<V, Param, FormatHalf>;
}

template <class V>
Kernels make_kernels(const char* name) {
  Kernels kernels = {};
  kernels.name = name;
  set_updates<V, Float32>(kernels.update[SWAFAST_FLOAT32]);
  set_updates<V, BFloat16>(kernels.update[SWAFAST_BFLOAT16]);
  set_updates<V, Float16>(kernels.update[SWAFAST_FLOAT16]);
  kernels.update[SWAFAST_BYTES][SWAFAST_FORMAT_COPIED] = copy_span;
  kernels.exchange = exchange_span;
  kernels.all_finite[SWAFAST_FLOAT32] = all_finite_span<uint32_t, 0x7f800000u>;
  kernels.all_finite[SWAFAST_BFLOAT16] = all_finite_span<uint16_t, 0x7f80u>;
  kernels.all_finite[SWAFAST_FLOAT16] = all_finite_span<uint16_t, 0x7c00u>;
  kernels.checksum[0] = checksum_span<uint8_t>;
  kernels.checksum[1] = checksum_span<uint16_t>;
  kernels.checksum[2] = checksum_span<uint32_t>;
  kernels.checksum[3] = checksum_span<uint64_t>;
  return kernels;
}

}  // namespace
}  // namespace swafast::cpu
