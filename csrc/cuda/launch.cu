// The C interface on CUDA devices: a launch each, on the caller's device and stream, and nothing that waits.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "../swafast.h"
#include "kernels.cuh"
#include "spread.cuh"

#if !defined(SWAFAST_CUDA_ARCHITECTURES)
#define SWAFAST_CUDA_ARCHITECTURES "unknown architectures"
#endif

namespace swafast::cuda {
namespace {

thread_local char last_error[256] = "";

int32_t status_of(cudaError_t error) {
  if (error == cudaSuccess) return SWAFAST_OK;
  std::snprintf(last_error, sizeof last_error, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  (void)cudaGetLastError();  // ours to report, so not left for torch to find
  return SWAFAST_CUDA_ERROR;
}

// The library's runtime keeps a current device of its own for each thread.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <class... Expected, class... Given>
cudaError_t launch(const swafast_table& table, const swafast_grid& grid, void* stream, void (*kernel)(Expected...),
                   Given... arguments) {
  // A launch without chunks still counts.
  const int64_t blocks = table.num_chunks < grid.num_blocks ? table.num_chunks : grid.num_blocks;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < 1 ? 1 : blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.num_threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(arguments)...);
}

// Load kernels onto the current device. CUDA would load each at its first launch, which may wait for the device and is
// not allowed while a graph is being captured.
template <class... Kernels>
cudaError_t load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  (void)((error = cudaFuncGetAttributes(&attributes, kernels), error == cudaSuccess) && ...);
  return error;
}

}  // namespace
}  // namespace swafast::cuda

using namespace swafast;
using namespace swafast::cuda;

extern "C" {

const char* swafast_cuda_build(void) {
  static char text[128];
  std::snprintf(text, sizeof text, "CUDA %d.%d; %s", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
                SWAFAST_CUDA_ARCHITECTURES);
  return text;
}

const char* swafast_cuda_error(void) { return last_error; }

int32_t swafast_cuda_blocks(int32_t device, int32_t num_threads, int32_t* num_blocks) {
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return status_of(scope.error());
  int multiprocessors = 0, per_multiprocessor = 0;
  cudaError_t error = load(update_kernel, exchange_kernel, nonfinite_kernel, collect_kernel, draw_kernel);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, update_kernel, num_threads, 0);
  }
  if (error == cudaSuccess && per_multiprocessor == 0) error = cudaErrorLaunchOutOfResources;
  *num_blocks = multiprocessors * per_multiprocessor;
  return status_of(error);
}

int32_t swafast_cuda_update(const swafast_table* table, const swafast_pace* paces, int64_t num_paces, int64_t advance,
                            int32_t skip_nonfinite, int32_t has_spread, const swafast_grid* grid, int32_t* capturing,
                            void* stream) {
  if (num_paces < 1 || num_paces > SWAFAST_MAX_PACES) return SWAFAST_BAD_PACE;
  const DeviceScope scope(static_cast<int32_t>(table->device));
  if (scope.error() != cudaSuccess) return status_of(scope.error());
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
  *capturing = capture != cudaStreamCaptureStatusNone;
  if (error == cudaSuccess) {
    Paces copied = {};
    std::memcpy(copied.each, paces, static_cast<size_t>(num_paces) * sizeof *paces);
    copied.count = static_cast<int32_t>(num_paces);
    const auto kernel = has_spread != 0 ? collect_kernel : update_kernel;
    error = launch(*table, *grid, stream, kernel, *table, copied, advance, skip_nonfinite);
  }
  return status_of(error);
}

int32_t swafast_cuda_exchange(const swafast_table* table, int64_t wanted, const swafast_grid* grid, void* stream) {
  const DeviceScope scope(static_cast<int32_t>(table->device));
  if (scope.error() != cudaSuccess) return status_of(scope.error());
  return status_of(launch(*table, *grid, stream, exchange_kernel, *table, wanted));
}

int32_t swafast_cuda_draw(const swafast_table* table, const swafast_sample* sample, const swafast_grid* grid,
                          void* stream) {
  const DeviceScope scope(static_cast<int32_t>(table->device));
  if (scope.error() != cudaSuccess) return status_of(scope.error());
  return status_of(launch(*table, *grid, stream, draw_kernel, *table, *sample));
}

int32_t swafast_cuda_first_nonfinite(const swafast_table* table, const swafast_grid* grid, void* stream) {
  const DeviceScope scope(static_cast<int32_t>(table->device));
  if (scope.error() != cudaSuccess) return status_of(scope.error());
  const cudaError_t error =
      cudaMemsetAsync(&table->state->nonfinite, 0, sizeof table->state->nonfinite, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return status_of(error);
  return status_of(launch(*table, *grid, stream, nonfinite_kernel, *table));
}

}  // extern "C"
