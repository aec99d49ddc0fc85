// h = x + y * gate and n = LN(h), with an affine or a modulation:
// anyflow/ops/residual_layer_norm.py.
//
// To the kernels an affine is a modulation whose one row all tokens share and that does not count
// from 1: n = LN(h) * (one + scale) + shift with scale = weight and one = 0, or one = 1.
#include "cpu/tokens.h"

namespace anyflow {

struct ResidualLayerNorm {
  View x, y, gate, scale, shift;
  float one;
  View h, n;
  int64_t length, d;
  float eps;
};

struct ResidualLayerNormBackward {
  View dh, dn, y, h, gate, scale;
  float one;
  View dx, dy;
  RowSums dgate, dscale, dshift;
  int64_t length, d;
  float eps;
};

ANYFLOW_KERNEL(residual_layer_norm_forward, const ResidualLayerNorm&, Range)
ANYFLOW_KERNEL(residual_layer_norm_backward, const ResidualLayerNormBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void residual_layer_norm_forward(const ResidualLayerNorm& a, Range range) {
  TokenReader xs(a.x), ys(a.y), gates(a.gate, a.d, 1);
  TokenReader scales(a.scale, a.d, 1 - a.one), shifts(a.shift, a.d);
  TokenWriter hs(a.h), ns(a.n);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *x = xs.at(block), *y = ys.at(block), *gate = gates.at(block);
    float* sum = hs.at(block);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      sum[i] = x[i] + y[i] * gate[i];
    }
    hs.done(block);
    // The norm is that of the rounded sum, which is returned.
    const float *h = hs.written(block), *scale = scales.at(block), *shift = shifts.at(block);
    const auto [mean, rstd] = moments(h, a.d, a.eps);
    float* n = ns.at(block);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      n[i] = (h[i] - mean) * rstd * (a.one + scale[i]) + shift[i];
    }
    ns.done(block);
  }
}

void residual_layer_norm_backward(const ResidualLayerNormBackward& a, Range range) {
  TokenReader dhs(a.dh, a.d), dns(a.dn), ys(a.y, a.d), hs(a.h), gates(a.gate, a.d, 1);
  TokenReader scales(a.scale, a.d, 1 - a.one);
  TokenWriter dxs(a.dx), dys(a.dy);
  RowSum dgates(a.dgate, range, a.d), dscales(a.dscale, range, a.d), dshifts(a.dshift, range, a.d);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *dn = dns.at(block), *h = hs.at(block), *scale = scales.at(block);
    float *dshift = dshifts.at(token), *dscale = dscales.at(token);
    const auto [mean, rstd] = moments(h, a.d, a.eps);
    const float one = a.one;
    // Sums of g and of g * n, with g = dn (one + scale).
    const auto [along, across] = sum_two(a.d, [=]<class T>(int64_t i) {
      const T grad = get<T>(dn + i), n = (get<T>(h + i) - mean) * rstd;
      const T g = grad * (one + get<T>(scale + i));
      put(dshift + i, get<T>(dshift + i) + grad);
      put(dscale + i, get<T>(dscale + i) + grad * n);
      return Two<T>{g, g * n};
    });
    const float size = static_cast<float>(a.d), g_mean = along / size, g_slope = across / size;
    const float* dh = dhs.at(block);
    float* dx = dxs.at(block);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      const float n = (h[i] - mean) * rstd, g = dn[i] * (one + scale[i]);
      dx[i] = dh[i] + rstd * (g - g_mean - n * g_slope);
    }
    if (a.dy.data != nullptr) {
      const float *y = ys.at(block), *gate = gates.at(block);
      float *dy = dys.at(block), *dgate = dgates.at(token);
#pragma omp simd
      for (int64_t i = 0; i < a.d; ++i) {
        dy[i] = dx[i] * gate[i];
        dgate[i] += dx[i] * y[i];
      }
      dys.done(block);
      dgates.done(token);
    }
    dxs.done(block);
    dscales.done(token);
    dshifts.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/tensors.h"

namespace anyflow {
namespace {

std::tuple<at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x_, const at::Tensor& y_,
                                                       const Optional& gate_,
                                                       const Optional& weight, const Optional& bias,
                                                       const Optional& shift, const Optional& scale,
                                                       double eps) {
  const Operands operands("residual_layer_norm", x_);
  operands.tokens("x", x_);
  operands.sized("y", y_, x_.sizes());
  check_residual_norm(operands, x_, gate_, weight, bias, shift, scale, eps);
  const at::Tensor x = contiguous_rows(x_), y = contiguous_rows(y_);
  const Optional gate = contiguous_rows(gate_), scales = contiguous_rows(weight ? weight : scale);
  const Optional shifts = contiguous_rows(weight ? bias : shift);
  const at::Tensor h = result_like(x), n = result_like(x);
  const TokenShape shape(x);
  const ResidualLayerNorm a{view(x),
                            view(y),
                            shape.view(gate),
                            shape.view(scales),
                            shape.view(shifts),
                            weight ? 0.0f : 1.0f,
                            view(h),
                            view(n),
                            shape.length,
                            shape.d,
                            static_cast<float>(eps)};
  for_tokens(shape, ANYFLOW_SELECT(residual_layer_norm_forward), a);
  return {h, n};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
residual_layer_norm_backward(const Optional& dh_, const at::Tensor& dn_, const Optional& y_,
                             const at::Tensor& h_, const Optional& gate_, const Optional& weight,
                             const Optional& bias, const Optional& shift, const Optional& scale,
                             double eps) {
  const Operands operands("residual_layer_norm_backward", h_);
  operands.tokens("h", h_);
  operands.sized("grad_n", dn_, h_.sizes());
  operands.sized("grad_h", dh_, h_.sizes());
  operands.sized("y", y_, h_.sizes());
  operands.require(y_ || !gate_, "gate needs y");
  check_residual_norm(operands, h_, gate_, weight, bias, shift, scale, eps);
  const at::Tensor dn = contiguous_rows(dn_), h = contiguous_rows(h_);
  const Optional dh = contiguous_rows(dh_), y = contiguous_rows(y_), gate = contiguous_rows(gate_);
  const Optional scales = contiguous_rows(weight ? weight : scale);
  const at::Tensor dx = result_like(h);
  const Optional dy = y ? Optional(result_like(*y)) : y;
  const TokenShape shape(h);
  Sums dgate(shape, gate), dscale(shape, scales), dshift(shape, weight ? bias : shift);
  const ResidualLayerNormBackward a{view(dh),
                                    view(dn),
                                    view(y),
                                    view(h),
                                    shape.view(gate),
                                    shape.view(scales),
                                    weight ? 0.0f : 1.0f,
                                    view(dx),
                                    view(dy),
                                    dgate.rows(),
                                    dscale.rows(),
                                    dshift.rows(),
                                    shape.length,
                                    shape.d,
                                    static_cast<float>(eps)};
  for_chunks(shape, ANYFLOW_SELECT(residual_layer_norm_backward), a);
  // The gradient of an absent operand; results must not share memory.
  const auto none = [&] { return at::empty({0}, h.options()); };
  const at::Tensor dscales = dscale.result(), dshifts = dshift.result();
  const bool biased = weight && bias;
  return {dx,
          dy ? *dy : none(),
          gate ? dgate.result() : none(),
          weight ? dscales : none(),
          biased ? dshifts : none(),
          shift ? dshifts : none(),
          shift ? dscales : none()};
}

}  // namespace

ANYFLOW_REGISTER(residual_layer_norm)
ANYFLOW_REGISTER(residual_layer_norm_backward)

}  // namespace anyflow
#endif
