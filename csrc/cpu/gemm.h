// Register tiles of matrix products, and scratch memory for their operands. Included by kernels
// only.
//
// A tile C[M][N vectors] stays in registers while `multiply` runs over the depth: each step reads N
// vectors of one row of B and broadcasts M elements of A. A may be stored by row or by column: a
// matrix and its transpose need no copies. B is read as whole vectors: its rows lie in scratch
// memory, aligned and padded.
#pragma once

#include "cpu/vector.h"

namespace anyflow::ANYFLOW_ISA {
namespace {

// C += A B, with A[M][depth] by row (element a[m * lda + k]) or by column (a[k * lda + m]), and
// B[depth][N vectors].
template <int M, int N, bool ByColumn>
inline __attribute__((always_inline)) void multiply(Vec (&c)[M][N], const float* a, int64_t lda,
                                                    const float* b, int64_t ldb, int64_t depth) {
  const float* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    row[m] = ByColumn ? a + m : a + m * lda;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      right[n] = vec(b + n * kLanes);
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
inline __attribute__((always_inline)) void store_tile(const Vec (&c)[M][N], float* p, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      vec(p + m * ld + n * kLanes) = c[m][n];
    }
  }
}

template <int M, int N>
inline __attribute__((always_inline)) void add_tile(const Vec (&c)[M][N], float* p, int64_t ld) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      vec(p + m * ld + n * kLanes) += c[m][n];
    }
  }
}

// Swaps the off-diagonal blocks of H x H lanes of two rows H apart: log2(kLanes) such steps
// transpose a square.
template <int H>
inline __attribute__((always_inline)) void swap_blocks(Vec& a, Vec& b) {
  const Vec first = a, second = b;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    a[i] = i & H ? second[i - H] : first[i];
    b[i] = i & H ? second[i] : first[i + H];
  }
#else
  IntVec low = {}, high = {};  // lanes of the first, then of the second
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
inline __attribute__((always_inline)) void transpose_steps(Vec (&r)[kLanes]) {
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

// to[columns][rows] = factor * from[rows][columns]^T for whole squares; the factor has one lane for
// each column.
inline void transpose(const float* from, int64_t from_ld, float* to, int64_t to_ld, Vec factor) {
  Vec r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    r[i] = factor * vec(from + i * from_ld);
  }
  transpose_steps<kLanes / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    vec(to + i * to_ld) = r[i];
  }
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out scratch memory in pieces of whole cache lines. Begun at address 0, it measures how much
// is needed.
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
