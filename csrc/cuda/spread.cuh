// The spread of an average: an update moves its variance and writes a column of deviations, and a draw writes a point
// near the average into the param. Both read the average's planes, by the descriptor that follows that of the spread.
#pragma once

#include "../normal.h"
#include "kernels.cuh"

namespace swafast::cuda {

// An array of one run: the address of its first element, and the bytes of each. No bytes: it is not there.
struct Array {
  void* start;
  int32_t nbytes;

  __device__ __forceinline__ void* from(int64_t element) const { return at(start, element * nbytes); }
  __device__ __forceinline__ int64_t to_boundary() const {
    const uint32_t distance = (16u - (static_cast<uint32_t>(reinterpret_cast<uint64_t>(start)) & 15u)) & 15u;
    return nbytes == 0 ? 0 : distance >> (nbytes >> 1);  // divided by 1, 2 or 4
  }
};

// Elements before the first at which all arrays are on a 16-byte boundary; all of them, where there is none.
template <class... Arrays>
__device__ __forceinline__ int64_t common_head(int64_t numel, const Arrays&... arrays) {
  int64_t head = 0;
  ((head = arrays.to_boundary() > head ? arrays.to_boundary() : head), ...);
  const bool alike = ((arrays.nbytes == 0 || is_aligned(arrays.from(head))) && ...);
  return alike && head < numel ? head : numel;
}

// Bytes of an element of a param or a column.
__device__ __forceinline__ int32_t bytes_of(int32_t dtype) {
  return dtype == SWAFAST_FLOAT32 ? Float32::kBytes : BFloat16::kBytes;
}

// Round float32 to the dtype of a param or a column.
__device__ __forceinline__ uint32_t encoded(Float32, float value) { return bits_of(value); }
__device__ __forceinline__ uint32_t encoded(BFloat16, float value) { return to_bfloat16(value); }
__device__ __forceinline__ uint32_t encoded(Float16, float value) { return to_float16(value); }

template <class Dtype, int kNumel>
__device__ __forceinline__ Lanes<Dtype::kBytes, kNumel> lanes_of(const float (&values)[kNumel]) {
  Lanes<Dtype::kBytes, kNumel> lanes;
  SWAFAST_UNROLL
  for (int i = 0; i < kNumel; ++i) lanes.set(i, encoded(Dtype{}, values[i]));
  return lanes;
}

// The columns of a tensor, where a spread row's descriptor says.
struct Ring {
  const swafast_ring* ring;
  __device__ __forceinline__ explicit Ring(const swafast_descriptor& chunk)
      : ring(static_cast<const swafast_ring*>(chunk.planes[1])) {
    SWAFAST_ASSUME_GLOBAL(ring);
  }
  // Of a column, which is one for all chunks of the tensor: where this chunk begins in it.
  __device__ __forceinline__ Array column(const swafast_descriptor& chunk, int64_t k) const {
    const int32_t nbytes = bytes_of(ring->dtype);
    return {at(reinterpret_cast<void* const*>(ring + 1)[k], chunk.first_index * nbytes), nbytes};
  }
};

// The column that an update writes, where the block's chunk begins in it.
struct Column {
  Array array;
  int32_t dtype;
};

// What a block knows of an update beside its chunks.
struct Collected : Progress {
  Column column;
};

// An update of the spread of one element. `before` and `after` are the distances of the param from the average as it
// is, and as it will be, before that is rounded to its planes.
struct Distances {
  float before, after;
};
template <class Average>
__device__ __forceinline__ Distances distances_of(Average average, float param, const Blend& blend) {
  const auto newest = static_cast<Average>(param);
  return {static_cast<float>(newest - average), static_cast<float>(newest - lerp(average, param, blend))};
}

template <class Dtype, class Format, bool kWide>
struct Collect {
  // 16 bytes of arrays with two bytes an element. An average in float64 takes twice the registers, and so half of that.
  static constexpr bool kInDouble = std::is_same_v<decltype(Format::decode({})), double>;
  static constexpr int kNumel = !kWide ? 1 : kInDouble ? 4 : 8;
  static constexpr int kUnroll = 1;

  struct Group {
    Lanes<Dtype::kBytes, kNumel> param;
    Lanes<Format::kFirst, kNumel> first;
    Lanes<Format::kSecond, kNumel> second;
    Lanes<4, kNumel> variance;
  };

