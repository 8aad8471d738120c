// The kernels: a persistent grid of blocks claims chunks and runs a mover over each. One launch serves tensors of every
// dtype and format, in a grid that the launch chooses.
#pragma once

#include <type_traits>

#include "../weight.h"
#include "movers.cuh"

namespace swafast::cuda {

constexpr int64_t kTileThreads = 256;
// The most threads of a block. So many fill a multiprocessor at 64 registers each, as 4 blocks of 256 threads do. With
// them alone in its bounds an exchange got 32 registers on sm_90, and a store before its last load; with one block
// beside them it gets more, but an update spills. tests/test_machine_code.py sees both.
constexpr int kMostThreads = 1024;

// Read anew for each run: kept from one to the next they would take registers that the loads in flight need.
__device__ __forceinline__ int64_t thread_index() {
#if defined(__CUDA_ARCH__)
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return threadIdx.x;
#endif
}
__device__ __forceinline__ int64_t block_width() {
#if defined(__CUDA_ARCH__)
  uint32_t width;
  asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(width));
  return width;
#else
  return blockDim.x;
#endif
}

// The groups of a run, in tiles: kUnroll groups for each of kTileThreads threads. A wider block takes as many tiles at
// a time as fit into its width. Every load of a tile stands before its first store, so that they are under way
// together. The addresses within a tile are a constant apart and take no registers.
template <class Mover>
__device__ __forceinline__ void run_groups(const Mover& mover, int64_t num_groups) {
  constexpr int kUnroll = Mover::kUnroll;
  const int64_t thread = thread_index();
  int64_t index = thread + thread / kTileThreads * (kUnroll - 1) * kTileThreads;
  if constexpr (kUnroll > 1) {
    SWAFAST_NO_UNROLL
    for (; index + (kUnroll - 1) * kTileThreads < num_groups; index += kUnroll * block_width()) {
      typename Mover::Group groups[kUnroll];
      SWAFAST_UNROLL
      for (int u = 0; u < kUnroll; ++u) mover.load(groups[u], index + u * kTileThreads);
      SWAFAST_UNROLL
      for (int u = 0; u < kUnroll; ++u) mover.store(groups[u], index + u * kTileThreads);
    }
  }
  // What is left is within one tile.
  SWAFAST_NO_UNROLL
  for (; index < num_groups; index += kUnroll > 1 ? kTileThreads : block_width()) {
    typename Mover::Group group;
    mover.load(group, index);
    mover.store(group, index);
  }
}

// An array from some element on.
template <class Pointer>
__device__ __forceinline__ Pointer at(Pointer base, int64_t nbytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Pointer>(static_cast<Byte*>(base) + nbytes);
}

// A run of elements, through `make(first element, wide)`: the aligned middle in wide groups, the ends one by one.
// `head` elements come before the first aligned one; all of them, where the arrays are not aligned alike. With
// kEndsFirst the ends come before the middle, and nothing that they need is kept across it: where registers are few.
template <class Wide, class Narrow, bool kEndsFirst = false, class Make>
__device__ __forceinline__ void run(int64_t numel, int64_t head, Make make) {
  const int64_t num_groups = (numel - head) / Wide::kNumel;
  const int64_t middle = num_groups * Wide::kNumel;
  if (!kEndsFirst && num_groups > 0) run_groups(make(Wide{}, head), num_groups);
  if (head > 0) run_groups(make(Narrow{}, int64_t{0}), head);
  if (head + middle < numel) run_groups(make(Narrow{}, head + middle), numel - head - middle);
  if (kEndsFirst && num_groups > 0) run_groups(make(Wide{}, head), num_groups);
}

// Elements of kBytes bytes before the first one on a 16-byte boundary.
template <int kBytes>
__device__ __forceinline__ int64_t elements_to_boundary(const void* address) {
  return static_cast<int64_t>((16u - (reinterpret_cast<uint64_t>(address) & 15u)) & 15u) / kBytes;
}

template <class Dtype, class Format, bool kEndsFirst>
__device__ __forceinline__ void update_run(const void* param, void* first, void* second, int64_t numel,
                                           const Move& move) {
  // Where the narrowest array meets a boundary, those that are aligned alike do too.
  constexpr int kLeast = Update<Dtype, Format, true>::kLeast;
  int64_t head = elements_to_boundary<kLeast>(kLeast == Format::kFirst    ? first
                                              : kLeast == Format::kSecond ? second
                                                                          : param);
  const bool alike = is_aligned(at(param, head * Dtype::kBytes)) && is_aligned(at(first, head * Format::kFirst)) &&
                     is_aligned(at(second, head * Format::kSecond));
  head = alike && head < numel ? head : numel;
  run<Update<Dtype, Format, true>, Update<Dtype, Format, false>, kEndsFirst>(
      numel, head, [&](auto mover, int64_t offset) {
        mover.param = at(param, offset * Dtype::kBytes);
        mover.first = at(first, offset * Format::kFirst);
        mover.second = at(second, offset * Format::kSecond);
        mover.move = move;
        mover.move.first_index += static_cast<uint32_t>(offset) * move.index_step;
        return mover;
      });
}

