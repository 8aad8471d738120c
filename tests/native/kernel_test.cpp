// The native CPU kernels against oracle.h, element by element, through the C interface alone: no torch, no Python.
//
//   kernel_test [--isa NAME] [--all] [--bug NUMBER]
//
// Ends with 0, or with 1 and a message at the first difference. --isa takes one instruction set instead of all that the
// machine has. --all adds every one of the 2^32 pairs of planes of the `exact` format. --bug takes the bug of
// that number, where the kernels were built with some: tests/test_native_sanitized.py.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checksum.h"
#include "far.h"
#include "launch.h"
#include "oracle.h"
#include "paces.h"
#include "planted.h"
#include "shared_checks.h"
#include "spreads.h"
#include "sums.h"
#include "swafast.h"
#include "tensors.h"

namespace {

// Every pair of dtype and format at every size that has an edge, all in one call.
Launch make_launch(int64_t chunk_numel, int32_t num_threads, int64_t shift) {
  Launch launch;
  launch.chunk_numel = chunk_numel;
  launch.num_threads = num_threads;
  for (int32_t dtype = 0; dtype < SWAFAST_NUM_DTYPES; ++dtype) {
    for (int32_t format = 0; format < SWAFAST_NUM_FORMATS; ++format) {
      if (!served(dtype, format)) continue;
      for (const int64_t numel :
           {int64_t{0}, int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, int64_t{31}, int64_t{32}, int64_t{33},
            chunk_numel - 1, chunk_numel, chunk_numel + 1, 3 * chunk_numel + 7}) {
        launch.add(dtype, format, numel, shift);
      }
    }
  }
  launch.number_elements();
  return launch;
}

void check_updates() {
  Random random(1);
  for (const int64_t chunk_numel : {33, 64, 1000}) {
    for (const int32_t num_threads : {1, 2}) {
      for (const int64_t shift : {0, 1, 7}) {
        Launch launch = make_launch(chunk_numel, num_threads, shift);
        for (const Case& it : kCases) check_case(launch, it, random);
      }
    }
  }
}

void check_self_copy() {
  Launch launch;
  Tensor& tensor = launch.add(SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, 1000);
  Random random(2);
  tensor.fill_random(random);
  swafast_tensor row = tensor.row();
  row.planes[0] = row.param;
  int64_t num_averaged = 1;
  require(launch.update_table({row}, {{0, 0, 1000, 0, 1}}, constant(0.5), &num_averaged, 1) == SWAFAST_OK &&
              launch.untouched(),
          "a tensor copied to itself changed");
}

void check_refusals() {
  struct Bad {
    int32_t dtype, format;
    bool exchange_only;
  };
  const Bad bads[] = {{-1, 0, false},
                      {SWAFAST_NUM_DTYPES, 0, false},
                      {INT32_MAX, 0, false},
                      {0, -1, false},
                      {0, SWAFAST_NUM_FORMATS, false},
                      {0, SWAFAST_FORMAT_SPREAD, false},
                      {0, INT32_MIN, false},
                      {SWAFAST_BYTES, SWAFAST_FORMAT_FLOAT32, false},
                      {SWAFAST_BYTES, SWAFAST_FORMAT_EXACT, false},
                      {SWAFAST_FLOAT32, SWAFAST_FORMAT_COPIED, false},
                      {SWAFAST_BFLOAT16, SWAFAST_FORMAT_COPIED, false},
                      {SWAFAST_BFLOAT16, SWAFAST_FORMAT_FLOAT32, true},
                      {SWAFAST_FLOAT32, SWAFAST_FORMAT_EXACT, true},
                      {SWAFAST_FLOAT16, SWAFAST_FORMAT_EXACT, true},
                      {SWAFAST_BYTES, SWAFAST_FORMAT_COMPACT, false},
                      {SWAFAST_BYTES, SWAFAST_FORMAT_HALF, false},
                      {SWAFAST_FLOAT32, SWAFAST_FORMAT_COMPACT, true},
                      {SWAFAST_FLOAT16, SWAFAST_FORMAT_HALF, true},
                      {SWAFAST_BFLOAT16, SWAFAST_FORMAT_COMPENSATED, true},
                      {SWAFAST_FLOAT32, SWAFAST_FORMAT_MIRRORED, true}};
  Launch launch;
  Random random(3);
  // The planes are larger than any format that a bad row may name, so that nothing but the refusal keeps them whole.
  for (int i = 0; i < 3; ++i) launch.add(SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 200);
  for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
  const auto good = launch.rows();
  const auto chunks = launch.chunks();
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  const swafast_rule rule = constant(0.3);
  for (const Bad& bad : bads) {
    for (const size_t place : {0, 1, 2}) {
      auto rows = good;
      rows[place].dtype = bad.dtype;
      rows[place].format = bad.format;
      int64_t num_averaged = 4, index = -7, exchanged = 0;
      require(swafast_cpu_exchange(rows.data(), 3, chunks.data(), num_chunks, 2, 1, &exchanged) == SWAFAST_BAD_TENSOR &&
                  exchanged == 0,
              "an exchange took dtype %d with format %d", bad.dtype, bad.format);
      if (!bad.exchange_only) {
        require(launch.update_table(rows, chunks, rule, &num_averaged, 1) == SWAFAST_BAD_TENSOR,
                "an update took dtype %d with format %d", bad.dtype, bad.format);
        require(swafast_cpu_first_nonfinite(rows.data(), 3, chunks.data(), num_chunks, 2, &index) == SWAFAST_BAD_TENSOR,
                "first_nonfinite took dtype %d with format %d", bad.dtype, bad.format);
      }
      require(launch.untouched() && num_averaged == 4 && index == -7, "a refused call wrote something");
    }
  }
  for (const int64_t count : {int64_t{-1}, INT64_MIN}) {
    int64_t num_averaged = count;
    require(launch.update(rule, &num_averaged) == SWAFAST_BAD_COUNT && num_averaged == count && launch.untouched(),
            "a negative count was not refused whole");
  }
  Launch none;
  int64_t num_averaged = 4;
  require(none.update(rule, &num_averaged) == SWAFAST_OK && num_averaged == 5, "an update of nothing did not count");
}

void check_refused_rows() {
  Launch launch;
  launch.num_threads = 2;
  Random random(9);
  launch.add(SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 200);
  for (int k = 0; k < 2; ++k) launch.add_follower(SWAFAST_FORMAT_EXACT);
  for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
  const auto chunks = launch.chunks();
  int64_t num_averaged = 4;
  const auto refuses = [&](int32_t status, void (*spoil)(Rows& rows), const char* what) {
    Rows rows = launch.rows();
    spoil(rows);
    require(launch.update_table(rows, chunks, constant(0.3), &num_averaged, 1) == status && num_averaged == 4 &&
                launch.untouched(),
            "an update took rows of which %s", what);
  };
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[0].followers = -1; }, "the first has -1 followers");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[0].followers = 3; }, "there are too few");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[2].followers = 1; }, "the last has a follower");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[1].followers = INT32_MAX; }, "one has very many followers");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[2].param = rows[2].planes[0]; }, "one has another param");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[1].numel = 199; }, "one has another size");
  refuses(SWAFAST_BAD_TENSOR, [](Rows& rows) { rows[2].dtype = SWAFAST_FLOAT16; }, "one has another dtype");
  refuses(SWAFAST_BAD_PACE, [](Rows& rows) { rows[0].pace = -1; }, "the first has a negative pace");
  refuses(SWAFAST_BAD_PACE, [](Rows& rows) { rows[2].pace = 1; }, "the last has a pace that is not there");
}

