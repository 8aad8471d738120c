// The spread of an average: how its variance and its deviations move, and how samples are drawn.
//
// Elements of every dtype and format become float32 in windows that stay in the first-level cache. So each step is
// written for one dtype or one format, and not for each way to combine those of param, average and columns. The
// arithmetic stands in plain loops, which compilers make vectors of.
#pragma once

#include <type_traits>

#include "../normal.h"
#include "span.h"
#include "sums.h"

namespace swafast::cpu {
namespace {

// Elements of a window. A multiple of 4: all windows of a run begin in the same lane of a block of random words.
constexpr int64_t kSpreadWindow = 1024;

template <class Body>
void with_dtype(int32_t dtype, const Body& body) {
  switch (dtype) {
    case SWAFAST_FLOAT32:
      return body(Float32{});
    case SWAFAST_BFLOAT16:
      return body(BFloat16{});
    default:
      return body(Float16{});
  }
}

template <class Body>
void with_format(int32_t format, const Body& body) {
  switch (format) {
    case SWAFAST_FORMAT_FLOAT32:
      return body(FormatFloat32{});
    case SWAFAST_FORMAT_EXACT:
      return body(FormatExact{});
    case SWAFAST_FORMAT_MIRRORED:
      return body(FormatMirrored{});
    case SWAFAST_FORMAT_COMPACT:
      return body(FormatCompact{});
    case SWAFAST_FORMAT_COMPENSATED:
      return body(FormatCompensated{});
    default:
      return body(FormatHalf{});
  }
}

template <class Body>
void for_each_window(int64_t numel, const Body& body) {
  for (int64_t done = 0; done < numel; done += kSpreadWindow) {
    body(done, numel - done < kSpreadWindow ? numel - done : kSpreadWindow);
  }
}

// The elements as float32: where they are, or in the window.
template <class V, class Element>
const float* widened(const void* elements, int64_t begin, int64_t numel, float* window) {
  const auto* first = static_cast<const typename Element::storage*>(elements) + begin;
  if constexpr (std::is_same_v<Element, Float32>) {
    return first;
  } else {
    widen_elements<V, Element>(first, window, numel);
    return window;
  }
}

// The average as float32. That of `compensated` is its first plane: the compensation is what rounding leaves over.
template <class V, class Format>
const float* decoded(void* const (&planes)[2], int64_t begin, int64_t numel, float* window) {
  const auto* plane0 = static_cast<const typename Format::plane0*>(planes[0]);
  if constexpr (std::is_same_v<typename Format::plane0, float>) {
    return plane0 + begin;
  } else {
    const auto* plane1 = static_cast<const typename Format::plane1*>(planes[1]);
    int64_t i = 0;
    if constexpr (V::kLanes > 1) {
      for (; i + V::kLanes <= numel; i += V::kLanes) {
        V::store_average(FormatFloat32{}, window, nullptr, i, V::load_average(Format{}, plane0, plane1, begin + i));
      }
    }
    for (; i < numel; ++i) window[i] = Format::load(plane0, plane1, begin + i);
    return window;
  }
}

// Rounded to nearest. The values may change in what no one reads.
template <class V, class Element>
void narrow(float* values, int64_t numel, void* elements, int64_t begin) {
  auto* first = static_cast<typename Element::storage*>(elements) + begin;
  if constexpr (std::is_same_v<Element, Float32>) {
    memcpy(first, values, static_cast<size_t>(numel) * sizeof(float));
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    for (int64_t i = 0; i < numel; ++i) first[i] = to_bfloat16(values[i]);
  } else {
    int64_t i = 0;
    if constexpr (V::kLanes > 1) {
      for (; i + V::kLanes <= numel; i += V::kLanes) {
        V::store_average(FormatMirrored{}, first, values, i, V::load(Float32{}, values + i));
      }
    }
    for (; i < numel; ++i) first[i] = to_float16(values[i]);
  }
}

// How far the param is from the average before it moves, and from the average after that, before it is rounded.
template <class V, class Param, class Format>
void measure(const SpreadRun& run, int64_t begin, int64_t numel, const Blend& shared, float* __restrict distances,
             float* __restrict deviations) {
  const Blend blend = shared;  // no store can change this one
  float params[kSpreadWindow], averages[kSpreadWindow];
  const float* newest = widened<V, Param>(run.param, begin, numel, params);
  const float* old = decoded<V, Format>(run.planes, begin, numel, averages);
  if constexpr (Format::kPrecise) {
    const float* compensations = static_cast<const float*>(run.planes[1]) + begin;
    for (int64_t i = 0; i < numel; ++i) {
      const double average = decode_compensated({old[i], compensations[i]});
      const double param = static_cast<double>(newest[i]);
      distances[i] = static_cast<float>(param - average);
      deviations[i] = static_cast<float>(param - lerp(average, newest[i], blend));
    }
  } else {
    for (int64_t i = 0; i < numel; ++i) {
      distances[i] = newest[i] - old[i];
      deviations[i] = newest[i] - lerp(old[i], newest[i], blend);
    }
  }
}

inline void move_variance(float* __restrict variance, const float* __restrict distances,
                          const float* __restrict deviations, int64_t numel, const Blend& shared) {
  const Blend blend = shared;
  for (int64_t i = 0; i < numel; ++i) variance[i] = lerp(variance[i], distances[i] * deviations[i], blend);
}

template <class V>
void spread_span(const SpreadRun& run, int64_t column, const Blend& blend) {
  void* deviations_to = run.columns == nullptr ? nullptr : run.columns[column];
  for_each_window(run.numel, [&](int64_t begin, int64_t numel) {
    alignas(64) float distances[kSpreadWindow], deviations[kSpreadWindow];
    if (blend.branch == Blend::kCopy) {  // the average becomes the param itself
      memset(run.variance + begin, 0, static_cast<size_t>(numel) * sizeof(float));
      memset(deviations, 0, sizeof deviations);
    } else {
      with_dtype(run.dtype, [&](auto param) {
        with_format(run.format, [&](auto format) {
          measure<V, decltype(param), decltype(format)>(run, begin, numel, blend, distances, deviations);
        });
      });
      move_variance(run.variance + begin, distances, deviations, numel, blend);
    }
    if (deviations_to == nullptr) return;
    with_dtype(run.column_dtype, [&](auto element) {
      narrow<V, decltype(element)>(deviations, numel, deviations_to, run.offset + begin);
    });
  });
}

template <class V, class Element>
void add_columns(const SpreadRun& run, int64_t begin, int64_t numel, const swafast_sample& sample,
                 float* __restrict point) {
  constexpr int32_t kAtOnce = 4;  // the point is read and written once for all of them
  alignas(64) float windows[kAtOnce][kSpreadWindow];
  const float* deviations[kAtOnce];
  for (int32_t k = 0; k < sample.num_columns; k += kAtOnce) {
    const int32_t count = sample.num_columns - k < kAtOnce ? sample.num_columns - k : kAtOnce;
    for (int32_t j = 0; j < count; ++j) {
      deviations[j] = widened<V, Element>(run.columns[k + j], run.offset + begin, numel, windows[j]);
    }
    const float* c = sample.coefficients + k;
    if (count == kAtOnce) {
      const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
      const float *d0 = deviations[0], *d1 = deviations[1], *d2 = deviations[2], *d3 = deviations[3];
      for (int64_t i = 0; i < numel; ++i) {
        point[i] = fmaf(c3, d3[i], fmaf(c2, d2[i], fmaf(c1, d1[i], fmaf(c0, d0[i], point[i]))));
      }
      continue;
    }
    for (int32_t j = 0; j < count; ++j) {
      const float coefficient = c[j];
      const float* deviation = deviations[j];
      for (int64_t i = 0; i < numel; ++i) point[i] = fmaf(coefficient, deviation[i], point[i]);
    }
  }
}

// `first` is the index in the whole param of the first of these elements.
inline void add_noise(const float* variance, int64_t numel, const swafast_sample& sample, const NormalRun& normals,
                      uint64_t first, float* __restrict point) {
  alignas(64) uint32_t words[kSpreadWindow + 4];
  const uint32_t index = sample.index;
  const uint64_t key = normals.key, step = normals.index_step;
  int64_t lane = 0;
  if (step == 1) {
    lane = static_cast<int64_t>(first & 3);
    // The indices of a run have the same upper 32 bits, so the lower word of the block never wraps.
    const auto low = static_cast<uint32_t>(first >> 2);
    const uint32_t high = upper_word(first >> 2);
    for (uint32_t b = 0; 4 * static_cast<int64_t>(b) < lane + numel; ++b) {
      const RandomBlock block = philox(low + b, high, index, kElements, key);
      for (uint32_t j = 0; j < 4; ++j) words[4 * b + j] = block.words[j];
    }
  } else {
    for (int64_t i = 0; i < numel; ++i) words[i] = random_word(key, index, first + static_cast<uint64_t>(i) * step);
  }
  const uint32_t* bits = words + lane;
  const float noise = sample.noise;
  for (int64_t i = 0; i < numel; ++i) point[i] = fmaf(sqrtf(variance[i]) * noise, normal_of(bits[i]), point[i]);
}

template <class V>
void draw_span(const SpreadRun& run, const swafast_sample& sample, const NormalRun& normals) {
  for_each_window(run.numel, [&](int64_t begin, int64_t numel) {
    alignas(64) float point[kSpreadWindow];
    with_format(run.format, [&](auto format) {
      const float* average = decoded<V, decltype(format)>(run.planes, begin, numel, point);
      if (average != point) memcpy(point, average, static_cast<size_t>(numel) * sizeof(float));
    });
    with_dtype(run.column_dtype,
               [&](auto element) { add_columns<V, decltype(element)>(run, begin, numel, sample, point); });
    if (sample.noise != 0.0f) {
      const uint64_t first = normals.first_index + static_cast<uint64_t>(begin) * normals.index_step;
      add_noise(run.variance + begin, numel, sample, normals, first, point);
    }
    with_dtype(run.dtype, [&](auto param) { narrow<V, decltype(param)>(point, numel, run.param, begin); });
  });
}

template <class V>
Kernels with_spread(Kernels kernels) {
  kernels.spread = spread_span<V>;
  kernels.draw = draw_span<V>;
  return kernels;
}

}  // namespace
}  // namespace swafast::cpu
