// Attention, backward: see cpu/attention.h. anyflow/ops/attention/operator.py has the operator.
#include "cpu/attention.h"

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGradM = 8;
#else
constexpr int kGradM = 6;
#endif
constexpr int64_t kBackwardQueries = 6 * kPanel;
static_assert(kKeys % kGradM == 0);

// A column of vectors whose rows are a power of two apart would fall into few sets of the cache.
constexpr int64_t kSpread = 16;

struct BackwardBuffers {
  // Of a block of queries.
  float *q, *grad_out, *q_t, *grad_out_t, *grad_q_t, *logsumexp, *rounding, *delta;
  float *keys, *values, *p, *grad_s;  // of a block of keys
  float *grad_k, *grad_v;             // of all keys

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

// Computes P^T and dS^T of one block of keys and panel of queries, [kKeys][kPanel] both.
void backward_panel(const BackwardBuffers& b, int64_t panel, int64_t keys, int64_t ld, int64_t dim,
                    float scale) {
  const int64_t offset = panel * kPanel;
  for (int64_t s = 0; s < keys; s += kM) {
    float* p = b.p + offset * kKeys + s * kPanel;
    Vec c[kM][kN] = {};
    multiply<kM, kN, false>(c, b.keys + s * ld, ld, b.q_t + offset * ld, kPanel, dim);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec logsumexp = vec(b.logsumexp + offset + n * kLanes);
      const Vec rounding = vec(b.rounding + offset + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const Vec exponent = c[m][n] * scale - logsumexp - rounding;
        vec(p + m * kPanel + n * kLanes) = exp2_of_negative(exponent);
      }
    }
    Vec g[kM][kN] = {};
    multiply<kM, kN, false>(g, b.values + s * ld, ld, b.grad_out_t + offset * ld, kPanel, dim);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec delta = vec(b.delta + offset + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        g[m][n] = vec(p + m * kPanel + n * kLanes) * (g[m][n] - delta);
      }
    }
    store_tile(g, b.grad_s + offset * kKeys + s * kPanel, kPanel);
  }
}

// result[keys][ld] += A B, with A[keys][panels * kPanel] in panels (P^T or dS^T) and
// B[panels * kPanel][ld + kSpread].
void accumulate_rows(const float* a, const float* b, int64_t panels, int64_t keys, int64_t ld,
                     int64_t dim, float* result) {
  for (int64_t d = 0; d < dim; d += kGradN * kLanes) {
    for (int64_t s = 0; s < keys; s += kGradM) {
      Vec c[kGradM][kGradN] = {};
      for (int64_t p = 0; p < panels; ++p) {
        multiply<kGradM, kGradN, false>(c, a + (p * kKeys + s) * kPanel, kPanel,
                                        b + p * kPanel * (ld + kSpread) + d, ld + kSpread, kPanel);
      }
      add_tile(c, result + s * ld + d, ld);
    }
  }
}

