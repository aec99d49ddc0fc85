// What the kernels over frames [B, F, ...] share. Each frame x[b, f] is contiguous in memory and
// processed by blocks, which are counted over all frames.
#pragma once

#include "cpu/view.h"

namespace anyflow {

struct FrameShape {
  int64_t samples = 0, frames = 0, size = 0;  // B, F, elements of a frame
  int64_t blocks = 0;                         // of a frame
};

// One number per frame, fp32 or fp64: [B, F], or [B] or 0-d with strides of 0.
struct Times {
  const void* data = nullptr;
  bool wide = false;
  int64_t batch_stride = 0, frame_stride = 0;
};

// The places of every sample in the tensors [n, F, ...] that hold picked samples, in their order:
// those of sample b are slots[first[b]] to slots[first[b + 1] - 1]. None where first is null.
struct SlotList {
  const int64_t* first = nullptr;
  const int64_t* slots = nullptr;
};

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

using FrameReader = Reader<kBlock>;
using FrameWriter = Writer<kBlock>;

inline Block frame_block(const FrameShape& shape, int64_t index) {
  const int64_t frame = index / shape.blocks, first = index % shape.blocks * kBlock;
  const int64_t rest = shape.size - first;
  return {frame / shape.frames, frame % shape.frames, first, rest < kBlock ? rest : kBlock};
}

struct SlotRange {
  SlotRange(const SlotList& list, int64_t sample)
      : begin_(list.first == nullptr ? nullptr : list.slots + list.first[sample]),
        end_(list.first == nullptr ? nullptr : list.slots + list.first[sample + 1]) {}

  const int64_t* begin() const { return begin_; }
  const int64_t* end() const { return end_; }

 private:
  const int64_t *begin_, *end_;
};

// The number of a block's frame.
inline double time(const Times& times, const Block& block) {
  const int64_t offset = block.batch * times.batch_stride + block.row * times.frame_stride;
  return times.wide ? static_cast<const double*>(times.data)[offset]
                    : static_cast<const float*>(times.data)[offset];
}

}  // namespace anyflow::ANYFLOW_ISA

#else
#include <c10/util/accumulate.h>

#include <vector>

#include "cpu/tensors.h"

namespace anyflow {

inline FrameShape frame_shape(const at::Tensor& x) {
  const int64_t size = c10::multiply_integers(x.sizes().slice(2));
  return {x.size(0), x.size(1), size, (size + kBlock - 1) / kBlock};
}

// Returns x itself if each frame is contiguous in memory (the kernels take any other strides), else
// a copy.
inline at::Tensor contiguous_frames(const at::Tensor& x) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    contiguous = contiguous && (x.size(i) == 1 || x.stride(i) == expected);
    expected *= x.size(i);
  }
  return copy_unless(contiguous, x);
}

inline Optional contiguous_frames(const Optional& x) {
  return x ? Optional(contiguous_frames(*x)) : x;
}

// Views 0-d, [n] or [n, F] times where they are; the caller keeps them.
inline Times times(const at::Tensor& x) {
  return {x.data_ptr(), x.scalar_type() == at::kDouble, x.dim() < 1 ? 0 : x.stride(0),
          x.dim() < 2 ? 0 : x.stride(1)};
}

// Finds the slots of every sample: those whose index in picked [n], counted from the end if
// negative, names the sample, or the slot of its own number where nothing is picked. An index that
// names no sample is an error.
class SlotLists {
 public:
  SlotLists(const Optional& picked, int64_t samples)
      : first_(samples + 2), slots_(picked ? picked->numel() : samples) {
    // A counting sort: first_[b + 1] is where the next slot of b goes, and in the end where b ends.
    std::vector<int64_t> owner(slots_.size());  // indices are read once: others may write them
    for (int64_t slot = 0; slot < count(); ++slot) {
      const int64_t index =
          picked ? picked->const_data_ptr<int64_t>()[slot * picked->stride(0)] : slot;
      TORCH_CHECK_VALUE(-samples <= index && index < samples, "picked must be in [", -samples, ", ",
                        samples, "), got ", index);
      owner[slot] = index < 0 ? index + samples : index;
      ++first_[owner[slot] + 2];
    }
    for (int64_t b = 0; b < samples; ++b) {
      first_[b + 2] += first_[b + 1];
    }
    for (int64_t slot = 0; slot < count(); ++slot) {
      slots_[first_[owner[slot] + 1]++] = slot;
    }
  }

  int64_t count() const { return static_cast<int64_t>(slots_.size()); }
  SlotList list() const { return {first_.data(), slots_.data()}; }

 private:
  std::vector<int64_t> first_, slots_;
};

// Calls the kernel for all blocks, in parallel.
template <class Arguments>
void for_frame_blocks(const FrameShape& shape, Kernel<Arguments> kernel, const Arguments& a) {
  const int64_t grain = kGrain / std::clamp<int64_t>(shape.size, 1, kBlock);
  for_ranges(shape.samples * shape.frames * shape.blocks, grain, kernel, a);
}

}  // namespace anyflow
#endif
