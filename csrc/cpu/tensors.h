// The torch side of the kernels over tokens: checks, results, the split over threads, and sums over rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "cpu/rows.h"

namespace anyflow {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

inline Type type_of(const at::Tensor& x) {
  TORCH_CHECK(x.is_cpu(), "expected a CPU tensor, got one on ", x.device());
  switch (x.scalar_type()) {
    case at::kFloat:
      return Type::f32;
    case at::kBFloat16:
      return Type::bf16;
    case at::kHalf:
      return Type::f16;
    default:
      TORCH_CHECK(false, "the native CPU kernels take float32, bfloat16 and float16, got ", x.scalar_type());
  }
}

// Whether the elements begin at multiples of their size: a view of a buffer need not.
inline bool is_aligned(const at::Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() == 0;
}

// x itself if a kernel can read it and `readable` holds of its strides, else a contiguous copy.
inline at::Tensor copy_unless(bool readable, const at::Tensor& x) {
  return readable && is_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline at::Tensor contiguous(const at::Tensor& x) { return copy_unless(x.is_contiguous(), x); }

// x itself if its last dimension is contiguous in memory (the kernels take any other strides), else a copy.
inline at::Tensor contiguous_rows(const at::Tensor& x) {
  return copy_unless(x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) == 1, x);
}

// An uninitialized contiguous tensor of x's shape and dtype, on huge pages where it is large: with pages of 4 KiB, the
// first touch of a fresh tensor costs as much as a pass over it.
at::Tensor result_like(const at::Tensor& x);

// Tokens [B, L, D].
struct Shape {
  int64_t batch = 0, length = 0, d = 0;
  int64_t chunks = 0;  // of consecutive tokens, one for each thread: what sums are split into

  Shape() = default;

  explicit Shape(const at::Tensor& x) : batch(x.size(0)), length(x.size(1)), d(x.size(2)) {
    TORCH_CHECK(d > 0 && d <= kMaxRow, "the native CPU kernels take rows of 1 to ", kMaxRow, " elements, got ", d);
    // Asked here, once: inside a parallel region a thread may answer for itself.
    chunks = std::min<int64_t>({at::get_num_threads(), tokens(), tokens() * d / kGrain + 1});
  }

  int64_t tokens() const { return batch * length; }

  // How tokens read [B, L, D], [B, R, D] with R dividing L, or [D].
  Rows rows(const at::Tensor& x) const {
    TORCH_CHECK(x.size(-1) == d && (x.dim() == 1 || (x.dim() == 3 && x.size(0) == batch)), "expected [", batch, ", R, ",
                d, "] or [", d, "], got ", x.sizes());
    if (x.dim() == 1) {
      return {x.data_ptr(), type_of(x), 0, 0, std::max<int64_t>(length, 1)};
    }
    TORCH_CHECK(x.size(1) > 0 || length == 0, "no rows for ", length, " tokens");
    const int64_t tokens = length / std::max<int64_t>(x.size(1), 1);
    TORCH_CHECK(tokens * x.size(1) == length, x.size(1), " rows do not divide ", length, " tokens");
    return {x.data_ptr(), type_of(x), x.stride(0), x.stride(1), std::max<int64_t>(tokens, 1)};
  }
};

// work(begin, end) over all tokens, in parallel.
template <class Work>
void for_tokens(const Shape& shape, const Work& work) {
  const int64_t grain = std::max<int64_t>(kGrain / shape.d, 1);
  at::parallel_for(0, shape.tokens(), grain, work);
}

inline int64_t chunk_begin(const Shape& shape, int64_t chunk) { return shape.tokens() * chunk / shape.chunks; }

// work(begin, end, chunk) for every chunk, in parallel.
template <class Work>
void for_chunks(const Shape& shape, const Work& work) {
  at::parallel_for(0, shape.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      work(chunk_begin(shape, chunk), chunk_begin(shape, chunk + 1), chunk);
    }
  });
}

// The gradient of a modulation [B, R, D] or of an affine [D]: sums over the tokens that read each of its rows.
class Sums {
 public:
  Sums() = default;  // of an absent operand

  Sums(const Shape& shape, const at::Tensor& like) : shape_(shape), like_(like) {
    tokens_ = like.dim() == 1 ? shape.tokens() : shape.rows(like).tokens;
    const auto options = like.options().dtype(at::kFloat);
    totals_ = shape.tokens() == 0 ? at::zeros(like.sizes(), options) : at::empty(like.sizes(), options);
    partials_ = at::empty({shape.chunks, 2, shape.d}, options);
  }

  RowSums rows() const {
    return like_.defined() ? RowSums{totals_.data_ptr<float>(), partials_.data_ptr<float>(), tokens_} : RowSums{};
  }

  // The sums in the operand's dtype, once all chunks are done.
  at::Tensor result();

 private:
  Shape shape_;
  at::Tensor like_, totals_, partials_;
  int64_t tokens_ = 1;
};

}  // namespace anyflow
