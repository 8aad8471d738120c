// A CUDA driver that runs nothing: Triton binds, loads and launches its kernels through it as on a GPU, and it counts.
//
// It stands where libcuda.so.1 would (TRITON_LIBCUDA_PATH) for an H200 with nothing on it. A function that is not here
// fails as one that the driver does not have. What a test may read or set are the null_ variables, by name.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

// cuda.h names the version of a function by a macro; a driver exports the function under both names.
#undef cuGetProcAddress

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED long long null_launches = 0;           // of kernels
EXPORTED long long null_modules = 0;            // loaded
EXPORTED long long null_loaded_in_capture = 0;  // of these, while null_capturing, which a driver refuses
EXPORTED int null_capturing = 0;                // every stream is
EXPORTED long long null_blocks = 0;             // of the last launch
EXPORTED long long null_threads = 0;            // of each of its blocks
EXPORTED char null_kernel[64] = "";             // that it launched

namespace {

int context = 0;
CUcontext current = nullptr;

CUresult launched(CUfunction function, unsigned blocks, unsigned threads) {
  null_launches += 1;
  null_blocks = blocks;
  null_threads = threads;
  std::snprintf(null_kernel, sizeof null_kernel, "%s", reinterpret_cast<const char*>(function));
  return CUDA_SUCCESS;
}

CUresult not_here() { return CUDA_ERROR_NOT_SUPPORTED; }

}  // namespace

EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return index == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 232448;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    default:
      *value = 1;
  }
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice) {
  *made = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* got) {
  *got = current;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxSetCurrent(CUcontext wanted) {
  current = wanted;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORTED CUresult cuPointerGetAttribute(void*, CUpointer_attribute, CUdeviceptr) { return CUDA_ERROR_INVALID_VALUE; }
EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  null_modules += 1;
  null_loaded_in_capture += null_capturing;
  *module = static_cast<CUmodule>(const_cast<void*>(image));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 64
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORTED CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the driver that runs nothing";
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = null_capturing != 0 ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  return launched(function, config->gridDimX, config->blockDimX);
}
EXPORTED CUresult cuLaunchKernel(CUfunction function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                                 unsigned, unsigned, CUstream, void**, void**) {
  return launched(function, blocks, threads);
}

EXPORTED CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                                      CUdriverProcAddressQueryResult* result) {
  if (result != nullptr) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  for (const char* version : {"_v3", "_v2", ""}) {
    *function = dlsym(RTLD_DEFAULT, (std::string(name) + version).c_str());
    if (*function != nullptr) return CUDA_SUCCESS;
  }
  *function = reinterpret_cast<void*>(not_here);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
