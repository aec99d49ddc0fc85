// The operators on CPU tensors, with the arguments of their schemas in anyflow/ops; csrc/bindings.cpp registers them.
// Absent tensors of a result are undefined where the schema says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace anyflow {

std::tuple<at::Tensor, at::Tensor> dual_timestep_embedding(const at::Tensor& t_emb, const at::Tensor& r_emb,
                                                           const at::Tensor& gate, c10::string_view fusion);
std::tuple<at::Tensor, at::Tensor, at::Tensor> dual_timestep_embedding_backward(
    const at::Tensor& grad_emb, const at::Tensor& grad_activated, const at::Tensor& t_emb, const at::Tensor& r_emb,
    const at::Tensor& gate, c10::string_view fusion, bool gate_gradient);

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& out, const at::Tensor& logsumexp);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                               const at::Tensor& weight, bool x_gradient,
                                                               bool weight_gradient, bool bias_gradient);

at::Tensor gelu(const at::Tensor& x);
at::Tensor gelu_backward(const at::Tensor& grad, const at::Tensor& x);

at::Tensor rms_norm_rope(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& cos,
                         const std::optional<at::Tensor>& sin, int64_t num_heads, double eps);
std::tuple<at::Tensor, at::Tensor> rms_norm_rope_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& cos,
    const std::optional<at::Tensor>& sin, int64_t num_heads, double eps);

at::Tensor layer_norm_modulate(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_modulate_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& scale, double eps);

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate);
std::tuple<at::Tensor, at::Tensor> gated_residual_backward(const at::Tensor& grad, const at::Tensor& y,
                                                           const at::Tensor& gate);

std::tuple<at::Tensor, at::Tensor> residual_layer_norm(
    const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& scale, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
residual_layer_norm_backward(const std::optional<at::Tensor>& dh, const at::Tensor& dn,
                             const std::optional<at::Tensor>& y, const at::Tensor& h,
                             const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shift,
                             const std::optional<at::Tensor>& scale, double eps);

std::tuple<at::Tensor, at::Tensor> flow_map_inputs(const at::Tensor& latents, const at::Tensor& noise,
                                                   const at::Tensor& t, const at::Tensor& epsilon_plus,
                                                   const at::Tensor& epsilon_minus,
                                                   const std::optional<at::Tensor>& rows, at::ScalarType dtype,
                                                   bool with_x_t);
std::tuple<at::Tensor, at::Tensor> flow_map_inputs_backward(
    const at::Tensor& grad, const at::Tensor& grad_batch, const at::Tensor& latents, const at::Tensor& noise,
    const at::Tensor& t, const at::Tensor& epsilon_plus, const at::Tensor& epsilon_minus,
    const std::optional<at::Tensor>& rows, bool with_x_t);

std::tuple<at::Tensor, at::Tensor> flow_map_loss(
    const at::Tensor& pred, const std::optional<at::Tensor>& uncond, const std::optional<at::Tensor>& u_plus,
    const std::optional<at::Tensor>& u_minus, const at::Tensor& latents, const at::Tensor& noise, const at::Tensor& t,
    const at::Tensor& r, const at::Tensor& weight, const at::Tensor& step, const std::optional<at::Tensor>& rows,
    double guidance, bool need_grad);
at::Tensor flow_map_loss_backward(const at::Tensor& grad, const at::Tensor& residual, const at::Tensor& weight,
                                  double guidance);

}  // namespace anyflow
