// Blocks one after another, and their threads as fibers. Shared memory starts out as garbage in every block. A thread
// runs to the next barrier, and to the next exchange of its warp, before another one does: the last threads have not
// written yet what the first ones read there, in one of the two orders.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "device.h"

// Or set by hand, for a file that is linked with an instrumented one and is not instrumented itself.
#if defined(__SANITIZE_ADDRESS__) || defined(SWAFAST_TEST_ASAN)
#define SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ASAN 1
#endif
#endif
#if defined(SHIM_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

// In a section of its own, which the linker gives a start and an end.
#define __shared__ static __attribute__((section("shim_shared")))

extern "C" {
extern char __start_shim_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_shim_shared[] __attribute__((weak, visibility("hidden")));
}

namespace shim {

constexpr size_t kStackBytes = 64 * 1024;

// A stack with what runs on it.
struct Fiber {
  ucontext_t context;  // where it begins
  void* left[5];       // where it left off
  bool has_begun = false;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  unsigned thread = 0;
  std::vector<Copy> unmade_copies;
};

// One launch at a time.
struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  Fiber host;
  Fiber* running = nullptr;
  std::vector<Fiber*> waiting, resuming;  // at a barrier, and behind it
  std::vector<Fiber*> warp, met;          // at an exchange of a warp, and behind it
  const std::function<void()>* body = nullptr;
  unsigned num_threads = 0, num_begun = 0;
};

// Made once and never destroyed: a thread of Python's may launch while the process ends.
SHIM_HIDDEN Machine& machine() {
  static Machine* made = new Machine;
  return *made;
}

// Not by swapcontext, which asks the kernel twice: a launch switches at every barrier of every thread.
[[noreturn]] __attribute__((noinline, no_sanitize("address"))) inline void enter(Fiber& fiber) {
  if (fiber.has_begun) __builtin_longjmp(fiber.left, 1);
  fiber.has_begun = true;
  setcontext(&fiber.context);
  std::abort();
}

__attribute__((noinline, no_sanitize("address"))) inline void switch_fiber(Fiber& from, Fiber& to, bool for_good) {
  machine().running = &to;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)for_good;
#endif
  if (__builtin_setjmp(from.left) == 0) enter(to);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A fiber runs threads from their first line on, until one of them waits at a barrier and so keeps it.
inline void run_fiber() {
  Machine& m = machine();
  Fiber& self = *m.running;
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &m.host.stack, &m.host.stack_bytes);
#endif
  // Not while a warp goes on, whose other threads would come after this new one.
  while (m.num_begun < m.num_threads && m.met.empty()) {
    const unsigned turn = m.num_begun++;
    self.unmade_copies.clear();
    self.thread = threadIdx.x = shim_reverse_threads != 0 ? m.num_threads - 1 - turn : turn;
    (*m.body)();
  }
  switch_fiber(self, m.host, true);
}

inline std::vector<Copy>& unmade_copies() { return machine().running->unmade_copies; }

inline void wait_at_barrier() {
  Machine& m = machine();
  Fiber& self = *m.running;
  m.waiting.push_back(&self);
  switch_fiber(self, m.host, false);
}

// The 32 threads of a warp meet here, while others may be anywhere.
inline void wait_for_warp() {
  Machine& m = machine();
  Fiber& self = *m.running;
  if (!m.warp.empty() && m.warp.front()->thread / 32 != self.thread / 32) {
    fault("an exchange that not every thread of the warp comes to", nullptr);
  }
  m.warp.push_back(&self);
  switch_fiber(self, m.host, false);
}

// Run a thread as far as the next barrier, and its warp with it where the last of them has come to an exchange.
inline void run_on(Machine& m, Fiber& fiber) {
  switch_fiber(m.host, fiber, false);
  while (m.warp.size() == std::min(m.num_threads, 32u)) {
    m.met.swap(m.warp);
    for (Fiber* each : m.met) {
      threadIdx.x = each->thread;
      switch_fiber(m.host, *each, false);
    }
    m.met.clear();
  }
}

inline void run_block(Machine& m) {
  if (__start_shim_shared != nullptr) {
    // As a signed number of any size, below 0 or above.
    const int garbage = shim_reverse_threads != 0 ? 0x54 : 0xAB;
    std::memset(__start_shim_shared, garbage, static_cast<size_t>(__stop_shim_shared - __start_shim_shared));
  }
  size_t num_fibers = 0;
  m.num_begun = 0;
  while (m.num_begun < m.num_threads) {
    Fiber& fiber = m.fibers[num_fibers++];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.has_begun = false;
    run_on(m, fiber);
  }
  while (!m.waiting.empty() || !m.warp.empty()) {
    if (!m.warp.empty()) fault("an exchange that not every thread of the warp comes to", nullptr);
    if (m.waiting.size() != m.num_threads) fault("a barrier that not every thread of the block comes to", nullptr);
    m.resuming.swap(m.waiting);
    for (Fiber* fiber : m.resuming) {
      threadIdx.x = fiber->thread;
      run_on(m, *fiber);
    }
    m.resuming.clear();
  }
}

inline void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> alone(m.mutex);
  while (m.fibers.size() < block.x) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fault("no memory for the stack of a thread", nullptr);
    m.fibers.emplace_back();
    m.fibers.back().stack = stack;
    m.fibers.back().stack_bytes = kStackBytes;
  }
  if (shim_alternating != 0) {
    // All four orders in turn, also for every second launch.
    shim_reverse_threads = (shim_num_launches ^ shim_num_launches >> 1) & 1;
    shim_reverse_blocks = shim_num_launches >> 1 & 1;
  }
  m.host.has_begun = true;
  m.body = &body;
  m.num_threads = block.x;
  gridDim = grid;
  blockDim = block;
  for (unsigned turn = 0; turn < grid.x; ++turn) {
    blockIdx.x = shim_reverse_blocks != 0 ? grid.x - 1 - turn : turn;
    run_block(m);
  }
}

}  // namespace shim
