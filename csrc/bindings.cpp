// The extension module anyflow._C. Importing it registers the native kernels with torch: those for
// the CPU in csrc/cpu/<op>.cpp, those for CUDA in csrc/cuda/operators.cpp. The module itself says
// what was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/dispatch.h"

namespace anyflow {
namespace {

// A Python object whose attribute `value` is what a function returns when it is read. To
// torch.compile that attribute is one like any other, read while tracing and compared by the guards
// of every call; torch.compile would trace through a property.
struct Evaluated {
  PyObject_HEAD PyObject* function;
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
  static PyGetSetDef attributes[] = {
      {"value", &evaluated_value, nullptr, "What the function returns now.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_init, reinterpret_cast<void*>(&evaluated_init)},
                                {Py_tp_getset, attributes},
                                {0, nullptr}};
  static PyType_Spec spec = {"anyflow._C.Evaluated", sizeof(Evaluated), 0, Py_TPFLAGS_DEFAULT,
                             slots};
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
  m.def(
      "build_info",
      [] {
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
      },
      "Returns what was built, and from what; every value is a string.");
  m.def(
      "cpu_instruction_set", [] { return std::string(anyflow::isa_name()); },
      "Returns the instruction set that the CPU kernels use on this machine.");
  m.def("cpu_is_intel", &anyflow::is_intel, "Tells whether the processor is one of Intel's.");
}
