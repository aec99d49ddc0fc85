// tanh-GELU: anyflow/ops/gelu.py.
#include "cpu/view.h"

namespace anyflow {

struct Gelu {
  View x, out;
};

struct GeluBackward {
  View grad, x, dx;
};

ANYFLOW_KERNEL(gelu_forward, const Gelu&, Range)
ANYFLOW_KERNEL(gelu_backward, const GeluBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
#include "cpu/math.h"

namespace anyflow::ANYFLOW_ISA {

void gelu_forward(const Gelu& a, Range range) {
  Reader<kBlock> xs(a.x);
  Writer<kBlock> outs(a.out);
  for_blocks(range, [&](const Block& block) {
    const float* x = xs.at(block);
    float* out = outs.at(block);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      out[i] = gelu(x[i]);
    }
    outs.done(block);
  });
}

void gelu_backward(const GeluBackward& a, Range range) {
  Reader<kBlock> grads(a.grad), xs(a.x);
  Writer<kBlock> dxs(a.dx);
  for_blocks(range, [&](const Block& block) {
    const float *grad = grads.at(block), *x = xs.at(block);
    float* dx = dxs.at(block);
#pragma omp simd
    for (int64_t i = 0; i < block.n; ++i) {
      dx[i] = grad[i] * gelu_derivative(x[i]);
    }
    dxs.done(block);
  });
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/tensors.h"

namespace anyflow {
namespace {

at::Tensor gelu(const at::Tensor& x_) {
  Operands("gelu", x_).dense("x", x_);
  const at::Tensor x = contiguous(x_), out = result_like(x);
  const Gelu a{view(x), view(out)};
  for_ranges(x.numel(), kGrain, ANYFLOW_SELECT(gelu_forward), a);
  return out;
}

at::Tensor gelu_backward(const at::Tensor& grad_, const at::Tensor& x_) {
  const Operands operands("gelu_backward", x_);
  operands.dense("x", x_);
  operands.sized("grad", grad_, x_.sizes());
  const at::Tensor grad = contiguous(grad_), x = contiguous(x_), dx = result_like(x);
  const GeluBackward a{view(grad), view(x), view(dx)};
  for_ranges(x.numel(), kGrain, ANYFLOW_SELECT(gelu_backward), a);
  return dx;
}

}  // namespace

ANYFLOW_REGISTER(gelu)
ANYFLOW_REGISTER(gelu_backward)

}  // namespace anyflow
#endif
