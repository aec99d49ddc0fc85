// Rows of D elements, as the kernels over tokens see them: fp32 in place, bf16 through a buffer in the L1 cache.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/vector.h"

namespace anyflow {

constexpr int64_t kMaxRow = 8192;  // elements; anyflow/ops/_common.py has the same number

// Tokens [B, L, D], modulation [B, R, D] or an affine [D], seen from tokens: token l of sample b reads the row at
// b * batch + l / tokens * row. Absent where data is null.
struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, row = 0;  // strides in elements
  int64_t tokens = 1;          // tokens that share a row
};

// Sums over the tokens of each row, formed by chunks of consecutive tokens: a chunk stores the rows that lie within it,
// and of a row that it shares with its neighbors a partial sum (csrc/cpu/tensors.h adds these up in their order).
struct RowSums {
  float* totals = nullptr;    // [rows, D]; null where nobody asked
  float* partials = nullptr;  // [chunks, 2, D]: of a row begun earlier, of a row begun here and not finished
  int64_t tokens = 1;         // per row
};

// Where the row of `token` goes, as seen from the chunk [begin, end): 2 for the totals, else the partial.
static inline int row_part(int64_t token, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t first = token / tokens * tokens;
  return first < begin ? 0 : first + tokens > end ? 1 : 2;
}

#ifdef ANYFLOW_ISA
namespace ANYFLOW_ISA {

inline float as_float(uint32_t bits) {
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline uint32_t as_bits(float value) {
  uint32_t result;
  __builtin_memcpy(&result, &value, 4);
  return result;
}

// Conversions as plain integer arithmetic, which the compiler vectorizes; to nearest, ties to even.
struct BFloat16 {
  static float widen(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }

  static uint16_t narrow(float value) {
    const uint32_t bits = as_bits(value);
    return static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  static float widen(uint16_t value) {
    const uint32_t magnitude = value & 0x7fffu, bits = magnitude << 13;
    const float finite = as_float(bits) * 0x1p112f;  // moves the exponent's bias, of subnormal numbers too
    return as_float((magnitude < 0x7c00u ? as_bits(finite) : bits | 0x7f800000u) | (value & 0x8000u) << 16);
  }

  static uint16_t narrow(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // 0.5's last place is theirs
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<uint16_t>((magnitude < 0x477ff000u ? finite : infinite) | (bits >> 16 & 0x8000u));
  }
};

template <class Format>
inline void widen_row(const uint16_t* source, int64_t d, float* target) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    target[i] = Format::widen(source[i]);
  }
}

template <class Format>
inline void narrow_row(const float* source, int64_t d, uint16_t* target) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    target[i] = Format::narrow(source[i]);
  }
}

// The elements as fp32: in place, or converted into `buffer`.
inline const float* load(const void* data, Type type, int64_t offset, int64_t d, float* buffer) {
  if (type == Type::f32) {
    return static_cast<const float*>(data) + offset;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + offset;
  type == Type::bf16 ? widen_row<BFloat16>(source, d, buffer) : widen_row<Float16>(source, d, buffer);
  return buffer;
}

// Converts what was computed into a buffer because it could not be computed in place.
inline void store(const float* values, void* data, Type type, int64_t offset, int64_t d) {
  if (type != Type::f32) {
    uint16_t* target = static_cast<uint16_t*>(data) + offset;
    type == Type::bf16 ? narrow_row<BFloat16>(values, d, target) : narrow_row<Float16>(values, d, target);
  }
}

// Reads the rows of one operand; `at` gives the row of a token as fp32. An absent operand reads as a constant. A row
// that many tokens share is found again without a division, of which one costs as much as a pass over a short row.
class RowReader {
 public:
  RowReader(const Rows& rows, int64_t d, float absent = 0) : rows_(rows), d_(d) {
    for (int64_t i = 0; rows.data == nullptr && i < d; ++i) {
      buffer_[i] = absent;
    }
  }

  const float* at(int64_t batch, int64_t token) {
    if (rows_.data == nullptr) {
      return buffer_;
    }
    if (rows_.tokens == 1) {
      return load(rows_.data, rows_.type, batch * rows_.batch + token * rows_.row, d_, buffer_);
    }
    if (batch != batch_ || token < first_ || token >= first_ + rows_.tokens) {
      const int64_t index = token / rows_.tokens;
      batch_ = batch;
      first_ = index * rows_.tokens;
      row_ = load(rows_.data, rows_.type, batch * rows_.batch + index * rows_.row, d_, buffer_);
    }
    return row_;
  }

 private:
  const Rows& rows_;
  const int64_t d_;
  int64_t batch_ = -1, first_ = 0;  // of the tokens that share row_
  const float* row_ = nullptr;
  alignas(64) float buffer_[kMaxRow];
};

// Writes the rows of a contiguous result: compute into `at(token)`, then call `done(token)`.
class RowWriter {
 public:
  RowWriter(void* data, Type type, int64_t d) : data_(data), type_(type), d_(d) {}

  float* at(int64_t token) { return type_ == Type::f32 ? static_cast<float*>(data_) + token * d_ : buffer_; }
  void done(int64_t token) { store(buffer_, data_, type_, token * d_, d_); }
  // What `done` has written, as it was rounded.
  const float* written(int64_t token) { return load(data_, type_, token * d_, d_, buffer_); }

 private:
  void* const data_;
  const Type type_;
  const int64_t d_;
  alignas(64) float buffer_[kMaxRow];
};

// One of the sums of a backward pass over the tokens [begin, end) of chunk `chunk`: add to `at(token)`, then call
// `done(token)`, for every token in order. An absent sum goes nowhere.
class RowSum {
 public:
  RowSum(const RowSums& to, int64_t begin, int64_t end, int64_t chunk, int64_t d)
      : to_(to), begin_(begin), end_(end), chunk_(chunk), d_(d), next_(begin / to.tokens * to.tokens) {}

  float* at(int64_t token) {
    if (token == begin_ || token == next_) {
      next_ = (token / to_.tokens + 1) * to_.tokens;
      __builtin_memset(sum_, 0, sizeof(float) * d_);
    }
    return sum_;
  }

  void done(int64_t token) {
    if (to_.totals == nullptr || (token + 1 != end_ && token + 1 != next_)) {
      return;
    }
    const int part = row_part(token, to_.tokens, begin_, end_);
    float* target = part == 2 ? to_.totals + token / to_.tokens * d_ : to_.partials + (chunk_ * 2 + part) * d_;
    __builtin_memcpy(target, sum_, sizeof(float) * d_);
  }

 private:
  const RowSums& to_;
  const int64_t begin_, end_, chunk_, d_;
  int64_t next_;  // the token at which another row begins
  alignas(64) float sum_[kMaxRow];
};

// Mean and reciprocal standard deviation of a row, by two passes: the second is not disturbed by a large mean.
struct Moments {
  float mean, rstd;
};

inline Moments moments(const float* x, int64_t d, float eps) {
  const float mean = sum(d, [=]<class T>(int64_t i) { return get<T>(x + i); }) / static_cast<float>(d);
  const float square = sum(d, [=]<class T>(int64_t i) {
    const T centered = get<T>(x + i) - mean;
    return centered * centered;
  });
  return {mean, 1.0f / __builtin_sqrtf(square / static_cast<float>(d) + eps)};
}

}  // namespace ANYFLOW_ISA
#endif

}  // namespace anyflow
