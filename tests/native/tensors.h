// Buffers with guards, and params with their averages on them.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "oracle.h"
#include "swafast.h"

// Also set by hand, for a test program that is linked with an instrumented library and is not instrumented itself.
#if defined(__SANITIZE_ADDRESS__)
#define SWAFAST_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SWAFAST_TEST_ASAN 1
#endif
#endif
#if defined(SWAFAST_TEST_ASAN)
#include <sanitizer/asan_interface.h>
inline void poison(const void* start, size_t nbytes) { __asan_poison_memory_region(start, nbytes); }
inline void unpoison(const void* start, size_t nbytes) { __asan_unpoison_memory_region(start, nbytes); }
#else
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
#endif

// Ways to spoil what the library is handed; the test has to fail with each of them.
inline const char* const kPlants[] = {"long-chunk",   "short-chunk",   "dropped-chunk", "doubled-chunk",
                                      "wrong-dtype",  "wrong-format",  "shifted-plane", "swapped-planes",
                                      "stale-weight", "truncated-far", "shifted-index"};
inline std::string planted;

inline bool is_plant(const std::string& name) {
  return std::find(std::begin(kPlants), std::end(kPlants), name) != std::end(kPlants);
}

// What is being tested at the moment, for messages; the test program sets it.
inline const char* (*subject)() = [] { return "swafast"; };

inline void require(bool holds, const char* message, ...) {
  if (holds) return;
  va_list values;
  va_start(values, message);
  std::fprintf(stderr, "[%s] ", subject());
  std::vfprintf(stderr, message, values);
  std::fputc('\n', stderr);
  va_end(values);
  std::fflush(stderr);
  std::_Exit(1);
}

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(next() >> 32) % limit; }

 private:
  uint64_t state_;
};

// Memory of a given size and misalignment. The bytes on either side must stay as they are; AddressSanitizer also sees a
// read of them. They differ from buffer to buffer, or a copy of one buffer's into another's would not show.
class Guarded {
 public:
  Guarded(int64_t nbytes, int64_t shift, uint8_t canary)
      : nbytes_(nbytes), canary_(canary), memory_(static_cast<size_t>(nbytes + shift + 3 * kGuard)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = static_cast<int64_t>((address + kGuard - 1) / kGuard * kGuard - address) + kGuard + shift;
    std::memset(memory_.data(), canary_, memory_.size());
    close_sides();
  }
  Guarded(Guarded&&) = default;
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    if (!memory_.empty()) unpoison(memory_.data(), memory_.size());
  }

  uint8_t* data() { return memory_.data() + start_; }
  int64_t nbytes() const { return nbytes_; }
  const std::vector<uint8_t>& before() const { return before_; }
  void remember() { before_.assign(data(), data() + nbytes_); }
  bool unchanged() { return holds(before_); }
  bool holds(const std::vector<uint8_t>& bytes) { return std::equal(bytes.begin(), bytes.end(), data()); }

  bool intact() {
    unpoison(memory_.data(), memory_.size());
    bool same = true;
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i) {
      if (i < start_ || i >= start_ + nbytes_) same &= memory_[static_cast<size_t>(i)] == canary_;
    }
    close_sides();
    return same;
  }

 private:
  static constexpr int64_t kGuard = 64;

  void close_sides() {
    poison(memory_.data(), static_cast<size_t>(start_));
    poison(data() + nbytes_, memory_.size() - static_cast<size_t>(start_ + nbytes_));
  }

  int64_t nbytes_, start_ = 0;
  uint8_t canary_;
  std::vector<uint8_t> memory_, before_;
};

inline int64_t param_itemsize(int32_t dtype) {
  const int64_t itemsizes[SWAFAST_NUM_DTYPES] = {4, 2, 2, 1};
  return itemsizes[dtype];
}

inline int64_t plane_itemsize(int32_t format, int plane) {
  const int64_t itemsizes[SWAFAST_NUM_FORMATS][2] = {{4, 0}, {2, 2}, {2, 4}, {1, 0}};
  return itemsizes[format][plane];
}

// The bits of one param and of its average's planes.
struct Element {
  uint32_t param = 0;
  uint32_t planes[2] = {0, 0};
};

inline uint32_t bits_at(const uint8_t* base, int64_t itemsize, int64_t i) {
  uint32_t bits = 0;
  if (itemsize != 0) std::memcpy(&bits, base + i * itemsize, static_cast<size_t>(itemsize));
  return bits;
}

