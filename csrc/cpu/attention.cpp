// Attention without a mask: out = softmax(scale * q k^T) v, and its gradients, without a matrix of scores in memory.
//
// Scores are kept transposed, [key][query], with queries in the lanes of vectors. So the softmax over keys is made of
// whole vectors (no horizontal sums), keys and values are multiplied in the layout that they have, and only the queries
// of a block, and its result, are ever transposed:
//
//     S^T = K Q^T        O^T = V^T P^T                                            (forward)
//     S^T = K Q^T        dP^T = V dO^T       dQ^T = K^T dS^T      dV = P^T dO      dK = dS^T Q      (backward)
//
// Scores are scaled, in units of log2, where they enter the exponential: rounding scaled queries would cost a bit.
#include "cpu/dispatch.h"

namespace anyflow {

// Elements between batches, rows and heads of [batch, rows, heads, head_dim]; the last dimension is contiguous.
struct AttentionTensor {
  void* data;
  int64_t batch, row, head;
};

struct Attention {
  int64_t batch, queries, keys, heads, head_dim;  // head_dim: a multiple of 8, up to 256
  float scale;
  Type type;                                         // of all tensors but logsumexp
  AttentionTensor q, k, v, out;
  float* logsumexp;                                  // [batch, heads, queries], of the scaled scores, from the forward
  AttentionTensor grad_out, grad_q, grad_k, grad_v;  // backward only
};

// What the caller must provide: any division of [0, tasks) into ranges, and aligned scratch memory for each.
struct AttentionPlan {
  int64_t forward_tasks, backward_tasks;
  int64_t forward_scratch, backward_scratch;  // bytes, aligned to 64
};

ANYFLOW_KERNEL(attention_plan, const Attention& args, AttentionPlan* plan)
ANYFLOW_KERNEL(attention_forward, const Attention& args, int64_t begin, int64_t end, void* scratch)
ANYFLOW_KERNEL(attention_backward, const Attention& args, int64_t begin, int64_t end, void* scratch)

}  // namespace anyflow

#ifdef ANYFLOW_ISA

#include "cpu/gemm.h"

namespace anyflow::ANYFLOW_ISA {
namespace {

// Tiles of M x N vectors that fill the registers: for [key][query] and [head_dim][query], and for [key][head_dim]; and
// the keys of a block, which with its queries fill the L2 cache.
#if defined(__AVX512F__)
constexpr int kM = 8, kN = 2, kGradM = 8, kGradN = 2;
constexpr int64_t kKeys = 128;
#else
constexpr int kM = 4, kN = 3, kGradM = 6, kGradN = 2;
constexpr int64_t kKeys = 120;
#endif
constexpr int64_t kPanel = kN * kLanes;  // queries side by side
constexpr int64_t kForwardQueries = 8 * kPanel, kBackwardQueries = 6 * kPanel, kRowUnit = kGradN * 16;
constexpr double kLog2e = 1.44269504088896341;  // twice rounded, it would show in the gradients
static_assert(kKeys % kM == 0 && kKeys % kGradM == 0 && 8 % kM == 0);

// A column of vectors whose rows are a power of two apart would fall into few sets of the cache.
constexpr int64_t kSpread = 16;

// The rows [first, first + rows) of one head of a tensor.
template <typename T>
inline T* head_rows(const AttentionTensor& t, int64_t batch, int64_t head, int64_t first) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head + first * t.row;
}

// What takes scores to exponents of 2.
inline float log2_scale(const Attention& a) { return static_cast<float>(a.scale * kLog2e); }

// to[ld][kPanel] = from[kPanel][ld]^T
inline void transpose_queries(const float* from, int64_t ld, int64_t dim, float* to) {
  for (int64_t q = 0; q < kPanel; q += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      transpose(from + q * ld + d, ld, to + d * kPanel + q, kPanel, broadcast(1));
    }
  }
}

// to[kPanel][ld] = (from[ld][kPanel] * factor[kPanel])^T
inline void transpose_back(const float* from, int64_t dim, float* to, int64_t ld, const Vector (&factor)[kN]) {
  for (int n = 0; n < kN; ++n) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      transpose(from + d * kPanel + n * kLanes, kPanel, to + n * kLanes * ld + d, ld, factor[n]);
    }
  }
}

