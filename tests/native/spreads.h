// Averages with a spread: how variance and deviations move, to the bit, and samples, to a few units in the last place.
// tests/test_backends.py has the bits of samples.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "launch.h"
#include "oracle.h"
#include "swafast.h"
#include "tensors.h"

namespace spreads {

constexpr int64_t kNumAveraged = 7;  // no multiple of a number of columns

// Ties to even, by quotient and rest.
inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = oracle::bits_of(value), high = bits / 65536, rest = bits % 65536;
  if (oracle::is_nan(bits)) return 0x7fc0;
  return high + (rest > 32768 || (rest == 32768 && high % 2 == 1) ? 1 : 0);
}

inline uint32_t narrowed(int32_t dtype, float value) {
  if (dtype == SWAFAST_FLOAT32) return oracle::bits_of(value);
  return dtype == SWAFAST_BFLOAT16 ? to_bfloat16(value) : oracle::to_float16(value);
}

inline float difference(double x, double y) { return static_cast<float>(oracle::sum(x, -y)); }

// Variance and deviation after an update.
inline std::pair<float, float> moved(const Tensor& tensor, const Element& before, float variance, double weight) {
  if (static_cast<float>(weight) == 1.0f) return {0.0f, 0.0f};
  const float param = param_value(tensor.dtype, before.param);
  float distance, deviation;
  if (tensor.format == SWAFAST_FORMAT_COMPENSATED) {
    const double old =
        oracle::decode_compensated({oracle::float_of(before.planes[0]), oracle::float_of(before.planes[1])});
    distance = difference(param, old);
    deviation = difference(param, oracle::lerp(old, param, weight));
  } else {
    const float old = average_value(tensor.format, before.planes);
    distance = difference(param, old);
    deviation = difference(param, oracle::lerp(old, param, weight));
  }
  const float area = static_cast<float>(static_cast<double>(distance) * static_cast<double>(deviation));
  return {oracle::lerp(variance, area, weight), deviation};
}

// Philox4x32-10 of the block of this index, with the key of each round as a multiple.
inline uint32_t random_word(uint64_t key, uint32_t sample, uint64_t index) {
  uint64_t c[4] = {index / 4 & 0xffffffffu, index >> 34, sample, 0};
  for (uint64_t round = 0; round < 10; ++round) {
    const uint64_t p0 = c[0] * 0xd2511f53u, p1 = c[2] * 0xcd9e8d57u;
    const uint64_t k0 = key + round * 0x9e3779b9u, k1 = (key >> 32) + round * 0xbb67ae85u;
    const uint64_t next[4] = {p1 >> 32 ^ c[1] ^ (k0 & 0xffffffffu), p1 & 0xffffffffu,
                              p0 >> 32 ^ c[3] ^ (k1 & 0xffffffffu), p0 & 0xffffffffu};
    std::memcpy(c, next, sizeof c);
  }
  return static_cast<uint32_t>(c[index % 4]);
}

// The inverse of the distribution function, by halving.
inline double normal_of(uint32_t word) {
  const uint32_t lower = word < 0x80000000u ? word : ~word;
  const double beyond = 0.5 - (lower + 0.5) * 0x1p-32;
  double low = 0.0, high = 8.0;
  for (int i = 0; i < 40; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) / 2 > beyond ? low : high) = middle;
  }
  return word < 0x80000000u ? low : -low;
}

// The spread of one average.
struct Spread {
  int32_t dtype;  // of the columns
  Guarded variance;
  std::vector<Guarded> columns;
  std::vector<uint64_t> ring;

  Spread(int64_t numel, int32_t dtype_, int32_t num_columns, int64_t shift)
      : dtype(dtype_), variance(4 * numel, 4 * shift, 0x33) {
    const int64_t itemsize = param_itemsize(dtype);
    for (int32_t k = 0; k < num_columns; ++k) {
      columns.emplace_back(numel * itemsize, (shift + k) % 16 * itemsize, static_cast<uint8_t>(0x40 + k));
    }
    set_head(num_columns, dtype);
    for (Guarded& column : columns) ring.push_back(reinterpret_cast<uintptr_t>(column.data()));
  }

  void set_head(int32_t num_columns, int32_t column_dtype) {
    const swafast_ring head = {num_columns, column_dtype};
    if (ring.empty()) ring.push_back(0);
    std::memcpy(ring.data(), &head, sizeof head);
  }

