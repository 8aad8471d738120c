// The C interface on the CPU: checks, choice of instruction set, and the walk over chunks.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../table.h"
#include "../weight.h"
#include "box.h"
#include "span.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace swafast::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// The named instruction set, or the best one for no name; null where this processor or this build lacks it.
const Kernels* find_isa(const char* name) {
  const Kernels* candidates[] = {has_avx512() ? avx512_kernels() : nullptr, has_avx2() ? avx2_kernels() : nullptr,
                                 &generic_kernels()};
  for (const Kernels* kernels : candidates) {
    if (kernels != nullptr && (name == nullptr || std::strcmp(kernels->name, name) == 0)) return kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{find_isa(nullptr)};
  return kernels;
}

// The OpenMP runtime's threads do not live through a fork, and a parallel region in the child waits for them for ever.
std::atomic<bool> in_forked_child{false};

#if !defined(_WIN32)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });
#endif

// Chunks are claimed dynamically, because a core that shares its memory bandwidth or its time falls behind; several at
// a time, because a chunk of a small tensor is shorter than the claim.
template <class Body>
void for_each_chunk(int64_t num_chunks, int32_t num_threads, Body body) {
#if defined(_OPENMP)
  if (num_threads > 1 && num_chunks > 1 && !in_forked_child.load(std::memory_order_relaxed)) {
    constexpr int64_t kClaimsPerThread = 16, kMostChunksPerClaim = 64;
    int64_t claim = num_chunks / (num_threads * kClaimsPerThread);
    claim = claim < 1 ? 1 : (claim > kMostChunksPerClaim ? kMostChunksPerClaim : claim);
#pragma omp parallel for schedule(dynamic, claim) num_threads(num_threads)
    for (int64_t i = 0; i < num_chunks; ++i) body(i);
    return;
  }
#endif
  (void)num_threads;
  for (int64_t i = 0; i < num_chunks; ++i) body(i);
}

int64_t param_itemsize(int32_t dtype) { return dtype == SWAFAST_FLOAT32 ? 4 : (dtype == SWAFAST_BYTES ? 1 : 2); }

int64_t plane_itemsize(int32_t format, int plane) {
  switch (format) {
    case SWAFAST_FORMAT_FLOAT32:
      return plane == 0 ? 4 : 0;
    case SWAFAST_FORMAT_EXACT:
      return 2;
    case SWAFAST_FORMAT_MIRRORED:
      return plane == 0 ? 2 : 4;
    case SWAFAST_FORMAT_COMPACT:
      return plane == 0 ? 2 : 1;
    case SWAFAST_FORMAT_COMPENSATED:
      return 4;
    case SWAFAST_FORMAT_HALF:
      return plane == 0 ? 2 : 0;
    default:
      return plane == 0 ? 1 : 0;
  }
}

// What Kernels::checksum has its entries by, or -1.
int word_size_log2(int64_t word_size) {
  for (int k = 0; k < kNumWordSizes; ++k) {
    if (word_size == int64_t{1} << k) return k;
  }
  return -1;
}

void* at(void* base, int64_t nbytes) { return base == nullptr ? nullptr : static_cast<char*>(base) + nbytes; }

// What one launch works out once for each of its paces.
struct Moves {
  Blend blends[SWAFAST_MAX_PACES];
  int64_t counts[SWAFAST_MAX_PACES];

  // False if a count is negative or exhausted.
  bool set(const swafast_pace* paces, int64_t num_paces) {
    for (int64_t k = 0; k < num_paces; ++k) {
      counts[k] = *paces[k].num_averaged;
      if (counts[k] < 0 || counts[k] == INT64_MAX) return false;
      blends[k] = make_blend(rule_weight(paces[k].rule, counts[k]));
    }
    return true;
  }
};

void update_chunk(const Kernels& kernels, const swafast_tensor& tensor, const swafast_chunk& chunk,
                  const Moves& moves) {
  const Draws draws = {draw_of(tensor.key, moves.counts[tensor.pace], chunk.first_index),
                       static_cast<uint32_t>(chunk.first_index), static_cast<uint32_t>(chunk.index_step)};
  kernels.update[tensor.dtype][tensor.format](at(tensor.param, chunk.offset * param_itemsize(tensor.dtype)),
                                              at(tensor.planes[0], chunk.offset * plane_itemsize(tensor.format, 0)),
                                              at(tensor.planes[1], chunk.offset * plane_itemsize(tensor.format, 1)),
                                              chunk.numel, moves.blends[tensor.pace], draws);
}

const swafast_ring& ring_of(const swafast_tensor& spread) {
  return *static_cast<const swafast_ring*>(spread.planes[1]);
}

// Of a spread's row, which that of its average follows.
SpreadRun run_of(const swafast_tensor& spread, const swafast_chunk& chunk) {
  const swafast_tensor& average = (&spread)[1];
  const swafast_ring& ring = ring_of(spread);
  return {at(spread.param, chunk.offset * param_itemsize(spread.dtype)),
          {at(average.planes[0], chunk.offset * plane_itemsize(average.format, 0)),
           at(average.planes[1], chunk.offset * plane_itemsize(average.format, 1))},
          static_cast<float*>(spread.planes[0]) + chunk.offset,
          ring.num_columns > 0 ? reinterpret_cast<void* const*>(&ring + 1) : nullptr,
          chunk.offset,
          chunk.numel,
          spread.dtype,
          average.format,
          ring.dtype};
}

void update_spread(const Kernels& kernels, const swafast_tensor& spread, const swafast_chunk& chunk,
                   const Moves& moves) {
  const int64_t num_columns = ring_of(spread).num_columns;
  kernels.spread(run_of(spread, chunk), num_columns > 0 ? moves.counts[spread.pace] % num_columns : 0,
                 moves.blends[spread.pace]);
}

bool any_spread(const swafast_tensor* tensors, int64_t num_tensors) {
  return std::any_of(tensors, tensors + num_tensors, is_spread);
}

// Every ring of a table must be sound, and have so many columns at least.
int32_t check_rings(const swafast_tensor* tensors, int64_t num_tensors, int32_t num_columns) {
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (!is_spread(tensors[i])) continue;
    if (!is_ring(ring_of(tensors[i]))) return SWAFAST_BAD_TENSOR;
    if (ring_of(tensors[i]).num_columns < num_columns) return SWAFAST_BAD_COUNT;
  }
  return SWAFAST_OK;
}

}  // namespace
}  // namespace swafast::cpu

