// Checks of the operands of a native operator: rank, sizes, dtype, device, layout and memory. An
// operator begins with them, before anything is allocated, read or launched. They cost O(rank) for
// each operand, and raise a ValueError that names the operator, the operand, what it must be and
// what it is. On the CPU the values of indices are checked as well, where they are read
// (csrc/cpu/frames.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace anyflow {

using Optional = std::optional<at::Tensor>;

// Sets of dtypes: of the kernels, of attention, all floating-point ones, of times, of indices.
enum class Numbers { kernel, attention, floating, times, indices };

// The operands of one call. Every method checks one of them, none where it is absent; the first
// decides the device.
class Operands {
 public:
  Operands(const char* op, const at::Tensor& first) : op_(op), device_(first.device()) {}

  template <class... Allowed>
  [[noreturn]] void refuse(const char* name, const at::Tensor& x, const Allowed&... allowed) const {
    TORCH_CHECK_VALUE(false, op_, ": ", name, " must be ", allowed..., ", got ", x.sizes(), " ",
                      x.scalar_type(), " on ", x.device());
  }

  template <class... Words>
  void require(bool condition, const Words&... words) const {
    TORCH_CHECK_VALUE(condition, op_, ": ", words...);
  }

  // Any sizes.
  void dense(const char* name, const at::Tensor& x, Numbers numbers = Numbers::kernel) const;

  void sized(const char* name, const at::Tensor& x, at::IntArrayRef sizes,
             Numbers numbers = Numbers::kernel) const;
  void sized(const char* name, const Optional& x, at::IntArrayRef sizes) const;

  void same_dtype(const char* name, const at::Tensor& x, const at::Tensor& like) const;

  void dtype(const char* name, at::ScalarType type) const;

  // [B, L, D], of which a kernel holds a whole token.
  void tokens(const char* name, const at::Tensor& x) const;

  // A modulation [B, R, D] of tokens [B, L, D]: R divides L.
  void rows(const char* name, const at::Tensor& x, const at::Tensor& tokens) const;
  void rows(const char* name, const Optional& x, const at::Tensor& tokens) const;

  // [B, F, ...] with at least `least` dimensions.
  void frames(const char* name, const at::Tensor& x, int64_t least) const;

  // Like frames [B, F, ...], but of n samples.
  void samples(const char* name, const at::Tensor& x, const at::Tensor& like, int64_t n) const;

  // One number, [n] or [n, F].
  void times(const char* name, const at::Tensor& x, int64_t n, int64_t frames) const;

  // Indices [n] of `samples` samples. Returns n, or the number of samples where nothing is picked.
  int64_t picked(const Optional& x, int64_t samples) const;

  void eps(double value) const;
  void guidance(double value) const;

 private:
  void aligned(const char* name, const at::Tensor& x) const;

  const char* const op_;
  const at::Device device_;
};

// What the operators check that have kernels for the CPU and for CUDA.

inline void check_modulation(const Operands& operands, const at::Tensor& x, const at::Tensor& shift,
                             const at::Tensor& scale, double eps) {
  operands.tokens("x", x);
  operands.rows("shift", shift, x);
  operands.sized("scale", scale, shift.sizes());
  operands.eps(eps);
}

inline void check_residual_norm(const Operands& operands, const at::Tensor& tokens,
                                const Optional& gate, const Optional& weight, const Optional& bias,
                                const Optional& shift, const Optional& scale, double eps) {
  operands.rows("gate", gate, tokens);
  operands.sized("weight", weight, {tokens.size(2)});
  operands.sized("bias", bias, {tokens.size(2)});
  operands.rows("shift", shift, tokens);
  operands.require(shift.has_value() == scale.has_value(),
                   "shift and scale are given together or not at all");
  operands.require(weight || !bias, "bias needs weight");
  operands.require(!weight || !shift,
                   "give an affine (weight, bias) or a modulation (shift, scale), not both");
  if (shift) {
    operands.sized("scale", scale, shift->sizes());
  }
  operands.eps(eps);
}

inline void check_rms_norm_rope(const Operands& operands, const at::Tensor& x,
                                const at::Tensor& weight, const Optional& cos, const Optional& sin,
                                int64_t num_heads, double eps) {
  operands.tokens("x", x);
  operands.sized("weight", weight, {x.size(2)});
  operands.require(num_heads > 0 && x.size(2) % num_heads == 0,
                   "num_heads must divide D = ", x.size(2), ", got ", num_heads);
  operands.require(cos.has_value() == sin.has_value(),
                   "cos and sin are given together or not at all");
  operands.eps(eps);
  const int64_t head_dim = x.size(2) / num_heads;
  operands.require(!cos || head_dim % 2 == 0, "a rotation needs an even D / num_heads, got ",
                   head_dim);
  operands.sized("cos", cos, {x.size(1), head_dim / 2});
  operands.sized("sin", sin, {x.size(1), head_dim / 2});
}

}  // namespace anyflow
