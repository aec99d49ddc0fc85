// Frames of [B, F, ...], as the flow-map kernels see them: each frame x[b, f] is contiguous in memory and processed by
// blocks, as fp32: in place, or through a buffer in the L1 cache. Blocks are counted over all frames.
#pragma once

#include "cpu/rows.h"

namespace anyflow {

constexpr int64_t kFrameBlock = 1024;  // elements: the buffers of all operands together fit the L1 cache

struct FrameShape {
  int64_t samples = 0, frames = 0, size = 0;  // B, F, elements of a frame
  int64_t blocks = 0;                         // of a frame
};

// A tensor [B, F, ...]. Absent where data is null.
struct Frames {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t sample = 0, frame = 0;  // strides in elements
};

// One number per frame, fp32 or fp64: [B, F], or [B] or 0-d with strides of 0.
struct Times {
  const void* data = nullptr;
  bool wide = false;
  int64_t sample = 0, frame = 0;
};

// Slot `at` of the tensors [n, F, ...] that hold picked samples; not valid where its index named no sample.
struct Slot {
  int64_t at;
  bool valid;
};

// The slots of every sample, in their order: those of sample b begin at slots[first[b]] and end before the next
// sample's. None where first is null.
struct SlotList {
  const int64_t* first = nullptr;
  const Slot* slots = nullptr;
};

#ifdef ANYFLOW_ISA
namespace ANYFLOW_ISA {

// The elements [first, first + count) of one frame.
struct FrameBlock {
  FrameBlock(const FrameShape& shape, int64_t index) {
    const int64_t row = index / shape.blocks;
    sample = row / shape.frames;
    frame = row % shape.frames;
    first = index % shape.blocks * kFrameBlock;
    count = shape.size - first < kFrameBlock ? shape.size - first : kFrameBlock;
  }

  int64_t sample, frame, first, count;
};

struct SlotRange {
  SlotRange(const SlotList& list, int64_t sample)
      : begin_(list.first == nullptr ? nullptr : list.slots + list.first[sample]),
        end_(list.first == nullptr ? nullptr : list.slots + list.first[sample + 1]) {}

  const Slot* begin() const { return begin_; }
  const Slot* end() const { return end_; }

 private:
  const Slot *begin_, *end_;
};

inline double time(const Times& times, int64_t sample, int64_t frame) {
  const int64_t offset = sample * times.sample + frame * times.frame;
  return times.wide ? static_cast<const double*>(times.data)[offset] : static_cast<const float*>(times.data)[offset];
}

inline int64_t offset_of(const Frames& x, int64_t sample, const FrameBlock& block) {
  return sample * x.sample + block.frame * x.frame + block.first;
}

// Reads the blocks of one operand; `at` gives the elements that a block has in a sample, its own or a slot.
class FrameReader {
 public:
  explicit FrameReader(const Frames& x) : x_(x) {}

  const float* at(int64_t sample, const FrameBlock& block) {
    return load(x_.data, x_.type, offset_of(x_, sample, block), block.count, buffer_);
  }

 private:
  const Frames& x_;
  alignas(64) float buffer_[kFrameBlock];
};

// Writes the blocks of a result, or of none: compute into `at(sample, block)`, then call `done(sample, block)`.
class FrameWriter {
 public:
  explicit FrameWriter(const Frames& x) : x_(x) {}

  float* at(int64_t sample, const FrameBlock& block) {
    const bool in_place = x_.data != nullptr && x_.type == Type::f32;
    return in_place ? static_cast<float*>(x_.data) + offset_of(x_, sample, block) : buffer_;
  }

  void done(int64_t sample, const FrameBlock& block) {
    if (x_.data != nullptr) {
      store(buffer_, x_.data, x_.type, offset_of(x_, sample, block), block.count);
    }
  }

 private:
  const Frames& x_;
  alignas(64) float buffer_[kFrameBlock];
};

}  // namespace ANYFLOW_ISA
#endif

}  // namespace anyflow

#ifndef ANYFLOW_ISA
#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace anyflow {

inline FrameShape frame_shape(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, "expected [B, F, ...], got ", x.sizes());
  int64_t size = 1;
  for (int64_t i = 2; i < x.dim(); ++i) {
    size *= x.size(i);
  }
  return {x.size(0), x.size(1), size, (size + kFrameBlock - 1) / kFrameBlock};
}

