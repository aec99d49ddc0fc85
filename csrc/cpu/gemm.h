// Register tiles of matrix products, the vectors they are made of, and what brings tensors into scratch memory for
// them. Included by kernels only (ANYFLOW_ISA is set).
//
// A tile C[M][N vectors] stays in registers while `multiply` runs over the depth: each step reads N vectors of one row
// of B and broadcasts M elements of A. A may be stored by row or by column: a matrix and its transpose need no copies.
// B is read as whole vectors: its rows lie in scratch memory, aligned and padded.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/vector.h"

namespace anyflow::ANYFLOW_ISA {

using Vector = Vec;
typedef uint32_t IntVector __attribute__((vector_size(4 * kLanes)));

namespace {

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Vector broadcast(float x) { return x - Vector{}; }

// The second where either is NaN. One instruction, which GCC does not find by itself.
#if defined(__AVX512F__)
inline Vector maximum(Vector a, Vector b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
#else
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
#endif

// C += A B, with A[M][depth] by row (element a[m * lda + k]) or by column (a[k * lda + m]), and B[depth][N vectors].
template <int M, int N, bool ByColumn>
inline __attribute__((always_inline)) void multiply(Vector (&c)[M][N], const float* a, int64_t lda,
                                                    const float* b, int64_t ldb, int64_t depth) {
  const float* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    row[m] = ByColumn ? a + m : a + m * lda;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      right[n] = load(b + n * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float left = ByColumn ? a[m] : row[m][k];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        c[m][n] += left * right[n];
      }
    }
    b += ldb;
    a += ByColumn ? lda : 0;
  }
}

template <int M, int N>
inline __attribute__((always_inline)) void store_tile(const Vector (&c)[M][N], float* p, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      store(p + m * ld + n * kLanes, c[m][n]);
    }
  }
}

template <int M, int N>
inline __attribute__((always_inline)) void add_tile(const Vector (&c)[M][N], float* p, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      store(p + m * ld + n * kLanes, load(p + m * ld + n * kLanes) + c[m][n]);
    }
  }
}

// Swaps the off-diagonal blocks of H x H lanes of two rows H apart: log2(kLanes) such steps transpose a square.
template <int H>
inline __attribute__((always_inline)) void swap_blocks(Vector& a, Vector& b) {
  const Vector first = a, second = b;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    a[i] = i & H ? second[i - H] : first[i];
    b[i] = i & H ? second[i] : first[i + H];
  }
#else
  IntVector low = {}, high = {};  // lanes of the first, then of the second
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & H ? kLanes + i - H : i;
    high[i] = i & H ? kLanes + i : i + H;
  }
  a = __builtin_shuffle(first, second, low);
  b = __builtin_shuffle(first, second, high);
#endif
}

template <int H>
inline __attribute__((always_inline)) void transpose_steps(Vector (&r)[kLanes]) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & H)) {
        swap_blocks<H>(r[i], r[i + H]);
      }
    }
    transpose_steps<H / 2>(r);
  }
}

// to[columns][rows] = factor * from[rows][columns]^T for whole squares; the factor has one lane for each column.
inline void transpose(const float* from, int64_t from_ld, float* to, int64_t to_ld, Vector factor) {
  Vector r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    r[i] = factor * load(from + i * from_ld);
  }
  transpose_steps<kLanes / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store(to + i * to_ld, r[i]);
  }
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, uint16_t* to) {  // to the nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

// Rows of a tensor as fp32 into [padded][ld], zeros where there is nothing.
template <typename T>
void load_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to, int64_t ld, int64_t padded) {
  for (int64_t r = 0; r < padded; ++r, to += ld, from += stride) {
    const int64_t filled = r < rows ? dim : 0;
    for (int64_t d = 0; d < filled; ++d) {
      to[d] = to_float(from[d]);
    }
    for (int64_t d = filled; d < ld; ++d) {
      to[d] = 0;
    }
  }
}

template <typename T>
void store_rows(const float* from, int64_t ld, float factor, T* to, int64_t stride, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, from += ld, to += stride) {
    for (int64_t d = 0; d < dim; ++d) {
      from_float(factor * from[d], to + d);
    }
  }
}

// Scratch memory, handed out in pieces of whole cache lines; begun at address 0, it measures how much is needed.
struct Scratch {
  uintptr_t next;

  float* take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(next);
    next += static_cast<uintptr_t>(round_up(4 * floats, 64));
    return piece;
  }
};

}  // namespace
}  // namespace anyflow::ANYFLOW_ISA
