// x_t = (1 - t) x0 + t eps and x_t +- epsilon (eps - x0): anyflow/ops/flow_map_inputs.py.
#include "cpu/frames.h"

namespace anyflow {

struct FlowMapInputs {
  FrameShape shape;
  Frames latents, noise;
  Times t, plus, minus;
  SlotList slots;
  Frames x_t, x_plus, x_minus, x_t_copy;  // of the last three, one buffer; the copy may be absent
};

struct FlowMapInputsBackward {
  FrameShape shape;
  Frames grad, grad_plus, grad_minus, grad_copy;
  Times t, plus, minus;
  SlotList slots;
  Frames dlatents, dnoise;
};

ANYFLOW_KERNEL(flow_map_inputs_forward, const FlowMapInputs& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(flow_map_inputs_backward, const FlowMapInputsBackward& a, int64_t begin, int64_t end)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

// out = x + width (noise - x0)
inline void step(float* out, const float* x, const float* x0, const float* noise, float width, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = x[i] + width * (noise[i] - x0[i]);
  }
}

void flow_map_inputs_forward(const FlowMapInputs& a, int64_t begin, int64_t end) {
  FrameReader latents(a.latents), noises(a.noise);
  FrameWriter x_ts(a.x_t), x_pluses(a.x_plus), x_minuses(a.x_minus), copies(a.x_t_copy);
  for (int64_t index = begin; index < end; ++index) {
    const FrameBlock block(a.shape, index);
    const int64_t sample = block.sample;
    const float *x0 = latents.at(sample, block), *noise = noises.at(sample, block);
    const float t = static_cast<float>(time(a.t, sample, block.frame));
    const float plus = static_cast<float>(time(a.plus, sample, block.frame));
    const float minus = static_cast<float>(time(a.minus, sample, block.frame));
    float* x_t = x_ts.at(sample, block);
#pragma omp simd
    for (int64_t i = 0; i < block.count; ++i) {
      x_t[i] = (1.0f - t) * x0[i] + t * noise[i];
    }
    for (const Slot& slot : SlotRange(a.slots, sample)) {
      const float nan = __builtin_nanf("");
      step(x_pluses.at(slot.at, block), x_t, x0, noise, slot.valid ? plus : nan, block.count);
      step(x_minuses.at(slot.at, block), x_t, x0, noise, slot.valid ? -minus : nan, block.count);
    }
    if (a.x_t_copy.data != nullptr) {
      __builtin_memcpy(copies.at(sample, block), x_t, sizeof(float) * block.count);
    }
    x_ts.done(sample, block);
  }
}

void flow_map_inputs_backward(const FlowMapInputsBackward& a, int64_t begin, int64_t end) {
  FrameReader grads(a.grad), pluses(a.grad_plus), minuses(a.grad_minus), copies(a.grad_copy);
  FrameWriter dlatents(a.dlatents), dnoises(a.dnoise);
  for (int64_t index = begin; index < end; ++index) {
    const FrameBlock block(a.shape, index);
    const int64_t sample = block.sample;
    const float t = static_cast<float>(time(a.t, sample, block.frame));
    const float plus = static_cast<float>(time(a.plus, sample, block.frame));
    const float minus = static_cast<float>(time(a.minus, sample, block.frame));
    // Until the last loop these are the gradients of x_t and of eps - x0.
    float *dx = dlatents.at(sample, block), *dv = dnoises.at(sample, block);
    __builtin_memcpy(dx, grads.at(sample, block), sizeof(float) * block.count);
    __builtin_memset(dv, 0, sizeof(float) * block.count);
    if (a.grad_copy.data != nullptr) {
      const float* grad = copies.at(sample, block);
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        dx[i] += grad[i];
      }
    }
    for (const Slot& slot : SlotRange(a.slots, sample)) {
      if (!slot.valid) {
        continue;
      }
      const float *dplus = pluses.at(slot.at, block), *dminus = minuses.at(slot.at, block);
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        dx[i] += dplus[i] + dminus[i];
        dv[i] += plus * dplus[i] - minus * dminus[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < block.count; ++i) {
      const float x = dx[i], v = dv[i];
      dx[i] = (1.0f - t) * x - v;
      dv[i] = t * x + v;
    }
    dlatents.done(sample, block);
    dnoises.done(sample, block);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"

namespace anyflow {
namespace {

// [x_plus ; x_minus ; x_t], [2 n + B, F, ...], the last part only where the rest has it.
struct Batch {
  Frames plus, minus, copy;

  Batch(const at::Tensor& batch, const FrameShape& shape, int64_t n, bool with_x_t) {
    TORCH_CHECK(batch.dim() >= 1 && batch.size(0) == 2 * n + (with_x_t ? shape.samples : 0), "expected 2 * ", n,
                (with_x_t ? " + " : " + 0 * "), shape.samples, " samples, got ", batch.sizes());
    plus = frames(batch.narrow(0, 0, n), shape, n);
    minus = frames(batch.narrow(0, n, n), shape, n);
    copy = with_x_t ? frames(batch.narrow(0, 2 * n, shape.samples), shape) : Frames{};
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> flow_map_inputs(const at::Tensor& latents_, const at::Tensor& noise_,
                                                   const at::Tensor& t, const at::Tensor& epsilon_plus,
                                                   const at::Tensor& epsilon_minus,
                                                   const std::optional<at::Tensor>& rows, at::ScalarType dtype,
                                                   bool with_x_t) {
  check::flow_map_inputs(latents_, noise_, t, epsilon_plus, epsilon_minus, rows, dtype);
  const at::Tensor latents = contiguous_frames(latents_), noise = contiguous_frames(noise_);
  const FrameShape shape = frame_shape(latents);
  const SlotLists slots(rows, shape.samples);
  const int64_t n = slots.count(), samples = shape.samples;
  at::Tensor x_t = result(latents.sizes(), latents.options().dtype(dtype));
  std::vector<int64_t> sizes = latents.sizes().vec();
  sizes[0] = 2 * n + (with_x_t ? samples : 0);
  at::Tensor out = result(sizes, latents.options().dtype(at::kFloat));
  const Batch batch(out, shape, n, with_x_t);
  const FlowMapInputs a{shape,
                        frames(latents, shape),
                        frames(noise, shape),
                        times(t, shape, samples),
                        times(epsilon_plus, shape, samples),
                        times(epsilon_minus, shape, samples),
                        slots.list(),
                        frames(x_t, shape),
                        batch.plus,
                        batch.minus,
                        batch.copy};
  for_frame_blocks(shape, [&, kernel = ANYFLOW_SELECT(flow_map_inputs_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return {x_t, out};
}

std::tuple<at::Tensor, at::Tensor> flow_map_inputs_backward(
    const at::Tensor& grad_, const at::Tensor& grad_batch_, const at::Tensor& latents, const at::Tensor& noise,
    const at::Tensor& t, const at::Tensor& epsilon_plus, const at::Tensor& epsilon_minus,
    const std::optional<at::Tensor>& rows, bool with_x_t) {
  check::flow_map_inputs_backward(grad_, grad_batch_, latents, noise, t, epsilon_plus, epsilon_minus, rows, with_x_t);
  const at::Tensor grad = contiguous_frames(grad_), grad_batch = contiguous_frames(grad_batch_);
  const FrameShape shape = frame_shape(latents);
  const SlotLists slots(rows, shape.samples);
  const Batch batch(grad_batch, shape, slots.count(), with_x_t);
  at::Tensor dlatents = result_like(latents), dnoise = result_like(noise);
  const FlowMapInputsBackward a{shape,
                                frames(grad, shape),
                                batch.plus,
                                batch.minus,
                                batch.copy,
                                times(t, shape, shape.samples),
                                times(epsilon_plus, shape, shape.samples),
                                times(epsilon_minus, shape, shape.samples),
                                slots.list(),
                                frames(dlatents, shape),
                                frames(dnoise, shape)};
  for_frame_blocks(shape, [&, kernel = ANYFLOW_SELECT(flow_map_inputs_backward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return {dlatents, dnoise};
}

}  // namespace anyflow
#endif
