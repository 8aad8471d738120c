// A box of a tensor as lines of words: its axes in the order of memory, joined where one goes on where another ends.
// For launch.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../swafast.h"

namespace swafast::cpu {
namespace {

struct Axis {
  int64_t size;
  int64_t stride;  // in words
  uint64_t index_stride;
};

// Words `stride` apart in memory and `index_step` in the whole tensor, from `offset` words behind the corner.
struct Line {
  int64_t offset, numel, stride;
  uint64_t index, index_step;

  void move(const Axis& axis, int64_t times) {
    offset += times * axis.stride;
    index += static_cast<uint64_t>(times) * axis.index_stride;
  }
};

// Each doubles the number of words at least, and 63 bits count them.
constexpr int kMostAxes = 63;

class Words {
 public:
  // False for a box that there cannot be.
  bool set(const swafast_box& box) {
    first_index_ = static_cast<uint64_t>(box.first_index);
    if (box.ndim < 0 || !count(box)) return false;
    for (int64_t d = 0; d < box.ndim && numel_ > 0; ++d) {
      if (box.sizes[d] == 1) continue;
      axes_[num_axes_++] = {box.sizes[d], box.strides[d], static_cast<uint64_t>(box.index_strides[d])};
    }
    std::sort(axes_, axes_ + num_axes_, [](const Axis& a, const Axis& b) {
      return a.stride != b.stride ? a.stride > b.stride : a.index_stride > b.index_stride;
    });
    join();
    if (num_axes_ == 0) axes_[num_axes_++] = {numel_, 1, 1};
    return true;
  }

  int64_t numel() const { return numel_; }

  // Hand `body` the lines that the words `begin` to `end` are made of, counted in the order of the axes.
  template <class Body>
  void for_each_line(int64_t begin, int64_t end, Body body) const {
    const int row = num_axes_ - 1;
    int64_t coordinates[kMostAxes];
    Line line = {0, 0, axes_[row].stride, first_index_, axes_[row].index_stride};
    int64_t rest = begin;
    for (int d = row; d >= 0; --d) {
      coordinates[d] = rest % axes_[d].size;
      rest /= axes_[d].size;
      line.move(axes_[d], coordinates[d]);
    }
    for (;; begin += line.numel) {
      line.numel = std::min(axes_[row].size - coordinates[row], end - begin);
      body(line);
      if (line.numel == end - begin) return;
      // To where the next row begins, without a division: a row may be short.
      line.move(axes_[row], -coordinates[row]);
      coordinates[row] = 0;
      for (int d = row - 1; d >= 0; --d) {
        line.move(axes_[d], 1);
        if (++coordinates[d] < axes_[d].size) break;
        line.move(axes_[d], -axes_[d].size);
        coordinates[d] = 0;
      }
    }
  }

 private:
  // numel_ = how many words there are; false where a size is negative or 64 bits do not count them.
  bool count(const swafast_box& box) {
    numel_ = 1;
    for (int64_t d = 0; d < box.ndim; ++d) {
      if (box.sizes[d] < 0) return false;
      if (box.sizes[d] == 0) numel_ = 0;
    }
    for (int64_t d = 0; d < box.ndim && numel_ > 0; ++d) {
      if (numel_ > INT64_MAX / box.sizes[d]) return false;
      numel_ *= box.sizes[d];
    }
    return true;
  }

  // An axis whose stride leads to where the next one ends, in memory and in the whole tensor, is one with it.
  void join() {
    int last = 0;
    for (int d = 1; d < num_axes_; ++d) {
      Axis& outer = axes_[last];
      const Axis& inner = axes_[d];
      const auto size = static_cast<uint64_t>(inner.size);
      if (static_cast<uint64_t>(outer.stride) == size * static_cast<uint64_t>(inner.stride) &&
          outer.index_stride == size * inner.index_stride) {
        outer = {outer.size * inner.size, inner.stride, inner.index_stride};
      } else {
        axes_[++last] = inner;
      }
    }
    if (num_axes_ > 0) num_axes_ = last + 1;
  }

  Axis axes_[kMostAxes];
  int num_axes_ = 0;
  int64_t numel_ = 0;
  uint64_t first_index_ = 0;
};

}  // namespace
}  // namespace swafast::cpu
