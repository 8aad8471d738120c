// What the C++ that tests/ptx makes of PTX calls. Every register is an unsigned integer of its size, whatever it holds:
// get and put say what an instruction takes it for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "translated.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;
using pred = bool;

template <class T>
constexpr bool kIsFloat = std::is_same_v<T, f16> || std::is_floating_point_v<T>;
template <class T>
using UnsignedOf = std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>;

// The value in the lower bits of a register or a literal.
template <class T, class Bits>
T get(Bits bits) {
  if constexpr (kIsFloat<T>) {
    const auto low = static_cast<UnsignedOf<T>>(bits);
    T value;
    std::memcpy(&value, &low, sizeof value);
    return value;
  } else {
    return static_cast<T>(bits);
  }
}

// A signed value fills a wider register with its sign, an unsigned one with zeros.
template <class T, class Register, class Value>
void put(Register& result, Value value) {
  const auto typed = static_cast<T>(value);
  if constexpr (kIsFloat<T>) {
    UnsignedOf<T> bits;
    std::memcpy(&bits, &typed, sizeof bits);
    result = static_cast<Register>(bits);
  } else {
    result = static_cast<Register>(typed);
  }
}

// Memory

template <class T, int kNumel>
struct Vector {
  T values[kNumel];
  const T& operator[](int index) const { return values[index]; }
};

inline u64 address_of(const char* pointer) { return reinterpret_cast<u64>(pointer); }
inline char* pointer(u64 address, s64 offset) { return reinterpret_cast<char*>(address + static_cast<u64>(offset)); }

inline char* shared_at(char* shared, s64 size, u32 start, s64 offset, s64 nbytes) {
  const s64 at = static_cast<s64>(start) + offset;
  if (at < 0 || at + nbytes > size) shim::fault("outside shared memory", shared + at);
  return shared + at;
}

template <class T, int kNumel>
Vector<T, kNumel> load(const char* address) {
  return shim::load(reinterpret_cast<const Vector<T, kNumel>*>(address));
}

template <class T, int kNumel>
void store(char* address, const T (&values)[kNumel]) {
  Vector<T, kNumel> vector;
  std::memcpy(vector.values, values, sizeof values);
  shim::store(reinterpret_cast<Vector<T, kNumel>*>(address), vector);
}

constexpr auto add_of = [](auto a, auto b) { return a + b; };
constexpr auto min_of = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto max_of = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto inc_of = [](auto a, auto b) { return a >= b ? decltype(a){0} : a + 1; };
constexpr auto exch_of = [](auto, auto b) { return b; };

// One thread runs at a time, so nothing comes between.
template <class T, class Combine>
T atomic(char* address, T value, Combine combine) {
  const T before = load<T, 1>(address)[0];
  store<T>(address, {static_cast<T>(combine(before, value))});
  return before;
}

// Arithmetic

template <class T>
T shift_left(T value, u32 by) {
  return by < 8 * sizeof(T) ? static_cast<T>(value << by) : T{0};
}
template <class T>
T shift_right(T value, u32 by) {
  if (by >= 8 * sizeof(T)) return value < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(value >> by);
}
// The upper word of two that are shifted to the left as one, by less than a word.
inline u32 shift_pair_left(u32 lower, u32 upper, u32 by) {
  return static_cast<u32>(((u64{upper} << 32 | lower) << (by & 31u)) >> 32);
}

// Towards zero, and the nearest that there is. A NaN gives 0 if both types have 32 bits or fewer, or else the least.
template <class T, class F>
T truncate(F value) {
  using Limits = std::numeric_limits<T>;
  if (value != value) return sizeof(T) == 8 || sizeof(F) == 8 ? Limits::min() : T{0};
  if (value >= -static_cast<F>(Limits::min())) return Limits::max();
  return value <= static_cast<F>(Limits::min()) ? Limits::min() : static_cast<T>(value);
}

inline u32 pair_of_halves(f32 upper, f32 lower) {
  const f16 halves[] = {static_cast<f16>(lower), static_cast<f16>(upper)};
  u32 bits;
  std::memcpy(&bits, halves, sizeof bits);
  return bits;
}

// Each digit of the selector names a byte of b:a; its upper bit asks for eight copies of that byte's sign.
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = (static_cast<u64>(b) << 32) | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 digit = selector >> (4 * i) & 15u;
    const auto byte = static_cast<u8>(both >> (8 * (digit & 7u)));
    result |= static_cast<u32>(digit & 8u ? (byte & 0x80u ? 0xffu : 0u) : byte) << (8 * i);
  }
  return result;
}

