// x_t = (1 - t) x0 + t noise and x_t +- epsilon (noise - x0): anyflow/ops/flow_map_inputs.py.
#include "cpu/frames.h"

namespace anyflow {

struct FlowMapInputs {
  FrameShape shape;
  View latents, noise;
  Times t, plus, minus;
  SlotList slots;
  View x_t, x_plus, x_minus, x_t_copy;  // the last three share one buffer; the copy may be absent
};

struct FlowMapInputsBackward {
  FrameShape shape;
  View grad, grad_plus, grad_minus, grad_copy;
  Times t, plus, minus;
  SlotList slots;
  View dlatents, dnoise;
};

ANYFLOW_KERNEL(flow_map_inputs_forward, const FlowMapInputs&, Range)
ANYFLOW_KERNEL(flow_map_inputs_backward, const FlowMapInputsBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

// out = x + width (noise - x0)
inline void move(float* out, const float* x, const float* x0, const float* noise, float width,
                 int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = x[i] + width * (noise[i] - x0[i]);
  }
}

void flow_map_inputs_forward(const FlowMapInputs& a, Range range) {
  FrameReader latents(a.latents), noises(a.noise);
  FrameWriter x_ts(a.x_t), x_pluses(a.x_plus), x_minuses(a.x_minus), copies(a.x_t_copy);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Block block = frame_block(a.shape, index);
    const float *x0 = latents.at(block), *noise = noises.at(block);
    const float t = static_cast<float>(time(a.t, block));
    const float plus = static_cast<float>(time(a.plus, block));
    const float minus = static_cast<float>(time(a.minus, block));
    float* x_t = x_ts.at(block);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      x_t[i] = (1.0f - t) * x0[i] + t * noise[i];
    }
    for (const int64_t slot : SlotRange(a.slots, block.batch)) {
      move(x_pluses.at(block.of(slot)), x_t, x0, noise, plus, block.n);
      move(x_minuses.at(block.of(slot)), x_t, x0, noise, -minus, block.n);
    }
    if (a.x_t_copy.data != nullptr) {
      __builtin_memcpy(copies.at(block), x_t, sizeof(float) * block.n);
    }
    x_ts.done(block);
  }
}

