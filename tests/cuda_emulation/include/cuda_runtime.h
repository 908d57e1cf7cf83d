// What the CUDA kernels of csrc/ need of CUDA, for a C++ compiler and a CPU: found in place of the
// toolkit's header, it lets `g++ -x c++` compile the same .cu files.
//
// One operating-system thread runs all blocks, one after the other. The threads of a block run one
// after the other too, each until it waits for others (a barrier or a warp's exchange) or ends, in
// an order that the test chooses. What a missing barrier gets wrong is then wrong in some order.
// Shared memory is allocated afresh for each block and filled with NaN (all bits one), so nothing
// survives from one block to the next, and the address sanitizer sees every array's ends.
//
// Threads that wait for what never comes end the launch with cudaErrorLaunchFailure and a text that
// says who waits where: a barrier that some threads left out by ending early, divergent barriers,
// exchanges whose mask names a lane that does not take part.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "declare shared memory with MB_SHARED_ARRAY");

// ---- types --------------------------------------------------------------------------------------

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- the scheduler (scheduler.cpp) --------------------------------------------------------------

namespace mb_emulation {

constexpr int kWarp = 32;
constexpr size_t kMaxArgumentBytes = 4096;

// Where in the source a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// What the lanes of a warp told each other.
struct Exchange {
  unsigned lane;  // of the asking thread
  unsigned mask;
  const unsigned char (*values)[sizeof(uint64_t)];  // [32]
};

cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* data);
void block_barrier(Site site);
Exchange exchange(Site site, unsigned mask, const void* value, size_t bytes);
void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  static_assert((sizeof(Parameters) + ... + 0) <= kMaxArgumentBytes, "too many kernel arguments");
  const auto body = [](void* data) {
    const Call* call = static_cast<const Call*>(data);
    std::apply(call->kernel, call->parameters);
  };
  return run_grid(grid, block, shared_bytes, body, &call);
}

template <class T>
T value_of_lane(const Exchange& told, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most eight bytes are exchanged");
  T value;
  if (told.mask >> lane & 1u) {
    memcpy(&value, told.values[lane], sizeof value);
  } else {
    memset(&value, 0xff, sizeof value);  // Undefined in CUDA.
  }
  return value;
}

template <class T>
T shuffle(Site site, unsigned mask, T value, int source, int width = kWarp) {
  const Exchange told = exchange(site, mask, &value, sizeof value);
  const unsigned segment = told.lane & ~(unsigned)(width - 1);
  return value_of_lane<T>(told, segment | ((unsigned)source & (unsigned)(width - 1)));
}

template <class T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width = kWarp) {
  const Exchange told = exchange(site, mask, &value, sizeof value);
  const bool inside = (told.lane & (unsigned)(width - 1)) + delta < (unsigned)width;
  return value_of_lane<T>(told, inside ? told.lane + delta : told.lane);
}

template <class T>
T shuffle_xor(Site site, unsigned mask, T value, int lane_mask, int width = kWarp) {
  const Exchange told = exchange(site, mask, &value, sizeof value);
  const unsigned source = told.lane ^ (unsigned)lane_mask;
  const unsigned end = (told.lane & ~(unsigned)(width - 1)) + (unsigned)width;
  return value_of_lane<T>(told, source < end ? source : told.lane);
}

inline unsigned ballot(Site site, unsigned mask, int predicate) {
  const Exchange told = exchange(site, mask, &predicate, sizeof predicate);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0 && value_of_lane<int>(told, lane) != 0) votes |= 1u << lane;
  }
  return votes;
}

}  // namespace mb_emulation

// ---- what kernels say ---------------------------------------------------------------------------

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#define MB_EMULATION_SITE(what) (mb_emulation::Site{what, __FILE__, __LINE__})

#define __syncthreads() mb_emulation::block_barrier(MB_EMULATION_SITE("__syncthreads"))
#define __syncwarp(mask) \
  ((void)mb_emulation::exchange(MB_EMULATION_SITE("__syncwarp"), mask, nullptr, 0))
#define __shfl_sync(...) mb_emulation::shuffle(MB_EMULATION_SITE("__shfl_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) \
  mb_emulation::shuffle_down(MB_EMULATION_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) \
  mb_emulation::shuffle_xor(MB_EMULATION_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __ballot_sync(...) mb_emulation::ballot(MB_EMULATION_SITE("__ballot_sync"), __VA_ARGS__)

template <class T>
T __ldg(const T* address) {
  return *address;
}

// The macros of common/cuda_launch.h. So few blocks that they have to take several models each.
#define MB_MAX_GRID_Y 3
#define MB_CUDA_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  mb_emulation::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define MB_SHARED_ARRAY(type, name, count) \
  static char name##_key;                  \
  type* const name =                       \
      static_cast<type*>(mb_emulation::shared_array(&name##_key, sizeof(type) * (count)))
#define MB_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(mb_emulation::dynamic_shared())
