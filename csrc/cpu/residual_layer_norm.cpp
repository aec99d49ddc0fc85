// h = x + y * gate and n = LN(h), with an affine or a modulation: anyflow/ops/residual_layer_norm.py.
//
// To the kernels an affine is a modulation whose one row all tokens share and that does not count from 1:
// n = LN(h) * (one + scale) + shift with scale = weight and one = 0, or one = 1.
#include "cpu/rows.h"

namespace anyflow {

struct ResidualLayerNorm {
  Rows x, y, gate, scale, shift;
  float one;
  void *h, *n;  // [B, L, D] of x's type
  int64_t length, d;
  float eps;
};

struct ResidualLayerNormBackward {
  Rows dh, dn, y, h, gate, scale;
  float one;
  void *dx, *dy;
  RowSums dgate, dscale, dshift;
  int64_t length, d;
  float eps;
};

ANYFLOW_KERNEL(residual_layer_norm_forward, const ResidualLayerNorm& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(residual_layer_norm_backward, const ResidualLayerNormBackward& a, int64_t begin, int64_t end,
               int64_t chunk)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void residual_layer_norm_forward(const ResidualLayerNorm& a, int64_t begin, int64_t end) {
  RowReader xs(a.x, a.d), ys(a.y, a.d), gates(a.gate, a.d, 1), scales(a.scale, a.d, 1 - a.one), shifts(a.shift, a.d);
  RowWriter hs(a.h, a.x.type, a.d), ns(a.n, a.x.type, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *x = xs.at(batch, l), *y = ys.at(batch, l), *gate = gates.at(batch, l);
    float* sum = hs.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      sum[i] = x[i] + y[i] * gate[i];
    }
    hs.done(token);
    const float *h = hs.written(token), *scale = scales.at(batch, l), *shift = shifts.at(batch, l);
    const auto [mean, rstd] = moments(h, a.d, a.eps);
    float* n = ns.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      n[i] = (h[i] - mean) * rstd * (a.one + scale[i]) + shift[i];
    }
    ns.done(token);
  }
}

