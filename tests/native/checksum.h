// Checksums of boxes, word by word against the generator whose mixing they use.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "far.h"
#include "swafast.h"
#include "tensors.h"

// A box whose lowest word stands at `base`.
struct Box {
  int64_t word_size;
  std::vector<int64_t> sizes, strides, index_strides;
  int64_t first_index = 0;

  // The span of memory from the lowest to the highest word, both included, and where in it the corner is.
  std::pair<int64_t, int64_t> extent() const {
    int64_t lowest = 0, highest = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return {0, 0};
      (strides[d] < 0 ? lowest : highest) += (sizes[d] - 1) * strides[d];
    }
    return {highest - lowest + 1, -lowest};
  }

  int32_t sum(const uint8_t* base, int32_t num_threads, uint64_t* sum) const {
    const swafast_box row = {base + extent().second * word_size,
                             word_size,
                             static_cast<int64_t>(sizes.size()),
                             sizes.data(),
                             strides.data(),
                             index_strides.data(),
                             first_index};
    return swafast_cpu_checksum(&row, num_threads, sum);
  }

  uint64_t expected(const uint8_t* base) const {
    return walk(base + extent().second * word_size, static_cast<uint64_t>(first_index), 0);
  }

  void check(const uint8_t* base, int32_t num_threads) const {
    const uint64_t wanted = expected(base);
    uint64_t got = ~wanted;
    const int32_t status = sum(base, num_threads, &got);
    require(status == SWAFAST_OK && got == wanted,
            "words of %lld bytes in %zu dimensions, %lld of them in the last: the checksum is %016llx, not %016llx",
            static_cast<long long>(word_size), sizes.size(), static_cast<long long>(sizes.empty() ? 1 : sizes.back()),
            static_cast<unsigned long long>(got), static_cast<unsigned long long>(wanted));
  }

 private:
  // The state that comes before the one which is mixed.
  uint64_t walk(const uint8_t* corner, uint64_t index, size_t d) const {
    if (d == sizes.size()) {
      uint64_t word = 0;
      std::memcpy(&word, corner, static_cast<size_t>(word_size));
      return Random(word + index * 0x9e3779b97f4a7c15u).next();
    }
    uint64_t total = 0;
    for (int64_t k = 0; k < sizes[d]; ++k) {
      total += walk(corner + k * strides[d] * word_size, index + static_cast<uint64_t>(k * index_strides[d]), d + 1);
    }
    return total;
  }
};

inline void fill_random(uint8_t* bytes, int64_t nbytes, Random& random) {
  for (int64_t i = 0; i < nbytes; ++i) bytes[i] = static_cast<uint8_t>(random.next());
}

// On memory that ends where the box does, `shift` bytes off any alignment.
inline void check_guarded(const Box& box, int64_t shift, Random& random) {
  Guarded memory(box.extent().first * box.word_size, shift, 0x5a);
  fill_random(memory.data(), memory.nbytes(), random);
  memory.remember();
  for (const int32_t num_threads : {1, 2}) box.check(memory.data(), num_threads);
  require(memory.unchanged() && memory.intact(), "a checksum wrote something");
}