  float variance_at(int64_t i) const { return oracle::float_of(bits_at(variance.before().data(), 4, i)); }
  float deviation_at(size_t k, int64_t i) const {
    return param_value(dtype, bits_at(columns[k].before().data(), param_itemsize(dtype), i));
  }

  template <class Value>
  void fill(int64_t numel, const Value& value) {
    for (int64_t i = 0; i < numel; ++i) {
      put_bits(variance.data(), 4, i, oracle::bits_of(std::fabs(value(i))));
      for (Guarded& column : columns) put_bits(column.data(), param_itemsize(dtype), i, narrowed(dtype, value(i)));
    }
    variance.remember();
    for (Guarded& column : columns) column.remember();
  }
  bool intact() {
    bool same = variance.intact();
    for (Guarded& column : columns) same &= column.intact();
    return same;
  }
  bool unchanged(size_t but) {
    bool same = true;
    for (size_t k = 0; k < columns.size(); ++k) same &= k == but || columns[k].unchanged();
    return same;
  }
};

// A launch whose averages have a spread each.
struct SpreadLaunch : Launch {
  std::vector<Spread> spreads;

  // Each row with that of its spread before it.
  Rows spread_rows() {
    Rows all;
    for (size_t t = 0; t < tensors.size(); ++t) {
      Tensor& it = tensors[t];
      all.push_back({it.param->data(),
                     {spreads[t].variance.data(), spreads[t].ring.data()},
                     it.numel,
                     it.dtype,
                     7,
                     0,
                     it.pace,
                     1});
      all.push_back(it.row());
    }
    return all;
  }
  Chunks spread_chunks() {
    Chunks all = chunks();
    for (swafast_chunk& chunk : all) chunk.tensor *= 2;
    return all;
  }
  int32_t update_rows(const Rows& rows, double weight) {
    int64_t num_averaged = kNumAveraged;
    return update_table(rows, spread_chunks(), constant(weight), &num_averaged, 1);
  }
  int32_t draw_rows(const Rows& rows, const swafast_sample& sample) {
    const Chunks all = spread_chunks();
    return swafast_cpu_draw(rows.data(), static_cast<int64_t>(rows.size()), all.data(),
                            static_cast<int64_t>(all.size()), &sample, num_threads);
  }
};

inline SpreadLaunch make_launch(int32_t num_columns, int64_t chunk_numel, int64_t shift) {
  SpreadLaunch launch;
  launch.chunk_numel = chunk_numel;
  launch.num_threads = num_columns == 3 ? 2 : 1;
  int32_t turn = 0;
  for (const int32_t dtype : kDtypes) {
    for (const int32_t format : kFormats) {
      for (const int64_t numel : {int64_t{1}, int64_t{33}, chunk_numel + 35}) {
        launch.add(dtype, format, numel, shift);
        launch.spreads.emplace_back(numel, kDtypes[turn++ % 3], num_columns, shift);
      }
    }
  }
  launch.number_elements();
  return launch;
}

inline bool same(uint32_t found, float expected, int32_t dtype) {
  return std::isnan(expected) ? std::isnan(param_value(dtype, found)) : found == narrowed(dtype, expected);
}

inline void check_moved(SpreadLaunch& launch, double weight) {
  for (size_t t = 0; t < launch.tensors.size(); ++t) {
    Tensor& tensor = launch.tensors[t];
    Spread& spread = launch.spreads[t];
    tensor.check_updated({weight, kNumAveraged});
    const size_t num_columns = spread.columns.size(), column = num_columns == 0 ? 0 : kNumAveraged % num_columns;
    for (int64_t i = 0; i < tensor.numel; ++i) {
      const Element before = {bits_at(tensor.param->before().data(), param_itemsize(tensor.dtype), i),
                              {bits_at(tensor.plane0.before().data(), plane_itemsize(tensor.format, 0), i),
                               bits_at(tensor.plane1.before().data(), plane_itemsize(tensor.format, 1), i)}};
      const auto [variance, deviation] = moved(tensor, before, spread.variance_at(i), weight);
      require(same(bits_at(spread.variance.data(), 4, i), variance, SWAFAST_FLOAT32),
              "dtype %d, format %d: variance %lld is wrong at weight %a", tensor.dtype, tensor.format,
              static_cast<long long>(i), weight);
      require(num_columns == 0 || same(bits_at(spread.columns[column].data(), param_itemsize(spread.dtype), i),
                                       deviation, spread.dtype),
              "dtype %d, format %d: deviation %lld is wrong at weight %a", tensor.dtype, tensor.format,
              static_cast<long long>(i), weight);
    }
    require(spread.unchanged(column), "an update wrote another column");
    require(spread.intact(), "an update wrote beside a spread");
  }
}