// The two-sided runs that do not look into the elements.
template <template <int, bool> class Mover, int kBytes, class Param>
__device__ __forceinline__ void plain_run(Param param, void* average, int64_t numel) {
  int64_t head = elements_to_boundary<kBytes>(average);
  const bool alike = is_aligned(at(param, head * kBytes)) && is_aligned(at(average, head * kBytes));
  head = alike && head < numel ? head : numel;
  run<Mover<kBytes, true>, Mover<kBytes, false>>(numel, head, [&](auto mover, int64_t offset) {
    mover.param = at(param, offset * kBytes);
    mover.average = at(average, offset * kBytes);
    return mover;
  });
}

template <class Dtype>
__device__ __forceinline__ bool holds_nonfinite(const void* param, int64_t numel) {
  int64_t head = elements_to_boundary<Dtype::kBytes>(param);
  head = is_aligned(at(param, head * Dtype::kBytes)) && head < numel ? head : numel;
  bool bad = false;
  run<FindNonfinite<Dtype, true>, FindNonfinite<Dtype, false>>(numel, head, [&](auto mover, int64_t offset) {
    mover.param = at(param, offset * Dtype::kBytes);
    mover.bad = &bad;
    return mover;
  });
  return bad;
}

// A launch begins by reading words that its end state is to change: no block may read what another has changed already.
// One thread of each block reads them, then says so here; the last one to do so may write. All blocks of a launch add
// up to 2^32, whatever its grid: two launches of one table that ran into one another, on streams of which neither
// waited, leave the lower half at 0, and the next one counts right.
__device__ __forceinline__ bool is_last_to_begin(swafast_state* state) {
  const uint64_t share = blockIdx.x == 0 ? (uint64_t{1} << 32) - (gridDim.x - 1) : 1;
  return static_cast<uint32_t>(add_to(&state->begun, share) + share) == 0;
}

// What a block knows of its chunks, in shared memory: the one that it moves, and the next one, which is on its way
// meanwhile. Neither takes a register, and the table in a register would cost one that the loads in flight need.
struct alignas(16) Feed {
  swafast_descriptor here, coming;
  swafast_table table;
  int64_t next, after;  // which chunks follow on `here`; num_chunks or more: none
};

// Bring a descriptor into shared memory. It is there for all threads after wait_for_copies and a barrier.
__device__ __forceinline__ void fetch(swafast_descriptor& into, const swafast_table& table, int64_t index) {
  SWAFAST_UNROLL
  for (int part = 0; part < static_cast<int>(sizeof into / sizeof(uint4)); ++part) {
    copy_16_bytes(reinterpret_cast<uint4*>(&into) + part,
                  reinterpret_cast<const uint4*>(table.descriptors + index) + part);
  }
}

// Every block begins with the chunk of its own index and claims further ones: a block that shares its multiprocessor
// with another kernel, or begins late, takes fewer of them. A launch claims num_chunks times, whatever its grid: each
// block once in vain. So the word is at 0 again when it ends.
__device__ __forceinline__ int64_t claim(const swafast_table& table) {
  uint32_t* claimed = &table.state->claimed;
  SWAFAST_ASSUME_GLOBAL(claimed);
  return int64_t{gridDim.x} + atomicInc(claimed, static_cast<uint32_t>(table.num_chunks - 1));
}

// The thread that feeds its block: of a short chunk the last one has no elements, so its waiting costs nothing.
__device__ __forceinline__ bool feeds() { return thread_index() == block_width() - 1; }

// The chunk that a block begins with, on its way while the block begins.
__device__ __forceinline__ void fetch_first(Feed& feed, const swafast_table& table) {
  if (!feeds()) return;
  feed.table = table;
  if (blockIdx.x < table.num_chunks) fetch(feed.here, table, blockIdx.x);
}
// By one thread, once it knows that the block will move chunks.
__device__ __forceinline__ void claim_second(Feed& feed, const swafast_table& table) {
  feed.next = table.num_chunks == 0 ? 0 : claim(table);
}