inline void check_checksum_layouts(int64_t word_size, Random& random) {
  constexpr int64_t kChunk = 32768;
  for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{8}, int64_t{9}, int64_t{31},
                              int64_t{64}, int64_t{65}, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 7}) {
    for (const int64_t shift : {0, 1, 8}) check_guarded({word_size, {numel}, {1}, {1}, 5}, shift, random);
  }
  const Box boxes[] = {
      {word_size, {}, {}, {}, 77},                                     // no dimension: one word
      {word_size, {6, 7, 11}, {77, 11, 1}, {77, 11, 1}, 0},            // the whole of a tensor, in its own order
      {word_size, {6, 7, 11}, {77, 11, 1}, {5000, 50, 3}, 123},        // a part of one
      {word_size, {300, 200}, {1, 300}, {200, 1}, 0},                  // transposed, several chunks
      {word_size, {5, 3, 8, 9}, {216, 1, 27, 3}, {216, 72, 9, 1}, 0},  // channels last
      {word_size, {30, 40, 50}, {2500, 60, 1}, {2000, 50, 1}, 0},      // gaps, several chunks, rows cut by them
      {word_size, {40, 1000}, {3000, 3}, {1000, 1}, 9},                // gaps everywhere
      {word_size, {4, 9, 1, 7}, {0, 7, 1000, 1}, {63, 7, 7, 1}, 0},    // the same memory four times
      {word_size, {100, 700}, {0, 0}, {700, 1}, 0},                    // one word
      {word_size, {10, 20}, {-20, -1}, {20, 1}, 0},                    // backwards
      {word_size, {10, 20}, {20, 1}, {-20, -1}, 199},                  // backwards in the whole
      {word_size, {3, 0, 5}, {0, 5, 1}, {0, 5, 1}, 3},                 // nothing
      {word_size, std::vector<int64_t>(70, 1), std::vector<int64_t>(70, 9), std::vector<int64_t>(70, 9), 1},
  };
  for (const Box& box : boxes) {
    for (const int64_t shift : {0, 3}) check_guarded(box, shift, random);
  }
  for (int round = 0; round < 50; ++round) {
    Box box = {word_size, {}, {}, {}, static_cast<int64_t>(random.next())};
    int64_t stride = 1;
    for (uint32_t d = random.below(5); d > 0; --d) {
      const int64_t size = 1 + random.below(7);
      // In any order of memory, each as far from the next as it must be or further.
      const auto place = static_cast<int64_t>(random.below(static_cast<uint32_t>(box.sizes.size()) + 1));
      box.sizes.insert(box.sizes.begin() + place, size);
      box.strides.insert(box.strides.begin() + place, stride);
      box.index_strides.push_back(static_cast<int64_t>(random.next() >> 20));
      stride = stride * size + random.below(3);
    }
    check_guarded(box, random.below(16), random);
  }
}

// Memory, indices and steps of both past 32 bits.
inline void check_far_checksum(int64_t word_size, Random& random) {
  constexpr int64_t kFar = (int64_t{1} << 32) + 5, kNumel = 100;
  const Box rows = {
      word_size, {2, kNumel}, {kFar, 1}, {(int64_t{1} << 33) + 1, (int64_t{1} << 32) + 3}, int64_t{1} << 40};
  const Box column = {word_size, {3}, {kFar / 2}, {kFar + 1}, kFar};
  for (const Box& box : {rows, column}) {
    Reserved reserved(box.extent().first * word_size);
    for (int64_t k = 0; k < box.sizes[0]; ++k) {
      const int64_t row = box.sizes.size() == 1 ? word_size : kNumel * word_size;
      fill_random(reserved.open(k * box.strides[0] * word_size, row), row, random);
    }
    box.check(reserved.base(), 2);
  }
}

inline void check_checksum_refusals() {
  constexpr int64_t kHuge = int64_t{1} << 62;
  const Box bads[] = {
      {0, {2}, {1}, {1}},
      {3, {2}, {1}, {1}},
      {16, {2}, {1}, {1}},
      {-8, {2}, {1}, {1}},
      {INT64_MIN, {2}, {1}, {1}},
      {4, {-1}, {1}, {1}},
      {4, {0, -1}, {1, 1}, {1, 1}},
      {4, {kHuge, 2}, {0, 0}, {1, 1}},
      {4, {4, kHuge, kHuge}, {0, 0, 0}, {1, 1, 1}},
  };
  const uint8_t word[16] = {};
  uint64_t sum = 77;
  for (const Box& bad : bads) {
    const swafast_box row = {word,
                             bad.word_size,
                             static_cast<int64_t>(bad.sizes.size()),
                             bad.sizes.data(),
                             bad.strides.data(),
                             bad.index_strides.data(),
                             0};
    require(swafast_cpu_checksum(&row, 2, &sum) == SWAFAST_BAD_TENSOR && sum == 77,
            "a checksum took words of %lld bytes, %lld in the first dimension", static_cast<long long>(bad.word_size),
            static_cast<long long>(bad.sizes[0]));
  }
  swafast_box row = {word, 4, -1, nullptr, nullptr, nullptr, 0};
  require(swafast_cpu_checksum(&row, 2, &sum) == SWAFAST_BAD_TENSOR && sum == 77, "a checksum took -1 dimensions");
  const Box nothing = {4, {kHuge, kHuge, 0}, {1, 1, 1}, {1, 1, 1}};
  require(nothing.sum(word, 2, &sum) == SWAFAST_OK && sum == 0, "nothing has a checksum other than 0");
}

inline void check_checksum() {
  Random random(9);
  for (const int64_t word_size : {1, 2, 4, 8}) {
    check_checksum_layouts(word_size, random);
    check_far_checksum(word_size, random);
  }
  check_checksum_refusals();
}
