// The arithmetic of the checksum: what one word adds to it. swafast/op/checksum.py says what the checksum is.
#pragma once

#include <cstdint>

#include "element.h"

namespace swafast {

// The constants and shifts here are splitmix64's: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
// Generators", 2014 (https://doi.org/10.1145/2660193.2660195), with Stafford's Mix13 as in Java's SplittableRandom.
constexpr uint64_t kIndexFactor = 0x9e3779b97f4a7c15u;

// Where the word with this index starts. The next word's is kIndexFactor more, so a loop adds and need not multiply.
SWAFAST_HD uint64_t start_of(uint64_t index) { return (index + 1) * kIndexFactor; }

// Each operation can be undone, so two words that differ in a bit never add the same at one index.
SWAFAST_HD uint64_t mix(uint64_t start, uint64_t word) {
  uint64_t x = start + word;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace swafast
