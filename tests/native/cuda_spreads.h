// Averages with a spread: an update moves the variance and writes a column, and a draw writes a sample into the param.
// The normal numbers are those of csrc/normal.h, which tests/test_normals.py holds to Python's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda_launch.h"
#include "normal.h"
#include "oracle.h"
#include "tensors.h"

// Round to nearest, ties to even, in units of the last place kept.
inline uint32_t rounded_to(int32_t dtype, float value) {
  const uint32_t bits = oracle::bits_of(value);
  if (dtype == SWAFAST_FLOAT32) return bits;
  if (dtype == SWAFAST_FLOAT16) return oracle::to_float16(value);
  const uint32_t count = bits / 65536u, rest = bits % 65536u;
  if (oracle::is_nan(bits)) return count | 0x40u;
  return rest > 32768u || (rest == 32768u && count % 2 == 1) ? count + 1 : count;
}

struct SpreadTensor {
  Tensor tensor;
  int32_t column_dtype;
  Guarded variance;
  std::vector<Guarded> columns;
  std::vector<uint64_t> ring;

  SpreadTensor(int32_t dtype, int32_t format, int64_t numel, int64_t shift, int32_t num_columns, int32_t of_columns)
      : tensor(dtype, format, numel, alike(shift)), column_dtype(of_columns), variance(numel * 4, shift * 4, 0x3c) {
    const int64_t itemsize = param_itemsize(of_columns);
    // Half of the rings are aligned as the rest of their tensor.
    const int64_t apart = (shift + num_columns % 2) * itemsize;
    for (int32_t k = 0; k < num_columns; ++k) columns.emplace_back(numel * itemsize, apart, 0x10 + k);
    ring.push_back(static_cast<uint32_t>(num_columns) | static_cast<uint64_t>(of_columns) << 32);
    for (Guarded& column : columns) ring.push_back(reinterpret_cast<uint64_t>(column.data()));
  }

  void fill(Random& random) {
    tensor.fill_random(random);
    for (int64_t i = 0; i < tensor.numel; ++i) put_bits(variance.data(), 4, i, random_float32(random) & 0x7fffffffu);
    for (Guarded& column : columns) {
      for (int64_t i = 0; i < tensor.numel; ++i) {
        const float value = oracle::float_of(random_float32(random));
        put_bits(column.data(), param_itemsize(column_dtype), i, rounded_to(column_dtype, value));
      }
    }
    remember();
  }
  void remember() {
    tensor.remember();
    variance.remember();
    for (Guarded& column : columns) column.remember();
  }

  swafast_tensor row() {
    swafast_tensor row = tensor.row(1);
    row.planes[0] = variance.data();
    row.planes[1] = ring.data();
    row.format = SWAFAST_FORMAT_SPREAD;
    return row;
  }

  void same(uint32_t got, float expected, int32_t dtype, const char* what, int64_t i) const {
    const bool any_nan = expected != expected;
    const bool is_nan = std::isnan(param_value(dtype, got));
    require(any_nan ? is_nan : got == rounded_to(dtype, expected),
            "a spread: dtype %d, format %d, columns of dtype %d: %s of element %lld of %lld is wrong", tensor.dtype,
            tensor.format, column_dtype, what, static_cast<long long>(i), static_cast<long long>(tensor.numel));
  }

  Element before(int64_t i) const {
    return {bits_at(tensor.param->before().data(), param_itemsize(tensor.dtype), i),
            {bits_at(tensor.plane0.before().data(), plane_itemsize(tensor.format, 0), i),
             bits_at(tensor.plane1.before().data(), plane_itemsize(tensor.format, 1), i)}};
  }

  double average_of(const Element& element) const {
    if (tensor.format != SWAFAST_FORMAT_COMPENSATED) return average_value(tensor.format, element.planes);
    return oracle::decode_compensated({oracle::float_of(element.planes[0]), oracle::float_of(element.planes[1])});
  }

  void check_updated(double weight, int64_t num_averaged) {
    tensor.check_updated({weight, num_averaged});
    const auto written = columns.empty() ? size_t{0} : static_cast<size_t>(num_averaged) % columns.size();
    for (int64_t i = 0; i < tensor.numel; ++i) {
      const Element element = before(i);
      const float param = param_value(tensor.dtype, element.param);
      const double old = average_of(element);
      const bool is_double = tensor.format == SWAFAST_FORMAT_COMPENSATED;
      const double moved = is_double ? oracle::lerp(old, param, weight)
                                     : static_cast<double>(oracle::lerp(static_cast<float>(old), param, weight));
      const float distance = static_cast<float>(param - old), deviation = static_cast<float>(param - moved);
      const float kept = oracle::float_of(bits_at(variance.before().data(), 4, i));
      const bool copies = static_cast<float>(weight) == 1.0f;
      const auto square = static_cast<float>(static_cast<double>(distance) * static_cast<double>(deviation));
      same(bits_at(variance.data(), 4, i), copies ? 0.0f : oracle::lerp(kept, square, weight), SWAFAST_FLOAT32,
           "the variance", i);
      if (columns.empty()) continue;
      same(bits_at(columns[written].data(), param_itemsize(column_dtype), i), copies ? 0.0f : deviation, column_dtype,
           "the deviation", i);
    }
    for (size_t k = 0; k < columns.size(); ++k) {
      require(k == written || columns[k].unchanged(), "an update wrote to column %zu, not only to %zu", k, written);
      require(columns[k].intact(), "an update wrote beside a buffer: column %zu", k);
    }
    require(variance.intact(), "an update wrote beside a buffer: a variance");
  }

