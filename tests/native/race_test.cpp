// The CUDA kernels with all blocks and threads at once (at_once/machine.h), for ThreadSanitizer: every kernel, with
// every format, several paces, averages that share a param or have a spread, and what the launches of one table share.
//
//   race_test [--bug NUMBER]
//
// Ends with 0, or with 1 and a message where a result is wrong; ThreadSanitizer ends it with 66 at the first race.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda_launch.h"
#include "cuda_spreads.h"
#include "planted.h"

namespace {

// More chunks than blocks, blocks of two tiles, and tails that are not whole vectors.
CudaLaunch make_launch() {
  CudaLaunch launch;
  launch.num_threads = 16;
  launch.chunk_numel = 120;
  launch.num_blocks = 4;
  Random random(1);
  for (const int32_t dtype : kDtypes) {
    for (const int32_t format : kFormats) launch.add(dtype, format, 250, alike(1));
  }
  launch.add(SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, 300);
  launch.add(SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT, 250);
  launch.add_follower(SWAFAST_FORMAT_FLOAT32);
  for (size_t t = 0; t < launch.tensors.size(); ++t) launch.tensors[t].pace = static_cast<int32_t>(t % 3);
  launch.tensors.back().pace = 2;
  for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
  return launch;
}

void update(CudaLaunch& launch, int32_t skip_nonfinite) {
  Paces paces = {{constant(0.25), 3}, {constant(0.5), 0}, {constant(0.75), 7}};
  launch.skip_nonfinite = skip_nonfinite;
  for (Tensor& tensor : launch.tensors) tensor.remember();
  require(launch.update(paces) == SWAFAST_OK, "an update was refused");
  const bool skipped = skip_nonfinite != 0 && launch.nonfinite != 0;
  const int64_t counts[] = {3, 0, 7};
  for (int k = 0; k < 3; ++k) {
    require(paces[k].num_averaged == counts[k] + (skipped ? 0 : 1), "pace %d counts %lld", k,
            static_cast<long long>(paces[k].num_averaged));
  }
  for (Tensor& tensor : launch.tensors) {
    const double weights[] = {0.25, 1.0, 0.75};  // the first model is taken as it is
    if (skipped) {
      require(tensor.untouched(), "a skipped update changed something");
    } else if (tensor.format != SWAFAST_FORMAT_COPIED) {
      tensor.check_updated({weights[tensor.pace], counts[tensor.pace]});
    }
  }
}

void exchange(CudaLaunch& launch, int64_t wanted, bool changes) {
  for (Tensor& tensor : launch.tensors) tensor.remember();
  require(launch.exchange(wanted) == SWAFAST_OK, "an exchange was refused");
  if (changes) {
    launch.check_exchanged();
  } else {
    require(launch.untouched(), "an exchange that was made already changed something");
  }
}

// Three chunks of each tensor: a block goes on to further ones.
void move_and_draw_spreads() {
  CudaLaunch launch;
  launch.num_threads = 16;
  launch.num_blocks = 4;
  Random random(5);
  check_spreads(launch, true, random);
}

void check() {
  CudaLaunch launch = make_launch();
  update(launch, 0);
  int64_t index = -1;
  require(launch.first_nonfinite(&index) == SWAFAST_OK && index >= 0, "no NaN was found");
  update(launch, 1);
  launch.keep_exchangeable();
  exchange(launch, 1, true);
  exchange(launch, 1, false);
  exchange(launch, 0, true);
  move_and_draw_spreads();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--bug") {
    planted_bug = std::atoi(argv[2]);
  } else if (argc != 1) {
    return 2;
  }
  for (int round = planted_bug == 0 ? 0 : 1; round < 2; ++round) check();
  std::printf("every check passed: CUDA, blocks at once\n");
  return 0;
}
