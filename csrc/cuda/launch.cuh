// From a launcher's arguments to a kernel: checks, the grid, the choice of an instance, and the
// launch.
//
// A kernel is a struct of its arguments with `operator()(block index, Block)`, what one thread
// does. `Block` has the thread's place and the sum over its block: all of CUDA that the arithmetic
// needs.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <numeric>
#include <type_traits>

#include "tokens.cuh"

namespace anyflow::cuda {

// Threads of a block for N chunks each: so few that ptxas can use the registers that a token needs.
template <int N>
constexpr int kMaxThreads = N == 1 ? 256 : 512;

struct DeviceBlock {
  int thread, threads;
  float (*partial)[16];  // shared memory, two buffers by turns: one barrier per sum is enough
  int turn = 0;

  // Returns the same value in every thread, always added up in the same order.
  __device__ __forceinline__ float sum(float value) {
    for (int offset = 16; offset > 0; offset /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threads == 32) return value;
    float* const sums = partial[turn];
    turn ^= 1;
    if (thread % 32 == 0) sums[thread / 32] = value;
    __syncthreads();
    value = thread % 16 < threads / 32 ? sums[thread % 16] : 0.0f;
    for (int offset = 8; offset > 0; offset /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ float partial[2][16];
  kernel(blockIdx.x,
         DeviceBlock{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), partial});
}

struct OnStream {
  void* stream;

  template <typename Kernel>
  const char* operator()(const Kernel& kernel) const {
    run_kernel<<<kernel.grid.blocks, kernel.grid.threads, 0, static_cast<cudaStream_t>(stream)>>>(
        kernel);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

// Says why the kernels do not take these, or nullptr; absent operands fit anywhere.
inline const char* check(const Sizes& sizes, std::initializer_list<Operand> operands) {
  if (sizes.dim <= 0 || sizes.dim % kChunk != 0 || sizes.dim > kMaxDim)
    return "D must be a multiple of 8 up to 8192";
  if (sizes.batch < 0 || sizes.tokens < 0) return "a size is negative";
  if (sizes.tokens > INT32_MAX || (sizes.tokens > 0 && sizes.batch > INT32_MAX / sizes.tokens))
    return "B * L must be below 2^31";
  for (const Operand& t : operands) {
    if (t.data == nullptr || sizes.tokens == 0) continue;
    if (t.rows <= 0 || sizes.tokens % t.rows != 0) return "the rows of an operand must divide L";
    if (!aligned(t, sizes.batch))
      return "every row of an operand must begin at a multiple of 16 bytes";
  }
  return nullptr;
}

inline int chunks_per_thread(const Sizes& sizes) {
  return sizes.dim <= kChunk * kMaxThreads<1> ? 1 : 2;
}

// Divides tokens over blocks, for sizes that are not empty. `parameters` are the operands whose
// rows tokens share.
inline Grid make_grid(const Sizes& sizes, std::initializer_list<Operand> parameters) {
  Grid grid{};
  grid.chunks = static_cast<int>(sizes.dim / kChunk);
  grid.tokens = static_cast<int>(sizes.tokens);
  const int warp_chunks = 32 * chunks_per_thread(sizes);
  grid.threads = (grid.chunks + warp_chunks - 1) / warp_chunks * 32;
  int64_t segment = sizes.tokens;
  for (const Operand& t : parameters) segment = std::gcd(segment, sizes.tokens / t.rows);
  const int64_t wanted = sizes.batch * sizes.tokens / kManyBlocks;
  grid.segment = static_cast<int>(segment);
  grid.run = static_cast<int>(wanted < 1 ? 1 : wanted < kMaxRun ? wanted : kMaxRun);
  grid.runs = (grid.segment + grid.run - 1) / grid.run;
  grid.blocks = static_cast<unsigned>(sizes.batch * (sizes.tokens / segment) * grid.runs);
  return grid;
}

// Calls `function` with a number of the dtype's type.
template <typename Function>
const char* with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::bfloat16:
      return function(__nv_bfloat16{});
    case DType::float16:
      return function(__half{});
  }
  return "unknown dtype";
}

// Calls `function` with the number of chunks per thread, as a type.
template <typename Function>
const char* with_chunks(const Sizes& sizes, Function function) {
  if (chunks_per_thread(sizes) == 1) return function(std::integral_constant<int, 1>{});
  return function(std::integral_constant<int, 2>{});
}

}  // namespace anyflow::cuda
