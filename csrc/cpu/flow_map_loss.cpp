// Squared error against the central-difference target, per sample: anyflow/ops/flow_map_loss.py.
#include "cpu/frames.h"

namespace anyflow {

struct FlowMapLoss {
  FrameShape shape;
  Frames pred, uncond, plus, minus, latents, noise;  // uncond, and the two sides together, may be absent
  Times t, r, weight, step;
  SlotList slots;
  Frames residual;  // may be absent
  double guidance;
  float* sums;  // of the weighted squares of each block
};

struct FlowMapLossBackward {
  FrameShape shape;
  Frames residual;
  Times grad, weight;
  double factor;
  Frames dpred;
};

ANYFLOW_KERNEL(flow_map_loss_forward, const FlowMapLoss& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(flow_map_loss_backward, const FlowMapLossBackward& a, int64_t begin, int64_t end)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void flow_map_loss_forward(const FlowMapLoss& a, int64_t begin, int64_t end) {
  FrameReader preds(a.pred), unconds(a.uncond), pluses(a.plus), minuses(a.minus), latents(a.latents), noises(a.noise);
  FrameWriter residuals(a.residual);
  const float rest = static_cast<float>(1.0 - a.guidance), inverse = static_cast<float>(1.0 / a.guidance);
  for (int64_t index = begin; index < end; ++index) {
    const FrameBlock block(a.shape, index);
    const int64_t sample = block.sample;
    const float *pred = preds.at(sample, block), *x0 = latents.at(sample, block), *noise = noises.at(sample, block);
    float* residual = residuals.at(sample, block);
    if (a.uncond.data != nullptr) {
      const float* uncond = unconds.at(sample, block);
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        residual[i] = (pred[i] - rest * uncond[i]) * inverse - (noise[i] - x0[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        residual[i] = pred[i] - (noise[i] - x0[i]);
      }
    }
    const double interval = time(a.t, sample, block.frame) - time(a.r, sample, block.frame);
    for (const Slot& slot : SlotRange(a.slots, sample)) {
      const double quotient = interval / (time(a.step, slot.at, block.frame) * a.guidance);
      const float factor = slot.valid ? static_cast<float>(quotient) : __builtin_nanf("");
      const float *plus = pluses.at(slot.at, block), *minus = minuses.at(slot.at, block);
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        residual[i] += (plus[i] - minus[i]) * factor;
      }
    }
    const float weight = static_cast<float>(time(a.weight, sample, block.frame));
    a.sums[index] = weight * sum(block.count, [=]<class T>(int64_t i) {
      const T error = get<T>(residual + i);
      return error * error;
    });
    residuals.done(sample, block);
  }
}

void flow_map_loss_backward(const FlowMapLossBackward& a, int64_t begin, int64_t end) {
  FrameReader residuals(a.residual);
  FrameWriter dpreds(a.dpred);
  for (int64_t index = begin; index < end; ++index) {
    const FrameBlock block(a.shape, index);
    const int64_t sample = block.sample;
    const double scale = time(a.grad, sample, block.frame) * time(a.weight, sample, block.frame);
    const float factor = static_cast<float>(scale * a.factor);
    const float* residual = residuals.at(sample, block);
    float* dpred = dpreds.at(sample, block);
#pragma omp simd
    for (int64_t i = 0; i < block.count; ++i) {
      dpred[i] = residual[i] * factor;
    }
    dpreds.done(sample, block);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include <numeric>

#include "cpu/operators.h"

namespace anyflow {

std::tuple<at::Tensor, at::Tensor> flow_map_loss(
    const at::Tensor& pred_, const std::optional<at::Tensor>& uncond_, const std::optional<at::Tensor>& u_plus,
    const std::optional<at::Tensor>& u_minus, const at::Tensor& latents_, const at::Tensor& noise_, const at::Tensor& t,
    const at::Tensor& r, const at::Tensor& weight, const at::Tensor& step, const std::optional<at::Tensor>& rows,
    double guidance, bool need_grad) {
  check::flow_map_loss(pred_, uncond_, u_plus, u_minus, latents_, noise_, t, r, weight, step, rows, guidance);
  const bool guided = uncond_.has_value(), sides = u_plus.has_value();
  const at::Tensor pred = contiguous_frames(pred_), latents = contiguous_frames(latents_);
  const at::Tensor noise = contiguous_frames(noise_), uncond = guided ? contiguous_frames(*uncond_) : at::Tensor();
  const at::Tensor plus = sides ? contiguous_frames(*u_plus) : at::Tensor();
  const at::Tensor minus = sides ? contiguous_frames(*u_minus) : at::Tensor();
  const FrameShape shape = frame_shape(pred);
  const int64_t samples = shape.samples;
  const SlotLists slots(rows, samples);
  at::Tensor residual = need_grad ? result_like(pred) : at::empty({0}, pred.options());
  std::vector<float> sums(shape.samples * shape.frames * shape.blocks);
  const FlowMapLoss a{shape,
                      frames(pred, shape),
                      guided ? frames(uncond, shape) : Frames{},
                      sides ? frames(plus, shape, slots.count()) : Frames{},
                      sides ? frames(minus, shape, slots.count()) : Frames{},
                      frames(latents, shape),
                      frames(noise, shape),
                      times(t, shape, samples),
                      times(r, shape, samples),
                      times(weight, shape, samples),
                      sides ? times(step, shape, slots.count()) : Times{},
                      sides ? slots.list() : SlotList{},
                      need_grad ? frames(residual, shape) : Frames{},
                      guidance,
                      sums.data()};
  for_frame_blocks(shape, [&, kernel = ANYFLOW_SELECT(flow_map_loss_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  at::Tensor loss = at::empty({samples}, pred.options().dtype(at::kFloat));
  const int64_t blocks = shape.frames * shape.blocks;
  for (int64_t b = 0; b < samples; ++b) {
    const double total = std::accumulate(sums.begin() + b * blocks, sums.begin() + (b + 1) * blocks, 0.0);
    loss.data_ptr<float>()[b] = static_cast<float>(total / static_cast<double>(shape.frames * shape.size));
  }
  return {loss, residual};
}

at::Tensor flow_map_loss_backward(const at::Tensor& grad_, const at::Tensor& residual_, const at::Tensor& weight,
                                  double guidance) {
  check::flow_map_loss_backward(grad_, residual_, weight, guidance);
  const at::Tensor residual = contiguous_frames(residual_), grad = grad_.to(at::kFloat);
  const FrameShape shape = frame_shape(residual);
  at::Tensor dpred = result_like(residual);
  const double elements = static_cast<double>(std::max<int64_t>(shape.frames * shape.size, 1));
  const FlowMapLossBackward a{shape, frames(residual, shape), times(grad, shape, shape.samples),
                              times(weight, shape, shape.samples), 2.0 / (elements * guidance), frames(dpred, shape)};
  for_frame_blocks(shape, [&, kernel = ANYFLOW_SELECT(flow_map_loss_backward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return dpred;
}

}  // namespace anyflow
#endif