void residual_layer_norm_backward(const ResidualLayerNormBackward& a, int64_t begin, int64_t end, int64_t chunk) {
  RowReader dhs(a.dh, a.d), dns(a.dn, a.d), ys(a.y, a.d), hs(a.h, a.d), gates(a.gate, a.d, 1);
  RowReader scales(a.scale, a.d, 1 - a.one);
  RowWriter dxs(a.dx, a.h.type, a.d), dys(a.dy, a.y.type, a.d);
  RowSum dgates(a.dgate, begin, end, chunk, a.d), dscales(a.dscale, begin, end, chunk, a.d);
  RowSum dshifts(a.dshift, begin, end, chunk, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *dn = dns.at(batch, l), *h = hs.at(batch, l), *scale = scales.at(batch, l);
    float *dshift = dshifts.at(token), *dscale = dscales.at(token);
    const auto [mean, rstd] = moments(h, a.d, a.eps);
    const float one = a.one;
    // Sums of g and of g * n, with g = dn (one + scale).
    const auto [along, across] = sum_two(a.d, [=]<class T>(int64_t i) {
      const T grad = get<T>(dn + i), n = (get<T>(h + i) - mean) * rstd, g = grad * (one + get<T>(scale + i));
      put(dshift + i, get<T>(dshift + i) + grad);
      put(dscale + i, get<T>(dscale + i) + grad * n);
      return Two<T>{g, g * n};
    });
    const float g_mean = along / static_cast<float>(a.d), g_slope = across / static_cast<float>(a.d);
    const float* dh = dhs.at(batch, l);
    float* dx = dxs.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      const float n = (h[i] - mean) * rstd, g = dn[i] * (one + scale[i]);
      dx[i] = dh[i] + rstd * (g - g_mean - n * g_slope);
    }
    if (a.dy != nullptr) {
      const float *y = ys.at(batch, l), *gate = gates.at(batch, l);
      float *dy = dys.at(token), *dgate = dgates.at(token);
#pragma omp simd
      for (int64_t i = 0; i < a.d; ++i) {
        dy[i] = dx[i] * gate[i];
        dgate[i] += dx[i] * y[i];
      }
      dys.done(token);
      dgates.done(token);
    }
    dxs.done(token);
    dscales.done(token);
    dshifts.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {
namespace {

using Optional = std::optional<at::Tensor>;

Optional readable(const Optional& x) { return x ? Optional(contiguous_rows(*x)) : x; }

Rows rows(const Shape& shape, const Optional& x) { return x ? shape.rows(*x) : Rows{}; }

Sums sums(const Shape& shape, const Optional& like) { return like ? Sums(shape, *like) : Sums(); }

// The gradient of an operand, empty where it is absent.
at::Tensor present(const at::Tensor& gradient, const at::Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x_, const at::Tensor& y_, const Optional& gate_,
                                                       const Optional& weight, const Optional& bias,
                                                       const Optional& shift, const Optional& scale, double eps) {
  check::residual_layer_norm(x_, y_, gate_, weight, bias, shift, scale, eps);
  const at::Tensor x = contiguous_rows(x_), y = contiguous_rows(y_);
  const Optional gate = readable(gate_), scales = readable(weight ? weight : scale);
  const Optional shifts = readable(weight ? bias : shift);
  const Shape shape(x);
  at::Tensor h = result_like(x), n = result_like(x);
  const ResidualLayerNorm a{shape.rows(x),
                            shape.rows(y),
                            rows(shape, gate),
                            rows(shape, scales),
                            rows(shape, shifts),
                            weight ? 0.0f : 1.0f,
                            h.data_ptr(),
                            n.data_ptr(),
                            shape.length,
                            shape.d,
                            static_cast<float>(eps)};
  for_tokens(shape, [&, kernel = ANYFLOW_SELECT(residual_layer_norm_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return {h, n};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
residual_layer_norm_backward(const Optional& dh_, const at::Tensor& dn_, const Optional& y_, const at::Tensor& h_,
                             const Optional& gate_, const Optional& weight, const Optional& bias, const Optional& shift,
                             const Optional& scale, double eps) {
  check::residual_layer_norm_backward(dh_, dn_, y_, h_, gate_, weight, bias, shift, scale, eps);
  const at::Tensor dn = contiguous_rows(dn_), h = contiguous_rows(h_);
  const Optional dh = readable(dh_), y = readable(y_), gate = readable(gate_);
  const Optional scales = readable(weight ? weight : scale), shifts = weight ? bias : shift;
  const Shape shape(h);
  at::Tensor dx = result_like(h), dy = y ? result_like(*y) : at::Tensor();
  Sums dgate = sums(shape, y ? gate : std::nullopt), dscale = sums(shape, scales), dshift = sums(shape, shifts);
  const ResidualLayerNormBackward a{rows(shape, dh),
                                    shape.rows(dn),
                                    rows(shape, y),
                                    shape.rows(h),
                                    rows(shape, gate),
                                    rows(shape, scales),
                                    weight ? 0.0f : 1.0f,
                                    dx.data_ptr(),
                                    y ? dy.data_ptr() : nullptr,
                                    dgate.rows(),
                                    dscale.rows(),
                                    dshift.rows(),
                                    shape.length,
                                    shape.d,
                                    static_cast<float>(eps)};
  for_chunks(shape, [&, kernel = ANYFLOW_SELECT(residual_layer_norm_backward)](int64_t begin, int64_t end, int64_t i) {
    kernel(a, begin, end, i);
  });
  const at::Tensor none, dscales = dscale.result(), dshifts = dshift.result();
  return {dx,
          present(dy, h),
          present(dgate.result(), h),
          present(weight ? dscales : none, h),
          present(weight ? dshifts : none, h),
          present(weight ? none : dshifts, h),
          present(weight ? none : dscales, h)};
}

}  // namespace anyflow
#endif
