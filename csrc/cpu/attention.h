// Attention without a mask: out = softmax(scale * q k^T) v, and its gradients, without a matrix of
// scores in memory. cpu/attention.cpp has the forward, cpu/attention_backward.cpp the backward.
//
// Scores are kept transposed, [key][query], with queries in the lanes of vectors. The softmax over
// keys is then made of whole vectors (no horizontal sums), keys and values are multiplied in the
// layout that they have, and only the queries of a block, and its result, are ever transposed:
//
//     forward     S^T = K Q^T    O^T = V^T P^T
//     backward    S^T = K Q^T    dP^T = V dO^T    dQ^T = K^T dS^T    dV = P^T dO    dK = dS^T Q
//
// Scores are scaled, in units of log2, where they enter the exponential: rounding scaled queries
// would cost a bit.
#pragma once

#include "cpu/dispatch.h"

namespace anyflow {

// A tensor [batch, rows, heads, head_dim] whose last dimension is contiguous.
struct HeadsView {
  void* data;
  int64_t batch_stride, row_stride, head_stride;  // in elements
};

struct Attention {
  int64_t batch, queries, keys, heads, head_dim;  // head_dim: a multiple of 8, up to 256
  float scale;
  Type type;  // of all tensors but logsumexp
  HeadsView q, k, v, out;
  float* logsumexp;  // [batch, heads, queries], of the scaled scores, from the forward
  HeadsView grad_out, grad_q, grad_k, grad_v;  // backward only
};

// What the caller must provide: any division of [0, tasks) into ranges, and aligned scratch memory
// for each.
struct AttentionPlan {
  int64_t tasks;
  int64_t scratch;  // bytes, aligned to 64
};

ANYFLOW_KERNEL(attention_forward_plan, const Attention&, AttentionPlan*)
ANYFLOW_KERNEL(attention_forward, const Attention&, Range, void* scratch)
ANYFLOW_KERNEL(attention_backward_plan, const Attention&, AttentionPlan*)
ANYFLOW_KERNEL(attention_backward, const Attention&, Range, void* scratch)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/formats.h"
#include "cpu/gemm.h"

namespace anyflow::ANYFLOW_ISA {
namespace {

// Tiles of M x N vectors that fill the registers, for [key][query] and [head_dim][query], and the
// keys of a block, which with its queries fill the L2 cache.
#if defined(__AVX512F__)
constexpr int kM = 8, kN = 2;
constexpr int64_t kKeys = 128;
#else
constexpr int kM = 4, kN = 3;
constexpr int64_t kKeys = 120;
#endif
constexpr int kGradN = 2;                       // of a tile [key][head_dim]
constexpr int64_t kRowUnit = kGradN * 16;       // what rows of head_dim are padded to
constexpr int64_t kPanel = kN * kLanes;         // queries side by side
constexpr double kLog2e = 1.44269504088896341;  // twice rounded, it would show in the gradients
static_assert(kKeys % kM == 0 && 8 % kM == 0);

// Returns the rows from `first` on of one head of a tensor.
template <class Format>
inline typename Format::Stored* head_rows(const HeadsView& x, int64_t batch, int64_t head,
                                          int64_t first) {
  return static_cast<typename Format::Stored*>(x.data) + batch * x.batch_stride +
         head * x.head_stride + first * x.row_stride;
}

// Reads n rows of one head as fp32 into [padded][ld], with zeros beyond them.
template <class Format>
void load_rows(const HeadsView& x, int64_t batch, int64_t head, int64_t first, int64_t n,
               int64_t dim, float* to, int64_t ld, int64_t padded) {
  const auto* from = head_rows<Format>(x, batch, head, first);
  for (int64_t r = 0; r < padded; ++r, to += ld, from += x.row_stride) {
    const int64_t filled = r < n ? dim : 0;
    for (int64_t d = 0; d < filled; ++d) {
      to[d] = Format::widen(from[d]);
    }
    for (int64_t d = filled; d < ld; ++d) {
      to[d] = 0;
    }
  }
}

// Writes n rows of [n][ld], times a factor, into one head.
template <class Format>
void store_rows(const float* from, int64_t ld, float factor, const HeadsView& x, int64_t batch,
                int64_t head, int64_t first, int64_t n, int64_t dim) {
  auto* to = head_rows<Format>(x, batch, head, first);
  for (int64_t r = 0; r < n; ++r, from += ld, to += x.row_stride) {
    for (int64_t d = 0; d < dim; ++d) {
      to[d] = Format::narrow(factor * from[d]);
    }
  }
}

// Returns what takes scores to exponents of 2.
inline float log2_scale(const Attention& a) { return static_cast<float>(a.scale * kLog2e); }

// The second where either is NaN. One instruction, which GCC does not find by itself.
#if defined(__AVX512F__)
inline Vec maximum(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
#endif

// to[ld][kPanel] = from[kPanel][ld]^T
inline void transpose_queries(const float* from, int64_t ld, int64_t dim, float* to) {
  for (int64_t q = 0; q < kPanel; q += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      transpose(from + q * ld + d, ld, to + d * kPanel + q, kPanel, broadcast(1));
    }
  }
}

// to[kPanel][ld] = (from[ld][kPanel] * factor[kPanel])^T
inline void transpose_back(const float* from, int64_t dim, float* to, int64_t ld,
                           const Vec (&factor)[kN]) {
  for (int n = 0; n < kN; ++n) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      transpose(from + d * kPanel + n * kLanes, kPanel, to + n * kLanes * ld + d, ld, factor[n]);
    }
  }
}

// Returns 2^x for x <= 0, to 1e-7. A positive x is taken for a rounding error of 0, below -126 the
// result is 0, and NaN stays.
inline Vec exp2_of_negative(Vec x) {
  x = minimum(Vec{}, maximum(broadcast(-126.0f), x));
  // The low bits of x + magic are round(x) + 126, the exponent of 2^(round(x) - 1): zero, and so
  // 0.0, at x = -126.
  const float magic = 12582912.0f + 126.0f;
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  const Vec half_power = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
  Vec p = f * 3.0706724e-4f + 2.6797750e-3f;  // minimax for 2^(1 + f), |f| <= 1/2
  p = p * f + 1.9236874e-2f;
  p = p * f + 1.1100665e-1f;
  p = p * f + 4.8045295e-1f;
  p = p * f + 1.3862944f;
  p = p * f + 2.0f;
  return p * half_power;
}

// result[dim][kPanel] = result * correction + A^T B, with A[keys][dim] (keys or values) and
// B[keys][kPanel].
inline void accumulate_transposed(const float* a, int64_t ld, const float* b, int64_t keys,
                                  int64_t dim, const Vec (&correction)[kN], float* result) {
  for (int64_t d = 0; d < dim; d += kM) {
    Vec c[kM][kN] = {};
    multiply<kM, kN, true>(c, a + d, ld, b, kPanel, keys);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        float* r = result + (d + m) * kPanel + n * kLanes;
        vec(r) = vec(r) * correction[n] + c[m][n];
      }
    }
  }
}

}  // namespace
}  // namespace anyflow::ANYFLOW_ISA

