// What a kernel sees of the GPU that the shim stands for, and what a test may set of it. Blocks and threads are run by
// machine.h.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// One definition for a whole program, and none that two libraries of one process would share.
#define SHIM_SETTING __attribute__((weak, visibility("default")))
#define SHIM_HIDDEN __attribute__((weak, visibility("hidden")))

extern "C" {
SHIM_SETTING int shim_reverse_threads = 0;            // the last thread of a block runs first
SHIM_SETTING int shim_reverse_blocks = 0;             // the last block of a grid runs first
SHIM_SETTING int shim_alternating = 0;                // each launch sets these two anew
SHIM_SETTING int shim_capturing = 0;                  // every stream is: launches wait for shim_replay()
SHIM_SETTING int shim_fits = 1;                       // a block of an update onto a multiprocessor
SHIM_SETTING const char* shim_failing = nullptr;      // the runtime's function that fails, by name
SHIM_SETTING const char* shim_refused = nullptr;      // what the last capture had and must not, and so has failed
SHIM_SETTING long long shim_num_launches = 0;         // kernels launched or captured so far
SHIM_SETTING long long shim_last_blocks = 0;          // of the last launch
SHIM_SETTING long long shim_last_threads = 0;         // of each of its blocks
SHIM_SETTING long long shim_num_vectors = 0;          // of 16 bytes, through __ldcs, __stcs and the like, by fibers
SHIM_SETTING int shim_last_device = -1;               // which it went to
SHIM_SETTING const void* shim_last_stream = nullptr;  // and on which stream
}

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
SHIM_HIDDEN thread_local uint3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};
SHIM_HIDDEN thread_local dim3 blockDim, gridDim;

namespace shim {

constexpr int kDevices = 2, kMultiprocessors = 3, kBlocksPerMultiprocessor = 2;

[[noreturn]] inline void fault(const char* what, const void* address) {
  std::fprintf(stderr, "[shim] block %u, thread %u: %s %p\n", blockIdx.x, threadIdx.x, what, address);
  std::abort();
}

template <class T>
inline void check_alignment(const T* address) {
  auto bits = reinterpret_cast<uintptr_t>(address);
  asm("" : "+r"(bits));  // or the compiler may conclude from the type that this holds
  if (bits % sizeof(T) != 0) fault("misaligned address", address);
}

template <class T>
inline void count_vector() {
#if !defined(SHIM_AT_ONCE)  // it would be a race of the shim's own
  if constexpr (sizeof(T) == 16) shim_num_vectors += 1;
#endif
}

// memcpy, because CUDA's functions take a word by whatever name of its type.
template <class T>
inline T load(const T* address) {
  check_alignment(address);
  count_vector<T>();
  T value;
  std::memcpy(static_cast<void*>(&value), address, sizeof value);
  return value;
}

template <class T>
inline void store(T* address, const T& value) {
  check_alignment(address);
  count_vector<T>();
  std::memcpy(static_cast<void*>(address), &value, sizeof value);
}

// Copied word by word: ThreadSanitizer would not see a memset.
struct __attribute__((may_alias, aligned(16))) SixteenBytes {
  uint64_t words[2];
};
inline void set(SixteenBytes& to, uint64_t first, uint64_t second) { to.words[0] = first, to.words[1] = second; }

// A copy into shared memory that its thread has not waited for yet.
struct Copy {
  SixteenBytes* to;
  const SixteenBytes* from;
};
// Those of the running thread. They are lost when it ends.
inline std::vector<Copy>& unmade_copies();

// A GPU may make a copy at any time from here to the wait. So zeros, as of a chunk without elements, stand there
// meanwhile: who reads them has not waited.
inline void copy_later(void* to, const void* from) {
  const Copy copy = {static_cast<SixteenBytes*>(to), static_cast<const SixteenBytes*>(from)};
  check_alignment(copy.to);
  check_alignment(copy.from);
  set(*copy.to, 0, 0);
  unmade_copies().push_back(copy);
}

// Make the copies of this thread.
inline void make_copies() {
  for (const Copy& copy : unmade_copies()) set(*copy.to, copy.from->words[0], copy.from->words[1]);
  unmade_copies().clear();
}

// What waits for shim_replay().
SHIM_HIDDEN std::vector<std::function<void()>>& captured() {
  static auto* made = new std::vector<std::function<void()>>;
  return *made;
}

}  // namespace shim
