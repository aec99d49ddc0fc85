// Eight neighbors of a token: the unit in which every thread reads, computes and writes. Runs on
// the host too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "launch.h"

#define ANYFLOW_BOTH __host__ __device__ __forceinline__

namespace anyflow::cuda {

constexpr int kChunk = 8;  // 16 bytes in half precision; every D is a multiple of it

struct Chunk {
  float v[kChunk];
};

// A chunk as it lies in memory: one 16-byte word, or two of fp32.
template <typename T>
struct alignas(16) Packed {
  uint4 words[kChunk * sizeof(T) / 16];
};

template <typename To, typename From>
ANYFLOW_BOTH To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

ANYFLOW_BOTH float2 unpack(uint32_t bits, __nv_bfloat16) {  // bf16 is the upper half of an fp32
  return make_float2(bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u));
}
ANYFLOW_BOTH float2 unpack(uint32_t bits, __half) {
  return __half22float2(bit_cast<__half2>(bits));
}

ANYFLOW_BOTH uint32_t pack(float a, float b, __nv_bfloat16) {
  return bit_cast<uint32_t>(__float22bfloat162_rn(make_float2(a, b)));
}
ANYFLOW_BOTH uint32_t pack(float a, float b, __half) {
  return bit_cast<uint32_t>(__float22half2_rn(make_float2(a, b)));
}

template <typename T>
ANYFLOW_BOTH Chunk unpack(const Packed<T>& packed) {
  const uint4 w = packed.words[0];
  if constexpr (sizeof(T) == 4) {
    const uint4 u = packed.words[1];
    return {{bit_cast<float>(w.x), bit_cast<float>(w.y), bit_cast<float>(w.z), bit_cast<float>(w.w),
             bit_cast<float>(u.x), bit_cast<float>(u.y), bit_cast<float>(u.z),
             bit_cast<float>(u.w)}};
  } else {
    const float2 a = unpack(w.x, T{}), b = unpack(w.y, T{}), c = unpack(w.z, T{}),
                 d = unpack(w.w, T{});
    return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
  }
}

// Rounds to nearest even.
template <typename T>
ANYFLOW_BOTH Packed<T> pack(const Chunk& chunk) {
  const float* v = chunk.v;
  if constexpr (sizeof(T) == 4) {
    const auto bits = [](float f) { return bit_cast<uint32_t>(f); };
    return {{make_uint4(bits(v[0]), bits(v[1]), bits(v[2]), bits(v[3])),
             make_uint4(bits(v[4]), bits(v[5]), bits(v[6]), bits(v[7]))}};
  } else {
    return {{make_uint4(pack(v[0], v[1], T{}), pack(v[2], v[3], T{}), pack(v[4], v[5], T{}),
                        pack(v[6], v[7], T{}))}};
  }
}

// Loads chunk number `index` of a row of any dtype, or a constant where the operand is absent.
ANYFLOW_BOTH Chunk load_chunk(const void* row, DType dtype, int index, float absent) {
  if (row == nullptr) return {{absent, absent, absent, absent, absent, absent, absent, absent}};
  if (dtype == DType::float32) return unpack(static_cast<const Packed<float>*>(row)[index]);
  if (dtype == DType::bfloat16)
    return unpack(static_cast<const Packed<__nv_bfloat16>*>(row)[index]);
  return unpack(static_cast<const Packed<__half>*>(row)[index]);
}

// Loads one number of a row of any dtype.
ANYFLOW_BOTH float load_number(const void* row, DType dtype, int column) {
  if (dtype == DType::float32) return static_cast<const float*>(row)[column];
  if (dtype == DType::bfloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[column]);
  return __half2float(static_cast<const __half*>(row)[column]);
}

}  // namespace anyflow::cuda