inline void check_update(int32_t num_columns, int64_t chunk_numel, int64_t shift, Random& random) {
  SpreadLaunch launch = make_launch(num_columns, chunk_numel, shift);
  for (const double weight : {1.0, 0.3, 0.9}) {
    for (size_t t = 0; t < launch.tensors.size(); ++t) {
      launch.tensors[t].fill_random(random);
      launch.spreads[t].fill(launch.tensors[t].numel,
                             [&](int64_t) { return oracle::float_of(random_float32(random)); });
    }
    require(launch.update_rows(launch.spread_rows(), weight) == SWAFAST_OK, "an update of spreads was refused");
    check_moved(launch, weight);
  }
}

// Numbers of which a sum is about as large as they are.
inline float small_number(Random& random) { return 0.5f + static_cast<float>(random.below(1u << 20)) * 0x1p-20f; }

inline void check_point(Tensor& tensor, Spread& spread, const swafast_sample& sample, int64_t i) {
  const uint32_t planes[2] = {bits_at(tensor.plane0.before().data(), plane_itemsize(tensor.format, 0), i),
                              bits_at(tensor.plane1.before().data(), plane_itemsize(tensor.format, 1), i)};
  const bool is_precise = tensor.format == SWAFAST_FORMAT_COMPENSATED;
  double point = is_precise ? oracle::float_of(planes[0]) : average_value(tensor.format, planes);
  double size = std::fabs(point);
  for (int32_t k = 0; k < sample.num_columns; ++k) {
    const double part = static_cast<double>(sample.coefficients[k]) * spread.deviation_at(static_cast<size_t>(k), i);
    point += part;
    size += std::fabs(part);
  }
  if (sample.noise != 0) {
    const auto index = static_cast<uint64_t>(tensor.index(i));
    const double z = normal_of(random_word(tensor.key, sample.index, index));
    const double part = std::sqrt(static_cast<double>(spread.variance_at(i))) * sample.noise * z;
    point += part;
    size += std::fabs(part);
  }
  const double units[3] = {0x1p-23, 0x1p-8, 0x1p-11};
  const double found = param_value(tensor.dtype, bits_at(tensor.param->data(), param_itemsize(tensor.dtype), i));
  require(std::fabs(found - point) <= size * 0x1p-21 + std::fabs(point) * units[tensor.dtype],
          "dtype %d, format %d, %d columns: point %lld of %lld is %a, not %a", tensor.dtype, tensor.format,
          sample.num_columns, static_cast<long long>(i), static_cast<long long>(tensor.numel), found, point);
}

inline void check_draw(int32_t num_columns, int64_t chunk_numel, int64_t shift, Random& random) {
  SpreadLaunch launch = make_launch(num_columns, chunk_numel, shift);
  std::vector<float> coefficients;
  for (int32_t k = 0; k < num_columns; ++k) coefficients.push_back(small_number(random) - 1.0f);
  const auto number = [&](int64_t) { return small_number(random); };
  for (const float noise : {0.0f, 0.75f}) {
    for (size_t t = 0; t < launch.tensors.size(); ++t) {
      Tensor& tensor = launch.tensors[t];
      tensor.fill([&](int64_t) {
        const float value = small_number(random);
        const oracle::Exact exact = oracle::encode_exact(value);
        if (tensor.format == SWAFAST_FORMAT_EXACT)
          return Element{0, {exact.average, static_cast<uint16_t>(exact.remainder)}};
        if (tensor.format == SWAFAST_FORMAT_MIRRORED)
          return Element{0, {oracle::to_float16(value), oracle::bits_of(value)}};
        const bool is_wide = plane_itemsize(tensor.format, 0) == 4;
        return Element{0, {is_wide ? oracle::bits_of(value) : to_bfloat16(value), 0}};
      });
      launch.spreads[t].fill(tensor.numel, number);
    }
    const swafast_sample sample = {coefficients.data(), num_columns, 0xfffffffeu, noise};
    require(launch.draw_rows(launch.spread_rows(), sample) == SWAFAST_OK, "a draw was refused");
    for (size_t t = 0; t < launch.tensors.size(); ++t) {
      Tensor& tensor = launch.tensors[t];
      Spread& spread = launch.spreads[t];
      for (int64_t i = 0; i < tensor.numel; ++i) check_point(tensor, spread, sample, i);
      const bool kept = tensor.plane0.unchanged() && tensor.plane1.unchanged() && spread.variance.unchanged();
      require(kept && spread.unchanged(~size_t{0}), "a draw changed what it read");
      require(tensor.intact() && spread.intact(), "a draw wrote beside a buffer");
    }
  }
}

