// A linear layer's matrix products: anyflow/ops/linear.py. The operator has no kernel of its own,
// but chooses between the two libraries that torch brings. In fp32 torch takes MKL, which stays
// with AVX2 on processors that are not Intel's; oneDNN uses the widest instructions. Small products
// stay with MKL, whose calls cost less.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/accumulate.h>

#include "cpu/tensors.h"

namespace anyflow {
namespace {

// Multiplications from which oneDNN is faster (two cores, Zen 5): of a product in which depth is
// contiguous in both factors or one, and of the weight's gradient, where depth is contiguous in
// neither.
constexpr int64_t kWorthIt = int64_t{1} << 22, kWorthItTransposed = int64_t{1} << 25;

// Returns torch's operator of a linear layer by oneDNN, which inductor uses; null in a torch that
// was built without oneDNN.
const c10::OperatorHandle* onednn_linear() {
  static const std::optional<c10::OperatorHandle> handle =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle ? &*handle : nullptr;
}

// Tells whether one dimension of a matrix is contiguous and the lines of the other do not overlap.
bool is_plain(const at::Tensor& x) {
  const auto along = [&](int64_t fast) {
    return x.stride(fast) == 1 && x.stride(1 - fast) >= x.size(fast);
  };
  return along(0) || along(1);
}

// a[M, K] b[N, K]^T + bias, by any strides.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const Optional& bias,
                   int64_t worth_it) {
  // In fp64: the product may pass 2^63.
  const double size = static_cast<double>(a.numel()) * static_cast<double>(b.size(0));
  const c10::OperatorHandle* onednn = onednn_linear();
  if (onednn == nullptr || size < static_cast<double>(worth_it) || a.scalar_type() != at::kFloat) {
    return at::linear(a, b, bias);
  }
  // oneDNN's operator reads the bias as if it were contiguous, and a matrix by its strides only
  // where BLAS would.
  torch::jit::Stack stack{a,
                          copy_unless(is_plain(b), b),
                          bias ? c10::IValue(contiguous(*bias)) : c10::IValue(),
                          std::string("none"),
                          c10::List<std::optional<at::Scalar>>(),
                          c10::IValue()};
  onednn->callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

// Views [..., K] as [M, K]; a size of -1 would be ambiguous where K is 0.
at::Tensor matrix(const at::Tensor& x) {
  const int64_t m = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.dim() == 2 ? x : x.reshape({m, x.size(-1)});
}

void check_linear(const Operands& operands, const at::Tensor& x, const at::Tensor& weight) {
  operands.dense("x", x);
  if (x.dim() == 0) {
    operands.refuse("x", x, "[..., K]");
  }
  operands.dense("weight", weight);
  if (weight.dim() != 2 || weight.size(1) != x.size(-1)) {
    operands.refuse("weight", weight, "[N, ", x.size(-1), "]");
  }
  operands.same_dtype("weight", weight, x);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias) {
  const Operands operands("linear", x);
  check_linear(operands, x, weight);
  operands.sized("bias", bias, {weight.size(0)});
  if (bias) {
    operands.same_dtype("bias", *bias, x);
  }
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return product(matrix(x), weight, bias, kWorthIt).view(sizes);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& weight, bool x_gradient,
    bool weight_gradient, bool bias_gradient) {
  const Operands operands("linear_backward", x_);
  check_linear(operands, x_, weight);
  operands.dense("grad", grad_);
  if (grad_.dim() != x_.dim() || grad_.size(-1) != weight.size(0) ||
      grad_.sizes().slice(0, x_.dim() - 1) != x_.sizes().slice(0, x_.dim() - 1)) {
    operands.refuse("grad", grad_, "[..., ", weight.size(0), "] for x ", x_.sizes());
  }
  operands.same_dtype("grad", grad_, x_);
  const at::Tensor grad = matrix(grad_);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  at::Tensor dx = none(), dweight = none(), dbias = none();
  if (x_gradient) {
    dx = product(grad, weight.t(), std::nullopt, kWorthIt).view(x_.sizes());
  }
  if (weight_gradient) {
    const at::Tensor x = matrix(x_);
    // Where the depth is contiguous in neither factor, oneDNN copies: only a wider multiplication
    // makes up for the copies.
    static const bool wide = has_full_width_avx512();
    const bool with_onednn = wide && x.size(1) >= 128 && grad.size(1) >= 128;
    dweight = with_onednn ? product(grad.t(), x.t(), std::nullopt, kWorthItTransposed)
                          : at::mm(grad.t(), x);
  }
  if (bias_gradient) {
    dbias = grad.sum(0);
  }
  return {dx, dweight, dbias};
}

}  // namespace

ANYFLOW_REGISTER(linear)
ANYFLOW_REGISTER(linear_backward)

}  // namespace anyflow