  // In shared memory, and read from there for each group: five addresses and a blend would not fit into
  // the registers.
  const swafast_descriptor* spread;
  const swafast_descriptor* average;
  const Column* column;
  const Blend* blend;
  int64_t offset;

  __device__ __forceinline__ int64_t element(int64_t index) const { return offset + index * kNumel; }

  // The average's own row reads param and planes next, from the caches.
  __device__ __forceinline__ void load(Group& group, int64_t index) const {
    forget_registers();
    load_param(group.param, at(spread->param, element(index) * Dtype::kBytes), 0);
    load_param(group.first, at(average->planes[0], element(index) * Format::kFirst), 0);
    load_param(group.second, at(average->planes[1], element(index) * Format::kSecond), 0);
    load_average(group.variance, at(spread->planes[0], element(index) * 4), 0);
  }
  __device__ __forceinline__ void store(const Group& group, int64_t index) const {
    Lanes<4, kNumel> new_variance;
    float deviations[kNumel];
    SWAFAST_UNROLL
    for (int i = 0; i < kNumel; ++i) {
      const auto average = Format::decode({group.first.get(i), group.second.get(i)});
      const Distances distances = distances_of(average, Dtype::value(group.param.get(i)), *blend);
      const float moved = lerp(float_of(group.variance.get(i)), distances.before * distances.after, *blend);
      // An average that is a copy of the newest model has no spread, whatever the numbers were.
      deviations[i] = blend->branch == Blend::kCopy ? 0.0f : distances.after;
      new_variance.set(i, bits_of(blend->branch == Blend::kCopy ? 0.0f : moved));
    }
    store_average(new_variance, at(spread->planes[0], element(index) * 4), 0);
    if (column->array.nbytes == 0) return;
    void* to = column->array.from(element(index));
    switch (column->dtype) {
      case SWAFAST_FLOAT32:
        return store_average(lanes_of<Float32>(deviations), to, 0);
      case SWAFAST_BFLOAT16:
        return store_average(lanes_of<BFloat16>(deviations), to, 0);
      default:
        return store_average(lanes_of<Float16>(deviations), to, 0);
    }
  }
};

// A chunk of a spread, and of its average.
struct SpreadChunk {
  const swafast_descriptor& spread;
  const swafast_descriptor& average;
  const Collected& progress;

  __device__ __forceinline__ int32_t dtype() const { return spread.dtype; }
  __device__ __forceinline__ int32_t format() const { return average.format; }
  template <class Dtype, class Format>
  __device__ __forceinline__ void run() const {
    const int64_t head = common_head(spread.numel, Array{spread.param, Dtype::kBytes}, Array{spread.planes[0], 4},
                                     Array{average.planes[0], Format::kFirst},
                                     Array{average.planes[1], Format::kSecond}, progress.column.array);
    swafast::cuda::run<Collect<Dtype, Format, true>, Collect<Dtype, Format, false>, true>(
        spread.numel, head, [&](auto mover, int64_t offset) {
          mover.spread = &spread;
          mover.average = &average;
          mover.blend = &progress.blends[spread.pace];
          mover.column = &progress.column;
          mover.offset = offset;
          return mover;
        });
  }
  __device__ __forceinline__ void copy() const {}  // bytes have no spread
};

// The average behind a spread is what the block moves next: wait until its descriptor is there.
__device__ __forceinline__ const swafast_descriptor& average_behind(const Feed& feed) {
  wait_for_copies();
  __syncthreads();
  return feed.coming;
}

struct CollectChunk {
  Collected& progress;
  const Feed& feed;
  __device__ __forceinline__ void operator()(const swafast_descriptor& chunk) const {
    if (chunk.format != SWAFAST_FORMAT_SPREAD) return update_chunk<true>(chunk, progress);
    if (feeds()) {
      // By the count that this update has found: one that is skipped leaves the next column the same.
      const Ring ring(chunk);
      const int32_t num_columns = ring.ring->num_columns;
      progress.column = {
          num_columns == 0 ? Array{nullptr, 0} : ring.column(chunk, progress.counts[chunk.pace] % num_columns),
          ring.ring->dtype};
    }
    with_kinds(SpreadChunk{chunk, average_behind(feed), progress});
  }
};

// As update_kernel, for tables in which averages have a spread.
__global__ void __launch_bounds__(kMostThreads)
    collect_kernel(const __grid_constant__ swafast_table table, const __grid_constant__ Paces paces, int64_t advance,
                   int32_t skip_nonfinite) {
  __shared__ Collected progress;
  __shared__ Feed feed;
  fetch_first(feed, table);
  begin(progress, feed, table, paces, advance, skip_nonfinite);
  if (!progress.stop) for_each_chunk<true>(feed, CollectChunk{progress, feed});
}

// A point near an average, into the param: what of it is not in the descriptors lies in the kernel's arguments. The
// format, the columns' dtype and the param's dtype are chosen between a group's loads, not around the loop: the body is
// long, and these branches are few beside it.
template <bool kWide>
struct Draw {
  static constexpr int kNumel = kWide ? 8 : 1;  // 16 bytes of the narrowest array but the remainder of `compact`
  static constexpr int kUnroll = 1;
  static constexpr int kColumns = 4;  // of which the loads are under way together