inline u32 reverse_bits(u32 value) {
  u32 result = 0;
  for (int i = 0; i < 32; ++i) result |= (value >> i & 1u) << (31 - i);
  return result;
}

// `count` bits from `start` on. Those past the end are the sign of a signed value, whose field has its uppermost as its
// own sign.
template <class T>
T bit_field(T value, u32 start, u32 count) {
  start &= 255u;
  count &= 255u;
  constexpr u32 kBits = 8 * sizeof(T);
  if (count == 0) return 0;
  const T shifted = shift_right(value, start);
  if (count >= kBits || (std::is_signed_v<T> && start + count > kBits)) return shifted;
  using Unsigned = std::make_unsigned_t<T>;
  const auto upper = static_cast<Unsigned>(static_cast<Unsigned>(shifted) << (kBits - count));
  return shift_right(static_cast<T>(upper), kBits - count);
}

// `field` in the place of `count` bits of `value` from `start` on. Those past the end are left out.
template <class T>
T insert_bits(T field, T value, u32 start, u32 count) {
  start &= 255u;
  count &= 255u;
  const T ones = count < 8 * sizeof(T) ? static_cast<T>(shift_left(T{1}, count) - 1) : static_cast<T>(~T{0});
  const T mask = shift_left(ones, start);
  return static_cast<T>((value & ~mask) | (shift_left(field, start) & mask));
}

[[noreturn]] inline void no_target() { shim::fault("a branch to nowhere", nullptr); }

// The threads of a warp. Each leaves its value and reads those of the others once all are there; the next one goes to
// another place, so that late readers find this one.
struct Lanes {
  static constexpr int kThreads = 1024;
  struct {
    u32 value;
    int site;  // the number of the instruction
  } left[2][kThreads];
  unsigned num_exchanges[kThreads];
};
inline Lanes lanes;

// Return `combine` of the values of all threads of this one's warp that `from` says to take.
template <int kSite, class T, class Takes, class Combine>
T gather_lanes(T value, u32 members, Takes takes, Combine combine) {
  if (members != ~0u) shim::fault("an exchange of some threads of a warp", nullptr);
  const unsigned thread = threadIdx.x, first = thread & ~31u, turn = lanes.num_exchanges[thread]++ % 2;
  lanes.left[turn][thread] = {static_cast<u32>(value), kSite};
  shim::wait_for_warp();
  T result = value;
  bool any = false;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& left = lanes.left[turn][first + lane];
    if (left.site != kSite) shim::fault("threads of a warp that are at two exchanges", nullptr);
    if (!takes(lane)) continue;
    result = any ? static_cast<T>(combine(result, static_cast<T>(left.value))) : static_cast<T>(left.value);
    any = true;
  }
  return result;
}

template <int kSite>
u32 exchange_lanes(u32 value, u32 mask, u32 clamp, u32 members) {
  if (clamp != 31) shim::fault("an exchange in parts of a warp", nullptr);
  const unsigned source = ((threadIdx.x & 31u) ^ mask) & 31u;
  return gather_lanes<kSite>(value, members, [=](unsigned lane) { return lane == source; }, exch_of);
}

template <int kSite, class T, class Combine>
T reduce_lanes(T value, u32 members, Combine combine) {
  return gather_lanes<kSite>(value, members, [](unsigned) { return true; }, combine);
}

}  // namespace ptx

// Launch a kernel of 64-bit words by its name. Returns 0, or 1 where there is none, or it has other params.
extern "C" SHIM_SETTING int shim_launch(const char* name, unsigned num_blocks, const long long* words,
                                        long long count) {
  for (const shim::Translated* made = shim::translated; made->name != nullptr; ++made) {
    if (std::strcmp(made->name, name) != 0) continue;
    long long kept[64] = {};
    char* params[64] = {};
    if (count > made->num_params) return 1;
    // Memory that the compiler may ask for comes after what the source names: none is asked for.
    for (int i = 0; i < made->num_params; ++i) {
      if (made->sizes[i] != sizeof *words || i == 64) return 1;
      kept[i] = i < count ? words[i] : 0;
      params[i] = reinterpret_cast<char*>(&kept[i]);
    }
    shim_num_launches += 1;
    shim::run_grid(dim3(num_blocks), dim3(made->num_threads), [&] { made->run(params); });
    return 0;
  }
  return 1;
}
