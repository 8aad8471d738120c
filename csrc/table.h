// What the entries of a table may be: the one place that knows which dtypes go with which formats.
#pragma once

#include "swafast.h"

namespace swafast {

// Whether an update serves this dtype and format, of an average or of a spread.
inline bool served(const swafast_tensor& tensor) {
  if (tensor.dtype < 0 || tensor.dtype >= SWAFAST_NUM_DTYPES) return false;
  if (tensor.format < 0 || tensor.format >= SWAFAST_NUM_FORMATS) return false;
  return (tensor.dtype == SWAFAST_BYTES) == (tensor.format == SWAFAST_FORMAT_COPIED);
}

inline bool is_spread(const swafast_tensor& tensor) { return tensor.format == SWAFAST_FORMAT_SPREAD; }

// Whether the row after a spread, one of its followers, is its average. has_followers sees that it is of the same
// param.
inline bool has_average(const swafast_tensor& spread) {
  if (spread.followers < 1) return false;
  const swafast_tensor& average = (&spread)[1];
  return !is_spread(average) && average.pace == spread.pace;
}

// Whether a ring has no more columns than it says, in a dtype that they may have.
inline bool is_ring(const swafast_ring& ring) {
  return ring.num_columns >= 0 && ring.dtype >= 0 && ring.dtype < SWAFAST_BYTES;
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
    if (is_spread(tensors[i]) && !has_average(tensors[i])) return SWAFAST_BAD_TENSOR;
  }
  return SWAFAST_OK;
}

// Whether a table has spreads and their averages alone, one of each param: what a draw takes.
inline int32_t check_draw(const swafast_tensor* tensors, int64_t num_tensors) {
  for (int64_t i = 0; i < num_tensors; ++i) {
    const bool leads = i % 2 == 0;
    if (is_spread(tensors[i]) != leads || tensors[i].followers != (leads ? 1 : 0)) return SWAFAST_BAD_TENSOR;
  }
  return check(tensors, num_tensors, false);
}

inline int32_t check_paces(const swafast_tensor* tensors, int64_t num_tensors, int64_t num_paces) {
  if (num_paces < 1 || num_paces > SWAFAST_MAX_PACES) return SWAFAST_BAD_PACE;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (tensors[i].pace < 0 || tensors[i].pace >= num_paces) return SWAFAST_BAD_PACE;
  }
  return SWAFAST_OK;
}

}  // namespace swafast