inline void put_bits(uint8_t* base, int64_t itemsize, int64_t i, uint32_t bits) {
  if (itemsize != 0) std::memcpy(base + i * itemsize, &bits, static_cast<size_t>(itemsize));
}

inline float param_value(int32_t dtype, uint32_t bits) {
  if (dtype == SWAFAST_FLOAT32) return oracle::float_of(bits);
  const auto narrow = static_cast<uint16_t>(bits);
  return dtype == SWAFAST_BFLOAT16 ? oracle::from_bfloat16(narrow) : oracle::from_float16(narrow);
}

inline float average_value(int32_t format, const uint32_t (&planes)[2]) {
  if (format == SWAFAST_FORMAT_FLOAT32) return oracle::float_of(planes[0]);
  const auto narrow = static_cast<uint16_t>(planes[0]);
  if (format == SWAFAST_FORMAT_EXACT) return oracle::decode_exact({narrow, static_cast<int16_t>(planes[1])});
  const float average = oracle::float_of(planes[1]);
  return narrow == oracle::to_float16(average) ? average : oracle::from_float16(narrow);
}

// Whether these planes are what an update by this weight makes. The sign and payload of a NaN count in a copy alone.
inline bool follows(int32_t dtype, int32_t format, const Element& before, double weight, const uint32_t (&planes)[2]) {
  if (format == SWAFAST_FORMAT_COPIED) return planes[0] == before.param;
  const uint32_t expected =
      oracle::bits_of(oracle::lerp(average_value(format, before.planes), param_value(dtype, before.param), weight));
  const bool any_nan = oracle::is_nan(expected) && static_cast<float>(weight) != 1.0f;
  switch (format) {
    case SWAFAST_FORMAT_FLOAT32:
      return any_nan ? oracle::is_nan(planes[0]) : planes[0] == expected;
    case SWAFAST_FORMAT_EXACT: {
      const oracle::Exact encoded = oracle::encode_exact(oracle::float_of(expected));
      const uint32_t ignored = any_nan ? 0x8000u : 0u;
      return (planes[0] | ignored) == (encoded.average | ignored) &&
             static_cast<int16_t>(planes[1]) == encoded.remainder;
    }
    default:
      return (any_nan ? oracle::is_nan(planes[1]) : planes[1] == expected) &&
             planes[0] == oracle::to_float16(oracle::float_of(planes[1]));
  }
}

// Values where rounding, range or meaning changes: of float32, of bf16 (ties, the last finite) and of float16 alike.
inline const uint32_t kSpecials[] = {0x00000000, 0x00000001, 0x00007fff, 0x00008000, 0x0000ffff, 0x007fffff, 0x00800000,
                                     0x33000000, 0x33000001, 0x33800000, 0x387fc000, 0x387fe000, 0x387fffff, 0x38800000,
                                     0x3eaaaaab, 0x3f000000, 0x3f7fffff, 0x3f800000, 0x3f807fff, 0x3f808000, 0x3f808001,
                                     0x3f818000, 0x3f801000, 0x3f803000, 0x477fe000, 0x477fefff, 0x477ff000, 0x477fffff,
                                     0x47800000, 0x4b800000, 0x7f7f7fff, 0x7f7f8000, 0x7f7fffff, 0x7f800000, 0x7f800001,
                                     0x7f808000, 0x7fc00000, 0x7fc12345, 0x7fff8000, 0x7fffffff};
constexpr uint32_t kNumSpecials = sizeof kSpecials / sizeof kSpecials[0];

inline uint32_t random_float32(Random& random) {
  const auto bits = static_cast<uint32_t>(random.next());
  switch (random.below(4)) {
    case 0:
      return kSpecials[random.below(kNumSpecials)] | (bits & 0x80000000u);
    case 1:
      return bits;
    default:  // near one another, where a lerp rounds
      return (bits & 0x807fffffu) | ((124 + random.below(6)) << 23);
  }
}

