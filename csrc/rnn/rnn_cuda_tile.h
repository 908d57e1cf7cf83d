// How a block of the persistent kernels owns some rows of one model's batch.
//
// Thread (x, y) owns element x of the state in `rows` consecutive rows; a block is `width` by
// `groups` threads and owns a tile of groups * rows rows. What the GEMM of a step reads lies in
// shared memory as [element][row], so a thread reads its rows' values in accesses of 16 bytes, all
// threads of a warp (nearly) the same ones, and weights without bank conflicts. Rows are padded by
// four floats, which spreads the writes of consecutive elements over the banks.
#pragma once

#include "common/cuda_launch.h"
#include "rnn/rnn_cuda.h"

namespace modelbatch {

constexpr int kRnnThreads = 256;
constexpr int kRnnPadding = 4;
// With fewer blocks than this, tiles are halved: a large GPU has about as many multiprocessors.
constexpr int64_t kRnnEnoughBlocks = 128;

struct alignas(16) RnnQuad {
  float values[4];
};

// rows floats from an address that is aligned to 16 bytes.
template <int rows>
__device__ inline void load_rows(const float* from, float* to) {
  for (int q = 0; q < rows / 4; ++q) {
    const RnnQuad quad = reinterpret_cast<const RnnQuad*>(from)[q];
    for (int i = 0; i < 4; ++i) to[4 * q + i] = quad.values[i];
  }
}

template <int rows>
__device__ inline void store_rows(float* to, const float* from) {
  for (int q = 0; q < rows / 4; ++q) {
    RnnQuad quad;
    for (int i = 0; i < 4; ++i) quad.values[i] = from[4 * q + i];
    reinterpret_cast<RnnQuad*>(to)[q] = quad;
  }
}

// Whether a block of the current device can have that much dynamic shared memory: 227 KB on the
// large GPUs since compute capability 9.0, 99 KB on the small ones.
inline bool rnn_fits_shared(int64_t bytes) {
#if defined(__CUDACC__)
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return false;
  }
  return bytes <= most;
#else
  return bytes <= 227 * 1024;
#endif
}

struct RnnTiles {
  int width, groups, rows;  // threads for the elements, threads for the rows, rows of a thread
  int64_t count;            // tiles of a model
  int64_t bytes;            // of shared memory

  // floats(tiles): how many floats of shared memory a block needs.
  template <class Floats>
  RnnTiles(int64_t num_models, int64_t hidden, int64_t batch, const Floats& floats) {
    width = 8;
    while (width < hidden) width *= 2;
    choose(batch, 8, floats);
    if (num_models * count < kRnnEnoughBlocks || !rnn_fits_shared(bytes)) {
      choose(batch, 4, floats);
    }
  }

  int tile() const { return groups * rows; }

 private:
  template <class Floats>
  void choose(int64_t batch, int rows_of_a_thread, const Floats& floats) {
    rows = rows_of_a_thread;
    const int64_t wanted = (batch + rows - 1) / rows, most = kRnnThreads / width;
    groups = (int)(wanted < most ? wanted : most);
    count = (batch + tile() - 1) / tile();
    bytes = floats(*this) * (int64_t)sizeof(float);
  }
};

// The place of the calling thread.
template <int rows>
struct RnnPlace {
  int element;     // of the state
  int in_tile;     // its first row in the tile
  int stride;      // of shared memory, from element to element
  int tile_first;  // the tile's first row in the batch
  int first;       // its own
  int64_t model;
  int thread, threads;

  __device__ explicit RnnPlace(int64_t tiles) {
    const int tile = (int)blockDim.y * rows;
    element = (int)threadIdx.x;
    in_tile = (int)threadIdx.y * rows;
    stride = tile + kRnnPadding;
    model = blockIdx.x / tiles;
    tile_first = (int)(blockIdx.x % tiles) * tile;
    first = tile_first + in_tile;
    threads = (int)(blockDim.x * blockDim.y);
    thread = (int)(threadIdx.y * blockDim.x + threadIdx.x);
  }
};

// Launches `kernel` for all tiles of all models.
template <class Kernel, class Launch>
cudaError_t launch_tiles(const Kernel& kernel, const RnnTiles& tiles, const Launch& launch) {
  const int64_t blocks = launch.num_models * tiles.count;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
#if defined(__CUDACC__)
  // More than 48 KB have to be asked for.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)tiles.bytes);
  if (error != cudaSuccess) return error;
#endif
  return MB_CUDA_LAUNCH_SHARED(kernel, dim3((unsigned)blocks),
                               dim3((unsigned)tiles.width, (unsigned)tiles.groups),
                               (size_t)tiles.bytes, launch.stream, launch, tiles.count);
}

// The kernels count the elements of a model's slice with 32 bits.
inline bool can_persist(int64_t hidden, const mb_rnn_runs& runs) {
  return hidden >= 1 && hidden <= MB_RNN_PERSISTENT_HIDDEN && runs.count >= 1 &&
         runs.count <= MB_RNN_MAX_RUNS && runs.rows <= INT32_MAX / (4 * MB_RNN_PERSISTENT_HIDDEN);
}

}  // namespace modelbatch