// 2^x for x <= 0, to 1e-7; a positive x is taken for a rounding error of 0, below -126 the result is 0, NaN stays.
inline Vector exp2_of_negative(Vector x) {
  x = minimum(Vector{}, maximum(broadcast(-126.0f), x));
  // The low bits of x + magic are round(x) + 126, the exponent of 2^(round(x) - 1): zero, and so 0.0, at x = -126.
  const float magic = 12582912.0f + 126.0f;
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  const Vector half_power = reinterpret_cast<Vector>(reinterpret_cast<IntVector>(shifted) << 23);
  Vector p = f * 3.0706724e-4f + 2.6797750e-3f;  // minimax for 2^(1 + f), |f| <= 1/2
  p = p * f + 1.9236874e-2f;
  p = p * f + 1.1100665e-1f;
  p = p * f + 4.8045295e-1f;
  p = p * f + 1.3862944f;
  p = p * f + 2.0f;
  return p * half_power;
}

// result[dim][kPanel] = result * correction + A^T B, with A[keys][dim] (keys or values) and B[keys][kPanel].
inline void accumulate_transposed(const float* a, int64_t ld, const float* b, int64_t keys, int64_t dim,
                                  const Vector (&correction)[kN], float* result) {
  for (int64_t d = 0; d < dim; d += kM) {
    Vector c[kM][kN] = {};
    multiply<kM, kN, true>(c, a + d, ld, b, kPanel, keys);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        float* r = result + (d + m) * kPanel + n * kLanes;
        store(r, load(r) * correction[n] + c[m][n]);
      }
    }
  }
}

// The state of a panel of queries: largest score so far, sum of the exponentials below it, and the sum of values [dim].
struct Softmax {
  Vector top[kN], sum[kN];
};

struct ForwardBuffers {
  float *rows, *queries, *results, *keys, *values, *scores;

  ForwardBuffers(Scratch& scratch, int64_t ld)
      : rows(scratch.take(kPanel * ld)),
        queries(scratch.take(kForwardQueries * ld)),
        results(scratch.take(kForwardQueries * ld)),
        keys(scratch.take(kKeys * ld)),
        values(scratch.take(kKeys * ld)),
        scores(scratch.take(kKeys * kPanel)) {}
};

// Scores [kM][kPanel] of a tile, and the largest so far.
// Not inlined, so that nothing else wants the registers of the tile.
__attribute__((noinline)) void score_tile(const float* keys, int64_t ld, const float* queries, int64_t dim,
                                          int64_t valid, float* scores, Vector* top) {
  Vector c[kM][kN] = {};
  multiply<kM, kN, false>(c, keys, ld, queries, kPanel, dim);
  store_tile(c, scores, kPanel);
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    if (m < valid) {
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) {
        top[n] = maximum(c[m][n], top[n]);
      }
    }
  }
}

// One block of keys for one panel of queries.
void forward_panel(const ForwardBuffers& buffers, const float* queries, int64_t keys, int64_t ld, int64_t dim,
                   float scale, Softmax& state, float* result) {
  Vector top[kN], correction[kN], sum[kN] = {};
  for (int n = 0; n < kN; ++n) {
    top[n] = state.top[n];
  }
  for (int64_t s = 0; s < keys; s += kM) {
    score_tile(buffers.keys + s * ld, ld, queries, dim, keys - s, buffers.scores + s * kPanel, top);
  }
  for (int n = 0; n < kN; ++n) {
    correction[n] = exp2_of_negative((state.top[n] - top[n]) * scale);
    state.top[n] = top[n];
  }
  for (int64_t s = 0; s < keys; ++s) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      float* score = buffers.scores + s * kPanel + n * kLanes;
      const Vector p = exp2_of_negative((load(score) - top[n]) * scale);
      sum[n] += p;
      store(score, p);
    }
  }
  for (int n = 0; n < kN; ++n) {
    state.sum[n] = state.sum[n] * correction[n] + sum[n];
  }
  accumulate_transposed(buffers.values, ld, buffers.scores, keys, dim, correction, result);
}

