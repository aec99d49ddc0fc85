// Contiguous tensors as runs of elements, for kernels to which shapes do not matter: fp32 in place, the others through
// a buffer in the L1 cache.
#pragma once

#include "cpu/rows.h"

namespace anyflow {

constexpr int64_t kBlock = 1024;  // elements that a kernel works on at a time

struct Elements {
  void* data = nullptr;
  Type type = Type::f32;
};

#ifdef ANYFLOW_ISA
namespace ANYFLOW_ISA {

class BlockReader {
 public:
  explicit BlockReader(const Elements& elements) : elements_(elements) {}

  // The elements [begin, begin + n), n <= kBlock, as fp32.
  const float* at(int64_t begin, int64_t n) { return load(elements_.data, elements_.type, begin, n, buffer_); }

 private:
  const Elements elements_;
  alignas(64) float buffer_[kBlock];
};

// Compute n <= kBlock elements into `at(begin)`, then call `done(begin, n)`.
class BlockWriter {
 public:
  explicit BlockWriter(const Elements& elements) : elements_(elements) {}

  float* at(int64_t begin) {
    return elements_.type == Type::f32 ? static_cast<float*>(elements_.data) + begin : buffer_;
  }
  void done(int64_t begin, int64_t n) { store(buffer_, elements_.data, elements_.type, begin, n); }

 private:
  const Elements elements_;
  alignas(64) float buffer_[kBlock];
};

// n <= kBlock values as they would be read after having been stored.
inline void round_to(Type type, float* values, int64_t n) {
  uint16_t stored[kBlock];
  store(values, stored, type, 0, n);  // nothing for fp32
  load(stored, type, 0, n, values);
}

// work(first, n) for each block of [begin, end).
template <class Work>
inline void for_blocks(int64_t begin, int64_t end, const Work& work) {
  for (int64_t first = begin; first < end; first += kBlock) {
    work(first, end - first < kBlock ? end - first : kBlock);
  }
}

}  // namespace ANYFLOW_ISA
#endif

}  // namespace anyflow
