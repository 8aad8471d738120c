// All blocks of a grid at once, and each of their threads one of the system's: for ThreadSanitizer, which sees two
// accesses that nothing orders, also where they give the right result.
//
// A launch ends before the next one begins. A declaration `__shared__ T name;` must have become `T& name =
// shim::shared<T, number>();`, with another number for each: C++ has no storage class for the threads of a block.
#pragma once

#define SHIM_AT_ONCE 1

#include <pthread.h>

#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../shim/device.h"

#define __shared__ left as it stands

namespace shim {

struct Block {
  static constexpr size_t kVariables = 8, kBytes = 2048;
  alignas(64) char memory[kVariables][kBytes];
  // In turns. With a single one, a thread that leaves it late would take over what the others did before they came to
  // it again, and ThreadSanitizer would miss their races.
  pthread_barrier_t barriers[2];

  explicit Block(unsigned num_threads) {
    std::memset(memory, 0xAB, sizeof memory);
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, num_threads);
  }
  ~Block() {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};
inline thread_local Block* block = nullptr;
inline thread_local unsigned num_waits = 0;  // of this thread at barriers

template <class T, int kNumber>
T& shared() {
  static_assert(sizeof(T) <= Block::kBytes && kNumber < static_cast<int>(Block::kVariables), "make Block larger");
  return *reinterpret_cast<T*>(block->memory[kNumber]);
}

inline std::vector<Copy>& unmade_copies() {
  static thread_local std::vector<Copy> copies;
  return copies;
}

inline void wait_at_barrier() { pthread_barrier_wait(&block->barriers[num_waits++ % 2]); }

inline void run_grid(dim3 grid, dim3 num_threads, const std::function<void()>& body) {
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned b = 0; b < grid.x; ++b) blocks.push_back(std::make_unique<Block>(num_threads.x));
  std::vector<std::thread> threads;
  const auto run = [&](unsigned b, unsigned t) {
    blockIdx = {b, 0, 0}, threadIdx = {t, 0, 0}, gridDim = grid, blockDim = num_threads;
    block = blocks[b].get();
    body();
  };
  // Thread by thread, so that the blocks are under way together however long it takes to start them.
  for (unsigned t = 0; t < num_threads.x; ++t) {
    for (unsigned b = 0; b < grid.x; ++b) threads.emplace_back(run, b, t);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace shim