void check_exchange() {
  Random random(4);
  for (const int64_t chunk_numel : {33, 1000, 5000}) {  // the last is longer than the window of an exchange
    for (const int32_t num_threads : {1, 2}) {
      Launch launch = make_launch(chunk_numel, num_threads, 1);
      launch.keep_exchangeable();
      for (Tensor& tensor : launch.tensors) tensor.fill_random(random);
      require(launch.exchange(1) == SWAFAST_OK, "an exchange was refused");
      require(launch.exchange(1) == SWAFAST_OK && launch.exchanged == 1, "an exchange asked for twice was refused");
      launch.check_exchanged();
      require(launch.exchange(0) == SWAFAST_OK && launch.untouched(), "two exchanges are not the way back");
    }
  }
}

// Every float16, and every float32 near which the rounding to float16 or bf16 changes.
void check_conversions() {
  std::vector<uint32_t> floats;
  for (uint32_t bits = 0; bits < 0xfffff000u; bits += 4093) floats.push_back(bits);
  for (uint32_t half = 0; half < 0x7c00u; ++half) {
    const uint32_t low = oracle::bits_of(oracle::from_float16(static_cast<uint16_t>(half)));
    const double next = half == 0x7bff ? 65536.0 : oracle::from_float16(static_cast<uint16_t>(half + 1));
    const uint32_t tie = oracle::bits_of(static_cast<float>((oracle::float_of(low) + next) / 2.0));
    for (const uint32_t bits : {low, tie - 1, tie, tie + 1}) floats.insert(floats.end(), {bits, bits | 0x80000000u});
  }
  for (uint32_t high = 0; high < 0x10000u; ++high) {
    for (const uint32_t low : {0x7fffu, 0x8000u, 0x8001u}) floats.push_back((high << 16) | low);
  }
  Launch copies;
  copies.chunk_numel = 32768;
  for (const int32_t format : kFormats) {
    copies.add(SWAFAST_FLOAT32, format, static_cast<int64_t>(floats.size())).fill([&](int64_t i) {
      return Element{floats[static_cast<size_t>(i)], {0, 0}};
    });
  }
  for (const int32_t dtype : {SWAFAST_BFLOAT16, SWAFAST_FLOAT16}) {
    copies.add(dtype, SWAFAST_FORMAT_FLOAT32, 0x10000).fill([](int64_t i) {
      return Element{static_cast<uint32_t>(i), {0, 0}};
    });
  }
  copies.update_and_check(1.0);

  Launch written;
  for (const float average : {0.0f, 1e30f, 1.0f}) {
    written.add(SWAFAST_FLOAT16, SWAFAST_FORMAT_MIRRORED, 0x10000).fill([average](int64_t i) {
      return Element{0xbc00, {static_cast<uint32_t>(i), oracle::bits_of(average)}};
    });
  }
  written.update_and_check(0.0);
}

