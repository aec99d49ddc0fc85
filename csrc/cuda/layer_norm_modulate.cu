// LN(x) * (1 + scale) + shift, one modulation row per sample or frame:
// anyflow/ops/layer_norm_modulate.py.
#include "launch.cuh"

namespace anyflow::cuda {

template <typename T, int N>
struct LayerNormModulate {
  static constexpr int kThreads = kMaxThreads<N>;
  Grid grid;
  Operand x, shift, scale;
  T* out;
  float eps;

#pragma nv_exec_check_disable
  template <typename Block>
  ANYFLOW_BOTH void operator()(unsigned index, Block block) const {
    const Run run = grid.at(index);
    const Columns<N> columns{block.thread, block.threads, grid.chunks};
    Packed<T> next[N] = {};
    const T* in = static_cast<const T*>(row_of(x, grid, run.batch, run.first));
    columns.load(next, in);
    Chunk add[N], multiply[N];
    columns.load_parameter(add, shift, row_of(shift, grid, run.batch, run.first), 0.0f);
    columns.load_parameter(multiply, scale, row_of(scale, grid, run.batch, run.first), 0.0f);
    const int64_t dim = grid.chunks * kChunk;
    T* to = out + (run.batch * grid.tokens + run.first) * dim;
    for (int token = 0; token < run.count; ++token, to += dim) {
      Chunk v[N];
      for (int i = 0; i < N; ++i) v[i] = unpack(next[i]);
      // The next token is on its way while this one is summed.
      if (token + 1 < run.count) columns.load(next, in += x.row_stride);
      standardize(v, columns, block, grid.dim(), eps);
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < kChunk; ++j)
          v[i].v[j] = v[i].v[j] * (1.0f + multiply[i].v[j]) + add[i].v[j];
        columns.store(to, i, pack<T>(v[i]));
      }
    }
  }
};

template <typename Launch>
const char* layer_norm_modulate_with(Launch launch, Sizes sizes, Operand x, Operand shift,
                                     Operand scale, void* out, float eps) {
  if (const char* error = check(sizes, {x, shift, scale, {out, x.dtype}})) return error;
  if (sizes.batch == 0 || sizes.tokens == 0) return nullptr;
  return with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    return with_chunks(sizes, [&](auto n) {
      const Grid grid = make_grid(sizes, {shift, scale});
      return launch(LayerNormModulate<T, n>{grid, x, shift, scale, static_cast<T*>(out), eps});
    });
  });
}

const char* layer_norm_modulate(Sizes sizes, Operand x, Operand shift, Operand scale, void* out,
                                float eps, void* stream) {
  return layer_norm_modulate_with(OnStream{stream}, sizes, x, shift, scale, out, eps);
}

}  // namespace anyflow::cuda
