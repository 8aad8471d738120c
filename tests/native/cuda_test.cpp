// The CUDA kernels against oracle.h, element by element, through the C interface alone, on a CPU: shim/cuda_runtime.h.
//
//   cuda_test [--all] [--large NAME] [--bug NUMBER]
//
// Ends with 0, or with 1 and a message at the first difference. --all takes every weight with every layout, and not a
// third of the weights with each. --large takes tensors of more elements than 32 bits count, of one NAME of kLarge, in
// place of everything else. --bug takes the bug of that number, where the kernels were built with some:
// tests/test_cuda_source.py.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda_launch.h"
#include "cuda_spreads.h"
#include "far.h"
#include "large.h"
#include "layouts.h"
#include "oracle.h"
#include "paces.h"
#include "planted.h"
#include "shared_checks.h"
#include "swafast.h"
#include "tensors.h"

namespace {

// The order in which a GPU would run threads and blocks is anybody's guess.
void take_order(int turn) {
  shim_reverse_threads = (turn & 1) == 0;
  shim_reverse_blocks = (turn & 2) == 0;
}

std::string describe_order() {
  return std::string("threads ") + (shim_reverse_threads != 0 ? "in reverse" : "forward") + ", blocks " +
         (shim_reverse_blocks != 0 ? "in reverse" : "forward");
}

// Of every three cases a layout takes one, unless it takes all: each third has a copy and weights on both sides of 0.5.
void check_updates(bool all) {
  Random random(1);
  int turn = 0;
  size_t first = 0;
  for (const Layout& layout : kLayouts) {
    CudaLaunch launch = make_launch(layout);
    size_t third = first++;
    for (const Case& it : kCases) {
      if (third++ % 3 != 0 && !all) continue;
      take_order(turn++);
      launch.num_blocks = turn % 5 == 0 ? 1 : 6;
      launch.num_threads = turn % 16 == 7 ? 1024 : 256;
      launch.reversed = turn % 3 == 0;
      check_case(launch, it, random);
      require(launch.capturing == 0 && launch.exchanged == 0 && launch.nonfinite == 0,
              "an update changed a state that is not its own");
    }
  }
}

// Arrays that are misaligned alike are worked on 16 bytes at a time all the same, but for a head and a tail.
void check_widths() {
  struct Width {
    int32_t dtype, format;
    int64_t group, vectors;  // elements of a group; loads and stores of averages that go with it
  };
  const Width widths[] = {
      {SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 4, 2},   {SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT, 8, 4},
      {SWAFAST_FLOAT16, SWAFAST_FORMAT_MIRRORED, 8, 6},  {SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, 16, 1},
      {SWAFAST_BFLOAT16, SWAFAST_FORMAT_COMPACT, 16, 6}, {SWAFAST_FLOAT32, SWAFAST_FORMAT_COMPENSATED, 4, 4},
      {SWAFAST_BFLOAT16, SWAFAST_FORMAT_HALF, 8, 2}};
  for (const Width& it : widths) {
    for (const int64_t shift : {0, 1, 3}) {
      CudaLaunch launch;
      launch.chunk_numel = 5000;
      const int64_t numel = launch.add(it.dtype, it.format, 5000, alike(shift)).numel;
      const int64_t groups = (numel - (it.group - shift) % it.group) / it.group;
      Random random(3);
      launch.tensors[0].fill_random(random);
      shim_num_vectors = 0;
      launch.update_and_check(0.3);
      require(shim_num_vectors == groups * it.vectors,
              "dtype %d, format %d, misaligned by %lld: %lld vectors of averages, not %lld", it.dtype, it.format,
              static_cast<long long>(shift), static_cast<long long>(shim_num_vectors),
              static_cast<long long>(groups * it.vectors));
    }
  }
}

// A launch of few chunks, one for each block and more.
CudaLaunch make_small_launch() {
  CudaLaunch launch;
  launch.chunk_numel = 500;
  for (const int32_t dtype : kDtypes) launch.add(dtype, dtype, 1300, 1);
  launch.add(SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, 900, 1);
  Random random(2);
  for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
  return launch;
}

void check_grids() {
  for (int turn = 0; turn < 4; ++turn) {
    take_order(turn);
    for (const int32_t num_blocks : {1, 2, 10, 11, 12, 1000}) {  // it has 11 chunks
      CudaLaunch launch = make_small_launch();
      launch.num_blocks = num_blocks;
      launch.num_threads = turn == 3 && num_blocks == 2 ? 1024 : 256;
      launch.device = num_blocks % 2;
      // Told apart from the weight after one more model.
      int64_t num_averaged = 3;
      require(launch.update({SWAFAST_RULE_EQUAL, {}}, &num_averaged) == SWAFAST_OK, "an update failed");
      for (Tensor& tensor : launch.tensors) tensor.check_updated({0.25, 3});
      require(num_averaged == 4, "the counter went from 3 to %lld", static_cast<long long>(num_averaged));
    }
    CudaLaunch none;
    int64_t num_averaged = 4;
    require(none.update(constant(0.5), &num_averaged) == SWAFAST_OK && num_averaged == 5,
            "an update of nothing did not count");
    require(none.exchange(1) == SWAFAST_OK && none.exchanged == 1, "an exchange of nothing was forgotten");
    int64_t index = 7;
    require(none.first_nonfinite(&index) == SWAFAST_OK && index == -1, "nothing was called nonfinite");
  }
}

void check_counts_that_stop() {
  CudaLaunch launch = make_small_launch();
  const swafast_rule rule = constant(0.3);
  for (int turn = 0; turn < 4; ++turn) {
    take_order(turn);
    for (const int64_t count : {int64_t{-1}, INT64_MIN, INT64_MAX}) {
      for (const int64_t advance : {0, 1, 5}) {
        int64_t num_averaged = count;
        require(
            launch.update(rule, &num_averaged, advance) == SWAFAST_OK && num_averaged == count && launch.untouched(),
            "an update after %lld models changed something", static_cast<long long>(count));
      }
    }
    launch.skip_nonfinite = 1;
    launch.nonfinite = 2;
    int64_t num_averaged = 3;
    require(launch.update(rule, &num_averaged) == SWAFAST_OK && num_averaged == 3 && launch.untouched(),
            "an update that was to be skipped changed something");
    require(launch.nonfinite == 2, "an update changed what was found");
  }
  struct Kept {
    int32_t skip_nonfinite;
    int64_t nonfinite;
  };
  for (const Kept kept : {Kept{1, 0}, Kept{0, 1}, Kept{0, 0}}) {
    CudaLaunch other = make_small_launch();
    other.skip_nonfinite = kept.skip_nonfinite;
    other.nonfinite = kept.nonfinite;
    other.update_and_check(0.3);
  }
}

void check_exchange() {
  Random random(4);
  int turn = 0;
  for (const Layout& layout : kLayouts) {
    CudaLaunch launch = make_launch(layout);
    launch.keep_exchangeable();
    for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
    for (int k = 0; k < 2; ++k) {
      take_order(turn++);
      launch.nonfinite = 3;
      require(launch.exchange(0) == SWAFAST_OK && launch.exchanged == 0 && launch.untouched(),
              "an exchange that nobody asked for");
      require(launch.exchange(1) == SWAFAST_OK && launch.exchanged == 1, "an exchange failed");
      launch.check_exchanged();
      require(launch.exchange(1) == SWAFAST_OK && launch.exchanged == 1, "an exchange asked for twice failed");
      launch.check_exchanged();
      require(launch.exchange(0) == SWAFAST_OK && launch.exchanged == 0 && launch.untouched(),
              "two exchanges are not the way back");
      require(launch.nonfinite == 3, "an exchange changed a state that is not its own");
    }
  }
}

void check_first_nonfinite() {
  CudaLaunch launch;
  launch.chunk_numel = 130;
  add_largest(launch);
  for (int turn = 0; turn < 4; ++turn) {
    take_order(turn);
    launch.reversed = turn == 3;
    check_first_nonfinite(launch, turn == 0 ? 1 : 37);
  }
}

void check_errors() {
  const std::string planted_error = "cudaErrorLaunchOutOfResources: planted by the shim";
  CudaLaunch launch = make_small_launch();
  launch.device = 1;
  int64_t num_averaged = 3, index = -9;
  int32_t num_blocks = 0;
  const auto failed = [&](int32_t status, const std::string& message) {
    return status == SWAFAST_CUDA_ERROR && swafast_cuda_error() == message && shim_pending_error() == cudaSuccess &&
           shim_current_device() == 0 && num_averaged == 3 && index == -9 && launch.exchanged == 0 &&
           launch.untouched();
  };
  const auto check_failing = [&](const char* function, bool of_update, bool of_exchange, bool of_search,
                                 bool of_blocks) {
    shim_failing = function;
    require(!of_update || failed(launch.update(constant(0.5), &num_averaged), planted_error), "%s: update", function);
    require(!of_exchange || failed(launch.exchange(1), planted_error), "%s: exchange", function);
    require(!of_search || failed(launch.first_nonfinite(&index), planted_error), "%s: first_nonfinite", function);
    require(!of_blocks || failed(swafast_cuda_blocks(1, 256, &num_blocks), planted_error), "%s: blocks", function);
    shim_failing = nullptr;
  };
  check_failing("cudaGetDevice", true, true, true, true);
  check_failing("cudaSetDevice", true, true, true, true);
  check_failing("cudaLaunchKernelEx", true, true, true, false);
  check_failing("cudaStreamIsCapturing", true, false, false, false);
  check_failing("cudaMemsetAsync", false, false, true, false);
  check_failing("cudaFuncGetAttributes", false, false, false, true);
  check_failing("cudaDeviceGetAttribute", false, false, false, true);
  check_failing("cudaOccupancyMaxActiveBlocksPerMultiprocessor", false, false, false, true);
  launch.device = shim::kDevices;
  const std::string no_device = "cudaErrorInvalidDevice: invalid device ordinal";
  require(failed(launch.update(constant(0.5), &num_averaged), no_device), "an update took a device that is not there");
  require(failed(swafast_cuda_blocks(shim::kDevices, 256, &num_blocks), no_device), "there are blocks on no device");
  require(swafast_cuda_blocks(1, 256, &num_blocks) == SWAFAST_OK && shim_current_device() == 0 &&
              num_blocks == shim::kMultiprocessors * shim::kBlocksPerMultiprocessor,
          "%d blocks fit on a device", num_blocks);
  require(swafast_cuda_blocks(1, 1024, &num_blocks) == SWAFAST_OK && num_blocks == shim::kMultiprocessors,
          "%d blocks of 1024 threads fit on a device", num_blocks);
  shim_fits = 0;
  require(failed(swafast_cuda_blocks(1, 256, &num_blocks), planted_error), "no block fits, and that is no error");
  shim_fits = 1;
}

// What goes into a graph runs as often as the graph does, and counts each time.
void check_capture() {
  CudaLaunch made = make_small_launch();
  Tensor& tensor = made.tensors[0];
  const Rows rows = {tensor.row()};
  const Chunks chunks = {{0, 0, tensor.numel, 0, 1}};
  swafast_state state = {};
  const std::vector<swafast_descriptor> descriptors = describe(rows, chunks);
  const swafast_table table = {descriptors.data(), 1, 1, &state, 0};
  const swafast_grid grid = {6, 256};
  int64_t num_averaged = 0;
  const swafast_pace pace = {{SWAFAST_RULE_EQUAL, {}}, &num_averaged};
  int32_t capturing = -1, num_blocks = 0;
  require(swafast_cuda_blocks(static_cast<int32_t>(table.device), 256, &num_blocks) == SWAFAST_OK, "blocks: %s",
          swafast_cuda_error());
  shim_capturing = 1;
  require(swafast_cuda_update(&table, &pace, 1, 1, 0, 0, &grid, &capturing, kStream) == SWAFAST_OK && capturing == 1,
          "an update into a graph said %d", capturing);
  shim_capturing = 0;
  require(num_averaged == 0 && tensor.untouched(), "a captured update ran at once");
  shim_replay();
  tensor.check_updated({1.0, 0});
  tensor.plane0.remember();
  shim_replay();
  tensor.check_updated({0.5});
  require(num_averaged == 2 && state.begun == int64_t{2} << 32, "two replays counted %lld",
          static_cast<long long>(num_averaged));
  shim_forget_captured();
}

// In a new process, swafast_cuda_blocks loads all that a capture may need, and is not called in one.
void check_first_capture() {
  CudaLaunch launch = make_small_launch();
  launch.device = 1;
  int64_t num_averaged = 3, index = -9;
  int32_t num_blocks = 0;
  const auto captures = [&](const char* what, int32_t status) {
    require(status == SWAFAST_OK, "a capture refuses %s: %s", what, swafast_cuda_error());
    require(shim_refused == nullptr, "the capture of %s fails for %s", what, shim_refused);
    shim_forget_captured();
  };
  shim_unload_kernels();
  require(swafast_cuda_blocks(launch.device, 256, &num_blocks) == SWAFAST_OK, "blocks: %s", swafast_cuda_error());
  shim_capturing = 1;
  captures("an update", launch.update(constant(0.5), &num_averaged));
  std::deque<SpreadTensor> spread;
  spread.emplace_back(SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 9, 0, 0, SWAFAST_FLOAT32);
  const Rows rows = {spread[0].row(), spread[0].tensor.row()};
  Paces paces = {{constant(0.5), 3}};
  captures("an update of a spread", launch.update_paces(rows, chunks_of(spread, 64), paces, 1));
  captures("a draw", launch.draw_table(rows, chunks_of(spread, 64), {nullptr, 0, 0, 0.5f}));
  captures("an exchange", launch.exchange(1));
  captures("a search", launch.first_nonfinite(&index));
  const std::string refused = "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing";
  require(swafast_cuda_blocks(launch.device, 256, &num_blocks) == SWAFAST_CUDA_ERROR && swafast_cuda_error() == refused,
          "a capture takes what it must not");
  const std::string failed =
      "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during capture";
  require(launch.exchange(1) == SWAFAST_CUDA_ERROR && swafast_cuda_error() == failed,
          "a capture that has failed takes a launch");
  shim_forget_captured();
  shim_unload_kernels();
  require(launch.exchange(1) == SWAFAST_CUDA_ERROR && swafast_cuda_error() == refused,
          "a capture takes a kernel that is not loaded");
  shim_forget_captured();
  shim_capturing = 0;
}

int run_large(const std::string& name) {
  for (const Large& large : kLarge) {
    if (name != large.name) continue;
    large.check();
    std::printf("every check passed: %s\n", large.name);
    return 0;
  }
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  static std::string order;
  subject = [] { return (order = describe_order()).c_str(); };
  std::string large;
  bool all = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--all") {
      all = true;
    } else if (argument == "--large" && i + 1 < argc) {
      large = argv[++i];
    } else if (argument == "--bug" && i + 1 < argc) {
      planted_bug = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: cuda_test [--all] [--large NAME of kLarge] [--bug NUMBER]\n");
      return 2;
    }
  }
  if (!large.empty()) return run_large(large);
  for (int turn = 0; turn < 4; ++turn) {
    take_order(turn);
    CudaLaunch launch;
    check_far_offsets(launch);
  }
  check_grids();
  check_widths();
  check_counts_that_stop();
  check_errors();
  check_first_capture();
  check_capture();
  for (int turn = 0; turn < 2; ++turn) {
    take_order(3 * turn);
    Random random(10);
    check_paces<CudaLaunch>(random);
  }
  for (const bool is_far : {false, true}) {
    take_order(is_far ? 1 : 0);
    Random random(12);
    CudaLaunch launch;
    check_spreads(launch, is_far, random);
  }
  // What takes seconds comes last: most bugs are seen before.
  check_exchange();
  check_first_nonfinite();
  check_updates(all);
  std::printf("every check passed: %s\n", swafast_cuda_build());
  return 0;
}