// Loads and transposes a block of queries. delta = sum(grad_out * out) is the part of dP that the
// softmax takes away.
template <class Format>
void backward_queries(const Attention& a, const BackwardBuffers& b, int64_t batch, int64_t head,
                      int64_t first, int64_t queries, int64_t padded, int64_t ld) {
  const int64_t dim = a.head_dim, row = ld + kSpread;
  const typename Format::Stored* out = head_rows<Format>(a.out, batch, head, first);
  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries + first;
  load_rows<Format>(a.q, batch, head, first, queries, dim, b.q, row, padded);
  load_rows<Format>(a.grad_out, batch, head, first, queries, dim, b.grad_out, row, padded);
  for (int64_t q = 0; q < padded; ++q) {
    float total = 0;
    const typename Format::Stored* from = out + q * a.out.row_stride;
    const int64_t filled = q < queries ? dim : 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < filled; ++d) {
      total += Format::widen(from[d]) * b.grad_out[q * row + d];
    }
    b.delta[q] = total;
    // In two parts: rounded once, the logsumexp would be off by as much as the gradients show.
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

template <class Format>
void backward_head(const Attention& a, int64_t task, Scratch scratch) {
  const int64_t head = task % a.heads, batch = task / a.heads;
  const int64_t dim = a.head_dim, ld = round_up(dim, kRowUnit);
  const BackwardBuffers b(scratch, ld, a.keys);
  for (int64_t i = 0; i < a.keys * ld; ++i) {
    b.grad_k[i] = b.grad_v[i] = 0;
  }
  for (int64_t first = 0; first < a.queries; first += kBackwardQueries) {
    const int64_t queries = smaller(a.queries - first, kBackwardQueries);
    const int64_t panels = round_up(queries, kPanel) / kPanel;
    backward_queries<Format>(a, b, batch, head, first, queries, panels * kPanel, ld);
    Vec one[kN], scale[kN];
    for (int n = 0; n < kN; ++n) {
      one[n] = broadcast(1);
      scale[n] = broadcast(a.scale);
    }
    for (int64_t s = 0; s < a.keys; s += kKeys) {
      const int64_t keys = smaller(a.keys - s, kKeys);
      load_rows<Format>(a.k, batch, head, s, keys, dim, b.keys, ld, kKeys);
      load_rows<Format>(a.v, batch, head, s, keys, dim, b.values, ld, kKeys);
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
      const int64_t start = first + p * kPanel, rest = smaller(a.queries - start, kPanel);
      store_rows<Format>(b.q, ld, 1.0f, a.grad_q, batch, head, start, rest, dim);
    }
  }
  store_rows<Format>(b.grad_k, ld, a.scale, a.grad_k, batch, head, 0, a.keys, dim);
  store_rows<Format>(b.grad_v, ld, 1.0f, a.grad_v, batch, head, 0, a.keys, dim);
}

}  // namespace

void attention_backward_plan(const Attention& a, AttentionPlan* plan) {
  Scratch scratch{0};
  BackwardBuffers(scratch, round_up(a.head_dim, kRowUnit), a.keys);
  *plan = {a.batch * a.heads, static_cast<int64_t>(scratch.next)};
}

void attention_backward(const Attention& a, Range range, void* scratch) {
  const auto run = a.type == Type::f32 ? backward_head<Float32> : backward_head<BFloat16>;
  for (int64_t task = range.begin; task < range.end; ++task) {
    run(a, task, {reinterpret_cast<uintptr_t>(scratch)});
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
namespace anyflow {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
    const at::Tensor& out_, const at::Tensor& logsumexp_) {
  const Operands operands("attention_backward", q_);
  check_attention(operands, q_, k_, v_);
  for (const auto& [name, x] :
       {std::pair<const char*, const at::Tensor&>{"grad", grad_}, {"out", out_}}) {
    operands.sized(name, x, q_.sizes(), Numbers::attention);
    operands.same_dtype(name, x, q_);
  }
  operands.sized("logsumexp", logsumexp_, {q_.size(0), q_.size(2), q_.size(1)});
  if (logsumexp_.scalar_type() != at::kFloat) {
    operands.refuse("logsumexp", logsumexp_, "in float32");
  }
  const at::Tensor q = contiguous_rows(q_), k = contiguous_rows(k_), v = contiguous_rows(v_);
  const at::Tensor grad = contiguous_rows(grad_), out = contiguous_rows(out_);
  const at::Tensor logsumexp = contiguous(logsumexp_);
  const at::Tensor grad_q = result_like(q), grad_k = result_like(k), grad_v = result_like(v);
  Attention a = attention_arguments(q, k, v);
  a.out = heads_view(out);
  a.logsumexp = logsumexp.data_ptr<float>();
  a.grad_out = heads_view(grad);
  a.grad_q = heads_view(grad_q);
  a.grad_k = heads_view(grad_k);
  a.grad_v = heads_view(grad_v);
  for_tasks(a, ANYFLOW_SELECT(attention_backward_plan), ANYFLOW_SELECT(attention_backward));
  return {grad_q, grad_k, grad_v};
}

}  // namespace

ANYFLOW_REGISTER(attention_backward)

}  // namespace anyflow
#endif
