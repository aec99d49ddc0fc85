// Squared error against the central-difference target, per sample: anyflow/ops/flow_map_loss.py.
#include "cpu/frames.h"

namespace anyflow {

struct FlowMapLoss {
  FrameShape shape;
  View pred, uncond, plus, minus, latents, noise;  // uncond, or both sides, may be absent
  Times t, r, weight, width;
  SlotList slots;
  View residual;  // may be absent
  double guidance;
  float* sums;  // of the weighted squares of each block
};

struct FlowMapLossBackward {
  FrameShape shape;
  View residual;
  Times grad, weight;
  double factor;
  View dpred;
};

ANYFLOW_KERNEL(flow_map_loss_forward, const FlowMapLoss&, Range)
ANYFLOW_KERNEL(flow_map_loss_backward, const FlowMapLossBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/vector.h"

namespace anyflow::ANYFLOW_ISA {

void flow_map_loss_forward(const FlowMapLoss& a, Range range) {
  FrameReader preds(a.pred), unconds(a.uncond), pluses(a.plus), minuses(a.minus);
  FrameReader latents(a.latents), noises(a.noise);
  FrameWriter residuals(a.residual);
  const float rest = static_cast<float>(1.0 - a.guidance);
  const float inverse = static_cast<float>(1.0 / a.guidance);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Block block = frame_block(a.shape, index);
    const float *pred = preds.at(block), *x0 = latents.at(block), *noise = noises.at(block);
    float* residual = residuals.at(block);
    if (a.uncond.data != nullptr) {
      const float* uncond = unconds.at(block);
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        residual[i] = (pred[i] - rest * uncond[i]) * inverse - (noise[i] - x0[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        residual[i] = pred[i] - (noise[i] - x0[i]);
      }
    }
    const double interval = time(a.t, block) - time(a.r, block);
    for (const int64_t slot : SlotRange(a.slots, block.batch)) {
      const Block other = block.of(slot);
      const float factor = static_cast<float>(interval / (time(a.width, other) * a.guidance));
      const float *plus = pluses.at(other), *minus = minuses.at(other);
#pragma omp simd
      for (int64_t i = 0; i < block.n; ++i) {
        residual[i] += (plus[i] - minus[i]) * factor;
      }
    }
    const float weight = static_cast<float>(time(a.weight, block));
    a.sums[index] = weight * sum(block.n, [=]<class T>(int64_t i) {
                      const T error = get<T>(residual + i);
                      return error * error;
                    });
    residuals.done(block);
  }
}

void flow_map_loss_backward(const FlowMapLossBackward& a, Range range) {
  FrameReader residuals(a.residual);
  FrameWriter dpreds(a.dpred);
  for (int64_t index = range.begin; index < range.end; ++index) {
    const Block block = frame_block(a.shape, index);
    const float factor = static_cast<float>(time(a.grad, block) * time(a.weight, block) * a.factor);
    const float* residual = residuals.at(block);
    float* dpred = dpreds.at(block);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      dpred[i] = residual[i] * factor;
    }
    dpreds.done(block);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include <numeric>

namespace anyflow {
namespace {

std::tuple<at::Tensor, at::Tensor> flow_map_loss(const at::Tensor& pred_, const Optional& uncond_,
                                                 const Optional& u_plus, const Optional& u_minus,
                                                 const at::Tensor& latents_,
                                                 const at::Tensor& noise_, const at::Tensor& t,
                                                 const at::Tensor& r, const at::Tensor& weight,
                                                 const at::Tensor& width, const Optional& picked,
                                                 double guidance, bool need_grad) {
  const Operands operands("flow_map_loss", pred_);
  operands.frames("pred", pred_, 3);
  operands.sized("uncond", uncond_, pred_.sizes());
  operands.sized("latents", latents_, pred_.sizes());
  operands.sized("noise", noise_, pred_.sizes());
  operands.require(u_plus.has_value() == u_minus.has_value(),
                   "u_plus and u_minus are given together or not at all");
  operands.require(u_plus || !picked, "picked needs u_plus and u_minus");
  const int64_t samples = pred_.size(0), frames = pred_.size(1);
  const int64_t n = operands.picked(picked, samples);
  if (u_plus) {
    operands.samples("u_plus", *u_plus, pred_, n);
    operands.samples("u_minus", *u_minus, pred_, n);
  }
  operands.times("t", t, samples, frames);
  operands.times("r", r, samples, frames);
  operands.require(t.sizes() == r.sizes(), "t ", t.sizes(), " and r ", r.sizes(),
                   " must have one shape");
  operands.times("weight", weight, samples, frames);
  operands.times("width", width, n, frames);
  operands.guidance(guidance);
  operands.require(uncond_ || guidance == 1, "guidance ", guidance, " needs uncond");

  const at::Tensor pred = contiguous_frames(pred_), latents = contiguous_frames(latents_);
  const at::Tensor noise = contiguous_frames(noise_);
  const Optional uncond = contiguous_frames(uncond_);
  const Optional plus = contiguous_frames(u_plus), minus = contiguous_frames(u_minus);
  const FrameShape shape = frame_shape(pred);
  const SlotLists slots(picked, samples);
  const at::Tensor residual = need_grad ? result_like(pred) : at::empty({0}, pred.options());
  const int64_t blocks = shape.frames * shape.blocks;  // of a sample
  std::vector<float> sums(samples * blocks);
  const FlowMapLoss a{shape,
                      view(pred),
                      view(uncond),
                      view(plus),
                      view(minus),
                      view(latents),
                      view(noise),
                      times(t),
                      times(r),
                      times(weight),
                      times(width),
                      plus ? slots.list() : SlotList{},
                      need_grad ? view(residual) : View{},
                      guidance,
                      sums.data()};
  for_frame_blocks(shape, ANYFLOW_SELECT(flow_map_loss_forward), a);
  at::Tensor loss = at::empty({samples}, pred.options().dtype(at::kFloat));
  for (int64_t b = 0; b < samples; ++b) {
    const auto begin = sums.begin() + b * blocks;
    const double total = std::accumulate(begin, begin + blocks, 0.0);
    const double elements = static_cast<double>(shape.frames * shape.size);
    loss.data_ptr<float>()[b] = static_cast<float>(total / elements);
  }
  return {loss, residual};
}

at::Tensor flow_map_loss_backward(const at::Tensor& grad_, const at::Tensor& residual_,
                                  const at::Tensor& weight, double guidance) {
  const Operands operands("flow_map_loss_backward", residual_);
  operands.frames("residual", residual_, 3);
  operands.sized("grad", grad_, {residual_.size(0)}, Numbers::floating);
  operands.times("weight", weight, residual_.size(0), residual_.size(1));
  operands.guidance(guidance);
  const at::Tensor residual = contiguous_frames(residual_);
  const at::Tensor grad = copy_unless(true, grad_.to(at::kFloat));  // any stride is readable
  const at::Tensor dpred = result_like(residual);
  const FrameShape shape = frame_shape(residual);
  const double elements = static_cast<double>(std::max<int64_t>(shape.frames * shape.size, 1));
  const FlowMapLossBackward a{
      shape, view(residual), times(grad), times(weight), 2.0 / (elements * guidance), view(dpred)};
  for_frame_blocks(shape, ANYFLOW_SELECT(flow_map_loss_backward), a);
  return dpred;
}

}  // namespace

ANYFLOW_REGISTER(flow_map_loss)
ANYFLOW_REGISTER(flow_map_loss_backward)

}  // namespace anyflow
#endif
