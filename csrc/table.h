// What the entries of a table may be: the one place that knows which dtypes go with which formats.
#pragma once

#include "swafast.h"

namespace swafast {

// Whether an update serves this dtype and format.
inline bool served(const swafast_tensor& tensor) {
  if (tensor.dtype < 0 || tensor.dtype >= SWAFAST_NUM_DTYPES) return false;
  if (tensor.format < 0 || tensor.format >= SWAFAST_NUM_FORMATS) return false;
  return (tensor.dtype == SWAFAST_BYTES) == (tensor.format == SWAFAST_FORMAT_COPIED);
}

// Whether param and planes[0] hold the same dtype, so that their bytes can change places.
inline bool exchangeable(const swafast_tensor& tensor) {
  switch (tensor.format) {
    case SWAFAST_FORMAT_FLOAT32:
    case SWAFAST_FORMAT_COMPENSATED:
      return tensor.dtype == SWAFAST_FLOAT32;
    case SWAFAST_FORMAT_EXACT:
    case SWAFAST_FORMAT_COMPACT:
    case SWAFAST_FORMAT_HALF:
      return tensor.dtype == SWAFAST_BFLOAT16;
    case SWAFAST_FORMAT_MIRRORED:
      return tensor.dtype == SWAFAST_FLOAT16;
    default:
      return tensor.format == SWAFAST_FORMAT_COPIED && tensor.dtype == SWAFAST_BYTES;
  }
}

// Whether the rows that a tensor says follow it are there, and average the same elements.
inline bool has_followers(const swafast_tensor* tensors, int64_t num_tensors, int64_t index) {
  const swafast_tensor& first = tensors[index];
  if (first.followers < 0 || first.followers >= num_tensors - index) return false;
  for (int64_t i = index + 1; i <= index + first.followers; ++i) {
    const swafast_tensor& next = tensors[i];
    if (next.param != first.param || next.numel != first.numel || next.dtype != first.dtype) return false;
  }
  return true;
}

inline int32_t check(const swafast_tensor* tensors, int64_t num_tensors, bool exchange) {
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (!(exchange ? exchangeable(tensors[i]) : served(tensors[i]))) return SWAFAST_BAD_TENSOR;
    if (!has_followers(tensors, num_tensors, i)) return SWAFAST_BAD_TENSOR;
  }
  return SWAFAST_OK;
}

inline int32_t check_paces(const swafast_tensor* tensors, int64_t num_tensors, int64_t num_paces) {
  if (num_paces < 1 || num_paces > SWAFAST_MAX_PACES) return SWAFAST_BAD_PACE;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (tensors[i].pace < 0 || tensors[i].pace >= num_paces) return SWAFAST_BAD_PACE;
  }
  return SWAFAST_OK;
}

}  // namespace swafast
