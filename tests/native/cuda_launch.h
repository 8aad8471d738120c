// Calls of the CUDA kernels, which run through the shim: tables, state and counter stand between guards too.
#pragma once

#include <cuda_runtime.h>

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

struct CudaLaunch : AnyLaunch {
  int32_t num_blocks = 6, device = 0;
  int32_t skip_nonfinite = 0, capturing = -1;
  int64_t nonfinite = 0;  // of the state, as the launch finds it

  int32_t update_paces(const Rows& rows, const Chunks& chunks, Paces& paces, int64_t advance) override {
    std::vector<Words<int64_t>> counts;
    for (const Pace& pace : paces) counts.emplace_back(pace.num_averaged);
    const int32_t status = with_table(rows, chunks, [&](const swafast_table& table) {
      // Gone when the call is over: a launch may not come back for it.
      std::vector<swafast_pace> addressed;
      for (size_t k = 0; k < paces.size(); ++k) addressed.push_back({paces[k].rule, counts[k].data()});
      return swafast_cuda_update(&table, addressed.data(), static_cast<int64_t>(addressed.size()), advance,
                                 skip_nonfinite, &capturing, kStream);
    });
    for (size_t k = 0; k < paces.size(); ++k) {
      counts[k].check(true, "counter");
      paces[k].num_averaged = *counts[k].data();
    }
    return status;
  }
  int32_t status_of_bad_count() const override { return SWAFAST_OK; }

  int32_t exchange_table(const Rows& rows, const Chunks& chunks, int64_t wanted) override {
    return with_table(rows, chunks,
                      [&](const swafast_table& table) { return swafast_cuda_exchange(&table, wanted, kStream); });
  }

  int32_t first_nonfinite_of_table(const Rows& rows, const Chunks& chunks, int64_t* index) override {
    const int32_t status = with_table(
        rows, chunks, [&](const swafast_table& table) { return swafast_cuda_first_nonfinite(&table, kStream); });
    if (status == SWAFAST_OK) *index = nonfinite == 0 ? -1 : static_cast<int64_t>(rows.size()) - nonfinite;
    return status;
  }

 private:
  template <class Call>
  int32_t with_table(const Rows& rows, const Chunks& chunks, Call call) {
    Words<swafast_tensor> tensors_(rows.data(), rows.size());
    Words<swafast_chunk> chunks_(chunks.data(), chunks.size());
    const int64_t blocks = chunks.empty() ? 1 : std::min<int64_t>(static_cast<int64_t>(chunks.size()), num_blocks);
    const int64_t begun = (int64_t{1} << 40) * blocks;  // as launches before this one left it
    Words<swafast_state> state({begun, exchanged, nonfinite});
    const swafast_table table = {tensors_.data(),
                                 chunks_.data(),
                                 static_cast<int64_t>(rows.size()),
                                 static_cast<int64_t>(chunks.size()),
                                 state.data(),
                                 device,
                                 num_blocks};
    const int64_t launches = shim_num_launches;
    const int current = shim_current_device();
    const int32_t status = call(table);
    tensors_.check(false, "tensors");
    chunks_.check(false, "chunks");
    state.check(true, "state");
    require(state.data()->blocks_begun == begun || state.data()->blocks_begun == begun + blocks,
            "a launch of %lld blocks began %lld", static_cast<long long>(blocks),
            static_cast<long long>(state.data()->blocks_begun - begun));
    require(shim_current_device() == current, "a call left another device current");
    if (status == SWAFAST_OK) {
      require(shim_num_launches == launches + 1 && shim_last_blocks == blocks && shim_last_device == device &&
                  shim_last_stream == kStream,
              "%lld launches, the last of %lld blocks and not %lld, on device %d",
              static_cast<long long>(shim_num_launches - launches), static_cast<long long>(shim_last_blocks),
              static_cast<long long>(blocks), shim_last_device);
    }
    exchanged = state.data()->exchanged;
    nonfinite = state.data()->nonfinite;
    return status;
  }
};
