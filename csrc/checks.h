// Checks of the operands of every operator, one function for each: rank, sizes, dtype, device, layout and memory. They run
// before anything is allocated, read or launched, cost O(rank) for each operand, and raise a ValueError that names the
// operator, the operand, what it must be and what it is. On the CPU the values of indices are checked as well, where they
// are read (csrc/cpu/frames.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace anyflow::check {

using Optional = std::optional<at::Tensor>;

void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);
void attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& out, const at::Tensor& logsumexp);

void dual_timestep_embedding(const at::Tensor& t_emb, const at::Tensor& r_emb, const at::Tensor& gate,
                             c10::string_view fusion);
void dual_timestep_embedding_backward(const at::Tensor& grad_emb, const at::Tensor& grad_activated,
                                      const at::Tensor& t_emb, const at::Tensor& r_emb, const at::Tensor& gate,
                                      c10::string_view fusion);

void gelu(const at::Tensor& x);
void gelu_backward(const at::Tensor& grad, const at::Tensor& x);

void linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias);
void linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight);

void rms_norm_rope(const at::Tensor& x, const at::Tensor& weight, const Optional& cos, const Optional& sin,
                   int64_t num_heads, double eps);
void rms_norm_rope_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const Optional& cos,
                            const Optional& sin, int64_t num_heads, double eps);

void layer_norm_modulate(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale, double eps);
void layer_norm_modulate_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift,
                                  const at::Tensor& scale, double eps);

void gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate);
void gated_residual_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& gate);

void residual_layer_norm(const at::Tensor& x, const at::Tensor& y, const Optional& gate, const Optional& weight,
                         const Optional& bias, const Optional& shift, const Optional& scale, double eps);
void residual_layer_norm_backward(const Optional& dh, const at::Tensor& dn, const Optional& y, const at::Tensor& h,
                                  const Optional& gate, const Optional& weight, const Optional& bias,
                                  const Optional& shift, const Optional& scale, double eps);

void flow_map_inputs(const at::Tensor& latents, const at::Tensor& noise, const at::Tensor& t,
                     const at::Tensor& epsilon_plus, const at::Tensor& epsilon_minus, const Optional& rows,
                     at::ScalarType dtype);
void flow_map_inputs_backward(const at::Tensor& grad, const at::Tensor& grad_batch, const at::Tensor& latents,
                              const at::Tensor& noise, const at::Tensor& t, const at::Tensor& epsilon_plus,
                              const at::Tensor& epsilon_minus, const Optional& rows, bool with_x_t);

void flow_map_loss(const at::Tensor& pred, const Optional& uncond, const Optional& u_plus, const Optional& u_minus,
                   const at::Tensor& latents, const at::Tensor& noise, const at::Tensor& t, const at::Tensor& r,
                   const at::Tensor& weight, const at::Tensor& step, const Optional& rows, double guidance);
void flow_map_loss_backward(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& weight,
                            double guidance);

}  // namespace anyflow::check
