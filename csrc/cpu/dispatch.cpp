#include "cpu/dispatch.h"

#if ANYFLOW_X86
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace anyflow {
namespace {

Isa detected() {
#if ANYFLOW_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
#else
  return Isa::generic;
#endif
}

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa chosen() {
  const Isa widest = detected();
  const char* wanted = std::getenv("ANYFLOW_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return widest;
  }
  for (int i = 0; i <= static_cast<int>(widest); ++i) {
    if (std::string(wanted) == kNames[i]) {
      return static_cast<Isa>(i);
    }
  }
  throw std::runtime_error(std::string("ANYFLOW_CPU_ISA: '") + wanted +
                           "' is unknown or more than this processor has (" +
                           kNames[static_cast<int>(widest)] + ")");
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

bool is_intel() {
#if ANYFLOW_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_full_width_avx512() {
#if ANYFLOW_X86
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
  return isa() == Isa::avx512 && __builtin_cpu_is("amd") && family >= 0x1a;
#else
  return false;
#endif
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace anyflow
