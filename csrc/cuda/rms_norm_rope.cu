// RMS norm over all of D, then rotation of interleaved pairs in each head:
// anyflow/ops/rms_norm_rope.py.
#include "launch.cuh"

namespace anyflow::cuda {

// cos and sin of the pairs of a chunk.
struct Angles {
  float cos[kChunk / 2], sin[kChunk / 2];
};

template <typename T, int N>
struct RmsNormRope {
  static constexpr int kThreads = kMaxThreads<N>;
  Grid grid;
  Operand x, weight, cos, sin;
  int half;   // pairs per head
  bool wide;  // the four angles of a chunk are 16 aligned bytes of each table
  T* out;
  float eps;

  // Returns the angles of the pairs that begin at a column of a token's rows of the tables; every
  // head reads the same ones.
  ANYFLOW_BOTH Angles angles(const void* cos_row, const void* sin_row, int column) const {
    if (wide) {
      const float4 c = static_cast<const float4*>(cos_row)[column / 4];
      const float4 s = static_cast<const float4*>(sin_row)[column / 4];
      return {{c.x, c.y, c.z, c.w}, {s.x, s.y, s.z, s.w}};
    }
    Angles a;
    for (int j = 0; j < kChunk / 2; ++j) {
      a.cos[j] = load_number(cos_row, cos.dtype, (column + j) % half);
      a.sin[j] = load_number(sin_row, sin.dtype, (column + j) % half);
    }
    return a;
  }

#pragma nv_exec_check_disable
  template <typename Block>
  ANYFLOW_BOTH void operator()(unsigned index, Block block) const {
    const Run run = grid.at(index);
    const Columns<N> columns{block.thread, block.threads, grid.chunks};
    Packed<T> next[N] = {};
    const T* in = static_cast<const T*>(row_of(x, grid, run.batch, run.first));
    columns.load(next, in);
    Chunk w[N];
    columns.load_parameter(w, weight, row_of(weight, grid, run.batch, run.first), 0.0f);
    int column[N];  // of the tables
    for (int i = 0; i < N; ++i) column[i] = columns[i] * (kChunk / 2) % half;
    const void* cos_row = row_of(cos, grid, run.batch, run.first);
    const void* sin_row = row_of(sin, grid, run.batch, run.first);
    const int64_t dim = grid.chunks * kChunk;
    T* to = out + (run.batch * grid.tokens + run.first) * dim;
    for (int token = 0; token < run.count; ++token, to += dim) {
      Chunk v[N];
      Angles turn[N];
      float squares = 0.0f;
      for (int i = 0; i < N; ++i) {
        v[i] = unpack(next[i]);
        if (cos_row != nullptr && columns.has(i)) turn[i] = angles(cos_row, sin_row, column[i]);
      }
      // The next token is on its way while this one is summed.
      if (token + 1 < run.count) columns.load(next, in += x.row_stride);
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < kChunk; ++j)
          squares += v[i].v[j] * v[i].v[j];  // zeros beyond the token
      const float rstd = rsqrtf(block.sum(squares) / grid.dim() + eps);
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < kChunk; ++j) v[i].v[j] *= rstd * w[i].v[j];
        if (cos_row != nullptr) rotate(v[i], turn[i]);
        columns.store(to, i, pack<T>(v[i]));
      }
      cos_row = next_row(cos, cos_row);
      sin_row = next_row(sin, sin_row);
    }
  }

  static ANYFLOW_BOTH void rotate(Chunk& chunk, const Angles& a) {
    for (int j = 0; j < kChunk / 2; ++j) {
      const float even = chunk.v[2 * j], odd = chunk.v[2 * j + 1];
      chunk.v[2 * j] = even * a.cos[j] - odd * a.sin[j];
      chunk.v[2 * j + 1] = even * a.sin[j] + odd * a.cos[j];
    }
  }
};

template <typename Launch>
const char* rms_norm_rope_with(Launch launch, Sizes sizes, Operand x, Operand weight, Operand cos,
                               Operand sin, int64_t num_heads, void* out, float eps) {
  if (const char* error = check(sizes, {x, weight, {out, x.dtype}})) return error;
  if (num_heads < 1 || sizes.dim % num_heads != 0) return "num_heads must divide D";
  if ((cos.data == nullptr) != (sin.data == nullptr))
    return "cos and sin are given together or not at all";
  const int64_t head_dim = sizes.dim / num_heads;
  const bool rotary = cos.data != nullptr;
  if (rotary && head_dim % 2 != 0) return "D / num_heads must be even for a rotation";
  if (rotary && (cos.rows != sizes.tokens || sin.rows != sizes.tokens))
    return "cos and sin must have L rows";
  if (sizes.batch == 0 || sizes.tokens == 0) return nullptr;
  const auto whole = [](const Operand& t) { return t.dtype == DType::float32 && aligned(t, 1); };
  const bool wide = head_dim % kChunk == 0 && whole(cos) && whole(sin);
  const int half = rotary ? static_cast<int>(head_dim / 2) : 1;
  return with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    return with_chunks(sizes, [&](auto n) {
      const Grid grid = make_grid(sizes, {weight});
      return launch(
          RmsNormRope<T, n>{grid, x, weight, cos, sin, half, wide, static_cast<T*>(out), eps});
    });
  });
}

const char* rms_norm_rope(Sizes sizes, Operand x, Operand weight, Operand cos, Operand sin,
                          int64_t num_heads, void* out, float eps, void* stream) {
  return rms_norm_rope_with(OnStream{stream}, sizes, x, weight, cos, sin, num_heads, out, eps);
}

}  // namespace anyflow::cuda
