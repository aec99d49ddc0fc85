// RMS norm over D, head split and rotation of the pairs (2i, 2i + 1): anyflow/ops/rms_norm_rope.py.
#include "cpu/rows.h"

namespace anyflow {

struct RmsNormRope {
  Rows x, weight, cos, sin;  // the tables are rows of head_dim / 2, absent without a rotation
  void* out;                 // [B, L, H, Dh] of x's type
  int64_t length, d, head_dim;
  float eps;
};

struct RmsNormRopeBackward {
  Rows grad;            // [B, L, H, Dh]
  int64_t grad_head;    // stride of its heads
  Rows x, weight, cos, sin;
  void* dx;
  RowSums dweight;
  int64_t length, d, head_dim;
  float eps;
};

// Tokens are counted over all samples.
ANYFLOW_KERNEL(rms_norm_rope_forward, const RmsNormRope& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(rms_norm_rope_backward, const RmsNormRopeBackward& a, int64_t begin, int64_t end, int64_t chunk)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

static float reciprocal_rms(const float* x, int64_t d, float eps) {
  const float square = sum(d, [=]<class T>(int64_t i) { return get<T>(x + i) * get<T>(x + i); });
  return 1.0f / __builtin_sqrtf(square / static_cast<float>(d) + eps);
}

void rms_norm_rope_forward(const RmsNormRope& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.head_dim / 2;
  RowReader xs(a.x, a.d), weights(a.weight, a.d), coss(a.cos, pairs), sins(a.sin, pairs);
  RowWriter outs(a.out, a.x.type, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *x = xs.at(batch, l), *weight = weights.at(batch, l);
    float* out = outs.at(token);
    const float rstd = reciprocal_rms(x, a.d, a.eps);
    if (a.cos.data == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < a.d; ++i) {
        out[i] = x[i] * rstd * weight[i];
      }
    } else {
      const float *cos = coss.at(batch, l), *sin = sins.at(batch, l);
      for (int64_t head = 0; head < a.d; head += a.head_dim) {
#pragma omp simd
        for (int64_t i = 0; i < pairs; ++i) {
          const int64_t even = head + 2 * i, odd = even + 1;
          const float n = x[even] * rstd * weight[even], m = x[odd] * rstd * weight[odd];
          out[even] = n * cos[i] - m * sin[i];
          out[odd] = n * sin[i] + m * cos[i];
        }
      }
    }
    outs.done(token);
  }
}

void rms_norm_rope_backward(const RmsNormRopeBackward& a, int64_t begin, int64_t end, int64_t chunk) {
  const int64_t pairs = a.head_dim / 2;
  RowReader xs(a.x, a.d), weights(a.weight, a.d), coss(a.cos, pairs), sins(a.sin, pairs);
  RowWriter dxs(a.dx, a.x.type, a.d);
  RowSum dweights(a.dweight, begin, end, chunk, a.d);
  alignas(64) float head_grad[kMaxRow], dn[kMaxRow];  // dn: the gradient of the norm's result, turned back
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *x = xs.at(batch, l), *weight = weights.at(batch, l);
    float *dx = dxs.at(token), *dweight = dweights.at(token);
    for (int64_t head = 0; head < a.d; head += a.head_dim) {
      const int64_t offset = batch * a.grad.batch + l * a.grad.row + head / a.head_dim * a.grad_head;
      const float* grad = load(a.grad.data, a.grad.type, offset, a.head_dim, head_grad);
      if (a.cos.data == nullptr) {
        __builtin_memcpy(dn + head, grad, sizeof(float) * a.head_dim);
      } else {
        const float *cos = coss.at(batch, l), *sin = sins.at(batch, l);
#pragma omp simd
        for (int64_t i = 0; i < pairs; ++i) {
          const float n = grad[2 * i], m = grad[2 * i + 1];
          dn[head + 2 * i] = n * cos[i] + m * sin[i];
          dn[head + 2 * i + 1] = m * cos[i] - n * sin[i];
        }
      }
    }
    const float rstd = reciprocal_rms(x, a.d, a.eps);
    const float along = sum(a.d, [&]<class T>(int64_t i) {
      return get<T>(dn + i) * get<T>(weight + i) * get<T>(x + i);
    });
    const float pull = along / static_cast<float>(a.d) * rstd * rstd;
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      dx[i] = rstd * (dn[i] * weight[i] - x[i] * pull);
      dweight[i] += dn[i] * (x[i] * rstd);
    }
    dxs.done(token);
    dweights.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {
namespace {

// A table [L, Dh / 2], which all samples share; `x` is kept by the caller.
Rows table(const at::Tensor& x) { return x.defined() ? Rows{x.data_ptr(), type_of(x), 0, x.stride(0), 1} : Rows{};
}

at::Tensor contiguous_table(const std::optional<at::Tensor>& x) { return x ? contiguous_rows(*x) : at::Tensor(); }

}  // namespace

at::Tensor rms_norm_rope(const at::Tensor& x_, const at::Tensor& weight_, const std::optional<at::Tensor>& cos_,
                         const std::optional<at::Tensor>& sin_, int64_t num_heads, double eps) {
  check::rms_norm_rope(x_, weight_, cos_, sin_, num_heads, eps);
  const at::Tensor x = contiguous_rows(x_), weight = contiguous_rows(weight_);
  const at::Tensor cos = contiguous_table(cos_), sin = contiguous_table(sin_);
  const Shape shape(x);
  const int64_t head_dim = shape.d / num_heads;
  at::Tensor out = result_like(x);
  const RmsNormRope a{shape.rows(x), shape.rows(weight), table(cos), table(sin),
                      out.data_ptr(), shape.length, shape.d, head_dim, static_cast<float>(eps)};
  for_tokens(shape, [&, kernel = ANYFLOW_SELECT(rms_norm_rope_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return out.view({shape.batch, shape.length, num_heads, head_dim});
}

std::tuple<at::Tensor, at::Tensor> rms_norm_rope_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight_, const std::optional<at::Tensor>& cos_,
    const std::optional<at::Tensor>& sin_, int64_t num_heads, double eps) {
  check::rms_norm_rope_backward(grad_, x_, weight_, cos_, sin_, num_heads, eps);
  const at::Tensor grad = contiguous_rows(grad_), x = contiguous_rows(x_), weight = contiguous_rows(weight_);
  const at::Tensor cos = contiguous_table(cos_), sin = contiguous_table(sin_);
  const Shape shape(x);
  const int64_t head_dim = shape.d / num_heads;
  at::Tensor dx = result_like(x);
  Sums dweight(shape, weight);
  const RmsNormRopeBackward a{{grad.data_ptr(), type_of(grad), grad.stride(0), grad.stride(1), 1}, grad.stride(2),
                              shape.rows(x), shape.rows(weight), table(cos),
                              table(sin), dx.data_ptr(), dweight.rows(), shape.length, shape.d,
                              head_dim, static_cast<float>(eps)};
  for_chunks(shape, [&, kernel = ANYFLOW_SELECT(rms_norm_rope_backward)](int64_t begin, int64_t end, int64_t i) {
    kernel(a, begin, end, i);
  });
  return {dx, dweight.result()};
}

}  // namespace anyflow
#endif