// x itself if each frame is contiguous in memory (the kernels take any other strides), else a copy.
inline at::Tensor contiguous_frames(const at::Tensor& x) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    contiguous = contiguous && (x.size(i) == 1 || x.stride(i) == expected);
    expected *= x.size(i);
  }
  return copy_unless(contiguous, x);
}

// A tensor with frames of `shape`, of any number of samples.
inline Frames frames(const at::Tensor& x, const FrameShape& shape, int64_t samples) {
  const FrameShape given = frame_shape(x);
  TORCH_CHECK(given.samples == samples && given.frames == shape.frames && given.size == shape.size, "expected ",
              samples, " samples of ", shape.frames, " frames of ", shape.size, " elements, got ", x.sizes());
  return {x.data_ptr(), type_of(x), x.stride(0), x.stride(1)};
}

inline Frames frames(const at::Tensor& x, const FrameShape& shape) { return frames(x, shape, shape.samples); }

// 0-d, [samples] or [samples, F] times; `x` is kept by the caller, and read where it is.
inline Times times(const at::Tensor& x, const FrameShape& shape, int64_t samples) {
  TORCH_CHECK(x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
              "expected times in float32 or float64 on the CPU, got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK(x.dim() <= 2 && (x.dim() < 1 || x.size(0) == samples) && (x.dim() < 2 || x.size(1) == shape.frames),
              "expected times [], [", samples, "] or [", samples, ", ", shape.frames, "], got ", x.sizes());
  return {x.data_ptr(), x.scalar_type() == at::kDouble, x.dim() < 1 ? 0 : x.stride(0), x.dim() < 2 ? 0 : x.stride(1)};
}

// Which slots belong to a sample: those whose index in rows [n], counted from the end if negative, names it, or the
// slot of its own number where there are no rows. An index that names no sample is an error.
class SlotLists {
 public:
  SlotLists(const std::optional<at::Tensor>& rows, int64_t samples) : count_(rows ? rows->numel() : samples) {
    TORCH_CHECK(!rows || (rows->dim() == 1 && rows->is_cpu() && rows->scalar_type() == at::kLong),
                "expected rows [n] in int64 on the CPU");
    TORCH_CHECK(count_ == 0 || samples > 0, "rows pick among 0 samples");
    const auto index = [&](int64_t slot) {
      const int64_t i = rows ? rows->const_data_ptr<int64_t>()[slot * rows->stride(0)] : slot;
      return i < 0 ? i + samples : i;
    };
    const auto sample = [&](int64_t slot) { return std::clamp<int64_t>(index(slot), 0, samples - 1); };
    first_.resize(samples + 2);  // counting sort: first_[b + 1] is where the next slot of b goes, then where b ends
    slots_.resize(count_);
    for (int64_t slot = 0; slot < count_; ++slot) {
      TORCH_CHECK_VALUE(sample(slot) == index(slot), "rows must be in [", -samples, ", ", samples, "), got ",
                        rows ? rows->const_data_ptr<int64_t>()[slot * rows->stride(0)] : slot);
      ++first_[sample(slot) + 2];
    }
    for (int64_t b = 0; b < samples; ++b) {
      first_[b + 2] += first_[b + 1];
    }
    for (int64_t slot = 0; slot < count_; ++slot) {
      slots_[first_[sample(slot) + 1]++] = {slot, sample(slot) == index(slot)};
    }
  }

  int64_t count() const { return count_; }
  SlotList list() const { return {first_.data(), slots_.data()}; }

 private:
  const int64_t count_;
  std::vector<int64_t> first_;
  std::vector<Slot> slots_;
};

// An uninitialized contiguous tensor, by the means of result_like.
inline at::Tensor result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return result_like(at::empty({}, options).expand(sizes));
}

// work(begin, end) over all blocks, in parallel.
template <class Work>
void for_frame_blocks(const FrameShape& shape, const Work& work) {
  const int64_t grain = kGrain / std::clamp<int64_t>(shape.size, 1, kFrameBlock);
  at::parallel_for(0, shape.samples * shape.frames * shape.blocks, grain, work);
}

}  // namespace anyflow
#endif
