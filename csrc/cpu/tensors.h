// The torch side of the kernels: views of tensors, results, the split over threads, sums over the
// tokens of a row, and the registration of operators.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/tokens.h"

// Registers a function on CPU tensors as the operator anyflow::<name>_native. The schema comes from
// anyflow/ops/<op>.py, which is imported later: torch checks the function against it there.
#define ANYFLOW_REGISTER(name) \
  TORCH_LIBRARY_IMPL(anyflow, CPU, library) { library.impl(#name "_native", &name); }

namespace anyflow {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

inline Type type_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Type::f32
         : x.scalar_type() == at::kBFloat16 ? Type::bf16
                                            : Type::f16;
}

// Tells whether the elements begin at multiples of their size; in a view of a buffer they need not.
inline bool is_aligned(const at::Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() == 0;
}

// Returns x itself if a kernel can read it and `readable` holds of its strides, else a contiguous
// copy.
inline at::Tensor copy_unless(bool readable, const at::Tensor& x) {
  return readable && is_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline at::Tensor contiguous(const at::Tensor& x) { return copy_unless(x.is_contiguous(), x); }

// Returns x itself if its last dimension is contiguous in memory (the kernels take any other
// strides), else a copy.
inline at::Tensor contiguous_rows(const at::Tensor& x) {
  return copy_unless(x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) == 1, x);
}

inline Optional contiguous_rows(const Optional& x) { return x ? Optional(contiguous_rows(*x)) : x; }

// Views a contiguous tensor, or rows [B, R, ...] of contiguous elements; the caller keeps x.
inline View view(const at::Tensor& x) {
  return {x.data_ptr(), type_of(x), x.dim() < 1 ? 0 : x.stride(0), x.dim() < 2 ? 0 : x.stride(1)};
}

inline View view(const Optional& x) { return x ? view(*x) : View{}; }

// Returns an uninitialized contiguous tensor, on huge pages where it is large: with pages of 4 KiB,
// the first touch of a fresh tensor costs as much as a pass over it.
at::Tensor result(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor result_like(const at::Tensor& x);

// Calls the kernel for ranges of at least `grain` of `count` things, in parallel.
template <class Arguments>
void for_ranges(int64_t count, int64_t grain, Kernel<Arguments> kernel, const Arguments& a) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(a, {begin, end}); });
}

// Tokens [B, L, D].
struct TokenShape {
  int64_t length, d, tokens;
  int64_t chunks;  // of consecutive tokens, one for each thread: what sums are split into

  explicit TokenShape(const at::Tensor& x)
      : length(x.size(1)), d(x.size(2)), tokens(x.size(0) * x.size(1)) {
    // The number of threads is asked here, once: a thread of a parallel region may say one.
    chunks = std::min<int64_t>({at::get_num_threads(), tokens, tokens * d / kGrain + 1});
  }

  // Views [B, L, D], [B, R, D] with R dividing L, or [D], as tokens read it.
  View view(const at::Tensor& x) const {
    if (x.dim() == 1) {
      return {x.data_ptr(), type_of(x), 0, 0, std::max<int64_t>(length, 1)};
    }
    View rows = anyflow::view(x);
    rows.shared = std::max<int64_t>(length / std::max<int64_t>(x.size(1), 1), 1);
    return rows;
  }

  View view(const Optional& x) const { return x ? view(*x) : View{}; }
};

// Calls the kernel for all tokens, in parallel.
template <class Arguments>
void for_tokens(const TokenShape& shape, Kernel<Arguments> kernel, const Arguments& a) {
  for_ranges(shape.tokens, std::max<int64_t>(kGrain / shape.d, 1), kernel, a);
}

inline Range chunk_of(const TokenShape& shape, int64_t chunk) {
  return {shape.tokens * chunk / shape.chunks, shape.tokens * (chunk + 1) / shape.chunks, chunk};
}

// Calls the kernel for every chunk of tokens, in parallel.
template <class Arguments>
void for_chunks(const TokenShape& shape, Kernel<Arguments> kernel, const Arguments& a) {
  at::parallel_for(0, shape.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      kernel(a, chunk_of(shape, chunk));
    }
  });
}

// The gradient of a modulation [B, R, D] or of an affine [D]: sums over the tokens that read each
// row. An absent operand has no sums and no result.
class Sums {
 public:
  Sums(const TokenShape& shape, const Optional& like);

  RowSums rows() const {
    return like_ ? RowSums{totals_.data_ptr<float>(), partials_.data_ptr<float>(), tokens_}
                 : RowSums{};
  }

  // Returns the sums in the operand's dtype, once all chunks are done; undefined if it is absent.
  at::Tensor result();

 private:
  const TokenShape shape_;
  const Optional like_;
  at::Tensor totals_, partials_;
  int64_t tokens_ = 1;  // of a row
};

}  // namespace anyflow
