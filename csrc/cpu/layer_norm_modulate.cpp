// LN(x) * (1 + scale) + shift: anyflow/ops/layer_norm_modulate.py.
#include "cpu/tokens.h"

namespace anyflow {

struct LayerNormModulate {
  View x, shift, scale, out;
  int64_t length, d;
  float eps;
};

struct LayerNormModulateBackward {
  View grad, x, scale, dx;
  RowSums dshift, dscale;
  int64_t length, d;
  float eps;
};

ANYFLOW_KERNEL(layer_norm_modulate_forward, const LayerNormModulate&, Range)
ANYFLOW_KERNEL(layer_norm_modulate_backward, const LayerNormModulateBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void layer_norm_modulate_forward(const LayerNormModulate& a, Range range) {
  TokenReader xs(a.x), shifts(a.shift), scales(a.scale);
  TokenWriter outs(a.out);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *x = xs.at(block), *shift = shifts.at(block), *scale = scales.at(block);
    float* out = outs.at(block);
    const auto [mean, rstd] = moments(x, a.d, a.eps);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      out[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
    }
    outs.done(block);
  }
}

void layer_norm_modulate_backward(const LayerNormModulateBackward& a, Range range) {
  TokenReader grads(a.grad), xs(a.x), scales(a.scale);
  TokenWriter dxs(a.dx);
  RowSum dshifts(a.dshift, range, a.d), dscales(a.dscale, range, a.d);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *grad = grads.at(block), *x = xs.at(block), *scale = scales.at(block);
    float *dx = dxs.at(block), *dshift = dshifts.at(token), *dscale = dscales.at(token);
    const auto [mean, rstd] = moments(x, a.d, a.eps);
    // Sums of dn and of dn * n, with dn = grad (1 + scale).
    const auto [along, across] = sum_two(a.d, [=]<class T>(int64_t i) {
      const T g = get<T>(grad + i), n = (get<T>(x + i) - mean) * rstd;
      const T dn = g * (1.0f + get<T>(scale + i));
      put(dshift + i, get<T>(dshift + i) + g);
      put(dscale + i, get<T>(dscale + i) + g * n);
      return Two<T>{dn, dn * n};
    });
    const float size = static_cast<float>(a.d), dn_mean = along / size, dn_slope = across / size;
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      const float n = (x[i] - mean) * rstd, dn = grad[i] * (1.0f + scale[i]);
      dx[i] = rstd * (dn - dn_mean - n * dn_slope);
    }
    dxs.done(block);
    dshifts.done(token);
    dscales.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/tensors.h"

namespace anyflow {
namespace {

at::Tensor layer_norm_modulate(const at::Tensor& x_, const at::Tensor& shift_,
                               const at::Tensor& scale_, double eps) {
  check_modulation(Operands("layer_norm_modulate", x_), x_, shift_, scale_, eps);
  const at::Tensor x = contiguous_rows(x_), shift = contiguous_rows(shift_);
  const at::Tensor scale = contiguous_rows(scale_), out = result_like(x);
  const TokenShape shape(x);
  const LayerNormModulate a{view(x),      shape.view(shift), shape.view(scale),      view(out),
                            shape.length, shape.d,           static_cast<float>(eps)};
  for_tokens(shape, ANYFLOW_SELECT(layer_norm_modulate_forward), a);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_modulate_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& shift,
    const at::Tensor& scale_, double eps) {
  const Operands operands("layer_norm_modulate_backward", x_);
  check_modulation(operands, x_, shift, scale_, eps);
  operands.sized("grad", grad_, x_.sizes());
  const at::Tensor grad = contiguous_rows(grad_), x = contiguous_rows(x_);
  const at::Tensor scale = contiguous_rows(scale_), dx = result_like(x);
  const TokenShape shape(x);
  Sums dshift(shape, shift), dscale(shape, scale);
  const LayerNormModulateBackward a{view(grad),   view(x),       shape.view(scale),
                                    view(dx),     dshift.rows(), dscale.rows(),
                                    shape.length, shape.d,       static_cast<float>(eps)};
  for_chunks(shape, ANYFLOW_SELECT(layer_norm_modulate_backward), a);
  return {dx, dshift.result(), dscale.result()};
}

}  // namespace

ANYFLOW_REGISTER(layer_norm_modulate)
ANYFLOW_REGISTER(layer_norm_modulate_backward)

}  // namespace anyflow
#endif
