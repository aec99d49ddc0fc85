// tanh-GELU: anyflow/ops/gelu.py.
#include "cpu/elements.h"

namespace anyflow {

ANYFLOW_KERNEL(gelu_forward, const Elements& x, const Elements& out, int64_t begin, int64_t end)
ANYFLOW_KERNEL(gelu_backward, const Elements& grad, const Elements& x, const Elements& dx, int64_t begin, int64_t end)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/math.h"

namespace anyflow::ANYFLOW_ISA {

void gelu_forward(const Elements& x_, const Elements& out_, int64_t begin, int64_t end) {
  BlockReader xs(x_);
  BlockWriter outs(out_);
  for_blocks(begin, end, [&](int64_t first, int64_t n) {
    const float* x = xs.at(first, n);
    float* out = outs.at(first);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = gelu(x[i]);
    }
    outs.done(first, n);
  });
}

void gelu_backward(const Elements& grad_, const Elements& x_, const Elements& dx_, int64_t begin, int64_t end) {
  BlockReader grads(grad_), xs(x_);
  BlockWriter dxs(dx_);
  for_blocks(begin, end, [&](int64_t first, int64_t n) {
    const float *grad = grads.at(first, n), *x = xs.at(first, n);
    float* dx = dxs.at(first);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      dx[i] = grad[i] * gelu_derivative(x[i]);
    }
    dxs.done(first, n);
  });
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {

at::Tensor gelu(const at::Tensor& x_) {
  check::gelu(x_);
  const at::Tensor x = contiguous(x_), out = result_like(x);
  const Elements from{x.data_ptr(), type_of(x)}, to{out.data_ptr(), type_of(out)};
  at::parallel_for(0, x.numel(), kGrain, [&, kernel = ANYFLOW_SELECT(gelu_forward)](int64_t begin, int64_t end) {
    kernel(from, to, begin, end);
  });
  return out;
}

at::Tensor gelu_backward(const at::Tensor& grad_, const at::Tensor& x_) {
  check::gelu_backward(grad_, x_);
  const at::Tensor grad = contiguous(grad_), x = contiguous(x_), dx = result_like(x);
  const Elements from{grad.data_ptr(), type_of(grad)}, at{x.data_ptr(), type_of(x)}, to{dx.data_ptr(), type_of(dx)};
  at::parallel_for(0, x.numel(), kGrain, [&, kernel = ANYFLOW_SELECT(gelu_backward)](int64_t begin, int64_t end) {
    kernel(from, at, to, begin, end);
  });
  return dx;
}

}  // namespace anyflow
#endif
