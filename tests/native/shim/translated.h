// Kernels that tests/ptx made of PTX. A program that is not linked with any has no table.
#pragma once

#include <cstddef>

namespace shim {

// What one thread of a kernel runs. A table ends with a kernel that has no name.
struct Translated {
  const char* name;
  const void* source;  // the kernel that it runs in the place of, as a host compiler made it of the source, or nothing
  void (*run)(char* const* params);
  unsigned num_threads;  // of a block
  int num_params;
  const size_t* sizes;  // of each param
};
extern const Translated translated[] __attribute__((weak, visibility("hidden")));

}  // namespace shim
