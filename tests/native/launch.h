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
inline const int32_t kFormats[] = {SWAFAST_FORMAT_FLOAT32, SWAFAST_FORMAT_EXACT,       SWAFAST_FORMAT_MIRRORED,
                                   SWAFAST_FORMAT_COMPACT, SWAFAST_FORMAT_COMPENSATED, SWAFAST_FORMAT_HALF};

// Averages: a spread has a row of another kind (spreads.h).
inline bool served(int32_t dtype, int32_t format) {
  return format != SWAFAST_FORMAT_SPREAD && (dtype == SWAFAST_BYTES) == (format == SWAFAST_FORMAT_COPIED);
}

// Whether the param and the first plane are of one dtype.
inline bool exchangeable(const Tensor& tensor) {
  const int32_t dtypes[SWAFAST_NUM_FORMATS] = {SWAFAST_FLOAT32,  SWAFAST_BFLOAT16, SWAFAST_FLOAT16, SWAFAST_BYTES,
                                               SWAFAST_BFLOAT16, SWAFAST_FLOAT32,  SWAFAST_BFLOAT16};
  return tensor.dtype == dtypes[tensor.format];
}

using Rows = std::vector<swafast_tensor>;
using Chunks = std::vector<swafast_chunk>;

// A pace as the test has it: the library is handed the address of its count, wherever that is to be.
struct Pace {
  swafast_rule rule;
  int64_t num_averaged;
};
using Paces = std::vector<Pace>;

struct AnyLaunch {
  std::vector<Tensor> tensors;
  int64_t chunk_numel = 64;
  bool reversed = false;  // the order of the chunks, which has no say
  int64_t exchanged = 0;

  AnyLaunch() = default;
  AnyLaunch(AnyLaunch&&) = default;
  virtual ~AnyLaunch() = default;

  virtual int32_t update_paces(const Rows& rows, const Chunks& chunks, Paces& paces, int64_t advance) = 0;
  // What an update after a negative or exhausted count returns.
  virtual int32_t status_of_bad_count() const = 0;
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
  // Another average of the last tensor's param.
  Tensor& add_follower(int32_t format, Shifts shifts = {}) {
    tensors.push_back(Tensor(tensors.back(), format, shifts));
    return tensors.back();
  }

  // A key for each tensor; and for two of three not all of a param, but every fifth element of it, or a part in which
  // the index outgrows 32 bits.
  void number_elements() {
    for (size_t t = 0; t < tensors.size(); ++t) {
      Tensor& tensor = tensors[t];
      tensor.key = oracle::splitmix64(t);
      if (tensor.is_follower || t % 3 == 0) continue;
      tensor.index_step = t % 3 == 1 ? 5 : 1;
      tensor.first_index = t % 3 == 1 ? static_cast<int64_t>(t) << 33 : (int64_t{7} << 32) - tensor.numel / 2;
    }
    for (size_t t = 1; t < tensors.size(); ++t) {
      if (!tensors[t].is_follower) continue;
      tensors[t].first_index = tensors[t - 1].first_index;
      tensors[t].index_step = tensors[t - 1].index_step;
    }
  }

  void keep_exchangeable() {
    std::vector<Tensor> kept;
    for (Tensor& tensor : tensors) {
      if (exchangeable(tensor)) kept.push_back(std::move(tensor));
    }
    tensors = std::move(kept);
  }

  int32_t num_followers(size_t t) const {
    int32_t count = 0;
    while (++t < tensors.size() && tensors[t].is_follower) ++count;
    return count;
  }

  Rows rows() {
    Rows rows;
    for (size_t t = 0; t < tensors.size(); ++t) rows.push_back(tensors[t].row(num_followers(t)));
    return rows;
  }

  Chunks chunks() {
    Chunks chunks;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const Tensor& it = tensors[t];
      for (int64_t offset = 0; offset < it.numel && !it.is_follower; offset += chunks.back().numel) {
        // As far as the upper half of the index stays.
        const int64_t index = it.index(offset), next = ((index >> 32) + 1) << 32;
        const int64_t until_next = (next - index + it.index_step - 1) / it.index_step;
        const int64_t numel = std::min({chunk_numel, it.numel - offset, until_next});
        chunks.push_back({static_cast<int64_t>(t), offset, numel, index, it.index_step});
      }
    }
    if (reversed) std::reverse(chunks.begin(), chunks.end());
    return chunks;
  }

  int32_t update_table(const Rows& rows, const Chunks& chunks, const swafast_rule& rule, int64_t* num_averaged,
                       int64_t advance) {
    Paces paces = {{rule, *num_averaged}};
    const int32_t status = update_paces(rows, chunks, paces, advance);
    *num_averaged = paces[0].num_averaged;
    return status;
  }
  int32_t update(const swafast_rule& rule, int64_t* num_averaged, int64_t advance = 1) {
    return update_table(rows(), chunks(), rule, num_averaged, advance);
  }
  int32_t update(Paces& paces, int64_t advance = 1) { return update_paces(rows(), chunks(), paces, advance); }
  int32_t exchange(int64_t wanted) { return exchange_table(rows(), chunks(), wanted); }
  int32_t first_nonfinite(int64_t* index) { return first_nonfinite_of_table(rows(), chunks(), index); }

  void update_and_check(double weight) {
    int64_t num_averaged = 1;
    require(update(constant(weight), &num_averaged) == SWAFAST_OK, "an update was refused");
    for (Tensor& tensor : tensors) tensor.check_updated({weight});
  }

  bool untouched() {
    bool same = true;
    for (Tensor& tensor : tensors) same &= tensor.untouched();
    return same;
  }

  // Of every tensor whose param and average can change places.
  void check_exchanged() {
    for (Tensor& tensor : tensors) {
      const bool swapped = tensor.param->holds(tensor.plane0.before()) && tensor.plane0.holds(tensor.param->before());
      require(swapped && tensor.plane1.unchanged(), "dtype %d, %lld elements: an exchange went wrong", tensor.dtype,
              static_cast<long long>(tensor.numel));
      require(tensor.intact(), "dtype %d: an exchange wrote beside a buffer", tensor.dtype);
    }
  }
};

// Through the CPU's kernels.
struct Launch : AnyLaunch {
  int32_t num_threads = 1;

  int32_t update_paces(const Rows& rows, const Chunks& chunks, Paces& paces, int64_t advance) override {
    std::vector<swafast_pace> addressed;
    for (Pace& pace : paces) addressed.push_back({pace.rule, &pace.num_averaged});
    return swafast_cpu_update(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                              static_cast<int64_t>(chunks.size()), addressed.data(),
                              static_cast<int64_t>(addressed.size()), advance, num_threads);
  }
  int32_t status_of_bad_count() const override { return SWAFAST_BAD_COUNT; }
  int32_t exchange_table(const Rows& rows, const Chunks& chunks, int64_t wanted) override {
    return swafast_cpu_exchange(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                                static_cast<int64_t>(chunks.size()), num_threads, wanted, &exchanged);
  }
  int32_t first_nonfinite_of_table(const Rows& rows, const Chunks& chunks, int64_t* index) override {
    return swafast_cpu_first_nonfinite(rows.data(), static_cast<int64_t>(rows.size()), chunks.data(),
                                       static_cast<int64_t>(chunks.size()), num_threads, index);
  }
};