using namespace swafast;
using namespace swafast::cpu;

extern "C" {

int32_t swafast_abi(void) { return SWAFAST_ABI; }

int32_t swafast_check(const swafast_tensor* tensors, int64_t num_tensors, int32_t exchange) {
  return check(tensors, num_tensors, exchange != 0);
}

const char* swafast_build(void) {
#if defined(__clang__)
#define SWAFAST_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define SWAFAST_COMPILER "gcc " __VERSION__
#else
#define SWAFAST_COMPILER "unknown compiler"
#endif
#if defined(_OPENMP)
#define SWAFAST_THREADING "OpenMP"
#else
#define SWAFAST_THREADING "one thread (no OpenMP)"
#endif
#if defined(SWAFAST_CUDA)
#define SWAFAST_CUDA_BUILD "CUDA for " SWAFAST_CUDA_ARCHITECTURES
#elif defined(SWAFAST_CUDA_FAILED)
#define SWAFAST_CUDA_BUILD "no CUDA: nvcc was there and did not work"
#else
#define SWAFAST_CUDA_BUILD "no CUDA"
#endif
  return SWAFAST_COMPILER ", " SWAFAST_THREADING ", " SWAFAST_CUDA_BUILD;
}

double swafast_weight(const swafast_rule* rule, int64_t num_averaged) { return rule_weight(*rule, num_averaged); }

const char* swafast_cpu_isa(void) { return chosen().load()->name; }

int32_t swafast_cpu_use_isa(const char* name) {
  const Kernels* kernels = find_isa(name);
  if (kernels == nullptr) return 1;
  chosen().store(kernels);
  return 0;
}

void swafast_cpu_want_large_pages(void* start, int64_t nbytes) {
#if defined(__linux__)
  // Only whole pages of the usual size inside the range: what lies beside it is not ours to advise on.
  constexpr uintptr_t kPage = 4096;
  const auto first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(nbytes)) / kPage * kPage;
  if (end <= first) return;
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  // Pages that were touched before: Linux 6.1 and later moves them now, a large page at a time.
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25
#endif
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_COLLAPSE);
#else
  (void)start;
  (void)nbytes;
