// Checks that the kernels of the CPU and of the GPU are both held to.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.h"
#include "swafast.h"
#include "tensors.h"

// An update, and its weight in closed form.
struct Case {
  swafast_rule rule;
  int64_t num_averaged, advance;
  double weight;
};

inline const Case kCases[] = {
    {constant(0.3), 0, 1, 1.0},  // a first update copies, whatever the rule
    {constant(0.0), 1, 1, 0.0},
    {constant(1e-300), 1, 0, 1e-300},
    {constant(0x1p-140), 7, 1, 0x1p-140},
    {constant(1e-3), 1, 5, 1e-3},
    // Between two float32 neighbours, nearer to the upper one by less than a float32 has digits for.
    {constant(0.3 + 0x1p-26), 1, 0, 0.3 + 0x1p-26},
    {{SWAFAST_RULE_EQUAL, {}}, 2, 1, 1.0 / 3.0},
    {{SWAFAST_RULE_POWER_WARMUP, {0.001, 0.9, 2.0, 1.0}}, 2, 1, 0.5},
    {{SWAFAST_RULE_RATIO_WARMUP, {1e-4, 0.7, 0, 0}}, 8, 1, 0.5},
    {{SWAFAST_RULE_RATIO_WARMUP, {1e-4, 0.7, 0, 0}}, 1, 1, 0.7},
    {{SWAFAST_RULE_POWER, {0.0, 0, 0, 0}}, 4, 1, 0.2},
    {{SWAFAST_RULE_RAMP_WARMUP, {0.3, 0.8, 1e12, 0}}, 3, 1, 0.8},
    {{SWAFAST_RULE_RAMP_WARMUP, {0.3, 0.8, 1e-2, 0}}, 8, 1, 0.3},
    {{SWAFAST_RULE_COSINE, {0.3, 5.0, 0, 0}}, 5, 1, 0.0},
    {{SWAFAST_RULE_LINEAR, {0.5, 4.0, 0, 0}}, 1, 1, 0.375},
    {constant(std::nextafter(0.5f, 0.0f)), 1, 1, std::nextafter(0.5f, 0.0f)},
    {constant(0.5), 1, 1, 0.5},
    {constant(0.9), int64_t{1} << 40, 1, 0.9},
    {constant(1.0 - 0x1p-24), INT64_MAX - 1, 1, 1.0 - 0x1p-24},
    {constant(1.0 - 1e-12), 1, 1, 1.0 - 1e-12},  // rounds to 1 in float32, and so copies there
    {constant(1.0), 1, 1, 1.0},
};

inline void check_case(AnyLaunch& launch, const Case& it, Random& random) {
  for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
  int64_t num_averaged = it.num_averaged;
  require(launch.update(it.rule, &num_averaged, it.advance) == SWAFAST_OK, "an update was refused");
  for (Tensor& tensor : launch.tensors) tensor.check_updated({it.weight, it.num_averaged});
  require(num_averaged == it.num_averaged + it.advance, "the counter went from %lld by %lld to %lld",
          static_cast<long long>(it.num_averaged), static_cast<long long>(it.advance),
          static_cast<long long>(num_averaged));
}

inline const uint32_t kBads[3][3] = {
    {0x7f800000, 0xff800000, 0x7f800001}, {0x7f80, 0xff80, 0xffff}, {0x7c00, 0xfc00, 0x7c01}};
inline const uint32_t kLargest[3] = {0xff7fffff, 0xff7f, 0xfbff};

// Bytes, which are never nonfinite, and params of the largest finite value, each with two averages.
inline void add_largest(AnyLaunch& launch) {
  launch.add(SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, 256).fill([](int64_t) { return Element{0xff, {0, 0}}; });
  for (const int64_t numel : {1, 300}) {
    for (const int32_t dtype : kDtypes) {
      launch.add(dtype, dtype, numel, 1).fill([dtype](int64_t) { return Element{kLargest[dtype], {0, 0}}; });
      launch.add_follower(SWAFAST_FORMAT_EXACT).fill([](int64_t) { return Element{}; });
    }
  }
}

// The tensor that is named is the first one, also of those that average its param.
inline void check_first_nonfinite(AnyLaunch& launch, int64_t step) {
  const auto spoil = [](Tensor& tensor, int64_t i, uint32_t bits) {
    put_bits(tensor.param->data(), param_itemsize(tensor.dtype), i, bits);
  };
  int64_t index = 77;
  require(launch.first_nonfinite(&index) == SWAFAST_OK && index == -1, "finite params were called nonfinite");
  for (size_t t = 1; t < launch.tensors.size(); ++t) {
    Tensor& tensor = launch.tensors[t];
    for (int64_t i = 0; i < tensor.numel && !tensor.is_follower; i += step) {
      spoil(tensor, i, kBads[tensor.dtype][i % 3]);
      require(launch.first_nonfinite(&index) == SWAFAST_OK && index == static_cast<int64_t>(t),
              "dtype %d: element %lld of tensor %lld is not finite, and %lld was named", tensor.dtype,
              static_cast<long long>(i), static_cast<long long>(t), static_cast<long long>(index));
      spoil(tensor, i, kLargest[tensor.dtype]);
    }
  }
  for (size_t t = launch.tensors.size(); t-- > 1;) {
    Tensor& tensor = launch.tensors[t];
    if (tensor.is_follower) continue;
    spoil(tensor, tensor.numel - 1, kBads[tensor.dtype][0]);
    require(launch.first_nonfinite(&index) == SWAFAST_OK && index == static_cast<int64_t>(t),
            "of several tensors that are not finite the first is %lld, and %lld was named", static_cast<long long>(t),
            static_cast<long long>(index));
  }
  for (Tensor& tensor : launch.tensors) {
    if (tensor.dtype != SWAFAST_BYTES) spoil(tensor, tensor.numel - 1, kLargest[tensor.dtype]);
  }
  require(launch.first_nonfinite(&index) == SWAFAST_OK && index == -1 && launch.untouched(),
          "what was found in an earlier call was found again");
}
