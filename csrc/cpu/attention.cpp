// Attention, forward: see cpu/attention.h. anyflow/ops/attention/operator.py has the operator.
#include "cpu/attention.h"

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {
namespace {

constexpr int64_t kForwardQueries = 8 * kPanel;

// The state of a panel of queries: the largest score so far, and the sum of the exponentials below
// it.
struct Softmax {
  Vec top[kN], sum[kN];
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

// Computes the scores [kM][kPanel] of a tile, and the largest so far. Not inlined, so that nothing
// else wants the registers of the tile.
__attribute__((noinline)) void score_tile(const float* keys, int64_t ld, const float* queries,
                                          int64_t dim, int64_t valid, float* scores, Vec* top) {
  Vec c[kM][kN] = {};
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

// Adds one block of keys to the state and the result of one panel of queries.
void forward_panel(const ForwardBuffers& buffers, const float* queries, int64_t keys, int64_t ld,
                   int64_t dim, float scale, Softmax& state, float* result) {
  Vec top[kN], correction[kN], sum[kN] = {};
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
      const Vec p = exp2_of_negative((vec(score) - top[n]) * scale);
      sum[n] += p;
      vec(score) = p;
    }
  }
  for (int n = 0; n < kN; ++n) {
    state.sum[n] = state.sum[n] * correction[n] + sum[n];
  }
  accumulate_transposed(buffers.values, ld, buffers.scores, keys, dim, correction, result);
}

template <class Format>
void forward_block(const Attention& a, int64_t task, Scratch scratch) {
  const int64_t blocks = round_up(a.queries, kForwardQueries) / kForwardQueries;
  const int64_t first = task % blocks * kForwardQueries;
  const int64_t head = task / blocks % a.heads, batch = task / blocks / a.heads;
  const int64_t queries = smaller(a.queries - first, kForwardQueries);
  const int64_t panels = round_up(queries, kPanel) / kPanel;
  const int64_t dim = a.head_dim, ld = round_up(dim, kRowUnit);
  const float scale = log2_scale(a);
  const ForwardBuffers buffers(scratch, ld);
  Softmax state[kForwardQueries / kPanel];

  for (int64_t p = 0; p < panels; ++p) {
    load_rows<Format>(a.q, batch, head, first + p * kPanel, queries - p * kPanel, dim, buffers.rows,
                      ld, kPanel);
    transpose_queries(buffers.rows, ld, dim, buffers.queries + p * kPanel * ld);
    for (int n = 0; n < kN; ++n) {
      state[p].top[n] = broadcast(-__builtin_inff());
      state[p].sum[n] = Vec{};
    }
  }
  for (int64_t i = 0; i < panels * kPanel * ld; ++i) {
    buffers.results[i] = 0;
  }
  for (int64_t s = 0; s < a.keys; s += kKeys) {
    const int64_t keys = smaller(a.keys - s, kKeys), padded = round_up(keys, kM);
    load_rows<Format>(a.k, batch, head, s, keys, dim, buffers.keys, ld, padded);
    load_rows<Format>(a.v, batch, head, s, keys, dim, buffers.values, ld, keys);
    for (int64_t p = 0; p < panels; ++p) {
      forward_panel(buffers, buffers.queries + p * kPanel * ld, keys, ld, dim, scale, state[p],
                    buffers.results + p * kPanel * ld);
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t start = first + p * kPanel, rest = smaller(a.queries - start, kPanel);
    Vec inverse[kN];
    float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries + start;
    for (int n = 0; n < kN; ++n) {
      inverse[n] = state[p].sum[n] == Vec{} ? Vec{} : 1.0f / state[p].sum[n];  // no keys at all: 0
    }
    for (int64_t q = 0; q < rest; ++q) {
      const int64_t n = q / kLanes, lane = q % kLanes;
      const double top = state[p].top[n][lane] * (scale / kLog2e);
      logsumexp[q] = static_cast<float>(top + __builtin_logf(state[p].sum[n][lane]));
    }
    transpose_back(buffers.results + p * kPanel * ld, dim, buffers.rows, ld, inverse);
    store_rows<Format>(buffers.rows, ld, 1.0f, a.out, batch, head, start, rest, dim);
  }
}

}  // namespace

void attention_forward_plan(const Attention& a, AttentionPlan* plan) {
  const int64_t blocks = round_up(a.queries, kForwardQueries) / kForwardQueries;
  Scratch scratch{0};
  ForwardBuffers(scratch, round_up(a.head_dim, kRowUnit));
  *plan = {a.batch * a.heads * blocks, static_cast<int64_t>(scratch.next)};
}

void attention_forward(const Attention& a, Range range, void* scratch) {
  const auto run = a.type == Type::f32 ? forward_block<Float32> : forward_block<BFloat16>;
  for (int64_t task = range.begin; task < range.end; ++task) {
    run(a, task, {reinterpret_cast<uintptr_t>(scratch)});
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
namespace anyflow {
namespace {

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q_, const at::Tensor& k_,
                                             const at::Tensor& v_) {
  check_attention(Operands("attention", q_), q_, k_, v_);
  const at::Tensor q = contiguous_rows(q_), k = contiguous_rows(k_), v = contiguous_rows(v_);
  const at::Tensor out = result_like(q);
  Attention a = attention_arguments(q, k, v);
  at::Tensor logsumexp = at::empty({a.batch, a.heads, a.queries}, q.options().dtype(at::kFloat));
  a.out = heads_view(out);
  a.logsumexp = logsumexp.data_ptr<float>();
  for_tasks(a, ANYFLOW_SELECT(attention_forward_plan), ANYFLOW_SELECT(attention_forward));
  return {out, logsumexp};
}

}  // namespace

ANYFLOW_REGISTER(attention)

}  // namespace anyflow
#endif
