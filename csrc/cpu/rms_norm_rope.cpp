// RMS norm over D, head split and rotation of the pairs (2i, 2i + 1): anyflow/ops/rms_norm_rope.py.
#include "cpu/tokens.h"

namespace anyflow {

struct RmsNormRope {
  View x, weight, cos, sin;  // the tables are rows of head_dim / 2, absent without a rotation
  View out;
  int64_t length, d, head_dim;
  float eps;
};

struct RmsNormRopeBackward {
  View grad;  // [B, L, H, Dh]
  int64_t grad_head_stride;
  View x, weight, cos, sin, dx;
  RowSums dweight;
  int64_t length, d, head_dim;
  float eps;
};

ANYFLOW_KERNEL(rms_norm_rope_forward, const RmsNormRope&, Range)
ANYFLOW_KERNEL(rms_norm_rope_backward, const RmsNormRopeBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

static float reciprocal_rms(const float* x, int64_t d, float eps) {
  const float square = sum(d, [=]<class T>(int64_t i) { return get<T>(x + i) * get<T>(x + i); });
  return 1.0f / __builtin_sqrtf(square / static_cast<float>(d) + eps);
}

void rms_norm_rope_forward(const RmsNormRope& a, Range range) {
  const int64_t pairs = a.head_dim / 2;
  TokenReader xs(a.x), weights(a.weight), coss(a.cos), sins(a.sin);
  TokenWriter outs(a.out);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *x = xs.at(block), *weight = weights.at(block);
    float* out = outs.at(block);
    const float rstd = reciprocal_rms(x, a.d, a.eps);
    if (a.cos.data == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < a.d; ++i) {
        out[i] = x[i] * rstd * weight[i];
      }
    } else {
      const Block angles{block.batch, block.row, 0, pairs};
      const float *cos = coss.at(angles), *sin = sins.at(angles);
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
    outs.done(block);
  }
}

void rms_norm_rope_backward(const RmsNormRopeBackward& a, Range range) {
  const int64_t pairs = a.head_dim / 2;
  TokenReader xs(a.x), weights(a.weight), coss(a.cos), sins(a.sin);
  TokenWriter dxs(a.dx);
  RowSum dweights(a.dweight, range, a.d);
  alignas(64) float head_grad[kMaxDim];
  alignas(64) float dn[kMaxDim];  // the gradient of the norm's result, turned back
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const Block angles{block.batch, block.row, 0, pairs};
    const float *x = xs.at(block), *weight = weights.at(block);
    float *dx = dxs.at(block), *dweight = dweights.at(token);
    for (int64_t head = 0; head < a.d; head += a.head_dim) {
      const int64_t offset = block.batch * a.grad.batch_stride + block.row * a.grad.row_stride +
                             head / a.head_dim * a.grad_head_stride;
      const float* grad = load(a.grad.data, a.grad.type, offset, a.head_dim, head_grad);
      if (a.cos.data == nullptr) {
        __builtin_memcpy(dn + head, grad, sizeof(float) * a.head_dim);
      } else {
        const float *cos = coss.at(angles), *sin = sins.at(angles);
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
    dxs.done(block);
    dweights.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/tensors.h"

namespace anyflow {
namespace {

// Views a table [L, Dh / 2], which all samples share; the caller keeps x.
View table(const Optional& x) {
  return x ? View{x->data_ptr(), type_of(*x), 0, x->stride(0)} : View{};
}

at::Tensor rms_norm_rope(const at::Tensor& x_, const at::Tensor& weight_, const Optional& cos_,
                         const Optional& sin_, int64_t num_heads, double eps) {
  check_rms_norm_rope(Operands("rms_norm_rope", x_), x_, weight_, cos_, sin_, num_heads, eps);
  const at::Tensor x = contiguous_rows(x_), weight = contiguous_rows(weight_);
  const Optional cos = contiguous_rows(cos_), sin = contiguous_rows(sin_);
  const at::Tensor out = result_like(x);
  const TokenShape shape(x);
  const int64_t head_dim = shape.d / num_heads;
  const RmsNormRope a{view(x),    shape.view(weight), table(cos),
                      table(sin), view(out),          shape.length,
                      shape.d,    head_dim,           static_cast<float>(eps)};
  for_tokens(shape, ANYFLOW_SELECT(rms_norm_rope_forward), a);
  return out.view({x.size(0), x.size(1), num_heads, head_dim});
}

std::tuple<at::Tensor, at::Tensor> rms_norm_rope_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight_, const Optional& cos_,
    const Optional& sin_, int64_t num_heads, double eps) {
  const Operands operands("rms_norm_rope_backward", x_);
  check_rms_norm_rope(operands, x_, weight_, cos_, sin_, num_heads, eps);
  operands.sized("grad", grad_, {x_.size(0), x_.size(1), num_heads, x_.size(2) / num_heads});
  const at::Tensor grad = contiguous_rows(grad_), x = contiguous_rows(x_);
  const at::Tensor weight = contiguous_rows(weight_), dx = result_like(x);
  const Optional cos = contiguous_rows(cos_), sin = contiguous_rows(sin_);
  const TokenShape shape(x);
  Sums dweight(shape, weight);
  const RmsNormRopeBackward a{view(grad),
                              grad.stride(2),
                              view(x),
                              shape.view(weight),
                              table(cos),
                              table(sin),
                              view(dx),
                              dweight.rows(),
                              shape.length,
                              shape.d,
                              shape.d / num_heads,
                              static_cast<float>(eps)};
  for_chunks(shape, ANYFLOW_SELECT(rms_norm_rope_backward), a);
  return {dx, dweight.result()};
}

}  // namespace

ANYFLOW_REGISTER(rms_norm_rope)
ANYFLOW_REGISTER(rms_norm_rope_backward)

}  // namespace anyflow
#endif