  void check_drawn(const swafast_sample& sample) {
    for (int64_t i = 0; i < tensor.numel; ++i) {
      auto value = static_cast<float>(average_of(before(i)));
      for (int32_t k = 0; k < sample.num_columns; ++k) {
        const uint32_t bits = bits_at(columns[static_cast<size_t>(k)].data(), param_itemsize(column_dtype), i);
        value = oracle::fused(param_value(column_dtype, bits), sample.coefficients[k], value);
      }
      if (sample.noise != 0.0f) {
        const float scale = std::sqrt(oracle::float_of(bits_at(variance.data(), 4, i))) * sample.noise;
        const auto index = static_cast<uint64_t>(tensor.index(i));
        const float normal = swafast::normal_of(swafast::random_word(tensor.key, sample.index, index));
        value = oracle::fused(scale, normal, value);
      }
      same(bits_at(tensor.param->data(), param_itemsize(tensor.dtype), i), value, tensor.dtype, "the sample", i);
    }
    bool same = tensor.intact() && variance.intact() && variance.unchanged() && tensor.plane0.unchanged() &&
                tensor.plane1.unchanged();
    for (Guarded& column : columns) same &= column.unchanged() && column.intact();
    require(same, "a draw wrote to more than a param");
  }
};

// Every dtype, format and dtype of columns, in chunks of a head, a middle and a tail, and of other indices.
inline std::deque<SpreadTensor> make_spreads(bool is_far) {
  std::deque<SpreadTensor> made;
  for (const int32_t dtype : kDtypes) {
    for (const int32_t format : kFormats) {
      const auto turn = static_cast<int64_t>(made.size());
      const int32_t num_columns = turn % 4 == 3 ? 0 : static_cast<int32_t>(2 + turn % 5);
      made.emplace_back(dtype, format, 300 + 7 * turn, turn % 3 == 2 ? 0 : 3 * turn % 8, num_columns,
                        kDtypes[turn % 3]);
      Tensor& tensor = made.back().tensor;
      tensor.key = oracle::splitmix64(static_cast<uint64_t>(turn));
      tensor.first_index = is_far ? (int64_t{turn + 1} << 34) - 100 + turn : 4 * turn;
      tensor.index_step = is_far && turn % 2 == 0 ? 3 : 1;
    }
  }
  return made;
}

inline Chunks chunks_of(const std::deque<SpreadTensor>& spreads, int64_t chunk_numel) {
  Chunks chunks;
  for (size_t t = 0; t < spreads.size(); ++t) {
    const Tensor& it = spreads[t].tensor;
    for (int64_t offset = 0; offset < it.numel; offset += chunks.back().numel) {
      const int64_t index = it.index(offset), next = ((index >> 32) + 1) << 32;
      const int64_t until_next = (next - index + it.index_step - 1) / it.index_step;
      const int64_t numel = std::min({chunk_numel, it.numel - offset, until_next});
      chunks.push_back({static_cast<int64_t>(2 * t), offset, numel, index, it.index_step});
    }
  }
  return chunks;
}

inline void check_spreads(CudaLaunch& launch, bool is_far, Random& random) {
  std::deque<SpreadTensor> spreads = make_spreads(is_far);
  Rows rows;
  for (SpreadTensor& spread : spreads) {
    rows.push_back(spread.row());
    rows.push_back(spread.tensor.row());
  }
  const Chunks chunks = chunks_of(spreads, is_far ? 130 : 4096);
  for (const double weight : {1.0, 0.3, 0.75}) {
    for (SpreadTensor& spread : spreads) spread.fill(random);
    Paces paces = {{constant(weight), 7}};
    require(launch.update_paces(rows, chunks, paces, 1) == SWAFAST_OK, "an update of spreads was refused");
    for (SpreadTensor& spread : spreads) spread.check_updated(weight, 7);
  }
  // Of the variance alone, of columns one by one, and four at a time.
  const std::vector<float> coefficients = {0.5f, -0.25f, 1.5f, 0.75f, -2.0f};
  for (const int32_t count : {0, 2, 5}) {
    Rows drawn_rows;
    std::deque<SpreadTensor*> drawn;
    Chunks drawn_chunks;
    for (size_t t = 0; t < spreads.size(); ++t) {
      if (spreads[t].columns.size() < static_cast<size_t>(count)) continue;
      for (swafast_chunk chunk : chunks) {
        if (chunk.tensor != static_cast<int64_t>(2 * t)) continue;
        chunk.tensor = static_cast<int64_t>(drawn_rows.size());
        drawn_chunks.push_back(chunk);
      }
      drawn_rows.push_back(rows[2 * t]);
      drawn_rows.push_back(rows[2 * t + 1]);
      drawn_rows.back().key = spreads[t].tensor.key;
      drawn.push_back(&spreads[t]);
    }
    for (SpreadTensor* spread : drawn) spread->remember();
    const swafast_sample sample = {coefficients.data(), count, 5, count == 0 || is_far ? 0.7f : 0.0f};
    require(launch.draw_table(drawn_rows, drawn_chunks, sample) == SWAFAST_OK, "a draw was refused");
    for (SpreadTensor* spread : drawn) spread->check_drawn(sample);
  }
}
