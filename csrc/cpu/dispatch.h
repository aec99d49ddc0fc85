// Lets one binary run on every machine of a processor family.
//
// Each csrc/cpu/<op>.cpp is compiled once for each instruction set, with ANYFLOW_ISA = generic,
// avx2 or avx512, and defines its kernels in the namespace of that name. It is compiled once more
// without ANYFLOW_ISA, where it defines the operator on tensors and picks a kernel by what the
// processor has.
//
// The kernels see raw pointers and no header of torch or of the C++ library beyond types and
// builtins: an inline function of such a header that was compiled for AVX-512 could be the copy
// that the linker keeps for every processor.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define ANYFLOW_X86 1
#else
#define ANYFLOW_X86 0
#endif

// Declares a kernel `void name(...)` in the namespaces of all instruction sets.
#if ANYFLOW_X86
#define ANYFLOW_KERNEL(name, ...) \
  namespace generic {             \
  void name(__VA_ARGS__);         \
  }                               \
  namespace avx2 {                \
  void name(__VA_ARGS__);         \
  }                               \
  namespace avx512 {              \
  void name(__VA_ARGS__);         \
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

// Returns the widest instruction set of this processor, or the lesser one named in
// ANYFLOW_CPU_ISA. The variable is read once.
Isa isa();

// Returns the name of isa(), as in ANYFLOW_CPU_ISA.
const char* isa_name();

// Tells whether MKL, which is Intel's, uses all that this processor has.
bool is_intel();

// Tells whether this is AMD's Zen 5 or later, with AVX-512 in use: before Zen 5, an AVX-512
// multiplication takes the time of two of AVX2.
bool has_full_width_avx512();

template <class Function>
Function select(Function generic, Function avx2, Function avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : generic;
}

// The format of a tensor that a kernel reads or writes; every kernel computes in fp32.
enum class Type : int32_t { f32, bf16, f16 };

// The part of a call that one kernel call computes: tokens, elements, blocks or tasks [begin, end).
struct Range {
  int64_t begin, end;
  int64_t chunk = 0;  // number of the part, for kernels that leave a partial sum of each
};

// How a kernel is called, once for each part of a call.
template <class Arguments>
using Kernel = void (*)(const Arguments&, Range);

}  // namespace anyflow
