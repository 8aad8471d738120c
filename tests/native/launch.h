// Tensors with their chunks, and the calls that take them: of the CPU's kernels here, of the GPU's in cuda_launch.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "swafast.h"
#include "tensors.h"

inline swafast_rule constant(double weight) { return {SWAFAST_RULE_CONSTANT, {weight, 0, 0, 0}}; }

inline const int32_t kDtypes[] = {SWAFAST_FLOAT32, SWAFAST_BFLOAT16, SWAFAST_FLOAT16};
inline const int32_t kFormats[] = {SWAFAST_FORMAT_FLOAT32, SWAFAST_FORMAT_EXACT, SWAFAST_FORMAT_MIRRORED};

inline bool served(int32_t dtype, int32_t format) {
  return (dtype == SWAFAST_BYTES) == (format == SWAFAST_FORMAT_COPIED);
}

using Rows = std::vector<swafast_tensor>;
using Chunks = std::vector<swafast_chunk>;

struct AnyLaunch {
  std::vector<Tensor> tensors;
  int64_t chunk_numel = 64;
  bool reversed = false;  // the order of the chunks, which has no say
  int64_t exchanged = 0;

  AnyLaunch() = default;
  AnyLaunch(AnyLaunch&&) = default;
  virtual ~AnyLaunch() = default;

  virtual int32_t update_table(const Rows& rows, const Chunks& chunks, const swafast_rule& rule, int64_t* num_averaged,
                               int64_t advance) = 0;
  virtual int32_t exchange_table(const Rows& rows, const Chunks& chunks, int64_t wanted) = 0;
  // *index: of the first tensor with a NaN or an infinity, or -1
  virtual int32_t first_nonfinite_of_table(const Rows& rows, const Chunks& chunks, int64_t* index) = 0;

  Tensor& add(int32_t dtype, int32_t format, int64_t numel, Shifts shifts = {}) {
    tensors.emplace_back(dtype, format, numel, shifts);
    return tensors.back();
  }
  Tensor& add(int32_t dtype, int32_t format, int64_t numel, int64_t shift) {
    return add(dtype, format, numel, apart(shift));
  }

  Rows rows() {
    Rows rows;
    for (Tensor& tensor : tensors) {
      rows.push_back(tensor.row());
      swafast_tensor& row = rows.back();
      if (planted == "wrong-dtype" && row.dtype == SWAFAST_BFLOAT16) row.dtype = SWAFAST_FLOAT16;
      if (planted == "wrong-format" && row.format == SWAFAST_FORMAT_EXACT) row.format = SWAFAST_FORMAT_MIRRORED;
      if (planted == "shifted-plane") row.planes[0] = static_cast<char*>(row.planes[0]) + 4;
      if (planted == "swapped-planes" && row.format == SWAFAST_FORMAT_EXACT) std::swap(row.planes[0], row.planes[1]);
    }
    return rows;
  }

  Chunks chunks() {
    Chunks chunks;
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int64_t offset = 0; offset < tensors[t].numel; offset += chunk_numel) {
        chunks.push_back({static_cast<int64_t>(t), offset, std::min(chunk_numel, tensors[t].numel - offset)});
      }
    }
    if (reversed) std::reverse(chunks.begin(), chunks.end());
    if (chunks.empty()) return chunks;
    if (planted == "long-chunk") ++chunks.back().numel;
    if (planted == "short-chunk") --chunks.back().numel;
    if (planted == "dropped-chunk") chunks.pop_back();
    if (planted == "doubled-chunk") chunks.insert(chunks.end(), chunks.begin(), chunks.begin() + 1);
    return chunks;
  }

  int32_t update(const swafast_rule& rule, int64_t* num_averaged, int64_t advance = 1) {
    return update_table(rows(), chunks(), rule, num_averaged, advance);
  }
  int32_t exchange(int64_t wanted) { return exchange_table(rows(), chunks(), wanted); }
  int32_t first_nonfinite(int64_t* index) { return first_nonfinite_of_table(rows(), chunks(), index); }

  void update_and_check(double weight) {
    int64_t num_averaged = 1;
    require(update(constant(weight), &num_averaged) == SWAFAST_OK, "an update was refused");
    for (Tensor& tensor : tensors) tensor.check_updated(weight);
  }

  bool untouched() {
    bool same = true;
    for (Tensor& tensor : tensors) same &= tensor.untouched();
    return same;
  }

  // Of every tensor whose param and average can change places.
  void check_exchanged() {
    for (Tensor& tensor : tensors) {
      const bool swapped = tensor.param.holds(tensor.plane0.before()) && tensor.plane0.holds(tensor.param.before());
      require(swapped && tensor.plane1.unchanged(), "dtype %d, %lld elements: an exchange went wrong", tensor.dtype,
              static_cast<long long>(tensor.numel));
      require(tensor.param.intact() && tensor.plane0.intact() && tensor.plane1.intact(),
              "dtype %d: an exchange wrote beside a buffer", tensor.dtype);
    }
  }
};

// Through the CPU's kernels.
struct Launch : AnyLaunch {
  int32_t num_threads = 1;

  int32_t update_table(const Rows& rows, const Chunks& chunks, const swafast_rule& rule, int64_t* num_averaged,
                       int64_t advance) override {
    return swafast_cpu_update(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                              static_cast<int64_t>(chunks.size()), &rule, num_averaged, advance, num_threads);
  }
  int32_t exchange_table(const Rows& rows, const Chunks& chunks, int64_t wanted) override {
    return swafast_cpu_exchange(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                                static_cast<int64_t>(chunks.size()), num_threads, wanted, &exchanged);
  }
  int32_t first_nonfinite_of_table(const Rows& rows, const Chunks& chunks, int64_t* index) override {
    return swafast_cpu_first_nonfinite(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                                       static_cast<int64_t>(chunks.size()), num_threads, index);
  }
};
