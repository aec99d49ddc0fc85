// x + y * gate: anyflow/ops/gated_residual.py.
#include "cpu/tokens.h"

namespace anyflow {

struct GatedResidual {
  View x, y, gate, out;
  int64_t length, d;
};

struct GatedResidualBackward {
  View grad, y, gate, dy;
  RowSums dgate;
  int64_t length, d;
};

ANYFLOW_KERNEL(gated_residual_forward, const GatedResidual&, Range)
ANYFLOW_KERNEL(gated_residual_backward, const GatedResidualBackward&, Range)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void gated_residual_forward(const GatedResidual& a, Range range) {
  TokenReader xs(a.x), ys(a.y), gates(a.gate);
  TokenWriter outs(a.out);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *x = xs.at(block), *y = ys.at(block), *gate = gates.at(block);
    float* out = outs.at(block);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      out[i] = x[i] + y[i] * gate[i];
    }
    outs.done(block);
  }
}

void gated_residual_backward(const GatedResidualBackward& a, Range range) {
  TokenReader grads(a.grad), ys(a.y), gates(a.gate);
  TokenWriter dys(a.dy);
  RowSum dgates(a.dgate, range, a.d);
  for (int64_t token = range.begin; token < range.end; ++token) {
    const Block block{token / a.length, token % a.length, 0, a.d};
    const float *grad = grads.at(block), *y = ys.at(block), *gate = gates.at(block);
    float *dy = dys.at(block), *dgate = dgates.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      dy[i] = grad[i] * gate[i];
      dgate[i] += grad[i] * y[i];
    }
    dys.done(block);
    dgates.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/tensors.h"

namespace anyflow {
namespace {

at::Tensor gated_residual(const at::Tensor& x_, const at::Tensor& y_, const at::Tensor& gate_) {
  const Operands operands("gated_residual", x_);
  operands.tokens("x", x_);
  operands.sized("y", y_, x_.sizes());
  operands.rows("gate", gate_, x_);
  const at::Tensor x = contiguous_rows(x_), y = contiguous_rows(y_), gate = contiguous_rows(gate_);
  const at::Tensor out = result_like(x);
  const TokenShape shape(x);
  const GatedResidual a{view(x), view(y), shape.view(gate), view(out), shape.length, shape.d};
  for_tokens(shape, ANYFLOW_SELECT(gated_residual_forward), a);
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward(const at::Tensor& grad_,
                                                           const at::Tensor& y_,
                                                           const at::Tensor& gate_) {
  const Operands operands("gated_residual_backward", grad_);
  operands.tokens("grad", grad_);
  operands.sized("y", y_, grad_.sizes());
  operands.rows("gate", gate_, grad_);
  const at::Tensor grad = contiguous_rows(grad_), y = contiguous_rows(y_);
  const at::Tensor gate = contiguous_rows(gate_), dy = result_like(y);
  const TokenShape shape(grad);
  Sums dgate(shape, gate);
  const GatedResidualBackward a{view(grad),   view(y),      shape.view(gate), view(dy),
                                dgate.rows(), shape.length, shape.d};
  for_chunks(shape, ANYFLOW_SELECT(gated_residual_backward), a);
  return {dy, dgate.result()};
}

}  // namespace

ANYFLOW_REGISTER(gated_residual)
ANYFLOW_REGISTER(gated_residual_backward)

}  // namespace anyflow
#endif
