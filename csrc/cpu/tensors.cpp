#include "cpu/tensors.h"

#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace anyflow {

at::Tensor result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (result.nbytes() >= 2 * kPage) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(result.data_ptr());
    const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
    const uintptr_t end = (data + result.nbytes()) / kPage * kPage;
    // Advice: a refusal changes nothing.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return result;
}

at::Tensor result_like(const at::Tensor& x) { return result(x.sizes(), x.options()); }

Sums::Sums(const TokenShape& shape, const Optional& like) : shape_(shape), like_(like) {
  if (!like) {
    return;
  }
  tokens_ = like->dim() == 1 ? shape.tokens : shape.view(*like).shared;
  const auto options = like->options().dtype(at::kFloat);
  totals_ =
      shape.tokens == 0 ? at::zeros(like->sizes(), options) : at::empty(like->sizes(), options);
  partials_ = at::empty({shape.chunks, 2, shape.d}, options);
}

at::Tensor Sums::result() {
  if (!like_) {
    return {};
  }
  float* totals = totals_.data_ptr<float>();
  const float* partials = partials_.data_ptr<float>();
  const int64_t d = shape_.d;
  for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
    const Range range = chunk_of(shape_, chunk);
    if (row_part(range.begin, tokens_, range.begin, range.end) == 0) {
      float* total = totals + range.begin / tokens_ * d;
      for (int64_t i = 0; i < d; ++i) {
        total[i] += partials[2 * chunk * d + i];
      }
    }
    if (row_part(range.end - 1, tokens_, range.begin, range.end) == 1) {
      std::memcpy(totals + (range.end - 1) / tokens_ * d, partials + (2 * chunk + 1) * d,
                  sizeof(float) * d);
    }
  }
  return totals_.to(like_->scalar_type());
}

}  // namespace anyflow
