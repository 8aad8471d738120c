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
#include <memory>
#include <utility>
#include <vector>

#include "elements.h"
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

// By how many elements the buffers of a tensor are misaligned.
struct Shifts {
  int64_t param = 0, plane0 = 0, plane1 = 0;
};
inline Shifts apart(int64_t shift) { return {shift, shift * 3 % 16, shift * 5 % 16}; }
inline Shifts alike(int64_t shift) { return {shift, shift, shift}; }

// What one average is moved by: the weight that its rule gives after so many models.
struct Motion {
  double weight;
  int64_t num_averaged = 1;
};

// One param and one of its averages, each on memory of its own.
struct Tensor {
  int32_t dtype, format;
  int64_t numel;
  bool is_follower = false;  // whether it has its param from the tensor before it
  uint64_t key = 0;
  int64_t first_index = 0, index_step = 1;  // of its elements in the whole param
  int32_t pace = 0;
  std::shared_ptr<Guarded> param;
  Guarded plane0, plane1;

  Tensor(int32_t dtype_, int32_t format_, int64_t numel_, Shifts shifts)
      : Tensor(
            dtype_, format_, numel_, shifts,
            std::make_shared<Guarded>(numel_ * param_itemsize(dtype_), shifts.param * param_itemsize(dtype_), 0x5a)) {}

  // Another average of that tensor's param.
  Tensor(const Tensor& first, int32_t format_, Shifts shifts)
      : Tensor(first.dtype, format_, first.numel, shifts, first.param) {
    is_follower = true;
    first_index = first.first_index;
    index_step = first.index_step;
  }

  int64_t index(int64_t i) const { return first_index + i * index_step; }

  void put(int64_t i, const Element& element) {
    if (!is_follower) put_bits(param->data(), param_itemsize(dtype), i, element.param);
    put_bits(plane0.data(), plane_itemsize(format, 0), i, element.planes[0]);
    put_bits(plane1.data(), plane_itemsize(format, 1), i, element.planes[1]);
  }

  void fill(const std::function<Element(int64_t)>& element) {
    for (int64_t i = 0; i < numel; ++i) put(i, element(i));
    remember();
  }

  void fill_random(Random& random) {
    const std::vector<Element>& elements = random_elements(dtype, format);
    size_t next = random.below(static_cast<uint32_t>(elements.size()));
    for (int64_t i = 0; i < numel; ++i) {
      put(i, elements[next]);
      next = next + 1 == elements.size() ? 0 : next + 1;
    }
    remember();
  }

  void remember() {
    for (Guarded* buffer : {param.get(), &plane0, &plane1}) buffer->remember();
  }

  void* plane(int k) {
    if (plane_itemsize(format, k) == 0) return nullptr;
    return k == 0 ? plane0.data() : plane1.data();
  }

  swafast_tensor row(int32_t followers = 0) {
    return {param->data(), {plane(0), plane(1)}, numel, dtype, format, key, pace, followers};
  }

  bool untouched() { return param->unchanged() && plane0.unchanged() && plane1.unchanged() && intact(); }
  bool intact() { return param->intact() && plane0.intact() && plane1.intact(); }

  void check_updated(const Motion& motion) {
    const bool is_random = format == SWAFAST_FORMAT_COMPACT || format == SWAFAST_FORMAT_HALF;
    for (int64_t i = 0; i < numel; ++i) {
      const Element before = {bits_at(param->before().data(), param_itemsize(dtype), i),
                              {bits_at(plane0.before().data(), plane_itemsize(format, 0), i),
                               bits_at(plane1.before().data(), plane_itemsize(format, 1), i)}};
      const uint32_t planes[2] = {bits_at(plane0.data(), plane_itemsize(format, 0), i),
                                  bits_at(plane1.data(), plane_itemsize(format, 1), i)};
      const uint32_t random = is_random ? oracle::random_bits(key, motion.num_averaged, index(i)) : 0;
      if (follows(dtype, format, before, motion.weight, random, planes)) continue;
      require(
          false,
          "dtype %d, format %d: element %lld of %lld is wrong at weight %a: param %08x, planes %08x %08x became %08x "
          "%08x",
          dtype, format, static_cast<long long>(i), static_cast<long long>(numel), motion.weight, before.param,
          before.planes[0], before.planes[1], planes[0], planes[1]);
    }
    require(param->unchanged(), "dtype %d, format %d: an update wrote to a param", dtype, format);
    require(intact(), "dtype %d, format %d, %lld elements: an update wrote beside a buffer", dtype, format,
            static_cast<long long>(numel));
  }

 private:
  Tensor(int32_t dtype_, int32_t format_, int64_t numel_, Shifts shifts, std::shared_ptr<Guarded> param_)
      : dtype(dtype_),
        format(format_),
        numel(numel_),
        param(std::move(param_)),
        plane0(numel * plane_itemsize(format, 0), shifts.plane0 * plane_itemsize(format, 0), 0xa5),
        plane1(numel * plane_itemsize(format, 1), shifts.plane1 * plane_itemsize(format, 1), 0xc3) {}
};
