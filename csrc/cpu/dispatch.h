// How one binary runs on every machine: each csrc/cpu/<op>.cpp is compiled once for each instruction set, with
// ANYFLOW_ISA = generic, avx2 or avx512, where it defines its kernels in the namespace of that name, and once without,
// where it defines the operator on tensors and picks a kernel by what the processor has.
//
// The kernels see raw pointers and no header of torch or of the C++ library beyond types and builtins: an inline function of
// theirs that was compiled for AVX-512 could be the copy that the linker keeps for everyone.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define ANYFLOW_X86 1
#else
#define ANYFLOW_X86 0
#endif

// Declares a kernel `void name(...)` in the namespaces of all instruction sets.
#if ANYFLOW_X86
#define ANYFLOW_KERNEL(name, ...)    \
  namespace generic {                \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace avx2 {                   \
  void name(__VA_ARGS__);            \
  }                                  \
  namespace avx512 {                 \
  void name(__VA_ARGS__);            \
  }
#define ANYFLOW_SELECT(name) ::anyflow::select(&generic::name, &avx2::name, &avx512::name)
#else
#define ANYFLOW_KERNEL(name, ...) \
  namespace generic {             \
  void name(__VA_ARGS__);         \
  }
#define ANYFLOW_SELECT(name) (&generic::name)
#endif

namespace anyflow {

enum class Isa { generic, avx2, avx512 };

// The widest instruction set of this processor, or the lesser one named in ANYFLOW_CPU_ISA. Read once.
Isa isa();

// Its name, as in ANYFLOW_CPU_ISA.
const char* isa_name();

// Whether MKL, which is Intel's, uses all that this processor has.
bool is_intel();

// Whether this is AMD's Zen 5 or later, with AVX-512 in use: before, an AVX-512 multiplication takes two AVX2 ones' time.
bool has_full_width_avx512();

template <class Function>
Function select(Function generic, Function avx2, Function avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : generic;
}

// Storage of a tensor that a kernel reads or writes; it computes in fp32.
enum class Type : int32_t { f32, bf16, f16 };

}  // namespace anyflow