void flow_map_inputs_backward(const FlowMapInputsBackward& a, Range range) {
  FrameReader grads(a.grad), pluses(a.grad_plus), minuses(a.grad_minus), copies(a.grad_copy);
  FrameWriter dlatents(a.dlatents), dnoises(a.dnoise);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Block block = frame_block(a.shape, index);
    const float t = static_cast<float>(time(a.t, block));
    const float plus = static_cast<float>(time(a.plus, block));
    const float minus = static_cast<float>(time(a.minus, block));
    // Until the last loop these are the gradients of x_t and of noise - x0.
    float *dx = dlatents.at(block), *dv = dnoises.at(block);
    __builtin_memcpy(dx, grads.at(block), sizeof(float) * block.n);
    __builtin_memset(dv, 0, sizeof(float) * block.n);
    if (a.grad_copy.data != nullptr) {
      const float* grad = copies.at(block);
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        dx[i] += grad[i];
      }
    }
    for (const int64_t slot : SlotRange(a.slots, block.batch)) {
      const float *dplus = pluses.at(block.of(slot)), *dminus = minuses.at(block.of(slot));
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        dx[i] += dplus[i] + dminus[i];
        dv[i] += plus * dplus[i] - minus * dminus[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      const float x = dx[i], v = dv[i];
      dx[i] = (1.0f - t) * x - v;
      dv[i] = t * x + v;
    }
    dlatents.done(block);
    dnoises.done(block);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
namespace anyflow {
namespace {

// Views of the parts of [x_plus ; x_minus ; x_t], [2 n + B, F, ...]. The last may be absent.
struct Parts {
  View plus, minus, copy;

  Parts(const at::Tensor& batch, int64_t n) {
    const int64_t rest = batch.size(0) - 2 * n;
    plus = view(batch.narrow(0, 0, n));
    minus = view(batch.narrow(0, n, n));
    copy = rest > 0 ? view(batch.narrow(0, 2 * n, rest)) : View{};
  }
};

std::tuple<at::Tensor, at::Tensor> flow_map_inputs(const at::Tensor& latents_,
                                                   const at::Tensor& noise_, const at::Tensor& t,
                                                   const at::Tensor& epsilon_plus,
                                                   const at::Tensor& epsilon_minus,
                                                   const Optional& picked, at::ScalarType dtype,
                                                   bool with_x_t) {
  const Operands operands("flow_map_inputs", latents_);
  operands.frames("latents", latents_, 2);
  operands.sized("noise", noise_, latents_.sizes());
  const int64_t samples = latents_.size(0), frames = latents_.size(1);
  operands.times("t", t, samples, frames);
  operands.times("epsilon_plus", epsilon_plus, samples, frames);
  operands.times("epsilon_minus", epsilon_minus, samples, frames);
  const int64_t n = operands.picked(picked, samples);
  operands.dtype("dtype", dtype);
  const at::Tensor latents = contiguous_frames(latents_), noise = contiguous_frames(noise_);
  const FrameShape shape = frame_shape(latents);
  const SlotLists slots(picked, samples);
  const at::Tensor x_t = result(latents.sizes(), latents.options().dtype(dtype));
  std::vector<int64_t> sizes = latents.sizes().vec();
  sizes[0] = 2 * n + (with_x_t ? samples : 0);
  const at::Tensor batch = result(sizes, latents.options().dtype(at::kFloat));
  const Parts parts(batch, n);
  const FlowMapInputs a{shape,        view(latents),       view(noise),
                        times(t),     times(epsilon_plus), times(epsilon_minus),
                        slots.list(), view(x_t),           parts.plus,
                        parts.minus,  parts.copy};
  for_frame_blocks(shape, ANYFLOW_SELECT(flow_map_inputs_forward), a);
  return {x_t, batch};
}

std::tuple<at::Tensor, at::Tensor> flow_map_inputs_backward(
    const at::Tensor& grad_, const at::Tensor& grad_batch_, const at::Tensor& latents,
    const at::Tensor& noise, const at::Tensor& t, const at::Tensor& epsilon_plus,
    const at::Tensor& epsilon_minus, const Optional& picked, bool with_x_t) {
  const Operands operands("flow_map_inputs_backward", latents);
  operands.frames("latents", latents, 2);
  operands.sized("noise", noise, latents.sizes());
  operands.sized("grad", grad_, latents.sizes());
  const int64_t samples = latents.size(0), frames = latents.size(1);
  operands.times("t", t, samples, frames);
  operands.times("epsilon_plus", epsilon_plus, samples, frames);
  operands.times("epsilon_minus", epsilon_minus, samples, frames);
  const int64_t n = operands.picked(picked, samples);
  operands.samples("grad_batch", grad_batch_, latents, 2 * n + (with_x_t ? samples : 0));
  const at::Tensor grad = contiguous_frames(grad_), grad_batch = contiguous_frames(grad_batch_);
  const FrameShape shape = frame_shape(latents);
  const SlotLists slots(picked, samples);
  const Parts parts(grad_batch, n);
  const at::Tensor dlatents = result_like(latents), dnoise = result_like(noise);
  const FlowMapInputsBackward a{
      shape,        view(grad),     parts.plus,          parts.minus,
      parts.copy,   times(t),       times(epsilon_plus), times(epsilon_minus),
      slots.list(), view(dlatents), view(dnoise)};
  for_frame_blocks(shape, ANYFLOW_SELECT(flow_map_inputs_backward), a);
  return {dlatents, dnoise};
}

}  // namespace

ANYFLOW_REGISTER(flow_map_inputs)
ANYFLOW_REGISTER(flow_map_inputs_backward)

}  // namespace anyflow
#endif
