// Stands where CUDA's own header would, so that a host compiler builds csrc/cuda/launch.cu as it is and its kernels run
// on a CPU: `-I tests/native/shim`. Linked with what tests/ptx makes of nvcc's PTX, it launches that in their place.
//
// Two machines run the blocks and threads, of which the include path chooses one. A misaligned access ends the program,
// as it would a GPU's.
//   shim/machine.h: blocks run one after another, so that what one of them writes too early is there for all that come
//     after it. The threads of a block are fibers: they run one after another as far as the next barrier.
//   at_once/machine.h: all blocks at once, each thread one of the system's. ThreadSanitizer sees their races.
//
// While a graph is being captured, a call fails that is not in kAllowedInCapture, and so does the launch of a kernel
// that is not loaded yet: CUDA would load it there. From then on the capture has failed, whoever ignores the error:
// nothing more goes into it, and shim_replay() ends the program.
//
// What a test may set, from C++ or by name from a shared library, are the shim_ variables of device.h.
#pragma once

#include <machine.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "translated.h"

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
  shim::check_alignment(address);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
// One more, and 0 after the limit.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  shim::check_alignment(address);
  unsigned before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, before >= limit ? 0 : before + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return before;
}
template <class T>
inline T atomicMax(T* address, T value) {
  shim::check_alignment(address);
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value &&
         !__atomic_compare_exchange_n(address, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline void __threadfence() {}
inline void __syncthreads() { shim::wait_at_barrier(); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

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

constexpr const char* kAllowedInCapture[] = {"cudaGetDevice", "cudaSetDevice", "cudaStreamIsCapturing",
                                             "cudaMemsetAsync", "cudaLaunchKernelEx"};

inline cudaError_t refuse_in_capture(const char* what) {
  shim_refused = what;
  return remember(cudaErrorStreamCaptureUnsupported);
}

// The error with which a call of this function fails before it does anything, or none.
inline cudaError_t refusal(const char* function) {
  const auto is_this = [=](const char* name) { return std::strcmp(name, function) == 0; };
  if (shim_failing != nullptr && is_this(shim_failing)) return remember(cudaErrorLaunchOutOfResources);
  const bool allowed = std::any_of(std::begin(kAllowedInCapture), std::end(kAllowedInCapture), is_this);
  return shim_capturing != 0 && !allowed ? refuse_in_capture(function) : cudaSuccess;
}

// Kernels that are on a device, as (device, kernel).
SHIM_HIDDEN std::set<std::pair<int, const void*>>& loaded() {
  static auto* made = new std::set<std::pair<int, const void*>>;
  return *made;
}

template <class Kernel>
cudaError_t load(Kernel* kernel) {
  const bool is_new = loaded().emplace(calls().device, reinterpret_cast<const void*>(kernel)).second;
  return is_new && shim_capturing != 0 ? refuse_in_capture("a kernel that is not loaded") : cudaSuccess;
}

// Now, or when the graph is launched.
inline cudaError_t run_on_stream(std::function<void()> work) {
  if (shim_capturing != 0) {
    if (shim_refused != nullptr) return remember(cudaErrorStreamCaptureInvalidated);
    captured().push_back(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

// What a thread of a launch runs.
template <class... Expected>
std::function<void()> body_of(void (*kernel)(Expected...), unsigned num_threads, Expected... arguments) {
  if (translated == nullptr) return [=] { kernel(arguments...); };
  const size_t sizes[] = {sizeof(Expected)...};
  for (const Translated* made = translated; made->name != nullptr; ++made) {
    if (made->source != reinterpret_cast<const void*>(kernel)) continue;
    const size_t count = sizeof...(Expected);
    if (made->num_params != count || std::memcmp(made->sizes, sizes, sizeof sizes) != 0) {
      fault("the PTX has other params than the source", made->name);
    }
    if (num_threads > made->num_threads) fault("the PTX is for narrower blocks", made->name);
    return [made, kept = std::tuple<Expected...>(arguments...)]() mutable {
      std::apply(
          [made](Expected&... each) {
            char* params[] = {reinterpret_cast<char*>(&each)...};
            made->run(params);
          },
          kept);
    };
  }
  fault("no PTX for a kernel at", reinterpret_cast<const void*>(kernel));
}

}  // namespace shim

extern "C" {
SHIM_SETTING int shim_current_device() { return shim::calls().device; }
SHIM_SETTING int shim_pending_error() { return shim::calls().last_error; }
// Run what was captured, as launching the graph would, and keep it; or forget it.
SHIM_SETTING void shim_replay() {
  if (shim_refused != nullptr)
    shim::fault(("the capture has failed for " + std::string(shim_refused)).c_str(), nullptr);
  for (const auto& work : shim::captured()) work();
}
SHIM_SETTING void shim_forget_captured() {
  shim::captured().clear();
  shim_refused = nullptr;
}
// Have no device any kernel, as in a new process.
SHIM_SETTING void shim_unload_kernels() { shim::loaded().clear(); }
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
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    default:
      return "cudaErrorLaunchOutOfResources";
  }
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  if (error == cudaErrorStreamCaptureInvalidated) return "operation failed due to a previous error during capture";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "planted by the shim";
}

inline cudaError_t cudaGetLastError() { return std::exchange(shim::calls().last_error, cudaSuccess); }

#define SHIM_BEGIN() \
  if (const cudaError_t error = shim::refusal(__func__)) return error

inline cudaError_t cudaGetDevice(int* device) {
  SHIM_BEGIN();
  *device = shim::calls().device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  SHIM_BEGIN();
  if (device < 0 || device >= shim::kDevices) return shim::remember(cudaErrorInvalidDevice);
  shim::calls().device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  SHIM_BEGIN();
  if (attribute != cudaDevAttrMultiProcessorCount || device != shim::calls().device) {
    return shim::remember(cudaErrorInvalidValue);
  }
  *value = shim::kMultiprocessors;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel* kernel) {
  SHIM_BEGIN();
  return shim::load(kernel);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, Kernel, int num_threads, size_t) {
  SHIM_BEGIN();
  if (num_threads < 1 || num_threads > 1024) return shim::remember(cudaErrorInvalidValue);
  // So many of 256 threads, and one of whatever is wider.
  *num_blocks = shim_fits == 0 ? 0 : num_threads > 256 ? 1 : shim::kBlocksPerMultiprocessor;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  SHIM_BEGIN();
  *status = shim_capturing != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* address, int value, size_t nbytes, cudaStream_t) {
  SHIM_BEGIN();
  return shim::run_on_stream([=] { std::memset(address, value, nbytes); });
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
  SHIM_BEGIN();
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x < 1 || grid.y != 1 || grid.z != 1 || block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) {
    return shim::remember(cudaErrorInvalidConfiguration);
  }
  if (const cudaError_t error = shim::load(kernel)) return error;
  shim_num_launches += 1;
  shim_last_blocks = grid.x;
  shim_last_threads = block.x;
  shim_last_device = shim::calls().device;
  shim_last_stream = config->stream;
  const std::function<void()> body = shim::body_of<Expected...>(kernel, block.x, arguments...);
  return shim::run_on_stream([=] { shim::run_grid(grid, block, body); });
}
