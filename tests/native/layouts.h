// Tensors of every dtype and format at every size that has an edge in the CUDA kernels.
#pragma once

#include <cstdint>
#include <set>

#include "cuda/movers.cuh"
#include "cuda_launch.h"
#include "launch.h"
#include "swafast.h"
#include "tensors.h"

constexpr int64_t kThreads = 256;  // as csrc/cuda/kernels.cuh has it

// Sizes around what one thread, one block and one tile of a block takes, with groups and without.
template <class Wide>
inline void add_edges(std::set<int64_t>& sizes) {
  constexpr int64_t kGroup = Wide::kNumel, kTile = kThreads * Wide::kUnroll;
  for (const int64_t edge : {kGroup, kThreads, kTile, kThreads * kGroup, kTile * kGroup, (kTile + kThreads) * kGroup}) {
    sizes.insert({edge - 1, edge, edge + 1});
  }
}

template <class Dtype>
inline std::set<int64_t> edges_of(int32_t format) {
  using namespace swafast::cuda;
  std::set<int64_t> sizes = {0, 1};
  if (format == SWAFAST_FORMAT_FLOAT32) add_edges<Update<Dtype, FormatFloat32, true>>(sizes);
  if (format == SWAFAST_FORMAT_EXACT) add_edges<Update<Dtype, FormatExact, true>>(sizes);
  if (format == SWAFAST_FORMAT_MIRRORED) add_edges<Update<Dtype, FormatMirrored, true>>(sizes);
  if (format == SWAFAST_FORMAT_COMPACT) add_edges<Update<Dtype, FormatCompact, true>>(sizes);
  if (format == SWAFAST_FORMAT_COMPENSATED) add_edges<Update<Dtype, FormatCompensated, true>>(sizes);
  if (format == SWAFAST_FORMAT_HALF) add_edges<Update<Dtype, FormatHalf, true>>(sizes);
  return sizes;
}

inline std::set<int64_t> edges(int32_t dtype, int32_t format) {
  using namespace swafast::cuda;
  if (dtype == SWAFAST_FLOAT32) return edges_of<Float32>(format);
  if (dtype == SWAFAST_BFLOAT16) return edges_of<BFloat16>(format);
  if (dtype == SWAFAST_FLOAT16) return edges_of<Float16>(format);
  std::set<int64_t> sizes = {0, 1};
  add_edges<Copy<1, true>>(sizes);
  return sizes;
}

struct Layout {
  int64_t chunk_numel;
  Shifts shifts;
};

// Whole tiles in long chunks; heads and tails of every length in short ones. Each array in turn is the odd one out.
inline const Layout kLayouts[] = {{1 << 20, {}},        {1 << 20, alike(1)},  {1 << 20, {1, 0, 0}},
                                  {1 << 20, {0, 0, 1}}, {1 << 20, {0, 1, 0}}, {4096, {}},
                                  {4096, alike(3)},     {1000, apart(7)},     {33, {}},
                                  {33, alike(5)}};

inline CudaLaunch make_launch(const Layout& layout) {
  CudaLaunch launch;
  launch.chunk_numel = layout.chunk_numel;
  for (int32_t dtype = 0; dtype < SWAFAST_NUM_DTYPES; ++dtype) {
    for (int32_t format = 0; format < SWAFAST_NUM_FORMATS; ++format) {
      if (!served(dtype, format)) continue;
      std::set<int64_t> sizes = edges(dtype, format);
      if (layout.chunk_numel < 1 << 20) sizes.insert(3 * layout.chunk_numel + 7);
      for (const int64_t numel : sizes) {
        // A chunk as short as that costs more than what it holds.
        if (layout.chunk_numel < 1000 && numel > 600) continue;
        launch.add(dtype, format, numel, layout.shifts);
      }
    }
  }
  launch.number_elements();
  return launch;
}
