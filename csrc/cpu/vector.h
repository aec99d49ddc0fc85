// A vector of fp32 lanes as wide as the instruction set, by the vector types of GCC and Clang:
// + - * / and comparisons work on each lane. Included by kernels only.
//
// Plain loops are left to the compiler; vectors are for sums, which the compiler would not reorder
// by itself, and for matrix products (cpu/gemm.h).
#pragma once

#include "cpu/dispatch.h"

namespace anyflow::ANYFLOW_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t IntVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// A float or a Vec, at any alignment.
template <class T>
inline T get(const float* source) {
  T result;
  __builtin_memcpy(&result, source, sizeof(T));
  return result;
}

template <class T>
inline void put(float* target, T value) {
  __builtin_memcpy(target, &value, sizeof(T));
}

// A Vec in place, aligned to its size.
inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }

inline Vec broadcast(float x) { return x - Vec{}; }

// Returns the sum of the lanes, by halves.
typedef float Vec4 __attribute__((vector_size(16)));
inline float horizontal(Vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#if defined(__AVX2__)
typedef float Vec8 __attribute__((vector_size(32)));
inline float horizontal(Vec8 v) {
  Vec4 halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return horizontal(halves[0] + halves[1]);
}
#endif

#if defined(__AVX512F__)
typedef float Vec16 __attribute__((vector_size(64)));
inline float horizontal(Vec16 v) {
  Vec8 halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return horizontal(halves[0] + halves[1]);
}
#endif

// Returns the sum of term.operator()<T>(i) over i < d, in four chains: one would wait for each of
// its additions.
template <class Term>
inline float sum(int64_t d, Term term) {
  Vec a{}, b{}, c{}, e{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    a += term.template operator()<Vec>(i);
    b += term.template operator()<Vec>(i + kLanes);
    c += term.template operator()<Vec>(i + 2 * kLanes);
    e += term.template operator()<Vec>(i + 3 * kLanes);
  }
  for (; i + kLanes <= d; i += kLanes) {
    a += term.template operator()<Vec>(i);
  }
  float rest = 0;
  for (; i < d; ++i) {
    rest += term.template operator()<float>(i);
  }
  return horizontal((a + b) + (c + e)) + rest;
}

// Two sums over the same elements: term.operator()<T>(i) is a Two<T>.
template <class T>
struct Two {
  T first, second;
};

template <class Term>
inline Two<float> sum_two(int64_t d, Term term) {
  Vec a{}, b{}, c{}, e{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    const Two<Vec> one = term.template operator()<Vec>(i);
    const Two<Vec> other = term.template operator()<Vec>(i + kLanes);
    a += one.first;
    b += one.second;
    c += other.first;
    e += other.second;
  }
  Two<float> rest{0, 0};
  for (; i < d; ++i) {
    const Two<float> one = term.template operator()<float>(i);
    rest.first += one.first;
    rest.second += one.second;
  }
  return {horizontal(a + c) + rest.first, horizontal(b + e) + rest.second};
}

}  // namespace anyflow::ANYFLOW_ISA
