// Tokens in registers: which tokens a block takes, which columns a thread, and sums over a block.
//
// A block takes a run of consecutive tokens that share their parameters, so that these are read
// once per run: in bf16 a token would otherwise read four times as many bytes of fp32 shift and
// scale as of x. Nothing else is shared between tokens, and a token lives in registers from its one
// read to its one write.
#pragma once

#include "chunk.cuh"

namespace anyflow::cuda {

// Tokens of a block, at most; this and kManyBlocks were not tuned on a GPU.
constexpr int kMaxRun = 16;
// Runs grow beyond one token only where so many blocks remain, enough to fill any GPU.
constexpr int64_t kManyBlocks = 1024;

struct Run {
  int64_t batch;
  int first, count;  // tokens
};

struct Grid {
  unsigned blocks;
  int threads;  // of a block: whole warps
  int chunks;   // of a row, D / 8
  int tokens;   // of a sample
  int segment;  // consecutive tokens that read the same rows of every parameter
  int run;      // of them, for a block
  int runs;     // blocks of a segment

  ANYFLOW_BOTH Run at(unsigned block) const {
    const int part = static_cast<int>(block / runs), segments = tokens / segment;
    const int offset = static_cast<int>(block % runs) * run;
    return {part / segments, part % segments * segment + offset,
            run < segment - offset ? run : segment - offset};
  }
  ANYFLOW_BOTH float dim() const { return static_cast<float>(chunks * kChunk); }
};

ANYFLOW_BOTH const void* advance(const Operand& t, const void* from, int64_t elements) {
  return static_cast<const char*>(from) + elements * (t.dtype == DType::float32 ? 4 : 2);
}

// Returns the row that a token reads; nullptr if the operand is absent.
ANYFLOW_BOTH const void* row_of(const Operand& t, const Grid& grid, int64_t batch, int token) {
  if (t.data == nullptr) return nullptr;
  const int64_t row = token / (grid.tokens / static_cast<int>(t.rows));
  return advance(t, t.data, batch * t.batch_stride + row * t.row_stride);
}

// Returns the row of the next token, where each has its own; nullptr stays what it is.
ANYFLOW_BOTH const void* next_row(const Operand& t, const void* row) {
  return row == nullptr ? nullptr : advance(t, row, t.row_stride);
}

// A thread's N chunks of each token, in the order that lets neighboring threads read neighboring
// memory.
template <int N>
struct Columns {
  int thread, threads, chunks;

  ANYFLOW_BOTH int operator[](int i) const { return thread + i * threads; }
  ANYFLOW_BOTH bool has(int i) const { return (*this)[i] < chunks; }

  // Loads the thread's chunks of a row; those beyond it stay as they were.
  template <typename T>
  ANYFLOW_BOTH void load(Packed<T> (&to)[N], const void* row) const {
    for (int i = 0; i < N; ++i)
      if (has(i)) to[i] = static_cast<const Packed<T>*>(row)[(*this)[i]];
  }

  template <typename T>
  ANYFLOW_BOTH void store(void* row, int i, const Packed<T>& chunk) const {
    if (has(i)) static_cast<Packed<T>*>(row)[(*this)[i]] = chunk;
  }

  ANYFLOW_BOTH void load_parameter(Chunk (&to)[N], const Operand& t, const void* row,
                                   float absent) const {
    for (int i = 0; i < N; ++i)
      to[i] = load_chunk(has(i) ? row : nullptr, t.dtype, (*this)[i], absent);
  }
};

// Computes (v - mean) / std of a token, in place. The variance is that of the centered token, so
// that it cannot cancel.
#pragma nv_exec_check_disable
template <int N, typename Block>
ANYFLOW_BOTH void standardize(Chunk (&v)[N], const Columns<N>& columns, Block& block, float dim,
                              float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < kChunk; ++j) sum += v[i].v[j];  // zeros beyond the token
  const float mean = block.sum(sum) / dim;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < kChunk; ++j) {
      v[i].v[j] = columns.has(i) ? v[i].v[j] - mean : 0.0f;
      squares += v[i].v[j] * v[i].v[j];
    }
  const float rstd = rsqrtf(block.sum(squares) / dim + eps);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < kChunk; ++j) v[i].v[j] *= rstd;
}

}  // namespace anyflow::cuda
