// A linear layer's matrix products: anyflow/ops/linear.py. No kernel of ours: the choice between the two libraries that
// torch brings. In fp32 torch takes MKL, which on processors that are not Intel's stays with AVX2; oneDNN uses what there
// is. Small products stay with MKL, whose calls cost less.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/accumulate.h>

#include <optional>

#include "cpu/dispatch.h"
#include "cpu/operators.h"
#include "cpu/tensors.h"

namespace anyflow {
namespace {

using Optional = std::optional<at::Tensor>;

// Multiplications, from which oneDNN is faster (two cores, Zen 5): of a product in which depth is contiguous in both
// factors or one, and of the weight's gradient, where it is contiguous in neither.
constexpr int64_t kWorthIt = int64_t{1} << 22, kWorthItTransposed = int64_t{1} << 25;

// torch's operator of a linear layer by oneDNN, which inductor uses; null in a torch that was built without oneDNN.
const c10::OperatorHandle* onednn_linear() {
  static const std::optional<c10::OperatorHandle> handle =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle ? &*handle : nullptr;
}

// Whether one dimension of a matrix is contiguous and the lines of the other do not overlap.
bool is_plain(const at::Tensor& x) {
  const auto along = [&](int64_t fast) { return x.stride(fast) == 1 && x.stride(1 - fast) >= x.size(fast); };
  return along(0) || along(1);
}

// a[M, K] b[N, K]^T + bias, by any strides.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const Optional& bias, int64_t worth_it) {
  const double size = static_cast<double>(a.numel()) * static_cast<double>(b.size(0));  // may pass 2^63
  const c10::OperatorHandle* onednn = onednn_linear();
  if (onednn == nullptr || size < static_cast<double>(worth_it) || a.scalar_type() != at::kFloat) {
    return at::linear(a, b, bias);
  }
  // It reads the bias as if it were contiguous, and a matrix by its strides only where it is one to BLAS.
  torch::jit::Stack stack{a,
                          copy_unless(is_plain(b), b),
                          bias ? c10::IValue(contiguous(*bias)) : c10::IValue(),
                          std::string("none"),
                          c10::List<std::optional<at::Scalar>>(),
                          c10::IValue()};
  onednn->callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

// [..., K] as [M, K]; -1 would name no size where K is 0.
at::Tensor matrix(const at::Tensor& x) {
  return x.dim() == 2 ? x : x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)});
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias) {
  check::linear(x, weight, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return product(matrix(x), weight, bias, kWorthIt).view(sizes);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_, const at::Tensor& x_,
                                                               const at::Tensor& weight, bool x_gradient,
                                                               bool weight_gradient, bool bias_gradient) {
  check::linear_backward(grad_, x_, weight);
  const at::Tensor grad = matrix(grad_);
  const auto none = [&] { return at::empty({0}, grad.options()); };
  at::Tensor dx = none(), dweight = none(), dbias = none();
  if (x_gradient) {
    dx = product(grad, weight.t(), std::nullopt, kWorthIt).view(x_.sizes());
  }
  if (weight_gradient) {
    const at::Tensor x = matrix(x_);
    // Where the depth is contiguous in neither factor, oneDNN copies: only a wider multiplication makes up for that.
    static const bool wide = has_full_width_avx512();
    const bool with_onednn = wide && x.size(1) >= 128 && grad.size(1) >= 128;
    dweight = with_onednn ? product(grad.t(), x.t(), std::nullopt, kWorthItTransposed) : at::mm(grad.t(), x);
  }
  if (bias_gradient) {
    dbias = grad.sum(0);
  }
  return {dx, dweight, dbias};
}

}  // namespace anyflow
