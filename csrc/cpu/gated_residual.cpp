// x + y * gate: anyflow/ops/gated_residual.py.
#include "cpu/rows.h"

namespace anyflow {

struct GatedResidual {
  Rows x, y, gate;
  void* out;  // [B, L, D] of x's type
  int64_t length, d;
};

struct GatedResidualBackward {
  Rows grad, y, gate;
  void* dy;
  RowSums dgate;
  int64_t length, d;
};

ANYFLOW_KERNEL(gated_residual_forward, const GatedResidual& a, int64_t begin, int64_t end)
ANYFLOW_KERNEL(gated_residual_backward, const GatedResidualBackward& a, int64_t begin, int64_t end, int64_t chunk)

}  // namespace anyflow

#ifdef ANYFLOW_ISA
namespace anyflow::ANYFLOW_ISA {

void gated_residual_forward(const GatedResidual& a, int64_t begin, int64_t end) {
  RowReader xs(a.x, a.d), ys(a.y, a.d), gates(a.gate, a.d);
  RowWriter outs(a.out, a.x.type, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *x = xs.at(batch, l), *y = ys.at(batch, l), *gate = gates.at(batch, l);
    float* out = outs.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      out[i] = x[i] + y[i] * gate[i];
    }
    outs.done(token);
  }
}

void gated_residual_backward(const GatedResidualBackward& a, int64_t begin, int64_t end, int64_t chunk) {
  RowReader grads(a.grad, a.d), ys(a.y, a.d), gates(a.gate, a.d);
  RowWriter dys(a.dy, a.y.type, a.d);
  RowSum dgates(a.dgate, begin, end, chunk, a.d);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, l = token % a.length;
    const float *grad = grads.at(batch, l), *y = ys.at(batch, l), *gate = gates.at(batch, l);
    float *dy = dys.at(token), *dgate = dgates.at(token);
#pragma omp simd
    for (int64_t i = 0; i < a.d; ++i) {
      dy[i] = grad[i] * gate[i];
      dgate[i] += grad[i] * y[i];
    }
    dys.done(token);
    dgates.done(token);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
#else
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {

at::Tensor gated_residual(const at::Tensor& x_, const at::Tensor& y_, const at::Tensor& gate_) {
  check::gated_residual(x_, y_, gate_);
  const at::Tensor x = contiguous_rows(x_), y = contiguous_rows(y_), gate = contiguous_rows(gate_);
  const Shape shape(x);
  at::Tensor out = result_like(x);
  const GatedResidual a{shape.rows(x), shape.rows(y), shape.rows(gate), out.data_ptr(), shape.length, shape.d};
  for_tokens(shape, [&, kernel = ANYFLOW_SELECT(gated_residual_forward)](int64_t begin, int64_t end) {
    kernel(a, begin, end);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward(const at::Tensor& grad_, const at::Tensor& y_,
                                                           const at::Tensor& gate_) {
  check::gated_residual_backward(grad_, y_, gate_);
  const at::Tensor grad = contiguous_rows(grad_), y = contiguous_rows(y_), gate = contiguous_rows(gate_);
  const Shape shape(grad);
  at::Tensor dy = result_like(y);
  Sums dgate(shape, gate);
  const GatedResidualBackward a{shape.rows(grad), shape.rows(y), shape.rows(gate), dy.data_ptr(),
                                dgate.rows(),     shape.length,  shape.d};
  for_chunks(shape, [&, kernel = ANYFLOW_SELECT(gated_residual_backward)](int64_t begin, int64_t end, int64_t i) {
    kernel(a, begin, end, i);
  });
  return {dy, dgate.result()};
}

}  // namespace anyflow
#endif
