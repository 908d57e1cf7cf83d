/* Every CUDA kernel is launched through this macro, which yields the launch's cudaError_t. */
#ifndef MODELBATCH_COMMON_CUDA_LAUNCH_H
#define MODELBATCH_COMMON_CUDA_LAUNCH_H

#include <cuda_runtime.h>

#define MB_CUDA_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__), cudaGetLastError())

#endif /* MODELBATCH_COMMON_CUDA_LAUNCH_H */
