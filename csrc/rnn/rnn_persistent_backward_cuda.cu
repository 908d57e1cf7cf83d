// All steps of all models' layers backward in one launch, for float32 and H <= 64.
//
// As forward (rnn_persistent_forward_cuda.cu): a block owns a tile of rows of one model. The
// recurrent weights stay in shared memory as they are, [gates H][H]; the gradients of a step's
// gates go there, and to global memory for the GEMMs that make the gradients of x and of the
// weights afterwards. Gradients of h and c stay in registers.
#include "common/cuda_launch.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_cells.h"
#include "rnn/rnn_cuda_tile.h"
#include "rnn/rnn_cuda_walk.h"

namespace modelbatch {
namespace {

// What a thread reads of a step: the gates (LSTM, GRU), c and the previous c (LSTM), the previous
// h (GRU) or y (RNN), and the gradient of y. Read one step ahead.
template <int cell, int rows>
struct Saved {
  float gates[rows][cell == MB_RNN_CUDA_LSTM || cell == MB_RNN_CUDA_GRU ? 4 : 1];
  float state[rows], previous[rows], grad_y[rows];

  __device__ void load(const mb_rnn_persistent_backward& p, const RnnPlace<rows>& place,
                       const RnnWalk& walk) {
    const int H = (int)p.hidden;
    for (int r = 0; r < rows; ++r) {
      const int b = place.first + r;
      if (place.element >= H || b >= walk.batch()) continue;
      const int row = walk.first_row() + b, at = row * H + place.element;
      const int at_start = b * H + place.element;
      const int before = (walk.prev_first_row() + b) * H + place.element;
      const bool follows = b < walk.prev_rows();
      if constexpr (cell == MB_RNN_CUDA_LSTM || cell == MB_RNN_CUDA_GRU) {
        const float* from = slice_of<const float>(p.gates, place.model) + row * 4 * H;
        for (int gate = 0; gate < 4; ++gate) gates[r][gate] = from[gate * H + place.element];
        const mb_rnn_array& states = cell == MB_RNN_CUDA_LSTM ? p.cells : p.y;
        const mb_rnn_array& starts = cell == MB_RNN_CUDA_LSTM ? p.c0 : p.h0;
        previous[r] = follows ? slice_of<const float>(states, place.model)[before]
                              : slice_of<const float>(starts, place.model)[at_start];
      }
      if (cell == MB_RNN_CUDA_LSTM) state[r] = slice_of<const float>(p.cells, place.model)[at];
      if (cell == MB_RNN_CUDA_TANH || cell == MB_RNN_CUDA_RELU) {
        state[r] = slice_of<const float>(p.y, place.model)[at];
      }
      grad_y[r] =
          p.grad_y.data == nullptr ? 0.0f : slice_of<const float>(p.grad_y, place.model)[at];
    }
  }
};

template <int cell, int gates, int rows>
__global__ void __launch_bounds__(kRnnThreads, 2)
    backward_kernel(const __grid_constant__ mb_rnn_persistent_backward p, int64_t tiles) {
  MB_DYNAMIC_SHARED(float, shared);
  const RnnPlace<rows> place(tiles);
  const int H = (int)p.hidden;
  const bool exists = place.element < H;
  float* grads = shared;                              // [gates H][tile]
  float* weights = grads + gates * H * place.stride;  // [gates H][H]
  const float* w_hh = slice_of<const float>(p.w_hh, place.model);
  for (int i = place.thread; i < gates * H * H; i += place.threads) weights[i] = w_hh[i];
  float grad_h[rows], grad_c[rows];
  for (int r = 0; r < rows; ++r) {
    const bool inside = exists && place.first + r < p.batch;
    const int at = (place.first + r) * H + place.element;
    const bool has_h = inside && p.grad_h_n.data != nullptr;
    grad_h[r] = has_h ? slice_of<const float>(p.grad_h_n, place.model)[at] : 0.0f;
    const bool has_c = cell == MB_RNN_CUDA_LSTM && inside && p.grad_c_n.data != nullptr;
    grad_c[r] = has_c ? slice_of<const float>(p.grad_c_n, place.model)[at] : 0.0f;
  }
  RnnWalk walk(p.runs, true);
  Saved<cell, rows> saved;
  saved.load(p, place, walk);
  for (bool goes_on = true; goes_on;) {
    const int first = walk.first_row() + place.first;
    const int active = exists ? walk.batch() - place.first : 0;  // of this thread's rows
    float recurrent[gates][rows];                                // gradients of h W_hh^T
    float direct[rows];                                          // GRU: what goes past the GEMM
    for (int r = 0; r < rows; ++r) {
      direct[r] = 0.0f;
      float grad[gates];
      if (r < active) {
        float* input =
            slice_of<float>(p.grad_input, place.model) + (first + r) * gates * H + place.element;
        const float total = grad_h[r] + saved.grad_y[r];
        if constexpr (cell == MB_RNN_CUDA_LSTM) {
          LstmCell::backward(saved.gates[r], saved.state[r], saved.previous[r], total, grad_c[r],
                             grad);
        } else if constexpr (cell == MB_RNN_CUDA_GRU) {
          float* hidden =
              slice_of<float>(p.grad_hidden, place.model) + (first + r) * gates * H + place.element;
          float hidden_n;
          direct[r] = GruCell::backward(saved.gates[r], saved.previous[r], total, grad, hidden_n);
          input[2 * H] = grad[2];
          grad[2] = hidden_n;
          for (int gate = 0; gate < gates; ++gate) hidden[gate * H] = grad[gate];
        } else {
          grad[0] = RnnCell < cell == MB_RNN_CUDA_RELU > ::backward(saved.state[r], total);
        }
        for (int gate = 0; gate < (cell == MB_RNN_CUDA_GRU ? 2 : gates); ++gate) {
          input[gate * H] = grad[gate];
        }
      }
      for (int gate = 0; gate < gates; ++gate) recurrent[gate][r] = r < active ? grad[gate] : 0.0f;
    }
    if (exists) {
      for (int gate = 0; gate < gates; ++gate) {
        store_rows<rows>(grads + (gate * H + place.element) * place.stride + place.in_tile,
                         recurrent[gate]);
      }
    }
    __syncthreads();
    goes_on = walk.next();
    // Asked for before the products, which take longer than the answer.
    if (goes_on) saved.load(p, place, walk);
    if (active > 0) {
      float sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = 0.0f;
      const float* own_weights = weights + place.element;
      const float* own_grads = grads + place.in_tile;
#pragma unroll 4
      for (int row = 0; row < gates * H; ++row) {
        float d[rows];
        load_rows<rows>(own_grads + row * place.stride, d);
        const float w = own_weights[row * H];
        for (int r = 0; r < rows; ++r) sums[r] += d[r] * w;
      }
      for (int r = 0; r < rows; ++r) {
        if (r < active) grad_h[r] = direct[r] + sums[r];
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < rows; ++r) {
    if (!exists || place.first + r >= p.batch) continue;
    const int at = (place.first + r) * H + place.element;
    if (p.grad_h0.data != nullptr) slice_of<float>(p.grad_h0, place.model)[at] = grad_h[r];
    if (cell == MB_RNN_CUDA_LSTM && p.grad_c0.data != nullptr) {
      slice_of<float>(p.grad_c0, place.model)[at] = grad_c[r];
    }
  }
}

template <int cell, int gates>
cudaError_t launch_backward(const mb_rnn_persistent_backward& launch) {
  const auto floats = [&](const RnnTiles& t) {
    return gates * launch.hidden * (t.tile() + kRnnPadding + launch.hidden);
  };
  const RnnTiles tiles(launch.num_models, launch.hidden, launch.batch, floats);
  return tiles.rows == 8 ? launch_tiles(backward_kernel<cell, gates, 8>, tiles, launch)
                         : launch_tiles(backward_kernel<cell, gates, 4>, tiles, launch);
}

}  // namespace
}  // namespace modelbatch

extern "C" cudaError_t mb_rnn_persistent_backward_cuda(mb_rnn_persistent_backward launch) {
  using namespace modelbatch;
  if (!can_persist(launch.hidden, launch.runs)) return cudaErrorInvalidValue;
  if (launch.num_models == 0 || launch.batch == 0) return cudaSuccess;
  switch (launch.cell) {
    case MB_RNN_CUDA_LSTM:
      return launch_backward<MB_RNN_CUDA_LSTM, 4>(launch);
    case MB_RNN_CUDA_GRU:
      return launch_backward<MB_RNN_CUDA_GRU, 3>(launch);
    case MB_RNN_CUDA_TANH:
      return launch_backward<MB_RNN_CUDA_TANH, 1>(launch);
    case MB_RNN_CUDA_RELU:
      return launch_backward<MB_RNN_CUDA_RELU, 1>(launch);
    default:
      return cudaErrorInvalidValue;
  }
}
