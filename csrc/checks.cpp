#include "checks.h"

#include <cmath>

#include "cpu/view.h"

namespace anyflow {
namespace {

// Of an operand: products of a few sizes stay below 2^63.
constexpr int64_t kMaxElements = int64_t{1} << 36;

bool includes(Numbers numbers, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return numbers != Numbers::indices;
    case at::kBFloat16:
      return numbers == Numbers::kernel || numbers == Numbers::attention ||
             numbers == Numbers::floating;
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

// Tells whether the last element lies in the tensor's memory, which may have been freed or shrunk
// behind the tensor.
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

}  // namespace

void Operands::dense(const char* name, const at::Tensor& x, Numbers numbers) const {
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

void Operands::sized(const char* name, const at::Tensor& x, at::IntArrayRef sizes,
                     Numbers numbers) const {
  dense(name, x, numbers);
  if (x.sizes() != sizes) {
    refuse(name, x, "of sizes ", sizes);
  }
}

void Operands::sized(const char* name, const Optional& x, at::IntArrayRef sizes) const {
  if (x) {
    sized(name, *x, sizes);
  }
}

void Operands::same_dtype(const char* name, const at::Tensor& x, const at::Tensor& like) const {
  if (x.scalar_type() != like.scalar_type()) {
    refuse(name, x, "in ", like.scalar_type());
  }
}

void Operands::dtype(const char* name, at::ScalarType type) const {
  require(includes(Numbers::kernel, type), name, " must be ", name_of(Numbers::kernel), ", got ",
          type);
}

void Operands::tokens(const char* name, const at::Tensor& x) const {
  dense(name, x);
  if (x.dim() != 3 || x.size(2) < 1 || x.size(2) > kMaxDim) {
    refuse(name, x, "[B, L, D] with D from 1 to ", kMaxDim);
  }
}

void Operands::rows(const char* name, const at::Tensor& x, const at::Tensor& tokens) const {
  dense(name, x);
  if (x.dim() != 3 || x.size(0) != tokens.size(0) || x.size(2) != tokens.size(2) ||
      x.size(1) == 0 || tokens.size(1) % x.size(1) != 0) {
    refuse(name, x, "[", tokens.size(0), ", R, ", tokens.size(2), "] with R >= 1 that divides ",
           tokens.size(1));
  }
}

void Operands::rows(const char* name, const Optional& x, const at::Tensor& tokens) const {
  if (x) {
    rows(name, *x, tokens);
  }
}

void Operands::frames(const char* name, const at::Tensor& x, int64_t least) const {
  dense(name, x);
  if (x.dim() < least) {
    refuse(name, x, "[B, F, ...] of ", least, " dimensions at least");
  }
}

void Operands::samples(const char* name, const at::Tensor& x, const at::Tensor& like,
                       int64_t n) const {
  dense(name, x);
  if (x.dim() != like.dim() || x.size(0) != n || x.sizes().slice(1) != like.sizes().slice(1)) {
    refuse(name, x, n, " samples like those of ", like.sizes());
  }
}

void Operands::times(const char* name, const at::Tensor& x, int64_t n, int64_t frames) const {
  dense(name, x, Numbers::times);
  aligned(name, x);
  if (x.dim() > 2 || (x.dim() >= 1 && x.size(0) != n) || (x.dim() == 2 && x.size(1) != frames)) {
    refuse(name, x, "[], [", n, "] or [", n, ", ", frames, "]");
  }
}

int64_t Operands::picked(const Optional& x, int64_t samples) const {
  if (!x) {
    return samples;
  }
  dense("picked", *x, Numbers::indices);
  aligned("picked", *x);
  if (x->dim() != 1) {
    refuse("picked", *x, "[n]");
  }
  require(x->size(0) == 0 || samples > 0, "picked cannot pick among 0 samples");
  return x->size(0);
}

void Operands::eps(double value) const {
  require(std::isfinite(value) && value >= 0, "eps must be a finite number >= 0, got ", value);
}

void Operands::guidance(double value) const {
  require(std::isfinite(value) && value > 0, "guidance must be a finite number > 0, got ", value);
}

// Of operands that are read where they are.
void Operands::aligned(const char* name, const at::Tensor& x) const {
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() != 0) {
    refuse(name, x, "aligned to its elements");
  }
}

}  // namespace anyflow