  struct Group {
    float values[kNumel];
  };

  const swafast_descriptor* spread;
  const swafast_descriptor* average;
  const swafast_sample* sample;
  int64_t offset;

  __device__ __forceinline__ int64_t element(int64_t index) const { return offset + index * kNumel; }

  template <class Format>
  __device__ __forceinline__ void load_in(Group& group, int64_t element) const {
    Lanes<Format::kFirst, kNumel> first;
    Lanes<Format::kSecond, kNumel> second;
    load_average(first, at(average->planes[0], element * Format::kFirst), 0);
    load_average(second, at(average->planes[1], element * Format::kSecond), 0);
    SWAFAST_UNROLL
    for (int i = 0; i < kNumel; ++i) {
      group.values[i] = static_cast<float>(Format::decode({first.get(i), second.get(i)}));
    }
  }
  __device__ __forceinline__ void load(Group& group, int64_t index) const {
    switch (average->format) {
      case SWAFAST_FORMAT_FLOAT32:
        return load_in<FormatFloat32>(group, element(index));
      case SWAFAST_FORMAT_EXACT:
        return load_in<FormatExact>(group, element(index));
      case SWAFAST_FORMAT_COMPACT:
        return load_in<FormatCompact>(group, element(index));
      case SWAFAST_FORMAT_COMPENSATED:
        return load_in<FormatCompensated>(group, element(index));
      case SWAFAST_FORMAT_HALF:
        return load_in<FormatHalf>(group, element(index));
      default:
        return load_in<FormatMirrored>(group, element(index));
    }
  }

  template <class Dtype, int kCount>
  __device__ __forceinline__ void add_some(float (&values)[kNumel], const Ring& ring, int32_t k,
                                           int64_t element) const {
    Lanes<Dtype::kBytes, kNumel> columns[kCount];
    SWAFAST_UNROLL
    for (int u = 0; u < kCount; ++u) load_average(columns[u], ring.column(*spread, k + u).from(element), 0);
    SWAFAST_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const float* coefficient = sample->coefficients + k + u;
      SWAFAST_ASSUME_GLOBAL(coefficient);
      SWAFAST_UNROLL
      for (int i = 0; i < kNumel; ++i) values[i] = fmaf(Dtype::value(columns[u].get(i)), *coefficient, values[i]);
    }
  }
  template <class Dtype>
  __device__ __forceinline__ void add_columns(float (&values)[kNumel], const Ring& ring, int64_t element) const {
    int32_t k = 0;
    SWAFAST_NO_UNROLL
    for (; k + kColumns <= sample->num_columns; k += kColumns) add_some<Dtype, kColumns>(values, ring, k, element);
    SWAFAST_NO_UNROLL
    for (; k < sample->num_columns; ++k) add_some<Dtype, 1>(values, ring, k, element);
  }

  // Four elements in a row share a block of random bits, where the group begins with one.
  __device__ __forceinline__ void draw_words(uint32_t (&words)[kNumel], int64_t element) const {
    const auto step = static_cast<uint64_t>(average->index_step);
    const uint64_t first = static_cast<uint64_t>(average->first_index) + static_cast<uint64_t>(element) * step;
    if (kWide && step == 1 && (first & 3u) == 0) {
      RandomBlock block = {};
      SWAFAST_UNROLL
      for (int i = 0; i < kNumel; ++i) {
        if (i % 4 == 0) block = random_block(average->key, sample->index, (first + i) >> 2);
        words[i] = block.words[i % 4];
      }
    } else {
      SWAFAST_UNROLL
      for (int i = 0; i < kNumel; ++i) words[i] = random_word(average->key, sample->index, first + i * step);
    }
  }
  __device__ __forceinline__ void add_noise(float (&values)[kNumel], int64_t element) const {
    Lanes<4, kNumel> variance;
    load_average(variance, at(spread->planes[0], element * 4), 0);
    uint32_t words[kNumel];
    draw_words(words, element);
    SWAFAST_UNROLL
    for (int i = 0; i < kNumel; ++i) {
      const float scale = sqrtf(float_of(variance.get(i))) * sample->noise;
      values[i] = fmaf(scale, normal_of(words[i]), values[i]);
    }
  }