#else
#include <c10/core/CPUAllocator.h>

#include <cmath>

#include "cpu/tensors.h"

namespace anyflow {

inline void check_attention(const Operands& operands, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v) {
  operands.dense("q", q, Numbers::attention);
  if (q.dim() != 4 || q.size(3) < 1 || q.size(3) > 256 || q.size(3) % 8 != 0) {
    operands.refuse("q", q, "[B, L, H, Dh] with Dh a multiple of 8 up to 256");
  }
  operands.dense("k", k, Numbers::attention);
  if (k.dim() != 4 || k.size(0) != q.size(0) || k.size(2) != q.size(2) || k.size(3) != q.size(3)) {
    operands.refuse("k", k, "[", q.size(0), ", S, ", q.size(2), ", ", q.size(3), "]");
  }
  operands.sized("v", v, k.sizes(), Numbers::attention);
  operands.same_dtype("k", k, q);
  operands.same_dtype("v", v, q);
}

inline HeadsView heads_view(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Returns what forward and backward share; q, k and v have contiguous rows.
inline Attention attention_arguments(const at::Tensor& q, const at::Tensor& k,
                                     const at::Tensor& v) {
  Attention a{};
  a.batch = q.size(0);
  a.queries = q.size(1);
  a.keys = k.size(1);
  a.heads = q.size(2);
  a.head_dim = q.size(3);
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.head_dim)));
  a.type = type_of(q);
  a.q = heads_view(q);
  a.k = heads_view(k);
  a.v = heads_view(v);
  return a;
}

// Calls the kernel for all tasks of its plan, in parallel: results do not depend on the split.
inline void for_tasks(const Attention& a, void (*plan_kernel)(const Attention&, AttentionPlan*),
                      void (*kernel)(const Attention&, Range, void*)) {
  AttentionPlan plan;
  plan_kernel(a, &plan);
  at::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    // The allocator aligns to 64 bytes.
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(plan.scratch);
    kernel(a, {begin, end}, scratch.get());
  });
}

}  // namespace anyflow
#endif
