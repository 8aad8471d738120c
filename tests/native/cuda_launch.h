// Calls of the CUDA kernels, which run through the shim: tables, state and counter stand between guards too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "launch.h"
#include "swafast.h"
#include "tensors.h"

// Any value that is no pointer to a stream serves: nothing looks behind it.
inline void* const kStream = reinterpret_cast<void*>(uintptr_t{0x51});

// Something of the caller's on "device" memory, with guards around it.
template <class T>
class Words {
 public:
  Words(const T* values, size_t count) : memory_(static_cast<int64_t>(count * sizeof(T)), 0, 0x99) {
    if (count != 0) std::memcpy(memory_.data(), values, count * sizeof(T));
    memory_.remember();
  }
  explicit Words(const T& value) : Words(&value, 1) {}

  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  void check(bool may_change, const char* what) {
    require(memory_.intact(), "a launch wrote beside the %s", what);
    require(may_change || memory_.unchanged(), "a launch wrote to the %s", what);
  }

 private:
  Guarded memory_;
};

// As the package makes them: one for each chunk, then those of all followers.
inline std::vector<swafast_descriptor> describe(const Rows& rows, const Chunks& chunks) {
  std::vector<swafast_descriptor> descriptors(chunks.size());
  const auto describe_one = [](const swafast_tensor& row, const swafast_chunk& chunk, int64_t tensor) {
    const auto at = [&](void* array, int64_t itemsize) {
      return array == nullptr ? array : static_cast<char*>(array) + chunk.offset * itemsize;
    };
    swafast_descriptor made = {};
    made.param = at(row.param, param_itemsize(row.dtype));
    for (int k = 0; k < 2; ++k) made.planes[k] = at(row.planes[k], plane_itemsize(row.format, k));
    made.numel = chunk.numel;
    // A ring is one for all chunks of its tensor.
    made.first_index = row.format == SWAFAST_FORMAT_SPREAD ? chunk.offset : chunk.first_index;
    made.key = row.key;
    made.tensor = static_cast<uint32_t>(tensor);
    made.index_step = static_cast<uint32_t>(chunk.index_step);
    made.dtype = static_cast<uint8_t>(row.dtype);
    made.format = static_cast<uint8_t>(row.format);
    made.pace = static_cast<uint8_t>(row.pace);
    return made;
  };
  for (size_t c = 0; c < chunks.size(); ++c) {
    size_t last = c;
    const auto first = static_cast<size_t>(chunks[c].tensor);
    descriptors[c] = describe_one(rows[first], chunks[c], chunks[c].tensor);
    for (size_t t = first + 1; t <= first + static_cast<size_t>(rows[first].followers); ++t) {
      descriptors[last].follower = static_cast<uint32_t>(descriptors.size());
      last = descriptors.size();
      descriptors.push_back(describe_one(rows[t], chunks[c], static_cast<int64_t>(t)));
    }
  }
  return descriptors;
}

struct CudaLaunch : AnyLaunch {
  int32_t num_blocks = 6, num_threads = 256, device = 0;
  int32_t skip_nonfinite = 0, capturing = -1;
  int64_t nonfinite = 0;  // of the state, as the launch finds it

  int32_t update_paces(const Rows& rows, const Chunks& chunks, Paces& paces, int64_t advance) override {
    std::vector<Words<int64_t>> counts;
    for (const Pace& pace : paces) counts.emplace_back(pace.num_averaged);
    const int32_t status = with_table(rows, chunks, [&](const swafast_table& table, const swafast_grid& grid) {
      // Gone when the call is over: a launch may not come back for it.
      std::vector<swafast_pace> addressed;
      for (size_t k = 0; k < paces.size(); ++k) addressed.push_back({paces[k].rule, counts[k].data()});
      return swafast_cuda_update(&table, addressed.data(), static_cast<int64_t>(addressed.size()), advance,
                                 skip_nonfinite, has_spread(rows) ? 1 : 0, &grid, &capturing, kStream);
    });
    for (size_t k = 0; k < paces.size(); ++k) {
      counts[k].check(true, "counter");
      paces[k].num_averaged = *counts[k].data();
    }
    return status;
  }
  int32_t status_of_bad_count() const override { return SWAFAST_OK; }
  static bool has_spread(const Rows& rows) {
    return std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row.format == SWAFAST_FORMAT_SPREAD; });
  }

  int32_t draw_table(const Rows& rows, const Chunks& chunks, const swafast_sample& sample) {
    return with_table(rows, chunks, [&](const swafast_table& table, const swafast_grid& grid) {
      return swafast_cuda_draw(&table, &sample, &grid, kStream);
    });
  }

  int32_t exchange_table(const Rows& rows, const Chunks& chunks, int64_t wanted) override {
    return with_table(rows, chunks, [&](const swafast_table& table, const swafast_grid& grid) {
      return swafast_cuda_exchange(&table, wanted, &grid, kStream);
    });
  }

  int32_t first_nonfinite_of_table(const Rows& rows, const Chunks& chunks, int64_t* index) override {
    const int32_t status = with_table(rows, chunks, [&](const swafast_table& table, const swafast_grid& grid) {
      return swafast_cuda_first_nonfinite(&table, &grid, kStream);
    });
    if (status == SWAFAST_OK) *index = nonfinite == 0 ? -1 : static_cast<int64_t>(rows.size()) - nonfinite;
    return status;
  }

 private:
  template <class Call>
  int32_t with_table(const Rows& rows, const Chunks& chunks, Call call) {
    const std::vector<swafast_descriptor> made = describe(rows, chunks);
    Words<swafast_descriptor> descriptors(made.data(), made.size());
    const int64_t blocks = chunks.empty() ? 1 : std::min<int64_t>(static_cast<int64_t>(chunks.size()), num_blocks);
    const int64_t begun = int64_t{1} << 40;  // as launches before this one left it, in whatever grids
    Words<swafast_state> state({begun, exchanged, nonfinite, 0, 0});
    const swafast_table table = {descriptors.data(), static_cast<int64_t>(chunks.size()),
                                 static_cast<int64_t>(rows.size()), state.data(), device};
    const swafast_grid grid = {num_blocks, num_threads};
    const int64_t launches = shim_num_launches;
    const int current = shim_current_device();
    const int32_t status = call(table, grid);
    descriptors.check(false, "descriptors");
    state.check(true, "state");
    const int64_t grown = state.data()->begun - begun;
    require(grown == 0 || grown == int64_t{1} << 32, "a launch of %lld blocks counted %lld",
            static_cast<long long>(blocks), static_cast<long long>(grown));
    require(state.data()->claimed == 0, "a launch of %lld blocks left %u chunks claimed",
            static_cast<long long>(blocks), state.data()->claimed);
    require(shim_current_device() == current, "a call left another device current");
    if (status == SWAFAST_OK) {
      require(shim_num_launches == launches + 1 && shim_last_blocks == blocks && shim_last_threads == num_threads &&
                  shim_last_device == device && shim_last_stream == kStream,
              "%lld launches, the last of %lld blocks of %lld threads each and not %lld of %d, on device %d",
              static_cast<long long>(shim_num_launches - launches), static_cast<long long>(shim_last_blocks),
              static_cast<long long>(shim_last_threads), static_cast<long long>(blocks), num_threads, shim_last_device);
    }
    exchanged = state.data()->exchanged;
    nonfinite = state.data()->nonfinite;
    return status;
  }
};
