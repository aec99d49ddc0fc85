// The kernels of csrc/cuda on the CPU, for test_cuda_sources.py: one CPU thread for each of a
// block, and the sum over a block at two barriers.
#include <pthread.h>

#include <cstring>
#include <thread>
#include <vector>

#include "layer_norm_modulate.cu"
#include "residual_layer_norm.cu"
#include "rms_norm_rope.cu"

using namespace anyflow::cuda;

struct HostBlock {
  int thread, threads;
  float* values;  // 512 of them, zero beyond the threads
  pthread_barrier_t* barrier;

  float sum(float value) {
    values[thread] = value;
    pthread_barrier_wait(barrier);
    float tree[512];
    std::memcpy(tree, values, sizeof(tree));
    for (int half = 256; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) tree[i] += tree[i + half];
    pthread_barrier_wait(barrier);
    return tree[0];
  }
};

struct OnHost {
  template <typename Kernel>
  const char* operator()(const Kernel& kernel) const {
    const Grid& grid = kernel.grid;
    if (grid.threads > Kernel::kThreads || grid.threads % 32 != 0)
      return "a block has the wrong size";
    float values[512] = {};
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, grid.threads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < grid.threads; ++thread)
      threads.emplace_back([&, thread] {
        for (unsigned block = 0; block < grid.blocks; ++block)
          kernel(block, HostBlock{thread, grid.threads, values, &barrier});
      });
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&barrier);
    return nullptr;
  }
};

extern "C" {

const char* host_layer_norm_modulate(Sizes sizes, Operand x, Operand shift, Operand scale,
                                     void* out, float eps) {
  return layer_norm_modulate_with(OnHost{}, sizes, x, shift, scale, out, eps);
}

const char* host_residual_layer_norm(Sizes sizes, Operand x, Operand y, Operand gate,
                                     Operand weight, Operand bias, Operand shift, Operand scale,
                                     void* h, void* n, float eps) {
  return residual_layer_norm_with(OnHost{}, sizes, x, y, gate, weight, bias, shift, scale, h, n,
                                  eps);
}

const char* host_rms_norm_rope(Sizes sizes, Operand x, Operand weight, Operand cos, Operand sin,
                               int64_t num_heads, void* out, float eps) {
  return rms_norm_rope_with(OnHost{}, sizes, x, weight, cos, sin, num_heads, out, eps);
}

}  // extern "C"
