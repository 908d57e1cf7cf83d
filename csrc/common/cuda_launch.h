/* How kernels are launched and declare shared memory. Everything goes through these macros, so that
 * tests/cuda_emulation, which defines them otherwise, can run the kernels on a CPU.
 */
#ifndef MODELBATCH_COMMON_CUDA_LAUNCH_H
#define MODELBATCH_COMMON_CUDA_LAUNCH_H

#include <cuda_runtime.h>

#ifndef MB_CUDA_LAUNCH_SHARED

/* Blocks in a grid's second dimension: the hardware's limit. The emulation's is small. */
#define MB_MAX_GRID_Y 65535

/* Launches with `shared_bytes` of dynamic shared memory; yields the launch's cudaError_t. */
#define MB_CUDA_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())

/* Inside a kernel: `count` elements that the block shares; count is a constant. */
#define MB_SHARED_ARRAY(type, name, count) __shared__ type name[count]

/* Inside a kernel: the dynamic shared memory of the launch, aligned to 16 bytes. */
#define MB_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char mb_dynamic_[]; \
  type* const name = reinterpret_cast<type*>(mb_dynamic_)

#endif

#define MB_CUDA_LAUNCH(kernel, grid, block, stream, ...) \
  MB_CUDA_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

#endif /* MODELBATCH_COMMON_CUDA_LAUNCH_H */