inline Element random_element(int32_t dtype, int32_t format, Random& random) {
  Element element;
  const bool raw = random.below(2) == 0;
  const uint32_t value = random_float32(random), bits = static_cast<uint32_t>(random.next());
  element.param = dtype == SWAFAST_FLOAT32 ? value : raw ? bits : value >> 16;
  if (dtype == SWAFAST_FLOAT16 && !raw) element.param = oracle::to_float16(oracle::float_of(value));
  const bool own = random.below(4) != 0;
  const uint32_t average = random_float32(random);
  const oracle::Exact encoded = oracle::encode_exact(oracle::float_of(average));
  const auto other = static_cast<uint32_t>(random.next());
  switch (format) {
    case SWAFAST_FORMAT_EXACT:  // or a bf16 that somebody wrote beside a remainder that is now stale
      element.planes[0] = own ? encoded.average : random_float32(random) >> 16;
      element.planes[1] = own ? static_cast<uint16_t>(encoded.remainder) : other & 0xffffu;
      break;
    case SWAFAST_FORMAT_MIRRORED:  // or a float16 that somebody wrote
      element.planes[0] = own ? oracle::to_float16(oracle::float_of(average)) : other & 0xffffu;
      element.planes[1] = average;
      break;
    default:
      element.planes[0] = average;
  }
  return element;
}

// By how many elements the buffers of a tensor are misaligned.
struct Shifts {
  int64_t param = 0, plane0 = 0, plane1 = 0;
};
inline Shifts apart(int64_t shift) { return {shift, shift * 3 % 16, shift * 5 % 16}; }
inline Shifts alike(int64_t shift) { return {shift, shift, shift}; }

// One param and its average, each on memory of its own.
struct Tensor {
  int32_t dtype, format;
  int64_t numel;
  Guarded param, plane0, plane1;

  Tensor(int32_t dtype_, int32_t format_, int64_t numel_, Shifts shifts)
      : dtype(dtype_),
        format(format_),
        numel(numel_),
        param(numel * param_itemsize(dtype), shifts.param * param_itemsize(dtype), 0x5a),
        plane0(numel * plane_itemsize(format, 0), shifts.plane0 * plane_itemsize(format, 0), 0xa5),
        plane1(numel * plane_itemsize(format, 1), shifts.plane1 * plane_itemsize(format, 1), 0xc3) {}

  void put(int64_t i, const Element& element) {
    put_bits(param.data(), param_itemsize(dtype), i, element.param);
    put_bits(plane0.data(), plane_itemsize(format, 0), i, element.planes[0]);
    put_bits(plane1.data(), plane_itemsize(format, 1), i, element.planes[1]);
  }

  void fill(const std::function<Element(int64_t)>& element) {
    for (int64_t i = 0; i < numel; ++i) put(i, element(i));
    for (Guarded* buffer : {&param, &plane0, &plane1}) buffer->remember();
  }

  void fill_random(Random& random) {
    fill([&](int64_t) { return random_element(dtype, format, random); });
  }

  void* plane(int k) {
    if (plane_itemsize(format, k) == 0) return nullptr;
    return k == 0 ? plane0.data() : plane1.data();
  }

  swafast_tensor row() { return {param.data(), {plane(0), plane(1)}, numel, dtype, format}; }

  bool untouched() {
    return param.unchanged() && plane0.unchanged() && plane1.unchanged() && param.intact() && plane0.intact() &&
           plane1.intact();
  }

  void check_updated(double weight) {
    for (int64_t i = 0; i < numel; ++i) {
      const Element before = {bits_at(param.before().data(), param_itemsize(dtype), i),
                              {bits_at(plane0.before().data(), plane_itemsize(format, 0), i),
                               bits_at(plane1.before().data(), plane_itemsize(format, 1), i)}};
      const uint32_t planes[2] = {bits_at(plane0.data(), plane_itemsize(format, 0), i),
                                  bits_at(plane1.data(), plane_itemsize(format, 1), i)};
      require(
          follows(dtype, format, before, weight, planes),
          "dtype %d, format %d: element %lld of %lld is wrong at weight %a: param %08x, planes %08x %08x became %08x "
          "%08x",
          dtype, format, static_cast<long long>(i), static_cast<long long>(numel), weight, before.param,
          before.planes[0], before.planes[1], planes[0], planes[1]);
    }
    require(param.unchanged(), "dtype %d, format %d: an update wrote to a param", dtype, format);
    require(param.intact() && plane0.intact() && plane1.intact(),
            "dtype %d, format %d, %lld elements: an update wrote beside a buffer", dtype, format,
            static_cast<long long>(numel));
  }
};