#endif
}

int32_t swafast_cpu_update(const swafast_tensor* tensors, int64_t num_tensors, const swafast_chunk* chunks,
                           int64_t num_chunks, const swafast_pace* paces, int64_t num_paces, int64_t advance,
                           int32_t num_threads) {
  const Kernels& kernels = *chosen().load();
  if (check_paces(tensors, num_tensors, num_paces) != SWAFAST_OK) return SWAFAST_BAD_PACE;
  if (check(tensors, num_tensors, false) != SWAFAST_OK) return SWAFAST_BAD_TENSOR;
  Moves moves;
  if (!moves.set(paces, num_paces)) return SWAFAST_BAD_COUNT;
  const auto move_all = [=](const auto& move) {
    for_each_chunk(num_chunks, num_threads, [=, &move](int64_t i) {
      // The chunk of the param stays in the caches from the first of its averages to the last.
      const swafast_tensor* tensor = tensors + chunks[i].tensor;
      for (int32_t k = 0; k <= tensor->followers; ++k) move(tensor[k], chunks[i]);
    });
  };
  const auto average = [&](const swafast_tensor& tensor, const swafast_chunk& chunk) {
    update_chunk(kernels, tensor, chunk, moves);
  };
  if (!any_spread(tensors, num_tensors)) {
    move_all(average);
  } else if (check_rings(tensors, num_tensors, 0) != SWAFAST_OK) {
    return SWAFAST_BAD_TENSOR;
  } else {
    move_all([&](const swafast_tensor& tensor, const swafast_chunk& chunk) {
      is_spread(tensor) ? update_spread(kernels, tensor, chunk, moves) : average(tensor, chunk);
    });
  }
  for (int64_t k = 0; k < num_paces; ++k) *paces[k].num_averaged += advance;
  return SWAFAST_OK;
}

int32_t swafast_cpu_exchange(const swafast_tensor* tensors, int64_t num_tensors, const swafast_chunk* chunks,
                             int64_t num_chunks, int32_t num_threads, int64_t wanted, int64_t* exchanged) {
  const Kernels& kernels = *chosen().load();
  if (check(tensors, num_tensors, true) != SWAFAST_OK) return SWAFAST_BAD_TENSOR;
  if (*exchanged == wanted) return SWAFAST_OK;
  for_each_chunk(num_chunks, num_threads, [=, &kernels](int64_t i) {
    const swafast_chunk& chunk = chunks[i];
    const swafast_tensor& tensor = tensors[chunk.tensor];
    const int64_t itemsize = param_itemsize(tensor.dtype);
    kernels.exchange(at(tensor.param, chunk.offset * itemsize), at(tensor.planes[0], chunk.offset * itemsize),
                     chunk.numel * itemsize);
  });
  *exchanged = wanted;
  return SWAFAST_OK;
}

