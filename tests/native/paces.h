// Several averages of one param in one launch, each by a pace of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "launch.h"
#include "swafast.h"
#include "tensors.h"

// One of SWAFAST_MAX_PACES paces which differ in their rules, counts and weights; and its weight in closed form.
struct KnownPace {
  Pace pace;
  double weight;
};

inline KnownPace known_pace(int32_t k) {
  switch (k % 4) {
    case 0:
      return {{constant(0.03 * (k + 1)), k + 1}, 0.03 * (k + 1)};
    case 1:
      return {{{SWAFAST_RULE_EQUAL, {}}, k}, 1.0 / (k + 1)};
    case 2:
      return {{{SWAFAST_RULE_RATIO_WARMUP, {1e-4, 0.9, 0, 0}}, 8 * k}, 9.0 / (10 + 8 * k)};
    default:
      return {{constant(0.2), k == 3 ? 0 : k}, k == 3 ? 1.0 : 0.2};
  }
}

inline Paces known_paces(int32_t count) {
  Paces paces;
  for (int32_t k = 0; k < count; ++k) paces.push_back(known_pace(k).pace);
  return paces;
}

// Params with as many averages as there are paces, and with fewer, and with one; neighbours differ in everything.
inline void add_averages(AnyLaunch& launch, int32_t num_paces) {
  const int64_t chunk = launch.chunk_numel;
  int32_t turn = 0;
  for (int32_t dtype = 0; dtype < SWAFAST_NUM_DTYPES; ++dtype) {
    for (const int64_t numel : {int64_t{0}, int64_t{1}, chunk - 1, chunk, chunk + 1, 3 * chunk + 7}) {
      const int32_t count = 1 + (num_paces - 1) / (1 + turn % 3);
      for (int32_t k = 0; k < count; ++k, ++turn) {
        const int32_t format = dtype == SWAFAST_BYTES ? SWAFAST_FORMAT_COPIED : kFormats[turn % 6];
        const Shifts shifts = turn % 2 == 0 ? alike(turn % 5) : apart(turn % 7);
        Tensor& tensor = k == 0 ? launch.add(dtype, format, numel, shifts) : launch.add_follower(format, shifts);
        tensor.pace = (k * 5 + turn) % num_paces;
      }
    }
  }
  launch.number_elements();
}

inline void check_paces_of(AnyLaunch& launch, int32_t num_paces, int64_t advance) {
  Paces paces = known_paces(num_paces);
  require(launch.update(paces, advance) == SWAFAST_OK, "an update by %d paces was refused", num_paces);
  for (Tensor& tensor : launch.tensors) {
    const KnownPace known = known_pace(tensor.pace);
    tensor.check_updated({known.weight, known.pace.num_averaged});
  }
  for (int32_t k = 0; k < num_paces; ++k) {
    require(paces[static_cast<size_t>(k)].num_averaged == known_pace(k).pace.num_averaged + advance,
            "pace %d of %d counts %lld models", k, num_paces,
            static_cast<long long>(paces[static_cast<size_t>(k)].num_averaged));
  }
}

// A count that is negative or exhausted stops the averages of every pace.
inline void check_one_bad_count(AnyLaunch& launch, int32_t num_paces) {
  for (int32_t bad = 0; bad < num_paces; ++bad) {
    Paces paces = known_paces(num_paces);
    paces[static_cast<size_t>(bad)].num_averaged = bad % 2 == 0 ? INT64_MAX : -1;
    const Paces before = paces;
    require(launch.update(paces) == launch.status_of_bad_count() && launch.untouched(),
            "a bad count of pace %d of %d did not stop an update", bad, num_paces);
    for (size_t k = 0; k < paces.size(); ++k) {
      require(paces[k].num_averaged == before[k].num_averaged, "a stopped update counted");
    }
  }
}

inline void check_numbers_of_paces(AnyLaunch& launch) {
  for (const int32_t count : {0, SWAFAST_MAX_PACES + 1}) {
    Paces paces = known_paces(count);
    const Paces before = paces;
    require(launch.update(paces) == SWAFAST_BAD_PACE && launch.untouched(), "an update took %d paces", count);
    for (size_t k = 0; k < paces.size(); ++k) {
      require(paces[k].num_averaged == before[k].num_averaged, "an update refused for its paces counted");
    }
  }
}

template <class AnyKindOfLaunch>
void check_paces(Random& random) {
  for (const int32_t num_paces : {1, 2, 3, SWAFAST_MAX_PACES}) {
    AnyKindOfLaunch launch;
    launch.chunk_numel = num_paces == 2 ? 512 : 64;
    launch.reversed = num_paces == 3;
    add_averages(launch, num_paces);
    for (const int64_t advance : {0, 1, 3}) {
      for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
      check_paces_of(launch, num_paces, advance);
    }
    for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
    if (num_paces > 1) check_one_bad_count(launch, num_paces);
    check_numbers_of_paces(launch);
  }
}