// Pairs of planes of the `exact` format, at a weight of 0 that leaves every finite value as it is.
void check_exact_pairs(bool all) {
  const int32_t edges[] = {0,   1,      -1,     2,       -2,     127,    -128,    255,
                           256, 0x3fff, 0x4000, -0x4000, 0x7ffe, 0x7fff, -0x7fff, -0x8000};
  Random random(5);
  std::vector<int16_t> remainders;
  if (all) {
    for (int32_t remainder = INT16_MIN; remainder <= INT16_MAX; ++remainder) {
      remainders.push_back(static_cast<int16_t>(remainder));
    }
  } else {
    for (const int32_t edge : edges) remainders.push_back(static_cast<int16_t>(edge));
    for (int i = 0; i < 16; ++i) remainders.push_back(static_cast<int16_t>(random.next()));
  }
  const auto count = static_cast<int64_t>(remainders.size());
  const int64_t highs_at_once = 65536 / count;
  Launch launch;
  Tensor& tensor = launch.add(SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT, highs_at_once * count);
  launch.chunk_numel = tensor.numel;
  for (int64_t high = 0; high < 0x10000; high += highs_at_once) {
    tensor.fill([&](int64_t i) {
      // A param of -1 keeps the sign of a zero.
      return Element{
          0xbf80,
          {static_cast<uint32_t>(high + i / count), static_cast<uint16_t>(remainders[static_cast<size_t>(i % count)])}};
    });
    launch.update_and_check(0.0);
  }
}

// A child of a process that has run a parallel update: its OpenMP runtime has lost its threads.
void check_fork() {
  Launch launch;
  launch.num_threads = 2;
  Random random(7);
  launch.add(SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT, 10000).fill_random(random);
  launch.update_and_check(0.3);
  launch.tensors[0].fill_random(random);
  const pid_t child = fork();
  require(child >= 0, "could not fork");
  if (child == 0) {
    launch.update_and_check(0.3);
    std::_Exit(0);
  }
  constexpr int kPatienceInMs = 5000;
  for (int waited = 0;; waited += 5) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) {
      require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the update of a forked child failed");
      return;
    }
    if (waited > kPatienceInMs) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      require(false, "the update of a forked child hangs");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