// What a block moves after `here`.
struct Ahead {
  int64_t index;  // of its descriptor, or -1
  bool is_chunk;  // and no follower
  __device__ __forceinline__ Ahead(const Feed& feed, bool followers) {
    const uint32_t follower = followers ? feed.here.follower : 0;
    is_chunk = follower == 0 && feed.next < feed.table.num_chunks;
    index = follower != 0 ? follower : is_chunk ? feed.next : -1;
  }
};

// Move every chunk of this block by `move(descriptor)`, and with kFollowers the followers of each. fetch_first,
// claim_second, wait_for_copies and a barrier come before.
template <bool kFollowers, class MoveChunk>
__device__ __forceinline__ void for_each_chunk(Feed& feed, MoveChunk move) {
  if (feed.table.num_chunks == 0) return;
  SWAFAST_NO_UNROLL
  for (;;) {
    if (feeds()) {
      const Ahead ahead(feed, kFollowers);
      if (ahead.index >= 0) fetch(feed.coming, feed.table, ahead.index);
      feed.after = ahead.is_chunk ? claim(feed.table) : feed.next;
    }
    move(feed.here);
    forget_registers();
    if (Ahead(feed, kFollowers).index < 0) return;
    wait_for_copies();
    __syncthreads();
    if (feeds()) {
      feed.here = feed.coming;
      feed.next = feed.after;
    }
    __syncthreads();
  }
}

// The paces of a launch, which go to the device with it.
struct Paces {
  swafast_pace each[SWAFAST_MAX_PACES];
  int32_t count;
};

// What a block makes of them: the counts as it found them, and how far the averages move.
struct Progress {
  int64_t counts[SWAFAST_MAX_PACES];
  Blend blends[SWAFAST_MAX_PACES];
  bool stop;
};

template <class Dtype, class Format, bool kEndsFirst>
__device__ __forceinline__ void update_in(const swafast_descriptor& chunk, const Progress& progress) {
  Move move = {progress.blends[chunk.pace], {}, static_cast<uint32_t>(chunk.first_index), chunk.index_step};
  if constexpr (Format::kRandom != 0) move.draw = draw_of(chunk.key, progress.counts[chunk.pace], chunk.first_index);
  update_run<Dtype, Format, kEndsFirst>(chunk.param, chunk.planes[0], chunk.planes[1], chunk.numel, move);
}

// Do `work` for the dtype of a param and the format of its average: work.run<Dtype, Format>(), or work.copy() for
// bytes.
template <class Dtype, class Work>
__device__ __forceinline__ void with_format(const Work& work) {
  switch (work.format()) {
    case SWAFAST_FORMAT_FLOAT32:
      return work.template run<Dtype, FormatFloat32>();
    case SWAFAST_FORMAT_EXACT:
      return work.template run<Dtype, FormatExact>();
    case SWAFAST_FORMAT_COMPACT:
      return work.template run<Dtype, FormatCompact>();
    case SWAFAST_FORMAT_COMPENSATED:
      return work.template run<Dtype, FormatCompensated>();
    case SWAFAST_FORMAT_HALF:
      return work.template run<Dtype, FormatHalf>();
    default:
      return work.template run<Dtype, FormatMirrored>();
  }
}
template <class Work>
__device__ __forceinline__ void with_kinds(const Work& work) {
  switch (work.dtype()) {
    case SWAFAST_FLOAT32:
      return with_format<Float32>(work);
    case SWAFAST_BFLOAT16:
      return with_format<BFloat16>(work);
    case SWAFAST_FLOAT16:
      return with_format<Float16>(work);
    default:
      return work.copy();
  }
}

template <bool kEndsFirst>
struct UpdateOfChunk {
  const swafast_descriptor& chunk;
  const Progress& progress;
  __device__ __forceinline__ int32_t dtype() const { return chunk.dtype; }
  __device__ __forceinline__ int32_t format() const { return chunk.format; }
  template <class Dtype, class Format>
  __device__ __forceinline__ void run() const {
    update_in<Dtype, Format, kEndsFirst>(chunk, progress);
  }
  __device__ __forceinline__ void copy() const {
    plain_run<Copy, 1>(static_cast<const void*>(chunk.param), chunk.planes[0], chunk.numel);
  }
};

template <bool kEndsFirst>
__device__ __forceinline__ void update_chunk(const swafast_descriptor& chunk, const Progress& progress) {
  with_kinds(UpdateOfChunk<kEndsFirst>{chunk, progress});
}

