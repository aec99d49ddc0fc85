// h = x + y * gate and n = LN(h), with an affine or a modulation:
// anyflow/ops/residual_layer_norm.py.
//
// To the kernel an affine is a modulation that all tokens share and that does not count from 1, and
// an absent operand is ones or zeros in registers: it costs no memory traffic, and one kernel
// serves every variant.
#include "launch.cuh"

namespace anyflow::cuda {

template <typename T, typename Y, int N>
struct ResidualLayerNorm {
  static constexpr int kThreads = kMaxThreads<N>;
  Grid grid;
  Operand x, y, gate, scale, shift;
  float one;  // added to scale
  T* h;
  T* n;
  float eps;

#pragma nv_exec_check_disable
  template <typename Block>
  ANYFLOW_BOTH void operator()(unsigned index, Block block) const {
    const Run run = grid.at(index);
    const Columns<N> columns{block.thread, block.threads, grid.chunks};
    Packed<T> next[N] = {};
    Packed<Y> next_y[N] = {};
    const T* in = static_cast<const T*>(row_of(x, grid, run.batch, run.first));
    const Y* in_y = static_cast<const Y*>(row_of(y, grid, run.batch, run.first));
    columns.load(next, in);
    columns.load(next_y, in_y);
    Chunk g[N], multiply[N], add[N];
    columns.load_parameter(g, gate, row_of(gate, grid, run.batch, run.first), 1.0f);
    columns.load_parameter(multiply, scale, row_of(scale, grid, run.batch, run.first), 1.0f);
    columns.load_parameter(add, shift, row_of(shift, grid, run.batch, run.first), 0.0f);
    int64_t to = (run.batch * grid.tokens + run.first) * (grid.chunks * kChunk);
    for (int token = 0; token < run.count; ++token, to += grid.chunks * kChunk) {
      Chunk v[N];
      for (int i = 0; i < N; ++i) {
        const Chunk left = unpack(next[i]), right = unpack(next_y[i]);
        for (int j = 0; j < kChunk; ++j) v[i].v[j] = left.v[j] + right.v[j] * g[i].v[j];
        const Packed<T> rounded = pack<T>(v[i]);
        columns.store(h + to, i, rounded);
        v[i] = unpack(rounded);  // the norm is that of what was returned
      }
      if (token + 1 < run.count) {  // on its way while this one is summed
        columns.load(next, in += x.row_stride);
        columns.load(next_y, in_y += y.row_stride);
      }
      standardize(v, columns, block, grid.dim(), eps);
      for (int i = 0; i < N; ++i) {
        for (int j = 0; j < kChunk; ++j)
          v[i].v[j] = v[i].v[j] * (one + multiply[i].v[j]) + add[i].v[j];
        columns.store(n + to, i, pack<T>(v[i]));
      }
    }
  }
};

template <typename Launch>
const char* residual_layer_norm_with(Launch launch, Sizes sizes, Operand x, Operand y, Operand gate,
                                     Operand weight, Operand bias, Operand shift, Operand scale,
                                     void* h, void* n, float eps) {
  const char* error =
      check(sizes, {x, y, gate, weight, bias, shift, scale, {h, x.dtype}, {n, x.dtype}});
  if (error != nullptr) return error;
  const bool modulated = scale.data != nullptr || shift.data != nullptr;
  if (modulated && (weight.data != nullptr || bias.data != nullptr))
    return "give an affine or a modulation, not both";
  if (sizes.batch == 0 || sizes.tokens == 0) return nullptr;
  const Operand multiply = modulated ? scale : weight, add = modulated ? shift : bias;
  const float one = scale.data != nullptr ? 1.0f : 0.0f;
  const Grid grid = make_grid(sizes, {gate, multiply, add});
  return with_type(x.dtype, [&](auto number) {
    using T = decltype(number);
    return with_type(y.dtype, [&](auto other) {
      return with_chunks(sizes, [&](auto chunks) {
        return launch(ResidualLayerNorm<T, decltype(other), chunks>{
            grid, x, y, gate, multiply, add, one, static_cast<T*>(h), static_cast<T*>(n), eps});
      });
    });
  });
}

const char* residual_layer_norm(Sizes sizes, Operand x, Operand y, Operand gate, Operand weight,
                                Operand bias, Operand shift, Operand scale, void* h, void* n,
                                float eps, void* stream) {
  return residual_layer_norm_with(OnStream{stream}, sizes, x, y, gate, weight, bias, shift, scale,
                                  h, n, eps);
}

}  // namespace anyflow::cuda
