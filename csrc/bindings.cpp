// The extension module anyflow._C: registers the native kernels with torch, and says what was built.
//
// The schemas are in anyflow/ops/<op>.py (operator `anyflow::<op>_native` has the schema of `anyflow::<op>`); importing
// this module gives them their implementations for the CPU and, where they are built, for CUDA.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "cpu/dispatch.h"
#include "cpu/operators.h"

#ifdef ANYFLOW_HAS_CUDA
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checks.h"
#include "cuda/launch.h"
#endif

namespace anyflow {

TORCH_LIBRARY_IMPL(anyflow, CPU, m) {
  m.impl("attention_native", &attention);
  m.impl("attention_backward_native", &attention_backward);
  m.impl("dual_timestep_embedding_native", &dual_timestep_embedding);
  m.impl("dual_timestep_embedding_backward_native", &dual_timestep_embedding_backward);
  m.impl("gelu_native", &gelu);
  m.impl("gelu_backward_native", &gelu_backward);
  m.impl("linear_native", &linear);
  m.impl("linear_backward_native", &linear_backward);
  m.impl("rms_norm_rope_native", &rms_norm_rope);
  m.impl("rms_norm_rope_backward_native", &rms_norm_rope_backward);
  m.impl("gated_residual_native", &gated_residual);
  m.impl("gated_residual_backward_native", &gated_residual_backward);
  m.impl("residual_layer_norm_native", &residual_layer_norm);
  m.impl("residual_layer_norm_backward_native", &residual_layer_norm_backward);
  m.impl("layer_norm_modulate_native", &layer_norm_modulate);
  m.impl("layer_norm_modulate_backward_native", &layer_norm_modulate_backward);
  m.impl("flow_map_inputs_native", &flow_map_inputs);
  m.impl("flow_map_inputs_backward_native", &flow_map_inputs_backward);
  m.impl("flow_map_loss_native", &flow_map_loss);
  m.impl("flow_map_loss_backward_native", &flow_map_loss_backward);
}

#ifdef ANYFLOW_HAS_CUDA
namespace {

using Optional = std::optional<at::Tensor>;

// An operand of a CUDA kernel and what keeps its memory alive: the tensor, or the aligned copy of it.
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
      TORCH_CHECK(false, "the native CUDA kernels take float32, bfloat16 and float16, got ", x.scalar_type());
  }
}