template <typename T>
void forward_block(const Attention& a, int64_t task, Scratch scratch) {
  const int64_t blocks = round_up(a.queries, kForwardQueries) / kForwardQueries;
  const int64_t first = task % blocks * kForwardQueries;
  const int64_t head = task / blocks % a.heads, batch = task / blocks / a.heads;
  const int64_t queries = smaller(a.queries - first, kForwardQueries), panels = round_up(queries, kPanel) / kPanel;
  const int64_t dim = a.head_dim, ld = round_up(dim, kRowUnit);
  const float scale = log2_scale(a);
  const ForwardBuffers buffers(scratch, ld);
  Softmax state[kForwardQueries / kPanel];

  for (int64_t p = 0; p < panels; ++p) {
    load_rows(head_rows<T>(a.q, batch, head, first + p * kPanel), a.q.row, queries - p * kPanel, dim, buffers.rows, ld,
              kPanel);
    transpose_queries(buffers.rows, ld, dim, buffers.queries + p * kPanel * ld);
    for (int n = 0; n < kN; ++n) {
      state[p].top[n] = broadcast(-__builtin_inff());
      state[p].sum[n] = Vector{};
    }
  }
  for (int64_t i = 0; i < panels * kPanel * ld; ++i) {
    buffers.results[i] = 0;
  }
  for (int64_t s = 0; s < a.keys; s += kKeys) {
    const int64_t keys = smaller(a.keys - s, kKeys), padded = round_up(keys, kM);
    load_rows(head_rows<T>(a.k, batch, head, s), a.k.row, keys, dim, buffers.keys, ld, padded);
    load_rows(head_rows<T>(a.v, batch, head, s), a.v.row, keys, dim, buffers.values, ld, keys);
    for (int64_t p = 0; p < panels; ++p) {
      forward_panel(buffers, buffers.queries + p * kPanel * ld, keys, ld, dim, scale, state[p],
                    buffers.results + p * kPanel * ld);
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t start = first + p * kPanel, rows = smaller(a.queries - start, kPanel);
    Vector inverse[kN];
    float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries + start;
    for (int n = 0; n < kN; ++n) {
      inverse[n] = state[p].sum[n] == Vector{} ? Vector{} : 1.0f / state[p].sum[n];  // no keys at all: 0
    }
    for (int64_t q = 0; q < rows; ++q) {
      const int64_t n = q / kLanes, lane = q % kLanes;
      const double top = state[p].top[n][lane] * (scale / kLog2e);
      logsumexp[q] = static_cast<float>(top + __builtin_logf(state[p].sum[n][lane]));
    }
    transpose_back(buffers.results + p * kPanel * ld, dim, buffers.rows, ld, inverse);
    store_rows(buffers.rows, ld, 1.0f, head_rows<T>(a.out, batch, head, start), a.out.row, rows, dim);
  }
}

struct BackwardBuffers {
  float *q, *grad_out, *q_t, *grad_out_t, *grad_q_t, *logsumexp, *rounding, *delta;  // of a block of queries
  float *keys, *values, *p, *grad_s;                                                   // of a block of keys
  float *grad_k, *grad_v;                                                              // of all keys

  BackwardBuffers(Scratch& scratch, int64_t ld, int64_t keys)
      : q(scratch.take(kBackwardQueries * (ld + kSpread))),
        grad_out(scratch.take(kBackwardQueries * (ld + kSpread))),
        q_t(scratch.take(kBackwardQueries * ld)),
        grad_out_t(scratch.take(kBackwardQueries * ld)),
        grad_q_t(scratch.take(kBackwardQueries * ld)),
        logsumexp(scratch.take(kBackwardQueries)),
        rounding(scratch.take(kBackwardQueries)),
        delta(scratch.take(kBackwardQueries)),
        keys(scratch.take(kKeys * ld)),
        values(scratch.take(kKeys * ld)),
        p(scratch.take(kKeys * kBackwardQueries)),
        grad_s(scratch.take(kKeys * kBackwardQueries)),
        grad_k(scratch.take(round_up(keys, kKeys) * ld)),
        grad_v(scratch.take(round_up(keys, kKeys) * ld)) {}
};

// P^T and dS^T of one block of keys and panel of queries, [kKeys][kPanel] both.
void backward_panel(const BackwardBuffers& b, int64_t panel, int64_t keys, int64_t ld, int64_t dim, float scale) {
  const int64_t offset = panel * kPanel;
  for (int64_t s = 0; s < keys; s += kM) {
    float* p = b.p + offset * kKeys + s * kPanel;
    Vector c[kM][kN] = {};
    multiply<kM, kN, false>(c, b.keys + s * ld, ld, b.q_t + offset * ld, kPanel, dim);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vector logsumexp = load(b.logsumexp + offset + n * kLanes);
      const Vector rounding = load(b.rounding + offset + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        store(p + m * kPanel + n * kLanes, exp2_of_negative(c[m][n] * scale - logsumexp - rounding));
      }
    }
    Vector g[kM][kN] = {};
    multiply<kM, kN, false>(g, b.values + s * ld, ld, b.grad_out_t + offset * ld, kPanel, dim);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vector delta = load(b.delta + offset + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        g[m][n] = load(p + m * kPanel + n * kLanes) * (g[m][n] - delta);
      }
    }
    store_tile(g, b.grad_s + offset * kKeys + s * kPanel, kPanel);
  }
}

