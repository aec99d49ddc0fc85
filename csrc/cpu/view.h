// Tensors as kernels see them, and the pair that reads and writes them as fp32: in place, or
// through a buffer in the L1 cache where they are stored in half precision.
#pragma once

#include "cpu/dispatch.h"

namespace anyflow {

// Elements of a token, at most; anyflow/ops/_common.py has the same number.
constexpr int64_t kMaxDim = 8192;
// Elements of a block, at most: the buffers of all operands together fit the L1 cache.
constexpr int64_t kBlock = 1024;

// A tensor of rows of contiguous elements, in samples; absent where data is null. Row `row` of
// sample `batch` begins at batch * batch_stride + row / shared * row_stride.
struct View {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch_stride = 0, row_stride = 0;  // in elements
  int64_t shared = 1;                        // consecutive rows that are one and the same in memory
};

// n consecutive elements of one row: a token, a part of a frame, or a part of a contiguous tensor.
struct Block {
  int64_t batch, row, first, n;

  // The same elements of another sample.
  Block of(int64_t other) const { return {other, row, first, n}; }
};

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/formats.h"

namespace anyflow::ANYFLOW_ISA {

// Reads blocks of at most N elements of one tensor. An absent tensor reads as a constant.
template <int64_t N>
class Reader {
 public:
  // n: elements of the blocks of a tensor that may be absent.
  explicit Reader(const View& view, int64_t n = 0, float absent = 0) : view_(view) {
    for (int64_t i = 0; view.data == nullptr && i < n; ++i) {
      buffer_[i] = absent;
    }
  }

  const float* at(const Block& block) {
    if (view_.data == nullptr) {
      return buffer_;
    }
    int64_t row = block.row;
    if (view_.shared != 1) {
      // Found again without a division, of which one costs as much as a pass over a short row.
      if (block.batch == batch_ && row >= first_ && row < first_ + view_.shared) {
        return elements_;
      }
      row /= view_.shared;
      batch_ = block.batch;
      first_ = row * view_.shared;
    }
    const int64_t offset = block.batch * view_.batch_stride + row * view_.row_stride + block.first;
    elements_ = load(view_.data, view_.type, offset, block.n, buffer_);
    return elements_;
  }

 private:
  const View& view_;
  int64_t batch_ = -1, first_ = 0;  // of the rows that share elements_
  const float* elements_ = nullptr;
  alignas(64) float buffer_[N];
};

// Writes blocks of at most N elements of one tensor: compute into `at(block)`, then call
// `done(block)`. What is computed of an absent tensor goes nowhere.
template <int64_t N>
class Writer {
 public:
  explicit Writer(const View& view) : view_(view) {}

  float* at(const Block& block) {
    const bool in_place = view_.data != nullptr && view_.type == Type::f32;
    return in_place ? static_cast<float*>(view_.data) + offset(block) : buffer_;
  }

  void done(const Block& block) {
    if (view_.data != nullptr) {
      store(buffer_, view_.data, view_.type, offset(block), block.n);
    }
  }

  // Returns what `done` has written, as it was rounded.
  const float* written(const Block& block) {
    return load(view_.data, view_.type, offset(block), block.n, buffer_);
  }

 private:
  int64_t offset(const Block& block) const {
    return block.batch * view_.batch_stride + block.row * view_.row_stride + block.first;
  }

  const View& view_;
  alignas(64) float buffer_[N];
};

// Calls work(block) for the blocks of the elements [begin, end) of a contiguous tensor.
template <class Work>
inline void for_blocks(Range range, const Work& work) {
  for (int64_t first = range.begin; first < range.end; first += kBlock) {
    work(Block{0, 0, first, range.end - first < kBlock ? range.end - first : kBlock});
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#endif
