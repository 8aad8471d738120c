// The kernels: a persistent grid of blocks takes chunks in turn and runs a mover over each. One launch serves tensors
// of every dtype and format.
#pragma once

#include <type_traits>

#include "../weight.h"
#include "movers.cuh"

namespace swafast::cuda {

constexpr int64_t kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;

// Read anew for each run: kept from one to the next it would take registers that the loads in flight need.
__device__ __forceinline__ int64_t thread_index() {
#if defined(__CUDA_ARCH__)
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return threadIdx.x;
#endif
}

// The groups of a run: kUnroll of them a thread at a time, a block's width apart, then one. Every load of a tile stands
// before its first store, so that they are under way together.
template <class Mover>
__device__ __forceinline__ void run_groups(const Mover& mover, int64_t num_groups) {
  int64_t index = thread_index();
  if constexpr (Mover::kUnroll > 1) {
    SWAFAST_NO_UNROLL
    for (; index + (Mover::kUnroll - 1) * kThreads < num_groups; index += Mover::kUnroll * kThreads) {
      typename Mover::Group groups[Mover::kUnroll];
      SWAFAST_UNROLL
      for (int u = 0; u < Mover::kUnroll; ++u) mover.load(groups[u], index + u * kThreads);
      SWAFAST_UNROLL
      for (int u = 0; u < Mover::kUnroll; ++u) mover.store(groups[u], index + u * kThreads);
    }
  }
  SWAFAST_NO_UNROLL
  for (; index < num_groups; index += kThreads) {
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
// `head` elements come before the first aligned one; all of them, where the arrays are not aligned alike.
template <class Wide, class Narrow, class Make>
__device__ __forceinline__ void run(int64_t numel, int64_t head, Make make) {
  const int64_t num_groups = (numel - head) / Wide::kNumel;
  const int64_t middle = num_groups * Wide::kNumel;
  if (num_groups > 0) run_groups(make(Wide{}, head), num_groups);
  if (head > 0) run_groups(make(Narrow{}, int64_t{0}), head);
  if (head + middle < numel) run_groups(make(Narrow{}, head + middle), numel - head - middle);
}

// Elements of kBytes bytes before the first one on a 16-byte boundary.
template <int kBytes>
__device__ __forceinline__ int64_t elements_to_boundary(const void* address) {
  return static_cast<int64_t>((16u - (reinterpret_cast<uint64_t>(address) & 15u)) & 15u) / kBytes;
}

template <class Dtype, class Format>
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
  run<Update<Dtype, Format, true>, Update<Dtype, Format, false>>(numel, head, [&](auto mover, int64_t offset) {
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

// The arrays of one chunk, in the row of its tensor or in that of a follower.
struct Run {
  void* param;
  void* planes[2];
  int64_t numel, offset, tensor, first_index;
  uint64_t key;
  uint32_t index_step;
  int32_t dtype, format, pace, followers;

  __device__ __forceinline__ Run(const swafast_table& table, int64_t index, int32_t follower = 0) {
    const auto* chunk = reinterpret_cast<const long long*>(table.chunks + index);
    tensor = __ldg(chunk) + follower;
    offset = __ldg(chunk + 1);
    numel = __ldg(chunk + 2);
    first_index = __ldg(chunk + 3);
    index_step = static_cast<uint32_t>(__ldg(chunk + 4));
    const auto* row = reinterpret_cast<const long long*>(table.tensors + tensor);
    param = reinterpret_cast<void*>(__ldg(row));
    planes[0] = reinterpret_cast<void*>(__ldg(row + 1));
    planes[1] = reinterpret_cast<void*>(__ldg(row + 2));
    const long long kinds = __ldg(row + 4);
    dtype = static_cast<int32_t>(kinds);
    format = static_cast<int32_t>(kinds >> 32);
    key = static_cast<uint64_t>(__ldg(row + 5));
    const long long others = __ldg(row + 6);
    pace = static_cast<int32_t>(others);
    followers = static_cast<int32_t>(others >> 32);
  }
};
static_assert(sizeof(swafast_tensor) == 56 && sizeof(swafast_chunk) == 40, "Run reads them as 64-bit words");

// A launch begins by reading words that its end state is to change: no block may read what another has changed already.
// One thread of each block reads them, then says so here; the last one to do so may write. The blocks are counted from
// launch to launch: two of one table that ran into one another, on streams of which neither waited, leave a whole
// number of launches behind, and the next one counts right.
__device__ __forceinline__ bool is_last_to_begin(swafast_state* state) {
  return (count_up(&state->blocks_begun) + 1) % gridDim.x == 0;
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

template <class Dtype, class Format>
__device__ __forceinline__ void update_in(const Run& run, const Progress& progress) {
  Move move = {progress.blends[run.pace], {}, static_cast<uint32_t>(run.first_index), run.index_step};
  if constexpr (Format::kRandom != 0) move.draw = draw_of(run.key, progress.counts[run.pace], run.first_index);
  update_run<Dtype, Format>(at(run.param, run.offset * Dtype::kBytes), at(run.planes[0], run.offset * Format::kFirst),
                            at(run.planes[1], run.offset * Format::kSecond), run.numel, move);
}

template <class Dtype>
__device__ __forceinline__ void update_as(const Run& run, const Progress& progress) {
  switch (run.format) {
    case SWAFAST_FORMAT_FLOAT32:
      return update_in<Dtype, FormatFloat32>(run, progress);
    case SWAFAST_FORMAT_EXACT:
      return update_in<Dtype, FormatExact>(run, progress);
    case SWAFAST_FORMAT_COMPACT:
      return update_in<Dtype, FormatCompact>(run, progress);
    case SWAFAST_FORMAT_COMPENSATED:
      return update_in<Dtype, FormatCompensated>(run, progress);
    case SWAFAST_FORMAT_HALF:
      return update_in<Dtype, FormatHalf>(run, progress);
    default:
      return update_in<Dtype, FormatMirrored>(run, progress);
  }
}

__device__ __forceinline__ void update_run(const Run& run, const Progress& progress) {
  switch (run.dtype) {
    case SWAFAST_FLOAT32:
      return update_as<Float32>(run, progress);
    case SWAFAST_BFLOAT16:
      return update_as<BFloat16>(run, progress);
    case SWAFAST_FLOAT16:
      return update_as<Float16>(run, progress);
    default:
      return plain_run<Copy, 1>(static_cast<const void*>(at(run.param, run.offset)), at(run.planes[0], run.offset),
                                run.numel);
  }
}

// One thread for each pace reads its count and works out its weight while the others wait: 64-bit floating-point units
// are few on many GPUs. The last block to have read the counts advances them, long before the memory traffic is over.
__device__ __forceinline__ void begin(Progress& progress, const swafast_table& table, const Paces& paces,
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
  }
  if (k < paces.count) {
    const int64_t n = progress.counts[k];
    progress.blends[k] = make_blend(rule_weight(paces.each[k].rule, n < 0 ? 0 : n));
  }
  if (last && !stop) {
    SWAFAST_NO_UNROLL
    for (int p = 0; p < paces.count; ++p) write_word(paces.each[p].num_averaged, progress.counts[p] + advance);
  }
  __syncthreads();
}

// The averages of one param are moved one after another, of which the first brings its chunk into the caches: from the
// last row back, since how many are left is then all that is kept in a register meanwhile.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ swafast_table table, const __grid_constant__ Paces paces, int64_t advance,
                  int32_t skip_nonfinite) {
  __shared__ Progress progress;
  begin(progress, table, paces, advance, skip_nonfinite);
  if (progress.stop) return;
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    int32_t follower = Run(table, i).followers;
    do {
      update_run(Run(table, i, follower), progress);
    } while (follower-- > 0);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    exchange_kernel(const swafast_table table, int64_t wanted) {
  __shared__ bool stop;
  if (threadIdx.x == 0) {
    stop = read_word(&table.state->exchanged) == wanted;
    if (is_last_to_begin(table.state)) write_word(&table.state->exchanged, wanted);
  }
  __syncthreads();
  if (stop) return;
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    const Run run(table, i);
    switch (run.dtype) {
      case SWAFAST_FLOAT32:
        plain_run<Exchange, 4>(at(run.param, run.offset * 4), at(run.planes[0], run.offset * 4), run.numel);
        break;
      case SWAFAST_BYTES:
        plain_run<Exchange, 1>(at(run.param, run.offset), at(run.planes[0], run.offset), run.numel);
        break;
      default:
        plain_run<Exchange, 2>(at(run.param, run.offset * 2), at(run.planes[0], run.offset * 2), run.numel);
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) nonfinite_kernel(const swafast_table table) {
  auto* found = reinterpret_cast<unsigned long long*>(&table.state->nonfinite);
  for (int64_t i = blockIdx.x; i < table.num_chunks; i += gridDim.x) {
    const Run run(table, i);
    bool bad = false;
    switch (run.dtype) {
      case SWAFAST_FLOAT32:
        bad = holds_nonfinite<Float32>(at(run.param, run.offset * 4), run.numel);
        break;
      case SWAFAST_BFLOAT16:
        bad = holds_nonfinite<BFloat16>(at(run.param, run.offset * 2), run.numel);
        break;
      case SWAFAST_FLOAT16:
        bad = holds_nonfinite<Float16>(at(run.param, run.offset * 2), run.numel);
        break;
      default:
        break;
    }
    if (bad) atomicMax(found, static_cast<unsigned long long>(table.num_tensors - run.tensor));
  }
}

}  // namespace swafast::cuda