void check_weights() {
  struct Case {
    swafast_rule rule;
    long double (*weight)(long double n);
  };
  const Case cases[] = {
      {constant(0.1), [](long double) { return static_cast<long double>(0.1); }},
      {{SWAFAST_RULE_EQUAL, {}}, [](long double n) { return 1.0L / (n + 1.0L); }},
      {{SWAFAST_RULE_POWER_WARMUP, {0.001, 0.9, 2.0, 0.75}},
       [](long double n) {
         return std::fmin(std::fmax(std::pow(1.0L + n / 2.0L, -0.75L), static_cast<long double>(0.001)),
                          static_cast<long double>(0.9));
       }},
      {{SWAFAST_RULE_RATIO_WARMUP, {1e-4, 0.7, 0, 0}},
       [](long double n) {
         return std::fmin(std::fmax(9.0L / (10.0L + n), static_cast<long double>(1e-4)), static_cast<long double>(0.7));
       }},
      {{SWAFAST_RULE_POWER, {7.0, 0, 0, 0}},
       [](long double n) {
         const long double kept = 1.0L - 1.0L / (n + 1.0L);
         // 1 - kept^8, factored so that it does not cancel
         return (1.0L - kept) * (1.0L + kept) * (1.0L + kept * kept) * (1.0L + kept * kept * kept * kept);
       }},
      {{SWAFAST_RULE_RAMP_WARMUP, {0x1p-10, 0.9, 2000.0, 0}},
       [](long double n) {
         return std::fmin(0x1p-10L + (1.0L - 0x1p-10L) * std::exp(-n / 2000.0L), static_cast<long double>(0.9));
       }},
      {{SWAFAST_RULE_COSINE, {0x1p-8, 1e9, 0, 0}},
       [](long double n) {
         const long double sine = std::sin(std::acos(0.0L) * std::fmax(1e9L - n, 0.0L) / 1e9L);
         return 0x1p-8L * sine * sine;
       }},
      {{SWAFAST_RULE_LINEAR, {0x1p-8, 1e9, 0, 0}},
       [](long double n) { return 0x1p-8L * std::fmax(1e9L - n, 0.0L) / 1e9L; }},
  };
  for (const Case& it : cases) {
    require(swafast_weight(&it.rule, 0) == 1.0, "rule %d: the first update is no copy", static_cast<int>(it.rule.kind));
    for (int64_t n = 1; n < 2'000'000'000'000; n += 1 + n / 7) {
      const double got = swafast_weight(&it.rule, n);
      // 1 - kept loses what 1/(n+1) has below the ulp of 1 in a long double
      const double lost = it.rule.kind == SWAFAST_RULE_POWER ? 1e-18 * static_cast<double>(n) : 0.0;
      const auto expected = static_cast<double>(it.weight(static_cast<long double>(n)));
      require(std::fabs(got - expected) <= (1e-15 + lost) * expected, "rule %d, n = %lld: weight %a is not %a",
              static_cast<int>(it.rule.kind), static_cast<long long>(n), got, expected);
    }
  }
}

// What takes longest comes last.
void check_isa(bool all) {
  Launch launch;
  Random random(10);
  check_fork();
  check_far_offsets(launch);
  check_self_copy();
  check_refusals();
  check_refused_rows();
  check_paces<Launch>(random);
  check_exchange();
  for (const int32_t num_threads : {1, 2}) {
    Launch largest;
    largest.num_threads = num_threads;
    largest.reversed = true;  // what comes last in the table is then seen first
    add_largest(largest);
    // A parallel region costs milliseconds where others share the cores: two threads look at both ends alone.
    check_first_nonfinite(largest, num_threads == 1 ? 1 : 299);
  }
  check_checksum();
  check_sums();
  spreads::check_spreads();
  check_updates();
  check_conversions();
  check_exact_pairs(all);
}

}  // namespace

int main(int argc, char** argv) {
  bool all = false;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--all") {
      all = true;
    } else if (argument == "--isa" && has_value) {
      only = argv[++i];
    } else if (argument == "--bug" && has_value) {
      planted_bug = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: kernel_test [--isa NAME] [--all] [--bug NUMBER]\n");
      return 2;
    }
  }
  subject = swafast_cpu_isa;
  require(swafast_abi() == SWAFAST_ABI, "the library has another interface than its header");
  const std::string best = swafast_cpu_isa();
  require(swafast_cpu_use_isa("sse9") != 0 && swafast_cpu_isa() == best, "an unknown instruction set was taken");
  require(swafast_cpu_use_isa("generic") == 0, "the generic kernels are missing");
  check_weights();
  std::string checked;
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if ((!only.empty() && only != isa) || swafast_cpu_use_isa(isa) != 0) continue;
    require(std::strcmp(swafast_cpu_isa(), isa) == 0, "%s was asked for", isa);
    check_isa(all);
    checked += std::string(isa) + " ";
  }
  require(!checked.empty(), "this machine or this build lacks %s", only.c_str());
  std::printf("every check passed: %s(%s)\n", checked.c_str(), swafast_build());
  return 0;
}
