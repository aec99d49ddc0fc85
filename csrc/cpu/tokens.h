// What the kernels over tokens [B, L, D] share: statistics of a token, and sums over the tokens
// that read a modulation row.
#pragma once

#include "cpu/view.h"

namespace anyflow {

// Sums over the tokens of each modulation row, formed by chunks of consecutive tokens: a chunk
// stores the rows that lie within it, and of a row that it shares with its neighbors a partial sum
// (csrc/cpu/tensors.h adds these up in their order).
struct RowSums {
  float* totals = nullptr;    // [rows, D]; null where nobody asked
  float* partials = nullptr;  // [chunks, 2, D]: of a row begun earlier, of a row begun here
  int64_t tokens = 1;         // of a row
};

// Says where the sum of the row of `token` goes, as seen from the chunk [begin, end): 2 for the
// totals, else the number of the partial sum.
static inline int row_part(int64_t token, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t first = token / tokens * tokens;
  return first < begin ? 0 : first + tokens > end ? 1 : 2;
}

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/vector.h"

namespace anyflow::ANYFLOW_ISA {

using TokenReader = Reader<kMaxDim>;
using TokenWriter = Writer<kMaxDim>;

// One of the sums of a backward pass over a range of tokens: add to `at(token)`, then call
// `done(token)`, for every token in order. An absent sum goes nowhere.
class RowSum {
 public:
  RowSum(const RowSums& to, Range range, int64_t d)
      : to_(to), range_(range), d_(d), next_(range.begin / to.tokens * to.tokens) {}

  float* at(int64_t token) {
    if (token == range_.begin || token == next_) {
      next_ = (token / to_.tokens + 1) * to_.tokens;
      __builtin_memset(sum_, 0, sizeof(float) * d_);
    }
    return sum_;
  }

  void done(int64_t token) {
    if (to_.totals == nullptr || (token + 1 != range_.end && token + 1 != next_)) {
      return;
    }
    const int part = row_part(token, to_.tokens, range_.begin, range_.end);
    float* total = to_.totals + token / to_.tokens * d_;
    float* partial = to_.partials + (range_.chunk * 2 + part) * d_;
    __builtin_memcpy(part == 2 ? total : partial, sum_, sizeof(float) * d_);
  }

 private:
  const RowSums& to_;
  const Range range_;
  const int64_t d_;
  int64_t next_;  // the token at which another row begins
  alignas(64) float sum_[kMaxDim];
};

// Mean and reciprocal standard deviation of a token, by two passes: a large mean does not disturb
// the second.
struct Moments {
  float mean, rstd;
};

inline Moments moments(const float* x, int64_t d, float eps) {
  const float mean =
      sum(d, [=]<class T>(int64_t i) { return get<T>(x + i); }) / static_cast<float>(d);
  const float square = sum(d, [=]<class T>(int64_t i) {
    const T centered = get<T>(x + i) - mean;
    return centered * centered;
  });
  return {mean, 1.0f / __builtin_sqrtf(square / static_cast<float>(d) + eps)};
}

}  // namespace anyflow::ANYFLOW_ISA
#endif