// result[keys][ld] += A B, with A[keys][panels * kPanel] in panels (P^T or dS^T) and B[panels * kPanel][ld + kSpread].
void accumulate_rows(const float* a, const float* b, int64_t panels, int64_t keys, int64_t ld, int64_t dim,
                     float* result) {
  for (int64_t d = 0; d < dim; d += kGradN * kLanes) {
    for (int64_t s = 0; s < keys; s += kGradM) {
      Vector c[kGradM][kGradN] = {};
      for (int64_t p = 0; p < panels; ++p) {
        multiply<kGradM, kGradN, false>(c, a + (p * kKeys + s) * kPanel, kPanel, b + p * kPanel * (ld + kSpread) + d,
                                         ld + kSpread, kPanel);
      }
      add_tile(c, result + s * ld + d, ld);
    }
  }
}

// Loads and transposes a block of queries; delta = sum(grad_out * out), the part of dP that the softmax takes away.
template <typename T>
void backward_queries(const Attention& a, const BackwardBuffers& b, int64_t batch, int64_t head, int64_t first,
                      int64_t queries, int64_t padded, int64_t ld) {
  const int64_t dim = a.head_dim, row = ld + kSpread;
  const T* out = head_rows<T>(a.out, batch, head, first);
  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries + first;
  load_rows(head_rows<T>(a.q, batch, head, first), a.q.row, queries, dim, b.q, row, padded);
  load_rows(head_rows<T>(a.grad_out, batch, head, first), a.grad_out.row, queries, dim, b.grad_out, row, padded);
  for (int64_t q = 0; q < padded; ++q) {
    float total = 0;
    const T* from = out + q * a.out.row;
    const int64_t filled = q < queries ? dim : 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < filled; ++d) {
      total += to_float(from[d]) * b.grad_out[q * row + d];
    }
    b.delta[q] = total;
    const double exact = q < queries ? logsumexp[q] * kLog2e : 0;
    b.logsumexp[q] = static_cast<float>(exact);
    b.rounding[q] = static_cast<float>(exact - b.logsumexp[q]);
  }
  for (int64_t p = 0; p < padded; p += kPanel) {
    transpose_queries(b.q + p * row, row, dim, b.q_t + p * ld);
    transpose_queries(b.grad_out + p * row, row, dim, b.grad_out_t + p * ld);
  }
  for (int64_t i = 0; i < padded * ld; ++i) {
    b.grad_q_t[i] = 0;
  }
}

template <typename T>
void backward_head(const Attention& a, int64_t task, Scratch scratch) {
  const int64_t head = task % a.heads, batch = task / a.heads;
  const int64_t dim = a.head_dim, ld = round_up(dim, kRowUnit);
  const BackwardBuffers b(scratch, ld, a.keys);
  for (int64_t i = 0; i < a.keys * ld; ++i) {
    b.grad_k[i] = b.grad_v[i] = 0;
  }
  for (int64_t first = 0; first < a.queries; first += kBackwardQueries) {
    const int64_t queries = smaller(a.queries - first, kBackwardQueries), panels = round_up(queries, kPanel) / kPanel;
    backward_queries<T>(a, b, batch, head, first, queries, panels * kPanel, ld);
    Vector one[kN], scale[kN];
    for (int n = 0; n < kN; ++n) {
      one[n] = broadcast(1);
      scale[n] = broadcast(a.scale);
    }
    for (int64_t s = 0; s < a.keys; s += kKeys) {
      const int64_t keys = smaller(a.keys - s, kKeys);
      load_rows(head_rows<T>(a.k, batch, head, s), a.k.row, keys, dim, b.keys, ld, kKeys);
      load_rows(head_rows<T>(a.v, batch, head, s), a.v.row, keys, dim, b.values, ld, kKeys);
      for (int64_t p = 0; p < panels; ++p) {
        backward_panel(b, p, keys, ld, dim, log2_scale(a));
        accumulate_transposed(b.keys, ld, b.grad_s + p * kPanel * kKeys, keys, dim, one,
                              b.grad_q_t + p * kPanel * ld);
      }
      accumulate_rows(b.p, b.grad_out, panels, keys, ld, dim, b.grad_v + s * ld);
      accumulate_rows(b.grad_s, b.q, panels, keys, ld, dim, b.grad_k + s * ld);
    }
    for (int64_t p = 0; p < panels; ++p) {
      transpose_back(b.grad_q_t + p * kPanel * ld, dim, b.q, ld, scale);
      store_rows(b.q, ld, 1.0f, head_rows<T>(a.grad_q, batch, head, first + p * kPanel), a.grad_q.row,
                 smaller(queries - p * kPanel, kPanel), dim);
    }
  }
  store_rows(b.grad_k, ld, a.scale, head_rows<T>(a.grad_k, batch, head, 0), a.grad_k.row, a.keys, dim);
  store_rows(b.grad_v, ld, 1.0f, head_rows<T>(a.grad_v, batch, head, 0), a.grad_v.row, a.keys, dim);
}

}  // namespace

