// LN(x) * (1 + scale) + shift: anyflow/ops/layer_norm_modulate.py.
#include "cpu/rows.h"

namespace anyflow {

struct LayerNormModulate {
  Rows x, shift, scale;
  void* out;  // [B, L, D] of x's type
  int64_t length, d;
  float eps;
};

struct LayerNormModulateBackward {
  Rows grad, x, scale;
  void* dx;
  RowSums dshift, dscale;
  int64_t length, d;
  float eps;
};

// Tokens are counted over all samples.
ANYFLOW_KERNEL(layer_norm_modulate_forward, const LayerNormModulate& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(layer_norm_modulate_backward, const LayerNormModulateBackward& a, int64_t begin, int64_t end,
               int64_t chunk)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void layer_norm_modulate_forward(const LayerNormModulate& a, int64_t begin, int64_t end) {
  RowReader xs(a.x, a.d), shifts(a.shift, a.d), scales(a.scale, a.d);
  RowWriter outs(a.out, a.x.type, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *x = xs.at(batch, l), *shift = shifts.at(batch, l), *scale = scales.at(batch, l);
    float* out = outs.at(token);
    const auto [mean, rstd] = moments(x, a.d, a.eps);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      out[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
    }
    outs.done(token);
  }
}

void layer_norm_modulate_backward(const LayerNormModulateBackward& a, int64_t begin, int64_t end, int64_t chunk) {
  RowReader grads(a.grad, a.d), xs(a.x, a.d), scales(a.scale, a.d);
  RowWriter dxs(a.dx, a.x.type, a.d);
  RowSum dshifts(a.dshift, begin, end, chunk, a.d), dscales(a.dscale, begin, end, chunk, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *grad = grads.at(batch, l), *x = xs.at(batch, l), *scale = scales.at(batch, l);
    float *dx = dxs.at(token), *dshift = dshifts.at(token), *dscale = dscales.at(token);
    const auto [mean, rstd] = moments(x, a.d, a.eps);
    // Sums of dn and of dn * n, with dn = grad (1 + scale).
    const auto [along, across] = sum_two(a.d, [=]<class T>(int64_t i) {
      const T g = get<T>(grad + i), n = (get<T>(x + i) - mean) * rstd, dn = g * (1.0f + get<T>(scale + i));
      put(dshift + i, get<T>(dshift + i) + g);
      put(dscale + i, get<T>(dscale + i) + g * n);
      return Two<T>{dn, dn * n};
    });
    const float dn_mean = along / static_cast<float>(a.d), dn_slope = across / static_cast<float>(a.d);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      const float n = (x[i] - mean) * rstd, dn = grad[i] * (1.0f + scale[i]);
      dx[i] = rstd * (dn - dn_mean - n * dn_slope);
    }
    dxs.done(token);
    dshifts.done(token);
    dscales.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {

at::Tensor layer_norm_modulate(const at::Tensor& x_, const at::Tensor& shift_, const at::Tensor& scale_, double eps) {
  check::layer_norm_modulate(x_, shift_, scale_, eps);
  const at::Tensor x = contiguous_rows(x_), shift = contiguous_rows(shift_), scale = contiguous_rows(scale_);
  const Shape shape(x);
  at::Tensor out = result_like(x);
  const LayerNormModulate a{shape.rows(x), shape.rows(shift), shape.rows(scale), out.data_ptr(),
                            shape.length,  shape.d,           static_cast<float>(eps)};
  for_tokens(shape, [&, kernel = ANYFLOW_SELECT(layer_norm_modulate_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_modulate_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& shift, const at::Tensor& scale_, double eps) {
  check::layer_norm_modulate_backward(grad_, x_, shift, scale_, eps);
  const at::Tensor grad = contiguous_rows(grad_), x = contiguous_rows(x_), scale = contiguous_rows(scale_);
  const Shape shape(x);
  at::Tensor dx = result_like(x);
  Sums dshift(shape, shift), dscale(shape, scale);
  const LayerNormModulateBackward a{shape.rows(grad), shape.rows(x), shape.rows(scale), dx.data_ptr(),
                                    dshift.rows(),    dscale.rows(), shape.length,      shape.d,
                                    static_cast<float>(eps)};
  for_chunks(shape, [&, kernel = ANYFLOW_SELECT(layer_norm_modulate_backward)](int64_t begin, int64_t end, int64_t i) {
    kernel(a, begin, end, i);
  });
  return {dx, dshift.result(), dscale.result()};
}

}  // namespace anyflow
#endif
