// All steps of all models' layers forward in one launch, for float32 and H <= 64.
//
// A block owns a tile of rows of one model (rnn_cuda_tile.h): models are independent, so no block
// waits for another. The recurrent weights stay in shared memory (68 KB for an LSTM with H = 64, so
// two blocks fit a multiprocessor of 228 KB); h lies there twice, the step's and the next one's, so
// that one barrier a step is enough; c and the thread's own h stay in registers. A thread owns all
// gates of its elements, and adds the products of a gate in the order of h's elements. So neither
// the other models nor the size of the tile change a result.
#include "common/cuda_launch.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_cells.h"
#include "rnn/rnn_cuda_tile.h"
#include "rnn/rnn_cuda_walk.h"

namespace modelbatch {
namespace {

// The gates' weights that multiply one element of h lie beside one another: one access of 16 bytes
// reads them, for GRU with an unused fourth.
template <int gates>
constexpr int kTogether = gates == 1 ? 1 : 4;

// Floats of shared memory for the weights of one element of h.
template <int gates>
MB_HOST_DEVICE int weight_stride(int width) {
  return width * kTogether<gates> + kRnnPadding;
}

template <int gates>
__device__ inline void load_weights(const float* w_hh, int hidden, float* weights, int thread,
                                    int threads) {
  const int stride = weight_stride<gates>((int)blockDim.x);
  for (int i = thread; i < gates * hidden * hidden; i += threads) {
    const int row = i / hidden, k = i % hidden;
    weights[k * stride + row % hidden * kTogether<gates> + row / hidden] = w_hh[i];
  }
}

// sums[row][gate] = the products of h's rows with the weights of this thread's element.
template <int gates, int rows>
__device__ inline void multiply(const float* state, const float* weights, int hidden,
                                const RnnPlace<rows>& place, float (*sums)[gates]) {
  const int stride = weight_stride<gates>((int)blockDim.x);
  for (int r = 0; r < rows; ++r) {
    for (int gate = 0; gate < gates; ++gate) sums[r][gate] = 0.0f;
  }
  const float* own_state = state + place.in_tile;
  const float* own_weights = weights + place.element * kTogether<gates>;
#pragma unroll 2
  for (int k = 0; k < hidden; ++k) {
    float w[4], h[rows];
    if (gates == 1) {
      w[0] = own_weights[k * stride];
    } else {
      load_rows<4>(own_weights + k * stride, w);
    }
    load_rows<rows>(own_state + k * place.stride, h);
    for (int r = 0; r < rows; ++r) {
      for (int gate = 0; gate < gates; ++gate) sums[r][gate] += h[r] * w[gate];
    }
  }
}

// What a thread keeps in registers from step to step.
template <int gates, int rows>
struct Own {
  float h[rows], c[rows];
  float b_ih[gates], b_hh[gates];
};

// The new states of the thread's rows from what the GEMMs made, and what is saved.
template <int cell, int gates, int rows>
__device__ inline void update(const mb_rnn_persistent_forward& p, const RnnPlace<rows>& place,
                              int row, int r, const float* projected, const float* recurrent,
                              Own<gates, rows>& own) {
  const int H = (int)p.hidden, at = row * H + place.element;
  float input[gates], hidden[gates];
  for (int gate = 0; gate < gates; ++gate) {
    input[gate] = projected[gate] + own.b_ih[gate];
    hidden[gate] = recurrent[gate] + own.b_hh[gate];
  }
  if constexpr (cell == MB_RNN_CUDA_LSTM || cell == MB_RNN_CUDA_GRU) {
    float saved[4];
    if constexpr (cell == MB_RNN_CUDA_LSTM) {
      for (int gate = 0; gate < 4; ++gate) saved[gate] = input[gate] + hidden[gate];
      own.h[r] = LstmCell::forward(saved, own.c[r]);
      slice_of<float>(p.cells, place.model)[at] = own.c[r];
    } else {
      own.h[r] = GruCell::forward(input, hidden, own.h[r], saved);
    }
    float* to = slice_of<float>(p.gates, place.model) + row * 4 * H + place.element;
    for (int gate = 0; gate < 4; ++gate) to[gate * H] = saved[gate];
  } else {
    own.h[r] = RnnCell < cell == MB_RNN_CUDA_RELU > ::forward(input[0] + hidden[0]);
  }
  slice_of<float>(p.y, place.model)[at] = own.h[r];
}

template <int cell, int gates, int rows>
__global__ void __launch_bounds__(kRnnThreads, 2)
    forward_kernel(const __grid_constant__ mb_rnn_persistent_forward p, int64_t tiles) {
  MB_DYNAMIC_SHARED(float, shared);
  const RnnPlace<rows> place(tiles);
  const int H = (int)p.hidden;
  const bool exists = place.element < H;
  float* weights = shared;                                             // [H][width][gates]
  float* state = weights + H * weight_stride<gates>((int)blockDim.x);  // [H][tile]
  float* next_state = state + H * place.stride;
  load_weights<gates>(slice_of<const float>(p.w_hh, place.model), H, weights, place.thread,
                      place.threads);
  Own<gates, rows> own;
  for (int gate = 0; gate < gates; ++gate) {
    const int at = gate * H + place.element;
    const bool biased = exists && p.b_ih.data != nullptr;
    own.b_ih[gate] = biased ? slice_of<const float>(p.b_ih, place.model)[at] : 0.0f;
    const bool biased_h = exists && p.b_hh.data != nullptr;
    own.b_hh[gate] = biased_h ? slice_of<const float>(p.b_hh, place.model)[at] : 0.0f;
  }
  for (int r = 0; r < rows; ++r) {
    const bool inside = exists && place.first + r < p.batch;
    const int at = (place.first + r) * H + place.element;
    own.h[r] = inside ? slice_of<const float>(p.h0, place.model)[at] : 0.0f;
    own.c[r] = 0.0f;
    if (cell == MB_RNN_CUDA_LSTM && inside) {
      own.c[r] = slice_of<const float>(p.c0, place.model)[at];
    }
  }
  if (exists) store_rows<rows>(state + place.element * place.stride + place.in_tile, own.h);
  __syncthreads();
  RnnWalk walk(p.runs, false);
  do {
    if (walk.batch() <= place.tile_first) continue;  // No row of the tile takes part.
    const int first = walk.first_row() + place.first;
    const int active = exists ? walk.batch() - place.first : 0;  // of this thread's rows
    // Asked for before the products, which take longer than the answer.
    float projected[rows][gates];
    for (int r = 0; r < rows; ++r) {
      const float* from = slice_of<const float>(p.projected, place.model) +
                          (first + r) * (int)p.projected_stride + place.element;
      for (int gate = 0; gate < gates; ++gate) {
        projected[r][gate] = r < active ? from[gate * H] : 0.0f;
      }
    }
    if (exists) {
      float sums[rows][gates];
      multiply<gates, rows>(state, weights, H, place, sums);
      for (int r = 0; r < rows; ++r) {
        if (r < active) {
          update<cell, gates, rows>(p, place, first + r, r, projected[r], sums[r], own);
        }
      }
      store_rows<rows>(next_state + place.element * place.stride + place.in_tile, own.h);
    }
    float* const written = next_state;
    next_state = state;
    state = written;
    __syncthreads();
  } while (walk.next());
  for (int r = 0; r < rows; ++r) {
    if (!exists || place.first + r >= p.batch) continue;
    const int at = (place.first + r) * H + place.element;
    slice_of<float>(p.h_n, place.model)[at] = own.h[r];
    if (cell == MB_RNN_CUDA_LSTM) slice_of<float>(p.c_n, place.model)[at] = own.c[r];
  }
}

template <int cell, int gates>
cudaError_t launch_forward(const mb_rnn_persistent_forward& launch) {
  const auto floats = [&](const RnnTiles& t) {
    return launch.hidden * (weight_stride<gates>(t.width) + 2 * (t.tile() + kRnnPadding));
  };
  const RnnTiles tiles(launch.num_models, launch.hidden, launch.batch, floats);
  return tiles.rows == 8 ? launch_tiles(forward_kernel<cell, gates, 8>, tiles, launch)
                         : launch_tiles(forward_kernel<cell, gates, 4>, tiles, launch);
}

}  // namespace
}  // namespace modelbatch

extern "C" cudaError_t mb_rnn_persistent_forward_cuda(mb_rnn_persistent_forward launch) {
  using namespace modelbatch;
  if (!can_persist(launch.hidden, launch.runs)) return cudaErrorInvalidValue;
  if (launch.num_models == 0 || launch.batch == 0) return cudaSuccess;
  switch (launch.cell) {
    case MB_RNN_CUDA_LSTM:
      return launch_forward<MB_RNN_CUDA_LSTM, 4>(launch);
    case MB_RNN_CUDA_GRU:
      return launch_forward<MB_RNN_CUDA_GRU, 3>(launch);
    case MB_RNN_CUDA_TANH:
      return launch_forward<MB_RNN_CUDA_TANH, 1>(launch);
    case MB_RNN_CUDA_RELU:
      return launch_forward<MB_RNN_CUDA_RELU, 1>(launch);
    default:
      return cudaErrorInvalidValue;
  }
}