  __device__ __forceinline__ void store(Group& group, int64_t index) const {
    const int64_t at_element = element(index);
    const Ring ring(*spread);
    if (sample->num_columns != 0) {
      switch (ring.ring->dtype) {
        case SWAFAST_FLOAT32:
          add_columns<Float32>(group.values, ring, at_element);
          break;
        case SWAFAST_BFLOAT16:
          add_columns<BFloat16>(group.values, ring, at_element);
          break;
        default:
          add_columns<Float16>(group.values, ring, at_element);
      }
    }
    if (sample->noise != 0.0f) add_noise(group.values, at_element);
    void* param = at(spread->param, at_element * bytes_of(spread->dtype));
    switch (spread->dtype) {
      case SWAFAST_FLOAT32:
        return store_param(lanes_of<Float32>(group.values), param, 0);
      case SWAFAST_BFLOAT16:
        return store_param(lanes_of<BFloat16>(group.values), param, 0);
      default:
        return store_param(lanes_of<Float16>(group.values), param, 0);
    }
  }
};

// Bytes of an element in a plane of an average.
__device__ __forceinline__ int32_t first_bytes_of(int32_t format) {
  return format == SWAFAST_FORMAT_FLOAT32 || format == SWAFAST_FORMAT_COMPENSATED ? 4 : 2;
}
__device__ __forceinline__ int32_t second_bytes_of(int32_t format) {
  switch (format) {
    case SWAFAST_FORMAT_EXACT:
      return FormatExact::kSecond;
    case SWAFAST_FORMAT_COMPACT:
      return FormatCompact::kSecond;
    case SWAFAST_FORMAT_COMPENSATED:
    case SWAFAST_FORMAT_MIRRORED:
      return 4;
    default:
      return 0;
  }
}

struct DrawChunk {
  const Feed& feed;
  const swafast_sample& sample;

  // Elements before the first at which everything is on a boundary, as of a run.
  __device__ __forceinline__ int64_t head_of(const swafast_descriptor& chunk, const swafast_descriptor& average) const {
    const Ring ring(chunk);
    const Array param = {chunk.param, bytes_of(chunk.dtype)}, variance = {chunk.planes[0], 4};
    const Array first = {average.planes[0], first_bytes_of(average.format)};
    const Array second = {average.planes[1], second_bytes_of(average.format)};
    const Array column = sample.num_columns != 0 ? ring.column(chunk, 0) : Array{nullptr, 0};
    const int64_t head = common_head(chunk.numel, param, variance, first, second, column);
    bool alike = true;
    SWAFAST_NO_UNROLL
    for (int32_t k = 1; k < sample.num_columns; ++k) alike &= is_aligned(ring.column(chunk, k).from(head));
    return alike ? head : chunk.numel;
  }
  __device__ __forceinline__ void operator()(const swafast_descriptor& chunk) const {
    if (chunk.format != SWAFAST_FORMAT_SPREAD) return;
    const swafast_descriptor& average = average_behind(feed);
    run<Draw<true>, Draw<false>, true>(chunk.numel, head_of(chunk, average), [&](auto mover, int64_t offset) {
      mover.spread = &chunk;
      mover.average = &average;
      mover.sample = &sample;
      mover.offset = offset;
      return mover;
    });
  }
};

__global__ void __launch_bounds__(kMostThreads)
    draw_kernel(const __grid_constant__ swafast_table table, const __grid_constant__ swafast_sample sample) {
  __shared__ Feed feed;
  fetch_first(feed, table);
  if (threadIdx.x == 0) claim_second(feed, table);
  wait_for_copies();
  __syncthreads();
  for_each_chunk<true>(feed, DrawChunk{feed, sample});
}

}  // namespace swafast::cuda