int32_t swafast_cpu_draw(const swafast_tensor* tensors, int64_t num_tensors, const swafast_chunk* chunks,
                         int64_t num_chunks, const swafast_sample* sample, int32_t num_threads) {
  const Kernels& kernels = *chosen().load();
  if (check_draw(tensors, num_tensors) != SWAFAST_OK) return SWAFAST_BAD_TENSOR;
  if (sample->num_columns < 0) return SWAFAST_BAD_COUNT;
  const int32_t rings = check_rings(tensors, num_tensors, sample->num_columns);
  if (rings != SWAFAST_OK) return rings;
  for_each_chunk(num_chunks, num_threads, [=, &kernels](int64_t i) {
    const swafast_chunk& chunk = chunks[i];
    const swafast_tensor* spread = tensors + chunk.tensor;
    const NormalRun normals = {spread[1].key, static_cast<uint64_t>(chunk.first_index),
                               static_cast<uint64_t>(chunk.index_step)};
    kernels.draw(run_of(*spread, chunk), *sample, normals);
  });
  return SWAFAST_OK;
}

int32_t swafast_cpu_first_nonfinite(const swafast_tensor* tensors, int64_t num_tensors, const swafast_chunk* chunks,
                                    int64_t num_chunks, int32_t num_threads, int64_t* tensor) {
  const Kernels& kernels = *chosen().load();
  if (check(tensors, num_tensors, false) != SWAFAST_OK) return SWAFAST_BAD_TENSOR;
  std::atomic<int64_t> first{num_tensors};
  for_each_chunk(num_chunks, num_threads, [=, &kernels, &first](int64_t i) {
    const swafast_chunk& chunk = chunks[i];
    const swafast_tensor& it = tensors[chunk.tensor];
    const FiniteSpan all_finite = kernels.all_finite[it.dtype];
    if (all_finite == nullptr || chunk.tensor >= first.load(std::memory_order_relaxed)) return;
    if (all_finite(at(it.param, chunk.offset * param_itemsize(it.dtype)), chunk.numel)) return;
    int64_t seen = first.load();
    while (chunk.tensor < seen && !first.compare_exchange_weak(seen, chunk.tensor)) {
    }
  });
  *tensor = first.load() == num_tensors ? -1 : first.load();
  return SWAFAST_OK;
}

int32_t swafast_cpu_checksum(const swafast_box* box, int32_t num_threads, uint64_t* sum) {
  const int size_log2 = word_size_log2(box->word_size);
  Words words;
  if (size_log2 < 0 || !words.set(*box)) return SWAFAST_BAD_TENSOR;
  constexpr int64_t kChunkWords = 32768;  // as long as the chunks that Python cuts
  const ChecksumSpan checksum = chosen().load()->checksum[size_log2];
  const int64_t word_size = box->word_size;
  const auto* corner = static_cast<const char*>(box->words);
  const int64_t num_chunks = words.numel() / kChunkWords + (words.numel() % kChunkWords != 0);
  std::atomic<uint64_t> total{0};
  for_each_chunk(num_chunks, num_threads, [=, &words, &total](int64_t i) {
    const int64_t begin = i * kChunkWords;
    uint64_t partial = 0;
    words.for_each_line(begin, begin + std::min(kChunkWords, words.numel() - begin), [&](const Line& line) {
      partial += checksum(corner + line.offset * word_size, line.numel, line.stride, line.index, line.index_step);
    });
    total.fetch_add(partial, std::memory_order_relaxed);
  });
  *sum = total.load();
  return SWAFAST_OK;
}

int32_t swafast_cpu_accumulate(double* sums, const void* elements, int64_t numel, int32_t element, double coefficient,
                               int32_t begin) {
  if (element < 0 || element >= SWAFAST_NUM_ELEMENTS) return SWAFAST_BAD_TENSOR;
  if (numel < 0) return SWAFAST_BAD_COUNT;
  chosen().load()->accumulate[element](sums, elements, numel, coefficient, begin != 0);
  return SWAFAST_OK;
}

int32_t swafast_cpu_finish(const double* sums, void* out, int64_t numel, int32_t element, double divisor,
                           int64_t* nonfinite) {
  if (element < 0 || element >= SWAFAST_NUM_ELEMENTS) return SWAFAST_BAD_TENSOR;
  if (numel < 0) return SWAFAST_BAD_COUNT;
  *nonfinite = chosen().load()->finish[element](sums, out, numel, divisor);
  return SWAFAST_OK;
}

}  // extern "C"
