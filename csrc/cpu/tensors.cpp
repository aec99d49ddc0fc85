#include "cpu/tensors.h"

#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace anyflow {

at::Tensor result_like(const at::Tensor& x) {
  at::Tensor result = at::empty(x.sizes(), x.options());
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (result.nbytes() >= 2 * kPage) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(result.data_ptr()) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(result.data_ptr()) + result.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return result;
}

at::Tensor Sums::result() {
  if (!like_.defined()) {
    return {};
  }
  float* totals = totals_.data_ptr<float>();
  const float* partials = partials_.data_ptr<float>();
  const int64_t d = shape_.d;
  for (int64_t chunk = 0; chunk < shape_.chunks; ++chunk) {
    const int64_t begin = chunk_begin(shape_, chunk), end = chunk_begin(shape_, chunk + 1);
    if (row_part(begin, tokens_, begin, end) == 0) {
      float* total = totals + begin / tokens_ * d;
      for (int64_t i = 0; i < d; ++i) {
        total[i] += partials[2 * chunk * d + i];
      }
    }
    if (row_part(end - 1, tokens_, begin, end) == 1) {
      std::memcpy(totals + (end - 1) / tokens_ * d, partials + (2 * chunk + 1) * d, sizeof(float) * d);
    }
  }
  return totals_.to(like_.scalar_type());
}

}  // namespace anyflow