// One thread for each pace reads its count and works out its weight while the others wait: 64-bit floating-point units
// are few on many GPUs. The last block to have read the counts advances them, long before the memory traffic is over.
__device__ __forceinline__ void begin(Progress& progress, Feed& feed, const swafast_table& table, const Paces& paces,
                                      int64_t advance, int32_t skip_nonfinite) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < paces.count) progress.counts[k] = read_word(paces.each[k].num_averaged);
  __syncthreads();
  bool last = false, stop = false;
  if (k == 0) {
    stop = skip_nonfinite != 0 && read_word(&table.state->nonfinite) != 0;
    SWAFAST_NO_UNROLL
    for (int p = 0; p < paces.count; ++p) stop |= progress.counts[p] < 0 || progress.counts[p] == INT64_MAX;
    last = is_last_to_begin(table.state);
    progress.stop = stop;
    if (!stop) claim_second(feed, table);
  }
  if (k < paces.count) {
    const int64_t n = progress.counts[k];
    progress.blends[k] = make_blend(rule_weight(paces.each[k].rule, n < 0 ? 0 : n));
  }
  if (last && !stop) {
    SWAFAST_NO_UNROLL
    for (int p = 0; p < paces.count; ++p) write_word(paces.each[p].num_averaged, progress.counts[p] + advance);
  }
  wait_for_copies();
  __syncthreads();
}

// What each kernel does with a chunk. Structs, since a lambda of this size is not inlined, and its call costs
// registers.
struct UpdateChunk {
  const Progress& progress;
  __device__ __forceinline__ void operator()(const swafast_descriptor& chunk) const {
    update_chunk<false>(chunk, progress);
  }
};

struct ExchangeChunk {
  __device__ __forceinline__ void operator()(const swafast_descriptor& chunk) const {
    switch (chunk.dtype) {
      case SWAFAST_FLOAT32:
        return plain_run<Exchange, 4>(chunk.param, chunk.planes[0], chunk.numel);
      case SWAFAST_BYTES:
        return plain_run<Exchange, 1>(chunk.param, chunk.planes[0], chunk.numel);
      default:
        return plain_run<Exchange, 2>(chunk.param, chunk.planes[0], chunk.numel);
    }
  }
};

struct SearchChunk {
  const swafast_table& table;
  __device__ __forceinline__ void operator()(const swafast_descriptor& chunk) const {
    auto* found = reinterpret_cast<unsigned long long*>(&table.state->nonfinite);
    if (is_bad(chunk)) atomicMax(found, static_cast<unsigned long long>(table.num_tensors - chunk.tensor));
  }
  __device__ __forceinline__ static bool is_bad(const swafast_descriptor& chunk) {
    switch (chunk.dtype) {
      case SWAFAST_FLOAT32:
        return holds_nonfinite<Float32>(chunk.param, chunk.numel);
      case SWAFAST_BFLOAT16:
        return holds_nonfinite<BFloat16>(chunk.param, chunk.numel);
      case SWAFAST_FLOAT16:
        return holds_nonfinite<Float16>(chunk.param, chunk.numel);
      default:
        return false;
    }
  }
};

// The averages of one param are moved one after another, of which the first brings its chunk into the caches.
__global__ void __launch_bounds__(kMostThreads)
    update_kernel(const __grid_constant__ swafast_table table, const __grid_constant__ Paces paces, int64_t advance,
                  int32_t skip_nonfinite) {
  __shared__ Progress progress;
  __shared__ Feed feed;
  fetch_first(feed, table);
  begin(progress, feed, table, paces, advance, skip_nonfinite);
  if (!progress.stop) for_each_chunk<true>(feed, UpdateChunk{progress});
}

__global__ void __launch_bounds__(kMostThreads, 1)
    exchange_kernel(const __grid_constant__ swafast_table table, int64_t wanted) {
  __shared__ bool stop;
  __shared__ Feed feed;
  fetch_first(feed, table);
  if (threadIdx.x == 0) {
    stop = read_word(&table.state->exchanged) == wanted;
    if (is_last_to_begin(table.state)) write_word(&table.state->exchanged, wanted);
    if (!stop) claim_second(feed, table);
  }
  wait_for_copies();
  __syncthreads();
  if (!stop) for_each_chunk<false>(feed, ExchangeChunk{});
}

__global__ void __launch_bounds__(kMostThreads, 1) nonfinite_kernel(const __grid_constant__ swafast_table table) {
  __shared__ Feed feed;
  fetch_first(feed, table);
  if (threadIdx.x == 0) claim_second(feed, table);
  wait_for_copies();
  __syncthreads();
  for_each_chunk<false>(feed, SearchChunk{table});
}

}  // namespace swafast::cuda