inline void check_refusals(Random& random) {
  SpreadLaunch launch;
  for (int t = 0; t < 2; ++t) {
    launch.add(SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 40);
    launch.spreads.emplace_back(40, SWAFAST_FLOAT32, 2, 0);
    std::vector<uint64_t>& ring = launch.spreads.back().ring;
    ring.push_back(ring.back());  // what a draw of too many columns would read
    launch.tensors.back().fill_random(random);
    launch.spreads.back().fill(40, [&](int64_t) { return small_number(random); });
  }
  const Rows good = launch.spread_rows();
  const float coefficients[3] = {1, 1, 1};
  const auto require_refused = [&](const Rows& rows, int32_t num_columns, int32_t status, bool update,
                                   const char* what) {
    const swafast_sample sample = {coefficients, num_columns, 0, 1.0f};
    require(launch.draw_rows(rows, sample) == status, "a draw took %s", what);
    require(!update || launch.update_rows(rows, 0.3) == status, "an update took %s", what);
    require(launch.untouched() && launch.spreads[1].variance.unchanged() && launch.spreads[1].unchanged(2),
            "what refused %s wrote something", what);
  };
  const auto with = [&](size_t row, void (*spoil)(swafast_tensor&)) {
    Rows rows = good;
    spoil(rows[row]);
    return rows;
  };
  require_refused(good, 3, SWAFAST_BAD_COUNT, false, "more columns than there are");
  require_refused(good, -1, SWAFAST_BAD_COUNT, false, "a negative number of columns");
  require_refused(launch.rows(), 0, SWAFAST_BAD_TENSOR, false, "averages without a spread");
  require_refused(with(2, [](swafast_tensor& it) { it.followers = 0; }), 2, SWAFAST_BAD_TENSOR, true,
                  "a spread without its average");
  require_refused(with(3, [](swafast_tensor& it) { it.format = SWAFAST_FORMAT_SPREAD; }), 2, SWAFAST_BAD_TENSOR, true,
                  "a spread of a spread");
  require_refused(with(2, [](swafast_tensor& it) { it.dtype = SWAFAST_BYTES; }), 2, SWAFAST_BAD_TENSOR, true,
                  "a spread of bytes");
  require_refused(with(2, [](swafast_tensor& it) { it.pace = 1; }), 2, SWAFAST_BAD_TENSOR, false,
                  "a spread with another pace");
  launch.spreads[1].set_head(-1, SWAFAST_FLOAT32);
  require_refused(good, 0, SWAFAST_BAD_TENSOR, true, "a ring of -1 columns");
  launch.spreads[1].set_head(2, SWAFAST_BYTES);
  require_refused(good, 2, SWAFAST_BAD_TENSOR, true, "a ring of bytes");
  int64_t exchanged = 0;
  require(launch.exchange_table(good, launch.spread_chunks(), 1) == SWAFAST_BAD_TENSOR && launch.exchanged == exchanged,
          "an exchange took a spread");
}

inline void check_spreads() {
  Random random(21);
  for (const int32_t num_columns : {0, 2, 3, 20}) {
    const int64_t chunk_numel = num_columns == 2 ? 1100 : 64, shift = num_columns % 7;
    check_update(num_columns, chunk_numel, shift, random);
    check_draw(num_columns, chunk_numel, shift, random);
  }
  check_refusals(random);
}

}  // namespace spreads
