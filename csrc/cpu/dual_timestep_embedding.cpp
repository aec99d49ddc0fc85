// (emb, silu(emb)) of emb = (1 - g) t + g r, or t + g r: anyflow/ops/dual_timestep_embedding.py.
#include "cpu/elements.h"

namespace anyflow {

struct DualTimestepEmbedding {
  Elements t, r, emb, activated;  // emb and activated of t's type
  float t_weight, gate;
};

struct DualTimestepEmbeddingBackward {
  Elements grad_emb, grad_activated, t, r, dt, dr;
  float t_weight, gate;
  bool gated;     // d emb / d gate is r - t, else r
  float* totals;  // of grad * (d emb / d gate), one for each run of kRun elements; null where nobody asked
};

constexpr int64_t kRun = 16 * kBlock;  // fixed, so that the sum does not depend on the number of threads

ANYFLOW_KERNEL(dual_timestep_embedding_forward, const DualTimestepEmbedding& a, int64_t begin, int64_t end)
// Over at most one run, of index `run`.
ANYFLOW_KERNEL(dual_timestep_embedding_backward, const DualTimestepEmbeddingBackward& a, int64_t begin, int64_t end,
               int64_t run)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/math.h"

namespace anyflow::ANYFLOW_ISA {

// emb as it is returned: after rounding to its type.
static void fuse(const float* t, const float* r, float t_weight, float gate, Type type, float* emb, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    emb[i] = t_weight * t[i] + gate * r[i];
  }
  round_to(type, emb, n);
}

void dual_timestep_embedding_forward(const DualTimestepEmbedding& a, int64_t begin, int64_t end) {
  BlockReader ts(a.t), rs(a.r);
  BlockWriter embs(a.emb), activations(a.activated);
  for_blocks(begin, end, [&](int64_t first, int64_t n) {
    const float *t = ts.at(first, n), *r = rs.at(first, n);
    float *emb = embs.at(first), *activated = activations.at(first);
    if (a.emb.type == Type::f32) {  // nothing to round: one loop, which computes while it waits for memory
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        emb[i] = a.t_weight * t[i] + a.gate * r[i];
        activated[i] = silu(emb[i]);
      }
      return;
    }
    fuse(t, r, a.t_weight, a.gate, a.emb.type, emb, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      activated[i] = silu(emb[i]);
    }
    embs.done(first, n);
    activations.done(first, n);
  });
}

void dual_timestep_embedding_backward(const DualTimestepEmbeddingBackward& a, int64_t begin, int64_t end, int64_t run) {
  BlockReader grad_embs(a.grad_emb), grad_activations(a.grad_activated), ts(a.t), rs(a.r);
  BlockWriter dts(a.dt), drs(a.dr);
  alignas(64) float grad[kBlock];  // of emb, from both results
  const float t_weight = a.t_weight, gate = a.gate, t_slope = a.gated ? 1.0f : 0.0f;
  float total = 0;
  for_blocks(begin, end, [&](int64_t first, int64_t n) {
    const float *grad_emb = grad_embs.at(first, n), *grad_activated = grad_activations.at(first, n);
    const float *t = ts.at(first, n), *r = rs.at(first, n);
    float *dt = dts.at(first), *dr = drs.at(first);
    fuse(t, r, t_weight, gate, a.t.type, grad, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      grad[i] = grad_emb[i] + grad_activated[i] * silu_derivative(grad[i]);
      dt[i] = grad[i] * t_weight;
      dr[i] = grad[i] * gate;
    }
    if (a.totals != nullptr) {
      total += sum(n, [&]<class T>(int64_t i) {
        return get<T>(grad + i) * (get<T>(r + i) - t_slope * get<T>(t + i));
      });
    }
    dts.done(first, n);
    drs.done(first, n);
  });
  if (a.totals != nullptr) {
    a.totals[run] = total;
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include <ATen/ops/full.h>

#include <numeric>
#include <vector>

#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {
namespace {

Elements elements(const at::Tensor& x) { return {x.data_ptr(), type_of(x)}; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> dual_timestep_embedding(const at::Tensor& t_, const at::Tensor& r_,
                                                           const at::Tensor& gate, c10::string_view fusion) {
  check::dual_timestep_embedding(t_, r_, gate, fusion);
  const at::Tensor t = contiguous(t_), r = contiguous(r_), emb = result_like(t), activated = result_like(t);
  const float g = gate.item<float>();
  const DualTimestepEmbedding a{elements(t), elements(r), elements(emb), elements(activated),
                                fusion == "gated" ? 1.0f - g : 1.0f, g};
  at::parallel_for(
      0, t.numel(), kGrain, [&, kernel = ANYFLOW_SELECT(dual_timestep_embedding_forward)](int64_t begin, int64_t end) {
        kernel(a, begin, end);
      });
  return {emb, activated};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dual_timestep_embedding_backward(
    const at::Tensor& grad_emb_, const at::Tensor& grad_activated_, const at::Tensor& t_, const at::Tensor& r_,
    const at::Tensor& gate, c10::string_view fusion, bool gate_gradient) {
  check::dual_timestep_embedding_backward(grad_emb_, grad_activated_, t_, r_, gate, fusion);
  const at::Tensor grad_emb = contiguous(grad_emb_), grad_activated = contiguous(grad_activated_);
  const at::Tensor t = contiguous(t_), r = contiguous(r_), dt = result_like(t), dr = result_like(r);
  const float g = gate.item<float>();
  const bool gated = fusion == "gated";
  const int64_t size = t.numel(), runs = (size + kRun - 1) / kRun;
  std::vector<float> totals(gate_gradient ? runs : 0);
  const DualTimestepEmbeddingBackward a{elements(grad_emb), elements(grad_activated), elements(t), elements(r),
                                        elements(dt), elements(dr), gated ? 1.0f - g : 1.0f, g, gated,
                                        gate_gradient ? totals.data() : nullptr};
  at::parallel_for(
      0, runs, 1, [&, kernel = ANYFLOW_SELECT(dual_timestep_embedding_backward)](int64_t first, int64_t last) {
        for (int64_t run = first; run < last; ++run) {
          kernel(a, run * kRun, std::min(size, (run + 1) * kRun), run);
        }
      });
  if (!gate_gradient) {
    return {dt, dr, at::empty({0}, gate.options())};
  }
  return {dt, dr, at::full(gate.sizes(), std::accumulate(totals.begin(), totals.end(), 0.0), gate.options())};
}

}  // namespace anyflow
#endif
