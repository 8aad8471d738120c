// Tensors of more elements than 32 bits count, on addresses without memory.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "launch.h"
#include "tensors.h"

// Addresses without memory, save where they are opened: an offset that loses its high bits crashes.
class Reserved {
 public:
  explicit Reserved(int64_t nbytes) : nbytes_(static_cast<size_t>(nbytes)) {
    base_ = mmap(nullptr, nbytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(base_ != MAP_FAILED, "could not reserve %lld bytes of addresses", static_cast<long long>(nbytes));
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() { munmap(base_, nbytes_); }

  uint8_t* base() { return static_cast<uint8_t*>(base_); }
  uint8_t* open(int64_t offset, int64_t nbytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), first = offset / page * page;
    require(mprotect(base() + first, static_cast<size_t>(offset + nbytes - first), PROT_READ | PROT_WRITE) == 0,
            "could not open reserved addresses");
    return base() + offset;
  }

 private:
  size_t nbytes_;
  void* base_;
};

// A chunk that starts past 2^32 elements.
inline void check_far_offsets(AnyLaunch& launch) {
  constexpr int64_t kFar = (int64_t{1} << 32) + 5, kNumel = 100;
  constexpr uint64_t kKey = 77;
  Random random(6);
  const int32_t kinds[][2] = {{SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32},     {SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT},
                              {SWAFAST_FLOAT16, SWAFAST_FORMAT_MIRRORED},    {SWAFAST_BFLOAT16, SWAFAST_FORMAT_COMPACT},
                              {SWAFAST_FLOAT32, SWAFAST_FORMAT_COMPENSATED}, {SWAFAST_BFLOAT16, SWAFAST_FORMAT_HALF}};
  for (const auto& [dtype, format] : kinds) {
    const int64_t itemsizes[3] = {param_itemsize(dtype), plane_itemsize(format, 0), plane_itemsize(format, 1)};
    Reserved reserved[3] = {Reserved((kFar + kNumel) * itemsizes[0]), Reserved((kFar + kNumel) * itemsizes[1]),
                            Reserved((kFar + kNumel) * (itemsizes[2] == 0 ? 1 : itemsizes[2]))};
    uint8_t* spans[3];
    for (int k = 0; k < 3; ++k) spans[k] = reserved[k].open(kFar * itemsizes[k], kNumel * itemsizes[k] + 1);
    std::vector<Element> before;
    for (int64_t i = 0; i < kNumel; ++i) {
      before.push_back(random_element(dtype, format, random));
      put_bits(spans[0], itemsizes[0], i, before.back().param);
      put_bits(spans[1], itemsizes[1], i, before.back().planes[0]);
      put_bits(spans[2], itemsizes[2], i, before.back().planes[1]);
    }
    const Rows rows = {{reserved[0].base(),
                        {reserved[1].base(), itemsizes[2] == 0 ? nullptr : reserved[2].base()},
                        kFar + kNumel,
                        dtype,
                        format,
                        kKey,
                        0,
                        0}};
    const Chunks chunks = {{0, kFar, kNumel, kFar, 1}};
    int64_t num_averaged = 1, index = -7;
    launch.exchanged = 0;
    require(launch.update_table(rows, chunks, constant(0.3), &num_averaged, 1) == SWAFAST_OK,
            "a far chunk was refused");
    for (int64_t i = 0; i < kNumel; ++i) {
      const uint32_t planes[2] = {bits_at(spans[1], itemsizes[1], i), bits_at(spans[2], itemsizes[2], i)};
      require(
          follows(dtype, format, before[static_cast<size_t>(i)], 0.3, oracle::random_bits(kKey, 1, kFar + i), planes),
          "dtype %d: element %lld past 2^32 is wrong", dtype, static_cast<long long>(i));
    }
    const uint32_t param = bits_at(spans[0], itemsizes[0], 7), average = bits_at(spans[1], itemsizes[1], 7);
    require(launch.exchange_table(rows, chunks, 1) == SWAFAST_OK && launch.exchanged == 1 &&
                bits_at(spans[0], itemsizes[0], 7) == average && bits_at(spans[1], itemsizes[1], 7) == param,
            "dtype %d: an exchange past 2^32 went wrong", dtype);
    put_bits(spans[0], itemsizes[0], kNumel - 1, 0xffffffffu);
    require(launch.first_nonfinite_of_table(rows, chunks, &index) == SWAFAST_OK && index == 0,
            "dtype %d: a NaN past 2^32 was not seen", dtype);
  }
}
