// Formats in which numbers are stored, and conversions from and to fp32. Included by kernels only.
//
// Conversions are plain integer arithmetic, which the compiler vectorizes; they round to nearest,
// ties to even.
#pragma once

#include "cpu/dispatch.h"

namespace anyflow::ANYFLOW_ISA {

inline float as_float(uint32_t bits) {
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline uint32_t as_bits(float value) {
  uint32_t result;
  __builtin_memcpy(&result, &value, 4);
  return result;
}

struct Float32 {
  typedef float Stored;
  static float widen(float value) { return value; }
  static float narrow(float value) { return value; }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static float widen(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }

  static uint16_t narrow(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  typedef uint16_t Stored;
  static float widen(uint16_t value) {
    const uint32_t magnitude = value & 0x7fffu, bits = magnitude << 13;
    // The product moves the exponent's bias, that of subnormal numbers too.
    const float finite = as_float(bits) * 0x1p112f;
    const uint32_t wide = magnitude < 0x7c00u ? as_bits(finite) : bits | 0x7f800000u;
    return as_float(wide | (value & 0x8000u) << 16);
  }

  static uint16_t narrow(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // The last place of 0.5 is that of a subnormal number of fp16, so the addition rounds to it.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t narrowed = magnitude < 0x477ff000u ? finite : infinite;
    return static_cast<uint16_t>(narrowed | (bits >> 16 & 0x8000u));
  }
};

template <class Format>
inline void widen(const typename Format::Stored* source, int64_t n, float* target) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    target[i] = Format::widen(source[i]);
  }
}

template <class Format>
inline void narrow(const float* source, int64_t n, typename Format::Stored* target) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    target[i] = Format::narrow(source[i]);
  }
}

// Returns n elements as fp32: in place, or converted into `buffer`.
inline const float* load(const void* data, Type type, int64_t offset, int64_t n, float* buffer) {
  if (type == Type::f32) {
    return static_cast<const float*>(data) + offset;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + offset;
  type == Type::bf16 ? widen<BFloat16>(source, n, buffer) : widen<Float16>(source, n, buffer);
  return buffer;
}

// Converts what was computed into a buffer because it could not be computed in place.
inline void store(const float* values, void* data, Type type, int64_t offset, int64_t n) {
  if (type != Type::f32) {
    uint16_t* target = static_cast<uint16_t*>(data) + offset;
    type == Type::bf16 ? narrow<BFloat16>(values, n, target) : narrow<Float16>(values, n, target);
  }
}

}  // namespace anyflow::ANYFLOW_ISA
