// A second device for tests: torch's PrivateUse1, whose memory is the host's and whose operators are those of the CPU.
// Tensors on it cannot be mixed with tensors on the CPU, as those on a GPU cannot.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

void release(void* memory) { std::free(memory); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* memory = nbytes > 0 ? std::aligned_alloc(64, (nbytes + 63) / 64 * 64) : nullptr;
    return {memory, memory, &release, c10::Device(c10::kPrivateUse1, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t nbytes) const override { std::memcpy(to, from, nbytes); }
};

Memory memory;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &memory);
C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::PrivateUse1>);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(at::kPrivateUse1, 0); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::StorageImpl* own = storage.unsafeGetStorageImpl();
    c10::DataPtr grown = memory.allocate(nbytes);
    if (own->nbytes() > 0 && nbytes > 0) std::memcpy(grown.get(), own->data(), std::min(nbytes, own->nbytes()));
    own->set_data_ptr(std::move(grown));
    own->set_nbytes(nbytes);
  }
};

const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// Returns the same memory as a tensor on the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (tensor.device().type() != c10::kPrivateUse1) return tensor;
  auto keep = [storage = tensor.storage()](void*) {};
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), keep, tensor.options().device(at::kCPU));
}

Tensor empty(SymIntArrayRef shape, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(shape), &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef shape, SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides), &memory,
                                           keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel() > 0) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor as_strided(const Tensor& tensor, SymIntArrayRef shape, SymIntArrayRef strides, std::optional<SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides),
                                           start);
}

Tensor view(const Tensor& tensor, SymIntArrayRef shape) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(shape));
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef shape, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(shape), format);
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef shape, SymIntArrayRef strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(shape), C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, SymInt offset, SymIntArrayRef shape, SymIntArrayRef strides) {
  return at::cpu::set_(tensor, storage, offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(shape),
                       C10_AS_INTARRAYREF_SLOW(strides));
}

at::Scalar item(const Tensor& tensor) { return on_cpu(tensor).item(); }

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("as_strided", as_strided);
  library.impl("resize_", resize);
  library.impl("view", view);
  library.impl("view.dtype", at::native::view_dtype);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("_local_scalar_dense", item);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace
