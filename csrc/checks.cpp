#include "checks.h"

#include <cmath>
#include <utility>

#include "cpu/rows.h"

namespace anyflow::check {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 36;  // of an operand: products of a few sizes stay below 2^63

enum class Numbers { kernel, attention, floating, times, indices };

bool includes(Numbers numbers, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return numbers != Numbers::indices;
    case at::kBFloat16:
      return numbers == Numbers::kernel || numbers == Numbers::attention || numbers == Numbers::floating;
    case at::kHalf:
      return numbers == Numbers::kernel || numbers == Numbers::floating;
    case at::kDouble:
      return numbers == Numbers::times || numbers == Numbers::floating;
    case at::kLong:
      return numbers == Numbers::indices;
    default:
      return false;
  }
}

const char* name_of(Numbers numbers) {
  switch (numbers) {
    case Numbers::kernel:
      return "float32, bfloat16 or float16";
    case Numbers::attention:
      return "float32 or bfloat16";
    case Numbers::floating:
      return "a floating-point dtype";
    case Numbers::times:
      return "float32 or float64";
    default:
      return "int64";
  }
}

// Whether the last element lies in the tensor's memory, which may have been freed or shrunk behind it.
bool in_memory(const at::Tensor& x) {
  if (x.numel() == 0) {
    return true;
  }
  int64_t last = x.storage_offset();
  for (int64_t i = 0; i < x.dim(); ++i) {
    last += (x.size(i) - 1) * x.stride(i);
  }
  return static_cast<uint64_t>(last + 1) * x.element_size() <= x.storage().nbytes();
}

// The operands of one call. Every method checks one of them; the first decides the device.
class Operands {
 public:
  Operands(const char* op, const at::Tensor& first) : op_(op), device_(first.device()) {}

  template <class... Allowed>
  [[noreturn]] void refuse(const char* name, const at::Tensor& x, const Allowed&... allowed) const {
    TORCH_CHECK_VALUE(false, op_, ": ", name, " must be ", allowed..., ", got ", x.sizes(), " ", x.scalar_type(), " on ",
                      x.device());
  }

  template <class... Words>
  void require(bool condition, const Words&... words) const {
    TORCH_CHECK_VALUE(condition, op_, ": ", words...);
  }

  void dense(const char* name, const at::Tensor& x, Numbers numbers = Numbers::kernel) const {
    if (x.layout() != at::kStrided || x.device() != device_ || !includes(numbers, x.scalar_type())) {
      refuse(name, x, "dense, in ", name_of(numbers), " on ", device_);
    }
    if (x.numel() > kMaxElements) {
      refuse(name, x, "of at most ", kMaxElements, " elements");
    }
    if (!in_memory(x)) {
      refuse(name, x, "within its memory of ", x.storage().nbytes(), " bytes");
    }
  }

  void sized(const char* name, const at::Tensor& x, at::IntArrayRef sizes, Numbers numbers = Numbers::kernel) const {
    dense(name, x, numbers);
    if (x.sizes() != sizes) {
      refuse(name, x, "of sizes ", sizes);
    }
  }

  void sized(const char* name, const Optional& x, at::IntArrayRef sizes, Numbers numbers = Numbers::kernel) const {
    if (x) {
      sized(name, *x, sizes, numbers);
    }
  }

  void same_dtype(const char* name, const at::Tensor& x, const at::Tensor& like) const {
    if (x.scalar_type() != like.scalar_type()) {
      refuse(name, x, "in ", like.scalar_type());
    }
  }

  // [B, L, D], rows of which a kernel holds whole.
  void tokens(const char* name, const at::Tensor& x) const {
    dense(name, x);
    if (x.dim() != 3 || x.size(2) < 1 || x.size(2) > kMaxRow) {
      refuse(name, x, "[B, L, D] with D from 1 to ", kMaxRow);
    }
  }

  // A modulation [B, R, D] of tokens [B, L, D]: R divides L.
  void rows(const char* name, const at::Tensor& x, const at::Tensor& tokens) const {
    dense(name, x);
    if (x.dim() != 3 || x.size(0) != tokens.size(0) || x.size(2) != tokens.size(2) || x.size(1) == 0 ||
        tokens.size(1) % x.size(1) != 0) {
      refuse(name, x, "[", tokens.size(0), ", R, ", tokens.size(2), "] with R >= 1 that divides ", tokens.size(1));
    }
  }

  void rows(const char* name, const Optional& x, const at::Tensor& tokens) const {
    if (x) {
      rows(name, *x, tokens);
    }
  }

  // [B, F, ...] with at least `least` dimensions.
  void frames(const char* name, const at::Tensor& x, int64_t least) const {
    dense(name, x);
    if (x.dim() < least) {
      refuse(name, x, "[B, F, ...] of ", least, " dimensions at least");
    }
  }

  // Like frames [B, F, ...], but of n samples.
  void samples(const char* name, const at::Tensor& x, const at::Tensor& like, int64_t n) const {
    dense(name, x);
    if (x.dim() != like.dim() || x.size(0) != n || x.sizes().slice(1) != like.sizes().slice(1)) {
      refuse(name, x, n, " samples like those of ", like.sizes());
    }
  }

  // Of operands that are read where they are.
  void aligned(const char* name, const at::Tensor& x) const {
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() != 0) {
      refuse(name, x, "aligned to its elements");
    }
  }

  // One number, [n] or [n, F].
  void times(const char* name, const at::Tensor& x, int64_t n, int64_t frames) const {
    dense(name, x, Numbers::times);
    aligned(name, x);
    if (x.dim() > 2 || (x.dim() >= 1 && x.size(0) != n) || (x.dim() == 2 && x.size(1) != frames)) {
      refuse(name, x, "[], [", n, "] or [", n, ", ", frames, "]");
    }
  }

  // Indices [n] of `samples` samples; returns n, or the number of samples where there are none.
  int64_t indices(const Optional& x, int64_t samples) const {
    if (!x) {
      return samples;
    }
    dense("rows", *x, Numbers::indices);
    aligned("rows", *x);
    if (x->dim() != 1) {
      refuse("rows", *x, "[n]");
    }
    require(x->size(0) == 0 || samples > 0, "rows pick among 0 samples");
    return x->size(0);
  }

  void eps(double value) const {
    require(std::isfinite(value) && value >= 0, "eps must be a finite number >= 0, got ", value);
  }

  void guidance(double value) const {
    require(std::isfinite(value) && value > 0, "guidance must be a finite number > 0, got ", value);
  }

 private:
  const char* const op_;
  const at::Device device_;
};

void attention_operands(const Operands& operands, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  operands.dense("q", q, Numbers::attention);
  if (q.dim() != 4 || q.size(3) < 1 || q.size(3) > 256 || q.size(3) % 8 != 0) {
    operands.refuse("q", q, "[B, L, H, Dh] with Dh a multiple of 8 up to 256");
  }
  operands.dense("k", k, Numbers::attention);
  if (k.dim() != 4 || k.size(0) != q.size(0) || k.size(2) != q.size(2) || k.size(3) != q.size(3)) {
    operands.refuse("k", k, "[", q.size(0), ", S, ", q.size(2), ", ", q.size(3), "]");
  }
  operands.sized("v", v, k.sizes(), Numbers::attention);
  operands.same_dtype("k", k, q);
  operands.same_dtype("v", v, q);
}

void dual_operands(const Operands& operands, const at::Tensor& t_emb, const at::Tensor& r_emb, const at::Tensor& gate,
                   c10::string_view fusion) {
  operands.dense("t_emb", t_emb);
  if (t_emb.dim() != 2) {
    operands.refuse("t_emb", t_emb, "[N, D]");
  }
  operands.sized("r_emb", r_emb, t_emb.sizes());
  operands.dense("gate", gate);
  if (gate.numel() != 1) {
    operands.refuse("gate", gate, "of one element");
  }
  operands.require(fusion == "gated" || fusion == "additive", "fusion must be 'gated' or 'additive', got '", fusion,
                   "'");
}

void linear_operands(const Operands& operands, const at::Tensor& x, const at::Tensor& weight) {
  operands.dense("x", x);
  if (x.dim() == 0) {
    operands.refuse("x", x, "[..., K]");
  }
  operands.dense("weight", weight);
  if (weight.dim() != 2 || weight.size(1) != x.size(-1)) {
    operands.refuse("weight", weight, "[N, ", x.size(-1), "]");
  }
  operands.same_dtype("weight", weight, x);
}

void rms_operands(const Operands& operands, const at::Tensor& x, const at::Tensor& weight, const Optional& cos,
                  const Optional& sin, int64_t num_heads, double eps) {
  operands.tokens("x", x);
  operands.sized("weight", weight, {x.size(2)});
  operands.require(num_heads > 0 && x.size(2) % num_heads == 0, "num_heads must divide D = ", x.size(2), ", got ",
                   num_heads);
  operands.require(cos.has_value() == sin.has_value(), "cos and sin are given together or not at all");
  operands.eps(eps);
  const int64_t head_dim = x.size(2) / num_heads;
  operands.require(!cos || head_dim % 2 == 0, "a rotation needs an even D / num_heads, got ", head_dim);
  operands.sized("cos", cos, {x.size(1), head_dim / 2});
  operands.sized("sin", sin, {x.size(1), head_dim / 2});
}

void modulate_operands(const Operands& operands, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale,
                       double eps) {
  operands.tokens("x", x);
  operands.rows("shift", shift, x);
  operands.sized("scale", scale, shift.sizes());
  operands.eps(eps);
}

void norm_operands(const Operands& operands, const at::Tensor& tokens, const Optional& gate, const Optional& weight,
                   const Optional& bias, const Optional& shift, const Optional& scale, double eps) {
  operands.rows("gate", gate, tokens);
  operands.sized("weight", weight, {tokens.size(2)});
  operands.sized("bias", bias, {tokens.size(2)});
  operands.rows("shift", shift, tokens);
  operands.require(shift.has_value() == scale.has_value(), "shift and scale are given together or not at all");
  operands.require(weight || !bias, "bias needs weight");
  operands.require(!weight || !shift, "give an affine (weight, bias) or a modulation (shift, scale), not both");
  if (shift) {
    operands.sized("scale", *scale, shift->sizes());
  }
  operands.eps(eps);
}

}  // namespace

void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  attention_operands(Operands("attention", q), q, k, v);
}

void attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& out, const at::Tensor& logsumexp) {
  const Operands operands("attention_backward", q);
  attention_operands(operands, q, k, v);
  for (const auto& [name, x] : {std::pair<const char*, const at::Tensor&>{"grad", grad}, {"out", out}}) {
    operands.sized(name, x, q.sizes(), Numbers::attention);
    operands.same_dtype(name, x, q);
  }
  operands.sized("logsumexp", logsumexp, {q.size(0), q.size(2), q.size(1)});
  if (logsumexp.scalar_type() != at::kFloat) {
    operands.refuse("logsumexp", logsumexp, "in float32");
  }
}

void dual_timestep_embedding(const at::Tensor& t_emb, const at::Tensor& r_emb, const at::Tensor& gate,
                             c10::string_view fusion) {
  dual_operands(Operands("dual_timestep_embedding", t_emb), t_emb, r_emb, gate, fusion);
}

void dual_timestep_embedding_backward(const at::Tensor& grad_emb, const at::Tensor& grad_activated,
                                      const at::Tensor& t_emb, const at::Tensor& r_emb, const at::Tensor& gate,
                                      c10::string_view fusion) {
  const Operands operands("dual_timestep_embedding_backward", t_emb);
  dual_operands(operands, t_emb, r_emb, gate, fusion);
  operands.sized("grad_emb", grad_emb, t_emb.sizes());
  operands.sized("grad_activated", grad_activated, t_emb.sizes());
}

void gelu(const at::Tensor& x) { Operands("gelu", x).dense("x", x); }

void gelu_backward(const at::Tensor& grad, const at::Tensor& x) {
  const Operands operands("gelu_backward", x);
  operands.dense("x", x);
  operands.sized("grad", grad, x.sizes());
}

void linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias) {
  const Operands operands("linear", x);
  linear_operands(operands, x, weight);
  operands.sized("bias", bias, {weight.size(0)});
  if (bias) {
    operands.same_dtype("bias", *bias, x);
  }
}

void linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  const Operands operands("linear_backward", x);
  linear_operands(operands, x, weight);
  operands.dense("grad", grad);
  if (grad.dim() != x.dim() || grad.size(-1) != weight.size(0) ||
      grad.sizes().slice(0, x.dim() - 1) != x.sizes().slice(0, x.dim() - 1)) {
    operands.refuse("grad", grad, "[..., ", weight.size(0), "] for x ", x.sizes());
  }
  operands.same_dtype("grad", grad, x);
}

void rms_norm_rope(const at::Tensor& x, const at::Tensor& weight, const Optional& cos, const Optional& sin,
                   int64_t num_heads, double eps) {
  rms_operands(Operands("rms_norm_rope", x), x, weight, cos, sin, num_heads, eps);
}

void rms_norm_rope_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const Optional& cos,
                            const Optional& sin, int64_t num_heads, double eps) {
  const Operands operands("rms_norm_rope_backward", x);
  rms_operands(operands, x, weight, cos, sin, num_heads, eps);
  operands.sized("grad", grad, {x.size(0), x.size(1), num_heads, x.size(2) / num_heads});
}

void layer_norm_modulate(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale, double eps) {
  modulate_operands(Operands("layer_norm_modulate", x), x, shift, scale, eps);
}

void layer_norm_modulate_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift,
                                  const at::Tensor& scale, double eps) {
  const Operands operands("layer_norm_modulate_backward", x);
  modulate_operands(operands, x, shift, scale, eps);
  operands.sized("grad", grad, x.sizes());
}

void gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate) {
  const Operands operands("gated_residual", x);
  operands.tokens("x", x);
  operands.sized("y", y, x.sizes());
  operands.rows("gate", gate, x);
}

void gated_residual_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& gate) {
  const Operands operands("gated_residual_backward", grad);
  operands.tokens("grad", grad);
  operands.sized("y", y, grad.sizes());
  operands.rows("gate", gate, grad);
}

void residual_layer_norm(const at::Tensor& x, const at::Tensor& y, const Optional& gate, const Optional& weight,
                         const Optional& bias, const Optional& shift, const Optional& scale, double eps) {
  const Operands operands("residual_layer_norm", x);
  operands.tokens("x", x);
  operands.sized("y", y, x.sizes());
  norm_operands(operands, x, gate, weight, bias, shift, scale, eps);
}

void residual_layer_norm_backward(const Optional& dh, const at::Tensor& dn, const Optional& y, const at::Tensor& h,
                                  const Optional& gate, const Optional& weight, const Optional& bias,
                                  const Optional& shift, const Optional& scale, double eps) {
  const Operands operands("residual_layer_norm_backward", h);
  operands.tokens("h", h);
  operands.sized("dn", dn, h.sizes());
  operands.sized("dh", dh, h.sizes());
  operands.sized("y", y, h.sizes());
  operands.require(y || !gate, "gate needs y");
  norm_operands(operands, h, gate, weight, bias, shift, scale, eps);
}

void flow_map_inputs(const at::Tensor& latents, const at::Tensor& noise, const at::Tensor& t,
                     const at::Tensor& epsilon_plus, const at::Tensor& epsilon_minus, const Optional& rows,
                     at::ScalarType dtype) {
  const Operands operands("flow_map_inputs", latents);
  operands.frames("latents", latents, 2);
  operands.sized("noise", noise, latents.sizes());
  operands.times("t", t, latents.size(0), latents.size(1));
  operands.times("epsilon_plus", epsilon_plus, latents.size(0), latents.size(1));
  operands.times("epsilon_minus", epsilon_minus, latents.size(0), latents.size(1));
  operands.indices(rows, latents.size(0));
  operands.require(includes(Numbers::kernel, dtype), "dtype must be ", name_of(Numbers::kernel), ", got ", dtype);
}

void flow_map_inputs_backward(const at::Tensor& grad, const at::Tensor& grad_batch, const at::Tensor& latents,
                              const at::Tensor& noise, const at::Tensor& t, const at::Tensor& epsilon_plus,
                              const at::Tensor& epsilon_minus, const Optional& rows, bool with_x_t) {
  const Operands operands("flow_map_inputs_backward", latents);
  const int64_t samples = latents.dim() == 0 ? 0 : latents.size(0);
  operands.frames("latents", latents, 2);
  operands.sized("noise", noise, latents.sizes());
  operands.sized("grad", grad, latents.sizes());
  operands.times("t", t, samples, latents.size(1));
  operands.times("epsilon_plus", epsilon_plus, samples, latents.size(1));
  operands.times("epsilon_minus", epsilon_minus, samples, latents.size(1));
  const int64_t n = operands.indices(rows, samples);
  operands.samples("grad_batch", grad_batch, latents, 2 * n + (with_x_t ? samples : 0));
}

void flow_map_loss(const at::Tensor& pred, const Optional& uncond, const Optional& u_plus, const Optional& u_minus,
                   const at::Tensor& latents, const at::Tensor& noise, const at::Tensor& t, const at::Tensor& r,
                   const at::Tensor& weight, const at::Tensor& step, const Optional& rows, double guidance) {
  const Operands operands("flow_map_loss", pred);
  operands.frames("pred", pred, 3);
  operands.sized("uncond", uncond, pred.sizes());
  operands.sized("latents", latents, pred.sizes());
  operands.sized("noise", noise, pred.sizes());
  operands.require(u_plus.has_value() == u_minus.has_value(), "u_plus and u_minus are given together or not at all");
  operands.require(u_plus || !rows, "rows need u_plus and u_minus");
  const int64_t samples = pred.size(0), frames = pred.size(1), n = operands.indices(rows, samples);
  if (u_plus) {
    operands.samples("u_plus", *u_plus, pred, n);
    operands.samples("u_minus", *u_minus, pred, n);
  }
  operands.times("t", t, samples, frames);
  operands.times("r", r, samples, frames);
  operands.require(t.sizes() == r.sizes(), "t ", t.sizes(), " and r ", r.sizes(), " must have one shape");
  operands.times("weight", weight, samples, frames);
  operands.times("step", step, n, frames);
  operands.guidance(guidance);
  operands.require(uncond || guidance == 1, "guidance ", guidance, " needs uncond");
}

void flow_map_loss_backward(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& weight,
                            double guidance) {
  const Operands operands("flow_map_loss_backward", residual);
  operands.frames("residual", residual, 3);
  operands.sized("grad", grad, {residual.size(0)}, Numbers::floating);
  operands.times("weight", weight, residual.size(0), residual.size(1));
  operands.guidance(guidance);
}

}  // namespace anyflow::check
