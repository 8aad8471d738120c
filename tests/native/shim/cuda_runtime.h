// Stands where CUDA's own header would, so that a host compiler builds csrc/cuda/launch.cu as it is and its kernels run
// on a CPU: `-I tests/native/shim`.
//
// Blocks run one after another, so that what one of them writes too early is there for all that come after it. The
// threads of a block are fibers: they run one after another as far as the next barrier. Shared memory starts out as
// garbage in every block. A misaligned access ends the program, as it would a GPU's.
//
// What a test may set, from C++ or by name from a shared library, are the shim_ variables of machine.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "machine.h"

#define CUDART_VERSION 13000

// 16 bytes that are copied to and from addresses on a boundary of 16 alone.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  uint4(unsigned x_, unsigned y_, unsigned z_, unsigned w_) : x(x_), y(y_), z(z_), w(w_) {}
  uint4(const uint4& other) {
    shim::check_alignment(&other);
    x = other.x, y = other.y, z = other.z, w = other.w;
  }
  uint4& operator=(const uint4& other) {
    shim::check_alignment(&other);
    shim::check_alignment(this);
    x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
inline T __ldg(const T* address) {
  return shim::load(address);
}
template <class T>
inline T __ldcs(const T* address) {
  return shim::load(address);
}
template <class T>
inline T __ldcg(const T* address) {
  return shim::load(address);
}
template <class T>
inline void __stcs(T* address, T value) {
  shim::store(address, value);
}
template <class T>
inline void __stcg(T* address, T value) {
  shim::store(address, value);
}
template <class T>
inline T atomicAdd(T* address, T value) {
  const T before = shim::load(address);
  shim::store(address, static_cast<T>(before + value));
  return before;
}
// One more, and 0 after the limit.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned before = shim::load(address);
  shim::store(address, before >= limit ? 0 : before + 1);
  return before;
}
template <class T>
inline T atomicMax(T* address, T value) {
  const T before = shim::load(address);
  shim::store(address, before < value ? value : before);
  return before;
}
inline void __threadfence() {}
inline void __syncthreads() { shim::wait_at_barrier(); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace shim {

struct Calls {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
};

// Of the calling thread, as CUDA has them.
SHIM_HIDDEN Calls& calls() {
  static thread_local Calls made;
  return made;
}

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) calls().last_error = error;
  return error;
}

inline bool fails(const char* function) { return shim_failing != nullptr && std::strcmp(shim_failing, function) == 0; }

// Now, or when the graph is launched.
inline cudaError_t run_on_stream(std::function<void()> work) {
  if (shim_capturing != 0) {
    machine().captured.push_back(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

}  // namespace shim

extern "C" {
SHIM_SETTING int shim_current_device() { return shim::calls().device; }
SHIM_SETTING int shim_pending_error() { return shim::calls().last_error; }
// Run what was captured, as launching the graph would, and keep it; or forget it.
SHIM_SETTING void shim_replay() {
  for (const auto& work : shim::machine().captured) work();
}
SHIM_SETTING void shim_forget_captured() { shim::machine().captured.clear(); }
}

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "cudaErrorLaunchOutOfResources";
  }
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "planted by the shim";
}

inline cudaError_t cudaGetLastError() { return std::exchange(shim::calls().last_error, cudaSuccess); }

#define SHIM_FAIL_IF_ASKED() \
  if (shim::fails(__func__)) return shim::remember(cudaErrorLaunchOutOfResources)

inline cudaError_t cudaGetDevice(int* device) {
  SHIM_FAIL_IF_ASKED();
  *device = shim::calls().device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  SHIM_FAIL_IF_ASKED();
  if (device < 0 || device >= shim::kDevices) return shim::remember(cudaErrorInvalidDevice);
  shim::calls().device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  SHIM_FAIL_IF_ASKED();
  if (attribute != cudaDevAttrMultiProcessorCount || device != shim::calls().device) {
    return shim::remember(cudaErrorInvalidValue);
  }
  *value = shim::kMultiprocessors;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, Kernel, int num_threads, size_t) {
  SHIM_FAIL_IF_ASKED();
  if (num_threads < 1 || num_threads > 1024) return shim::remember(cudaErrorInvalidValue);
  // So many of 256 threads, and one of whatever is wider.
  *num_blocks = num_threads > 256 ? 1 : shim::kBlocksPerMultiprocessor;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  SHIM_FAIL_IF_ASKED();
  *status = shim_capturing != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t nbytes, cudaStream_t) {
  SHIM_FAIL_IF_ASKED();
  return shim::run_on_stream([=] { std::memset(address, value, nbytes); });
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
  SHIM_FAIL_IF_ASKED();
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x < 1 || grid.y != 1 || grid.z != 1 || block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) {
    return shim::remember(cudaErrorInvalidConfiguration);
  }
  shim_num_launches += 1;
  shim_last_blocks = grid.x;
  shim_last_threads = block.x;
  shim_last_device = shim::calls().device;
  shim_last_stream = config->stream;
  return shim::run_on_stream([=] { shim::run_grid(grid, block, [&] { kernel(arguments...); }); });
}