// [B, R, D] as it is, [D] and a table [L, D] with stride 0 where they are shared; copied where the kernels need it.
CudaOperand operand(const at::Tensor& x, int64_t batch, bool must_be_aligned = true) {
  const auto view = [](const at::Tensor& t) {
    const int64_t rows = t.dim() == 1 ? 1 : t.size(-2);
    return cuda::Operand{t.data_ptr(), cuda_type(t), rows, t.dim() == 3 ? t.stride(0) : 0,
                         t.dim() == 1 ? 0 : t.stride(-2)};
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

at::Tensor layer_norm_modulate_cuda(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                                    double eps) {
  check::layer_norm_modulate(x, shift, scale, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch), shifts = operand(shift, batch), scales = operand(scale, batch);
  at::Tensor out = contiguous_like(x);
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::layer_norm_modulate(sizes, xs.operand, shifts.operand, scales.operand, out.data_ptr(),
                                     static_cast<float>(eps), stream);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> residual_layer_norm_cuda(const at::Tensor& x, const at::Tensor& y,
                                                            const Optional& gate, const Optional& weight,
                                                            const Optional& bias, const Optional& shift,
                                                            const Optional& scale, double eps) {
  check::residual_layer_norm(x, y, gate, weight, bias, shift, scale, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch), ys = operand(y, batch), gates = operand(gate, batch);
  const CudaOperand weights = operand(weight, batch), biases = operand(bias, batch);
  const CudaOperand shifts = operand(shift, batch), scales = operand(scale, batch);
  at::Tensor h = contiguous_like(x), n = contiguous_like(x);
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::residual_layer_norm(sizes, xs.operand, ys.operand, gates.operand, weights.operand, biases.operand,
                                     shifts.operand, scales.operand, h.data_ptr(), n.data_ptr(),
                                     static_cast<float>(eps), stream);
  });
  return {h, n};
}

at::Tensor rms_norm_rope_cuda(const at::Tensor& x, const at::Tensor& weight, const Optional& cos, const Optional& sin,
                              int64_t num_heads, double eps) {
  check::rms_norm_rope(x, weight, cos, sin, num_heads, eps);
  const int64_t batch = x.size(0);
  const CudaOperand xs = operand(x, batch), weights = operand(weight, batch);
  const CudaOperand cosines = operand(cos, batch, false), sines = operand(sin, batch, false);
  at::Tensor out = at::empty({batch, x.size(1), num_heads, x.size(2) / num_heads}, x.options());
  launch(x, [&](cuda::Sizes sizes, void* stream) {
    return cuda::rms_norm_rope(sizes, xs.operand, weights.operand, cosines.operand, sines.operand, num_heads,
                               out.data_ptr(), static_cast<float>(eps), stream);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(anyflow, CUDA, m) {
  m.impl("layer_norm_modulate_native", &layer_norm_modulate_cuda);
  m.impl("residual_layer_norm_native", &residual_layer_norm_cuda);
  m.impl("rms_norm_rope_native", &rms_norm_rope_cuda);
}
#endif

namespace {

// A Python object whose attribute `value` is what a function returns when it is read. To torch.compile that attribute is
// one like any other, read while tracing and compared by the guards of every call; a property it would trace through.
struct Evaluated {
  PyObject_HEAD
  PyObject* function;
};

PyObject* evaluated_value(PyObject* self, void*) {
  return PyObject_CallNoArgs(reinterpret_cast<Evaluated*>(self)->function);
}

int evaluated_init(PyObject* self, PyObject* arguments, PyObject*) {
  PyObject* function = nullptr;
  if (!PyArg_ParseTuple(arguments, "O", &function)) {
    return -1;
  }
  Py_XSETREF(reinterpret_cast<Evaluated*>(self)->function, Py_NewRef(function));
  return 0;
}

// The objects live as long as the process, like the functions: no traversal, and nothing to free.
PyObject* evaluated_type() {
  static PyGetSetDef attributes[] = {{"value", &evaluated_value, nullptr, "What the function returns now.", nullptr},
                                     {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_init, reinterpret_cast<void*>(&evaluated_init)},
                                {Py_tp_getset, attributes},
                                {0, nullptr}};
  static PyType_Spec spec = {"anyflow._C.Evaluated", sizeof(Evaluated), 0, Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace
}  // namespace anyflow

PYBIND11_MODULE(_C, m) {
  PyObject* evaluated = anyflow::evaluated_type();
  if (evaluated == nullptr) {
    throw pybind11::error_already_set();
  }
  m.add_object("Evaluated", pybind11::reinterpret_steal<pybind11::object>(evaluated));
  m.doc() = "The native kernels of anyflow; they are called through anyflow.ops.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = ANYFLOW_TORCH_VERSION;
    info["compiler"] = ANYFLOW_COMPILER;
    info["cpu_instruction_sets"] = ANYFLOW_CPU_INSTRUCTION_SETS;
    info["cuda"] = ANYFLOW_CUDA_NOTE;
#ifdef ANYFLOW_HAS_CUDA
    info["cuda_archs"] = ANYFLOW_CUDA_BUILT_ARCHS;
#else
    info["cuda_archs"] = "";
#endif
    return info;
  }, "What was built, from what; every value a string.");
  m.def("cpu_instruction_set", [] { return std::string(anyflow::isa_name()); },
        "The instruction set that the CPU kernels use on this machine.");
  m.def("cpu_is_intel", &anyflow::is_intel, "Whether the processor is one of Intel's.");
}
