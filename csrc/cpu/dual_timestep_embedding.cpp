// (emb, silu(emb)) of emb = (1 - g) t + g r, or t + g r: anyflow/ops/dual_timestep_embedding.py.
#include "cpu/view.h"

namespace anyflow {

struct DualTimestepEmbedding {
  View t, r, emb, activated;  // emb and activated of t's type
  float t_weight, gate;
};

struct DualTimestepEmbeddingBackward {
  View grad_emb, grad_activated, t, r, dt, dr;
  float t_weight, gate;
  bool gated;     // d emb / d gate is r - t, else r
  float* totals;  // of grad * (d emb / d gate), one for each run; null where nobody asked
};

// Elements of a run: fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kRun = 16 * kBlock;

ANYFLOW_KERNEL(dual_timestep_embedding_forward, const DualTimestepEmbedding&, Range)
// Over at most one run, of index range.chunk.
ANYFLOW_KERNEL(dual_timestep_embedding_backward, const DualTimestepEmbeddingBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/math.h"
#include "cpu/vector.h"

namespace anyflow::ANYFLOW_ISA {

// Writes at most kBlock elements of emb as they are returned: rounded to their type.
static void fuse(const float* t, const float* r, float t_weight, float gate, Type type, float* emb,
                 int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    emb[i] = t_weight * t[i] + gate * r[i];
  }
  uint16_t stored[kBlock];
  store(emb, stored, type, 0, n);  // nothing for fp32
  load(stored, type, 0, n, emb);
}

void dual_timestep_embedding_forward(const DualTimestepEmbedding& a, Range range) {
  Reader<kBlock> ts(a.t), rs(a.r);
  Writer<kBlock> embs(a.emb), activations(a.activated);
  for_blocks(range, [&](const Block& block) {
    const float *t = ts.at(block), *r = rs.at(block);
    float *emb = embs.at(block), *activated = activations.at(block);
    if (a.emb.type == Type::f32) {  // nothing to round: one loop computes while it waits for memory
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        emb[i] = a.t_weight * t[i] + a.gate * r[i];
        activated[i] = silu(emb[i]);
      }
      return;
    }
    fuse(t, r, a.t_weight, a.gate, a.emb.type, emb, block.n);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      activated[i] = silu(emb[i]);
    }
    embs.done(block);
    activations.done(block);
  });
}

void dual_timestep_embedding_backward(const DualTimestepEmbeddingBackward& a, Range range) {
  Reader<kBlock> grad_embs(a.grad_emb), grad_activations(a.grad_activated), ts(a.t), rs(a.r);
  Writer<kBlock> dts(a.dt), drs(a.dr);
  alignas(64) float grad[kBlock];  // of emb, from both results
  const float t_weight = a.t_weight, gate = a.gate, t_slope = a.gated ? 1.0f : 0.0f;
  float total = 0;
  for_blocks(range, [&](const Block& block) {
    const float *grad_emb = grad_embs.at(block), *grad_activated = grad_activations.at(block);
    const float *t = ts.at(block), *r = rs.at(block);
    float *dt = dts.at(block), *dr = drs.at(block);
    fuse(t, r, t_weight, gate, a.t.type, grad, block.n);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      grad[i] = grad_emb[i] + grad_activated[i] * silu_derivative(grad[i]);
      dt[i] = grad[i] * t_weight;
      dr[i] = grad[i] * gate;
    }
    if (a.totals != nullptr) {
      total += sum(block.n, [&]<class T>(int64_t i) {
        return get<T>(grad + i) * (get<T>(r + i) - t_slope * get<T>(t + i));
      });
    }
    dts.done(block);
    drs.done(block);
  });
  if (a.totals != nullptr) {
    a.totals[range.chunk] = total;
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include <ATen/ops/full.h>

#include <numeric>
#include <vector>

#include "cpu/tensors.h"

namespace anyflow {
namespace {

void check_embeddings(const Operands& operands, const at::Tensor& t_emb, const at::Tensor& r_emb,
                      const at::Tensor& gate, c10::string_view fusion) {
  operands.dense("t_emb", t_emb);
  if (t_emb.dim() != 2) {
    operands.refuse("t_emb", t_emb, "[N, D]");
  }
  operands.sized("r_emb", r_emb, t_emb.sizes());
  operands.dense("gate", gate);
  if (gate.numel() != 1) {
    operands.refuse("gate", gate, "of one element");
  }
  operands.require(fusion == "gated" || fusion == "additive",
                   "fusion must be 'gated' or 'additive', got '", fusion, "'");
}

std::tuple<at::Tensor, at::Tensor> dual_timestep_embedding(const at::Tensor& t_,
                                                           const at::Tensor& r_,
                                                           const at::Tensor& gate,
                                                           c10::string_view fusion) {
  check_embeddings(Operands("dual_timestep_embedding", t_), t_, r_, gate, fusion);
  const at::Tensor t = contiguous(t_), r = contiguous(r_);
  const at::Tensor emb = result_like(t), activated = result_like(t);
  const float g = gate.item<float>();
  const DualTimestepEmbedding a{
      view(t), view(r), view(emb), view(activated), fusion == "gated" ? 1.0f - g : 1.0f, g};
  for_ranges(t.numel(), kGrain, ANYFLOW_SELECT(dual_timestep_embedding_forward), a);
  return {emb, activated};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dual_timestep_embedding_backward(
    const at::Tensor& grad_emb_, const at::Tensor& grad_activated_, const at::Tensor& t_,
    const at::Tensor& r_, const at::Tensor& gate, c10::string_view fusion, bool gate_gradient) {
  const Operands operands("dual_timestep_embedding_backward", t_);
  check_embeddings(operands, t_, r_, gate, fusion);
  operands.sized("grad_emb", grad_emb_, t_.sizes());
  operands.sized("grad_activated", grad_activated_, t_.sizes());
  const at::Tensor grad_emb = contiguous(grad_emb_), grad_activated = contiguous(grad_activated_);
  const at::Tensor t = contiguous(t_), r = contiguous(r_), dt = result_like(t), dr = result_like(r);
  const float g = gate.item<float>();
  const bool gated = fusion == "gated";
  const int64_t size = t.numel(), runs = (size + kRun - 1) / kRun;
  std::vector<float> totals(gate_gradient ? runs : 0);
  const DualTimestepEmbeddingBackward a{view(grad_emb),
                                        view(grad_activated),
                                        view(t),
                                        view(r),
                                        view(dt),
                                        view(dr),
                                        gated ? 1.0f - g : 1.0f,
                                        g,
                                        gated,
                                        gate_gradient ? totals.data() : nullptr};
  const auto kernel = ANYFLOW_SELECT(dual_timestep_embedding_backward);
  at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      kernel(a, {run * kRun, std::min(size, (run + 1) * kRun), run});
    }
  });
  if (!gate_gradient) {
    return {dt, dr, at::empty({0}, gate.options())};
  }
  const double total = std::accumulate(totals.begin(), totals.end(), 0.0);
  return {dt, dr, at::full(gate.sizes(), total, gate.options())};
}

}  // namespace

ANYFLOW_REGISTER(dual_timestep_embedding)
ANYFLOW_REGISTER(dual_timestep_embedding_backward)

}  // namespace anyflow
#endif