void attention_plan(const Attention& args, AttentionPlan* plan) {
  const int64_t heads = args.batch * args.heads;
  Scratch forward{0}, backward{0};
  ForwardBuffers(forward, round_up(args.head_dim, kRowUnit));
  BackwardBuffers(backward, round_up(args.head_dim, kRowUnit), args.keys);
  *plan = {heads * (round_up(args.queries, kForwardQueries) / kForwardQueries), heads,
           static_cast<int64_t>(forward.next), static_cast<int64_t>(backward.next)};
}

void attention_forward(const Attention& args, int64_t begin, int64_t end, void* scratch) {
  const auto run = args.type == Type::f32 ? forward_block<float> : forward_block<uint16_t>;
  for (int64_t task = begin; task < end; ++task) {
    run(args, task, {reinterpret_cast<uintptr_t>(scratch)});
  }
}

void attention_backward(const Attention& args, int64_t begin, int64_t end, void* scratch) {
  const auto run = args.type == Type::f32 ? backward_head<float> : backward_head<uint16_t>;
  for (int64_t task = begin; task < end; ++task) {
    run(args, task, {reinterpret_cast<uintptr_t>(scratch)});
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include <c10/core/CPUAllocator.h>

#include <cmath>

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {
namespace {

AttentionTensor view(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// What forward and backward share; q, k and v have contiguous rows.
Attention arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t batch = q.size(0), heads = q.size(2), head_dim = q.size(3);
  Attention a{};
  a.batch = batch;
  a.queries = q.size(1);
  a.keys = k.size(1);
  a.heads = heads;
  a.head_dim = head_dim;
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  a.type = type_of(q);
  a.q = view(q);
  a.k = view(k);
  a.v = view(v);
  return a;
}

AttentionPlan plan_of(const Attention& a) {
  AttentionPlan plan;
  ANYFLOW_SELECT(attention_plan)(a, &plan);
  return plan;
}

// kernel(a, begin, end, scratch) over all tasks, in parallel: results do not depend on the split.
template <class Kernel>
void for_tasks(const Attention& a, int64_t tasks, int64_t bytes, Kernel kernel) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);  // aligned to 64
    kernel(a, begin, end, scratch.get());
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_) {
  check::attention(q_, k_, v_);
  const at::Tensor q = contiguous_rows(q_), k = contiguous_rows(k_), v = contiguous_rows(v_);
  Attention a = arguments(q, k, v);
  at::Tensor out = result_like(q);
  at::Tensor logsumexp = at::empty({a.batch, a.heads, a.queries}, q.options().dtype(at::kFloat));
  a.out = view(out);
  a.logsumexp = logsumexp.data_ptr<float>();
  const AttentionPlan plan = plan_of(a);
  for_tasks(a, plan.forward_tasks, plan.forward_scratch, ANYFLOW_SELECT(attention_forward));
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad_, const at::Tensor& q_,
                                                                  const at::Tensor& k_, const at::Tensor& v_,
                                                                  const at::Tensor& out_,
                                                                  const at::Tensor& logsumexp_) {
  check::attention_backward(grad_, q_, k_, v_, out_, logsumexp_);
  const at::Tensor q = contiguous_rows(q_), k = contiguous_rows(k_), v = contiguous_rows(v_);
  const at::Tensor grad = contiguous_rows(grad_), out = contiguous_rows(out_), logsumexp = contiguous(logsumexp_);
  Attention a = arguments(q, k, v);
  at::Tensor grad_q = result_like(q), grad_k = result_like(k), grad_v = result_like(v);
  a.out = view(out);
  a.logsumexp = logsumexp.data_ptr<float>();
  a.grad_out = view(grad);
  a.grad_q = view(grad_q);
  a.grad_k = view(grad_k);
  a.grad_v = view(grad_v);
  const AttentionPlan plan = plan_of(a);
  for_tasks(a, plan.backward_tasks, plan.backward_scratch, ANYFLOW_SELECT(attention_backward));
  return {grad_q, grad_k, grad_v};
}

}  // namespace anyflow
#endif  // ANYFLOW_ISA
