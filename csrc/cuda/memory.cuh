// Reads and writes of global memory. The pointers come out of a table, where the compiler cannot tell which memory they
// lead to: told so, it gives one LDG or STG of the full width.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../element.h"

#if defined(__CUDA_ARCH__)
#define SWAFAST_ASSUME_GLOBAL(address) __builtin_assume(__isGlobal(address))
#else
#define SWAFAST_ASSUME_GLOBAL(address) (void)(address)
#endif

namespace swafast::cuda {

// The unsigned integer of kBytes bytes: the bits of one element.
template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = unsigned char;
};
template <>
struct BitsOf<2> {
  using type = unsigned short;
};
template <>
struct BitsOf<4> {
  using type = unsigned int;
};
template <int kBytes>
using Bits = typename BitsOf<kBytes>::type;

__device__ __forceinline__ bool is_aligned(const void* address) {
  return (reinterpret_cast<uint64_t>(address) & 15u) == 0;
}

// The share of one thread in an array: kNumel elements of kBytes bytes, in registers, moved 16 bytes at a time. Indices
// are compile-time constants once the loops are unrolled, or the words would go to local memory.
template <int kBytes, int kNumel>
struct Lanes {
  using vector_type = uint4;
  static constexpr int kVectors = kBytes * kNumel / 16;
  static constexpr int kPerWord = 4 / kBytes;
  static_assert(kVectors * 16 == kBytes * kNumel, "whole vectors alone");
  uint32_t words[kVectors * 4];

  __device__ __forceinline__ void put(int v, uint4 vector) {
    words[4 * v] = vector.x;
    words[4 * v + 1] = vector.y;
    words[4 * v + 2] = vector.z;
    words[4 * v + 3] = vector.w;
  }
  __device__ __forceinline__ uint4 vector(int v) const {
    return make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
  }
  __device__ __forceinline__ uint32_t get(int i) const {
    if constexpr (kBytes == 4) return words[i];
    return (words[i / kPerWord] >> (i % kPerWord * 8 * kBytes)) & ((1ull << (8 * kBytes)) - 1);
  }
  // Elements are set in their order, each once.
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    if constexpr (kBytes == 4) {
      words[i] = bits;
    } else {
      uint32_t& word = words[i / kPerWord];
      word = i % kPerWord == 0 ? bits : word | (bits << (i % kPerWord * 8 * kBytes));
    }
  }
};

// One element: the ends of runs, and runs whose pointers are not aligned alike.
template <int kBytes>
struct Lanes<kBytes, 1> {
  using vector_type = Bits<kBytes>;
  static constexpr int kVectors = 1;
  vector_type bits;

  __device__ __forceinline__ void put(int, vector_type value) { bits = value; }
  __device__ __forceinline__ vector_type vector(int) const { return bits; }
  __device__ __forceinline__ uint32_t get(int) const { return bits; }
  __device__ __forceinline__ void set(int, uint32_t value) { bits = static_cast<vector_type>(value); }
};

// Eight bytes: narrow elements in a group that fills 16 bytes of wider ones.
template <int kBytes, int kNumel>
struct EightBytes {
  using vector_type = unsigned long long;
  static constexpr int kVectors = 1;
  vector_type bits;

  __device__ __forceinline__ void put(int, vector_type value) { bits = value; }
  __device__ __forceinline__ vector_type vector(int) const { return bits; }
  __device__ __forceinline__ uint32_t get(int i) const { return static_cast<Bits<kBytes>>(bits >> (i * 8 * kBytes)); }
  __device__ __forceinline__ void set(int i, uint32_t value) {
    bits = i == 0 ? value : bits | static_cast<vector_type>(value) << (i * 8 * kBytes);
  }
};
template <>
struct Lanes<1, 8> : EightBytes<1, 8> {};
template <>
struct Lanes<2, 4> : EightBytes<2, 4> {};

// A plane that a format does not have.
struct NoLanes {
  using vector_type = uint4;
  static constexpr int kVectors = 0;
  __device__ __forceinline__ void put(int, uint4) {}
  __device__ __forceinline__ uint4 vector(int) const { return make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ uint32_t get(int) const { return 0; }
  __device__ __forceinline__ void set(int, uint32_t) {}
};
template <int kNumel>
struct Lanes<0, kNumel> : NoLanes {};
template <>
struct Lanes<0, 1> : NoLanes {};

// Params stay in the caches, where the next forward pass looks for them. Averages are not touched again before the next
// update, and leave the caches first.
template <class L>
__device__ __forceinline__ void load_param(L& lanes, const void* base, int64_t group) {
  const auto* vectors = static_cast<const typename L::vector_type*>(base) + group * L::kVectors;
  SWAFAST_UNROLL
  for (int v = 0; v < L::kVectors; ++v) {
    SWAFAST_ASSUME_GLOBAL(vectors + v);
    lanes.put(v, vectors[v]);
  }
}

template <class L>
__device__ __forceinline__ void load_average(L& lanes, const void* base, int64_t group) {
  const auto* vectors = static_cast<const typename L::vector_type*>(base) + group * L::kVectors;
  SWAFAST_UNROLL
  for (int v = 0; v < L::kVectors; ++v) lanes.put(v, __ldcs(vectors + v));
}

template <class L>
__device__ __forceinline__ void store_param(const L& lanes, void* base, int64_t group) {
  auto* vectors = static_cast<typename L::vector_type*>(base) + group * L::kVectors;
  SWAFAST_UNROLL
  for (int v = 0; v < L::kVectors; ++v) {
    SWAFAST_ASSUME_GLOBAL(vectors + v);
    vectors[v] = lanes.vector(v);
  }
}

template <class L>
__device__ __forceinline__ void store_average(const L& lanes, void* base, int64_t group) {
  auto* vectors = static_cast<typename L::vector_type*>(base) + group * L::kVectors;
  SWAFAST_UNROLL
  for (int v = 0; v < L::kVectors; ++v) __stcs(vectors + v, lanes.vector(v));
}

// The words that launches share are read and written past the first-level cache.
__device__ __forceinline__ int64_t read_word(const int64_t* word) {
  return __ldcg(reinterpret_cast<const long long*>(word));
}
__device__ __forceinline__ void write_word(int64_t* word, int64_t value) {
  __stcg(reinterpret_cast<long long*>(word), static_cast<long long>(value));
}

// Add to a word and give what was there. This thread's accesses before it are over by then, and those after it not yet
// begun.
__device__ __forceinline__ uint64_t add_to(int64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(word), "l"(value) : "memory");
  return before;
#else
  return __atomic_fetch_add(reinterpret_cast<uint64_t*>(word), value, __ATOMIC_ACQ_REL);
#endif
}

// Read shared memory again from here on: what was read before is not kept in registers.
__device__ __forceinline__ void forget_registers() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// Copy from global into shared memory, beside whatever this thread does next. It takes no register meanwhile. In the
// tests that run the kernels on a CPU, the shim makes such a copy at the wait.
__device__ __forceinline__ void copy_16_bytes(uint4* shared, const uint4* global) {
#if defined(__CUDACC__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  shim::copy_later(shared, global);
#endif
}
// Wait until this thread's copies are there.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  shim::make_copies();
#endif
}

}  // namespace swafast::cuda
