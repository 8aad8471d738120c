// Tensors of more than 2^31 elements on a few megabytes of memory, mapped again and again.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "cuda_launch.h"
#include "launch.h"
#include "tensors.h"

constexpr int64_t kLargeNumel = (int64_t{1} << 31) + 1000;

// A range of addresses behind which the same kPeriod elements of memory stand over and over.
class Repeated {
 public:
  static constexpr int64_t kPeriod = int64_t{1} << 18;

  Repeated(int64_t itemsize, int64_t shift) : itemsize_(itemsize), shift_(shift) {
    const auto period = static_cast<size_t>(kPeriod * itemsize);
    const size_t periods = static_cast<size_t>(kLargeNumel / kPeriod) + 2;
    // Before and behind it is nothing, as far as an index could lead that lost its high bits.
    nbytes_ = 3 * periods * period;
    const int file = memfd_create("swafast", 0);
    require(file >= 0 && ftruncate(file, static_cast<off_t>(period)) == 0, "could not make a file in memory");
    reserved_ = mmap(nullptr, nbytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(reserved_ != MAP_FAILED, "could not reserve addresses");
    base_ = static_cast<uint8_t*>(reserved_) + periods * period;
    for (size_t k = 0; k < periods; ++k) {
      void* part =
          mmap(base_ + k * period, period, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, file, 0);
      require(part != MAP_FAILED, "could not map a file once more");
    }
    close(file);
  }
  Repeated(const Repeated&) = delete;
  ~Repeated() { munmap(reserved_, nbytes_); }

  uint8_t* data() { return base_ + shift_ * itemsize_; }

 private:
  int64_t itemsize_, shift_;
  size_t nbytes_;
  void* reserved_;
  uint8_t* base_;
};

// Each element of memory is updated as often as it stands in the tensor, and no more: some thousand of them are looked
// at, the first ones, which the tensor's odd end holds once more than the others, and any.
inline void check_large(int32_t dtype, int32_t format, int64_t chunk_numel, int64_t shift) {
  const int64_t itemsizes[3] = {param_itemsize(dtype), plane_itemsize(format, 0), plane_itemsize(format, 1)};
  const int64_t least = itemsizes[2] == 0 ? 1 : itemsizes[2];
  Repeated param(itemsizes[0], 0), plane0(itemsizes[1], shift), plane1(least, shift);
  Random random(8);
  struct Sample {
    int64_t index;
    Element before;
  };
  std::vector<Sample> samples;
  for (int64_t i = 0; i < Repeated::kPeriod; ++i) {
    const uint32_t value = (random.below(2) << 31) | ((124 + random.below(6)) << 23) | random.below(1 << 23);
    const uint32_t average = (random.below(2) << 31) | ((124 + random.below(6)) << 23) | random.below(1 << 23);
    Element element = {value, {average, 0}};
    if (dtype != SWAFAST_FLOAT32) element.param >>= 16;
    if (format == SWAFAST_FORMAT_EXACT) {
      const oracle::Exact encoded = oracle::encode_exact(oracle::float_of(average));
      element.planes[0] = encoded.average;
      element.planes[1] = static_cast<uint16_t>(encoded.remainder);
    }
    put_bits(param.data(), itemsizes[0], i, element.param);
    put_bits(plane0.data(), itemsizes[1], i, element.planes[0]);
    put_bits(plane1.data(), itemsizes[2], i, element.planes[1]);
    if (i < 1010 || random.below(300) == 0) samples.push_back({i, element});
  }
  const Rows rows = {{param.data(),
                      {plane0.data(), itemsizes[2] == 0 ? nullptr : plane1.data()},
                      kLargeNumel,
                      dtype,
                      format,
                      0,
                      0,
                      0}};
  Chunks chunks;
  for (int64_t offset = 0; offset < kLargeNumel; offset += chunk_numel) {
    chunks.push_back({0, offset, std::min(chunk_numel, kLargeNumel - offset), offset, 1});
  }
  CudaLaunch launch;
  int64_t num_averaged = 1;
  constexpr double kWeight = 0x1p-13;
  require(launch.update_table(rows, chunks, constant(kWeight), &num_averaged, 1) == SWAFAST_OK, "an update failed");
  for (const Sample& sample : samples) {
    const int64_t times = kLargeNumel / Repeated::kPeriod + (sample.index < kLargeNumel % Repeated::kPeriod ? 1 : 0);
    const uint32_t planes[2] = {bits_at(plane0.data(), itemsizes[1], sample.index),
                                bits_at(plane1.data(), itemsizes[2], sample.index)};
    bool holds = planes[0] == (sample.before.param & 0xffu);
    if (format != SWAFAST_FORMAT_COPIED) {
      float average = average_value(format, sample.before.planes);
      for (int64_t k = 0; k < times; ++k)
        average = oracle::lerp(average, param_value(dtype, sample.before.param), kWeight);
      holds = oracle::bits_of(average_value(format, planes)) == oracle::bits_of(average);
    }
    require(holds, "dtype %d: element %lld and its like, %lld elements apart, did not go through %lld updates", dtype,
            static_cast<long long>(sample.index), static_cast<long long>(Repeated::kPeriod),
            static_cast<long long>(times));
  }
}

struct Large {
  const char* name;
  void (*check)();
};

// Chunks as long as the package cuts them for such a tensor; and one of all the elements, which are taken 16 at a time
// or, where the arrays are not aligned alike, one by one.
inline const Large kLarge[] = {
    {"float32", [] { check_large(SWAFAST_FLOAT32, SWAFAST_FORMAT_FLOAT32, 1 << 16, 0); }},
    {"exact", [] { check_large(SWAFAST_BFLOAT16, SWAFAST_FORMAT_EXACT, 1 << 16, 0); }},
    {"one-chunk",
     [] {
       for (const int64_t shift : {0, 1}) check_large(SWAFAST_BYTES, SWAFAST_FORMAT_COPIED, kLargeNumel, shift);
     }},
};
