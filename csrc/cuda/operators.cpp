// The CUDA kernels as operators on tensors: checks, aligned copies, the current stream. No other
// file of csrc/cuda knows torch.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "cuda/launch.h"

namespace anyflow {
namespace {

// An operand of a CUDA kernel, and the tensor, or its aligned copy, that keeps the memory alive.
struct CudaOperand {
  at::Tensor tensor;
  cuda::Operand operand;
};

cuda::DType cuda_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return cuda::DType::float32;
    case at::kBFloat16:
      return cuda::DType::bfloat16;
    case at::kHalf:
      return cuda::DType::float16;
    default:
      TORCH_CHECK(false, "the native CUDA kernels take float32, bfloat16 and float16, got ",
                  x.scalar_type());
  }
}

// Views [B, R, D] as it is, and [D] and a table [L, D] with strides of 0 where they are shared;
// copies what the kernels cannot read.
CudaOperand operand(const at::Tensor& x, int64_t batch, bool must_be_aligned = true) {
  const auto view = [](const at::Tensor& t) {
    const int64_t rows = t.dim() == 1 ? 1 : t.size(-2);
    const int64_t batch_stride = t.dim() == 3 ? t.stride(0) : 0;
    const int64_t row_stride = t.dim() == 1 ? 0 : t.stride(-2);
    return cuda::Operand{t.data_ptr(), cuda_type(t), rows, batch_stride, row_stride};
  };
  at::Tensor t = x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
  if (must_be_aligned && !cuda::aligned(view(t), batch)) {
    t = x.clone(at::MemoryFormat::Contiguous);
  }
  return {t, view(t)};
}

CudaOperand operand(const Optional& x, int64_t batch, bool must_be_aligned = true) {
  return x ? operand(*x, batch, must_be_aligned) : CudaOperand{};
}

// Runs a launcher with the sizes of x[B, L, D] and the current stream of its device.
template <class Launch>
void launch(const at::Tensor& x, Launch launcher) {
  const c10::cuda::CUDAGuard guard(x.device());
  const char* error = launcher(cuda::Sizes{x.size(0), x.size(1), x.size(2)},
                               static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
  TORCH_CHECK(error == nullptr, "anyflow: ", error);
}

at::Tensor contiguous_like(const at::Tensor& x) { return at::empty(x.sizes(), x.options()); }

at::Tensor layer_norm_modulate(const at::Tensor& x, const at::Tensor& shift,
                               const at::Tensor& scale, double eps) {
  check_modulation(Operands("layer_norm_modulate", x), x, shift, scale, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch);
  const CudaOperand shifts = operand(shift, batch), scales = operand(scale, batch);
  at::Tensor out = contiguous_like(x);
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::layer_norm_modulate(sizes, xs.operand, shifts.operand, scales.operand,
                                     out.data_ptr(), static_cast<float>(eps), stream);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> residual_layer_norm(const at::Tensor& x, const at::Tensor& y,
                                                       const Optional& gate, const Optional& weight,
                                                       const Optional& bias, const Optional& shift,
                                                       const Optional& scale, double eps) {
  const Operands operands("residual_layer_norm", x);
  operands.tokens("x", x);
  operands.sized("y", y, x.sizes());
  check_residual_norm(operands, x, gate, weight, bias, shift, scale, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch), ys = operand(y, batch), gates = operand(gate, batch);
  const CudaOperand weights = operand(weight, batch), biases = operand(bias, batch);
  const CudaOperand shifts = operand(shift, batch), scales = operand(scale, batch);
  at::Tensor h = contiguous_like(x), n = contiguous_like(x);
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::residual_layer_norm(sizes, xs.operand, ys.operand, gates.operand, weights.operand,
                                     biases.operand, shifts.operand, scales.operand, h.data_ptr(),
                                     n.data_ptr(), static_cast<float>(eps), stream);
  });
  return {h, n};
}

at::Tensor rms_norm_rope(const at::Tensor& x, const at::Tensor& weight, const Optional& cos,
                         const Optional& sin, int64_t num_heads, double eps) {
  check_rms_norm_rope(Operands("rms_norm_rope", x), x, weight, cos, sin, num_heads, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch), weights = operand(weight, batch);
  const CudaOperand cosines = operand(cos, batch, false), sines = operand(sin, batch, false);
  at::Tensor out = at::empty({batch, x.size(1), num_heads, x.size(2) / num_heads}, x.options());
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::rms_norm_rope(sizes, xs.operand, weights.operand, cosines.operand, sines.operand,
                               num_heads, out.data_ptr(), static_cast<float>(eps), stream);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(anyflow, CUDA, library) {
  library.impl("layer_norm_modulate_native", &layer_norm_modulate);
  library.impl("residual_layer_norm_native", &residual_layer_norm);
  library.impl("rms_norm_rope_native", &rms_norm_rope);
}

}  // namespace anyflow
