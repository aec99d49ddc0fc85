// Elementary functions that the compiler vectorizes: no branch, no table, no call. Included by
// kernels only.
//
// Errors are a few units in the last place of the result, however small it is. NaN stays NaN.
#pragma once

#include <cstdint>

namespace anyflow::ANYFLOW_ISA {

// a b - c, rounded once.
inline float multiply_subtract(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, -c);
#else
  return static_cast<float>(static_cast<double>(a) * b - c);
#endif
}

// s = 1 / (1 + 2^-z). Scaled, because 2^-z overflows where s is still a normal number.
struct Logistic {
  static constexpr float kUnit = 0x1p-64f;
  float scaled;  // s / kUnit: multiply by kUnit last
  float rest;    // 1 - s
};

// For z = x (q + r), -160 < z < 60. r is the small rounding error of q: an error of z counts z
// times in the result.
inline Logistic logistic(float x, float q, float r) {
  constexpr float kRound = 0x1.8p23f;  // the low bits of z + kRound are the integer nearest to z
  const float shifted = x * q + kRound;
  const float f = multiply_subtract(x, q, shifted - kRound) + x * r;  // z less that integer
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (0x4b400000u + 127u - 64u - bits) << 23;  // 2^-integer kUnit
  float power;
  __builtin_memcpy(&power, &bits, 4);
  float p = 1.53532790e-4f;  // minimax for 2^-f, |f| <= 1/2, exact at 0
  p = p * f - 1.33989775e-3f;
  p = p * f + 9.61843878e-3f;
  p = p * f - 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f - 6.93147182e-1f;
  p = p * f + 1.0f;
  const float exponential = p * power;
  const float scaled = 1.0f / (Logistic::kUnit + exponential);
  return {scaled, exponential * scaled};
}

// y where x sigmoid(z(x)) is neither `low` nor `high`: beyond the bounds y may be anything.
inline float between(float x, float low_bound, float high_bound, float low, float high, float y) {
  y = x < low_bound ? low : y;
  return x > high_bound ? high : y;
}

// sigmoid(x).
inline Logistic sigmoid(float x) { return logistic(x, 0x1.715476p0f, 0x1.4ae0cp-26f); }

inline float silu(float x) {
  const float y = x * sigmoid(x).scaled * Logistic::kUnit;
  return between(x, -110.0f, 25.0f, -0.0f, x, y);
}

inline float silu_derivative(float x) {
  const Logistic s = sigmoid(x);
  const float y = (s.scaled + s.scaled * (x * s.rest)) * Logistic::kUnit;
  return between(x, -110.0f, 25.0f, -0.0f, 1.0f, y);
}

// tanh-GELU is x sigmoid(2 u) with 2 u = z ln 2, z = x (c1 + c3 x^2).
constexpr float kGeluC1 = 2.3022082f, kGeluC3 = 0.10294324f;

// sigmoid(2 u).
inline Logistic gelu_gate(float x) {
  constexpr float c1 = 2.302215576171875f;  // 17 bits, so that q - c1 is exact
  const float square = x * x, q = square * kGeluC3 + c1;
  const float r =
      (square * -2.0162e-9f - 7.37802755e-6f) + multiply_subtract(x, x, square) * kGeluC3;
  return logistic(x, q, r + multiply_subtract(square, kGeluC3, q - c1));
}

inline float gelu(float x) {
  const float y = x * gelu_gate(x).scaled * Logistic::kUnit;
  return between(x, -10.8f, 6.0f, -0.0f, x, y);
}

inline float gelu_derivative(float x) {
  constexpr float kLn2 = 0.693147181f;
  const Logistic s = gelu_gate(x);
  const float slope = (kGeluC1 * kLn2) + (3 * kGeluC3 * kLn2) * (x * x);  // of 2 u
  const float y = (s.scaled + s.scaled * (x * s.rest * slope)) * Logistic::kUnit;
  return between(x, -10.8f, 6.0f, -0.0f, 1.0f, y);
}

}  // namespace anyflow::ANYFLOW_ISA
