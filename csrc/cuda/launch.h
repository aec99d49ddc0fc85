// The interface of the CUDA kernels: raw pointers, sizes, strides and a stream. Plain C++17, no
// CUDA or torch header.
//
// Every launcher enqueues one kernel on `stream` (a cudaStream_t) of the current device, none if
// B * L = 0. A launcher allocates nothing and waits for nothing, so it can be captured into a CUDA
// graph. It returns nullptr, or a static message that says why nothing was launched. The kernels
// are forward only; anyflow/ops/<name>.py has equations and rounding.
#pragma once

#include <cstdint>

namespace anyflow::cuda {

enum class DType : int32_t { float32, bfloat16, float16 };

constexpr int64_t kMaxDim = 8192;

// B, L, D of the tokens: D is a multiple of 8 up to kMaxDim, B * L is below 2^31 (B * L * D need
// not be).
struct Sizes {
  int64_t batch, tokens, dim;
};

// An input `[B, rows, columns]`, its last dimension contiguous, strides in elements: token l of
// sample b reads `data + b * batch_stride + l / (L / rows) * row_stride`. Each has a dtype of its
// own.
//   tokens [B, L, D]:          rows = L
//   modulation [B, R, D]:      rows = R, which divides L
//   vector [D]:                rows = 1, both strides 0
//   table [L, Dh / 2]:         rows = L, batch_stride 0
//   absent optional operand:   Operand{}
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 1;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
};

constexpr int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Tells whether every row begins at a multiple of 16 bytes. Rows of all operands but cos and sin
// must: the kernels read 16 bytes at a time. The caller copies what is not aligned. A fresh
// contiguous copy is aligned, because 8 divides D; a contiguous view with an odd offset is not, so
// `Tensor::contiguous`, which returns such a view as it is, is not enough.
inline bool aligned(const Operand& t, int64_t batch) {
  const auto whole = [&](int64_t stride) { return stride * element_size(t.dtype) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (batch <= 1 || whole(t.batch_stride)) &&
         (t.rows <= 1 || whole(t.row_stride));
}

// out[B, L, D] = LN(x) * (1 + scale) + shift. `out` is contiguous, 16-byte aligned, of x's dtype.
const char* layer_norm_modulate(Sizes sizes, Operand x, Operand shift, Operand scale, void* out,
                                float eps, void* stream);

// h[B, L, D] = x + y * gate, rounded to x's dtype, and n[B, L, D] = LN(h) * weight + bias or
// LN(h) * (1 + scale) + shift. gate, weight, bias, shift and scale are optional: not both of weight
// or bias and shift or scale; gate and modulation may differ in R. `h` and `n` are contiguous,
// 16-byte aligned, of x's dtype, and overlap nothing.
const char* residual_layer_norm(Sizes sizes, Operand x, Operand y, Operand gate, Operand weight,
                                Operand bias, Operand shift, Operand scale, void* h, void* n,
                                float eps, void* stream);

// out[B, L, H, Dh] = x / sqrt(mean(x^2) + eps) * weight, then the pairs (2i, 2i + 1) of each head
// turned by cos[l, i] and sin[l, i], or left alone where both are absent. With tables, which may
// have any alignment, Dh = D / num_heads is even. `out` is contiguous, 16-byte aligned, of x's
// dtype.
const char* rms_norm_rope(Sizes sizes, Operand x, Operand weight, Operand cos, Operand sin,
                          int64_t num_heads, void* out, float eps, void* stream);

}  // namespace anyflow::cuda
