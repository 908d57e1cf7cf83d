/* Launchers of the rnn family: every model in one launch, on a stream, without waiting.
 *
 * A layer runs in one of two ways. Step by step: a batched GEMM makes h W_hh^T of all models, then
 * one of the step kernels here does the rest of the step. Persistent (float32, H <= 64, no
 * projection): one launch does all steps, a block owns some rows of one model's batch.
 */
#ifndef MODELBATCH_RNN_RNN_CUDA_H
#define MODELBATCH_RNN_RNN_CUDA_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of x and y. "Wide" below is float64 for float64 and float32 for the others. */
enum { MB_RNN_CUDA_F32, MB_RNN_CUDA_F64, MB_RNN_CUDA_BF16, MB_RNN_CUDA_F16 };

enum { MB_RNN_CUDA_LSTM, MB_RNN_CUDA_GRU, MB_RNN_CUDA_TANH, MB_RNN_CUDA_RELU };

/* The slice of model m begins m * model_stride elements after `data`; 0: all models share it. A
 * slice is dense unless a comment says otherwise. */
typedef struct mb_rnn_array {
  void* data; /* NULL where absent */
  int64_t model_stride;
} mb_rnn_array;

/* One step of all models. `rows` rows of the batch take part, the first `prev_rows` of them took
 * part in the step before, and the others begin with their initial states. G is 4, 3 or 1. */
typedef struct mb_rnn_forward_step {
  int cell, dtype;
  int64_t num_models, hidden, rows, prev_rows;
  mb_rnn_array projected;   /* [rows, G H] of x W_ih^T, wide, may be `gates` or `y` */
  int64_t projected_stride; /* from row to row */
  mb_rnn_array recurrent;   /* [rows, G H] of h W_hh^T, wide */
  mb_rnn_array b_ih, b_hh;  /* [G H] */
  mb_rnn_array c0;          /* [B, H] */
  mb_rnn_array prev_cells;  /* [prev_rows, H], wide */
  mb_rnn_array state;       /* [B, H]: h, updated; with projection o tanh(c) */
  mb_rnn_array y;           /* [rows, H]; NULL with projection */
  mb_rnn_array c_n;         /* [B, H], written */
  mb_rnn_array gates;       /* [rows, 4 H], wide */
  mb_rnn_array cells;       /* [rows, H], wide */
  cudaStream_t stream;
} mb_rnn_forward_step;

cudaError_t mb_rnn_forward_step_cuda(mb_rnn_forward_step step);

typedef struct mb_rnn_backward_step {
  int cell, dtype;
  int64_t num_models, hidden, rows, prev_rows;
  mb_rnn_array grad_y;      /* [rows, H] or NULL */
  mb_rnn_array grad_h;      /* [B, H], wide: what the later steps' GEMMs sent here */
  mb_rnn_array grad_direct; /* GRU: [B, H], wide, updated: what they sent past the GEMM */
  mb_rnn_array grad_c;      /* LSTM: [B, H], wide, updated */
  mb_rnn_array c0;          /* [B, H] */
  mb_rnn_array prev_cells;  /* [prev_rows, H], wide */
  mb_rnn_array h0;          /* GRU: [B, H] */
  mb_rnn_array prev_y;      /* GRU: [prev_rows, H] */
  mb_rnn_array y;           /* RNN: [rows, H] */
  mb_rnn_array gates;       /* [rows, 4 H], wide */
  mb_rnn_array cells;       /* [rows, H], wide */
  mb_rnn_array grad_input;  /* [rows, G H], written: of x W_ih^T + b_ih */
  mb_rnn_array grad_hidden; /* GRU: [rows, 3 H], written: of h W_hh^T + b_hh */
  mb_rnn_array unprojected; /* LSTM: [rows, H] or NULL, written: o tanh(c) */
  cudaStream_t stream;
} mb_rnn_backward_step;

cudaError_t mb_rnn_backward_step_cuda(mb_rnn_backward_step step);

/* The states that the steps of a run began with. A run is consecutive steps of `batch` rows each;
 * row b of a step follows row b of the step before in the order of computation, or h0. */
typedef struct mb_rnn_previous {
  int element_size; /* 2, 4 or 8 bytes */
  int reverse;
  int64_t num_models, columns;
  int64_t first_row, steps, batch; /* the run */
  int64_t neighbour; /* rows of the step before the run, reverse: after it; 0 where none is */
  mb_rnn_array y;    /* [N, columns] */
  mb_rnn_array h0;   /* [B, columns] */
  mb_rnn_array to;   /* [N, columns] */
  cudaStream_t stream;
} mb_rnn_previous;

cudaError_t mb_rnn_previous_cuda(mb_rnn_previous previous);

/* to[m, c] = the sum over rows of from[m, row, c]; from [M, rows, columns], to [M, columns]. */
cudaError_t mb_rnn_bias_gradient_cuda(int dtype, int64_t num_models, int64_t rows, int64_t columns,
                                      const void* from, void* to, cudaStream_t stream);

/* to[m, i] = a[m, i] + b[m, i] for `count` elements of each model, a wide, b and `to` of the dtype.
 * b may be absent. */
cudaError_t mb_rnn_add_cuda(int dtype, int64_t num_models, int64_t count, mb_rnn_array a,
                            mb_rnn_array b, mb_rnn_array to, cudaStream_t stream);

/* ---- all steps in one launch ----------------------------------------------------------------- */

enum { MB_RNN_PERSISTENT_HIDDEN = 64, MB_RNN_MAX_RUNS = 128 };

/* The steps from the first to the last, as runs of steps with equally many rows, at least one. */
typedef struct mb_rnn_runs {
  int32_t count, reverse;
  int64_t rows; /* of all steps */
  int32_t steps[MB_RNN_MAX_RUNS], batch[MB_RNN_MAX_RUNS];
} mb_rnn_runs;

typedef struct mb_rnn_persistent_forward {
  int cell;
  int64_t num_models, hidden, batch;
  mb_rnn_runs runs;
  mb_rnn_array projected;   /* [N, G H], may be `gates` or `y` */
  int64_t projected_stride; /* from row to row */
  mb_rnn_array w_hh;        /* [G H, H] */
  mb_rnn_array b_ih, b_hh;  /* [G H] */
  mb_rnn_array h0, c0;      /* [B, H] */
  mb_rnn_array y;           /* [N, H] */
  mb_rnn_array h_n, c_n;    /* [B, H] */
  mb_rnn_array gates;       /* [N, 4 H] */
  mb_rnn_array cells;       /* [N, H] */
  cudaStream_t stream;
} mb_rnn_persistent_forward;

cudaError_t mb_rnn_persistent_forward_cuda(mb_rnn_persistent_forward launch);

typedef struct mb_rnn_persistent_backward {
  int cell;
  int64_t num_models, hidden, batch;
  mb_rnn_runs runs;
  mb_rnn_array grad_y;             /* [N, H] or NULL */
  mb_rnn_array grad_h_n, grad_c_n; /* [B, H] or NULL */
  mb_rnn_array w_hh;               /* [G H, H] */
  mb_rnn_array h0, c0;             /* [B, H] */
  mb_rnn_array y, gates, cells;    /* [N, H], [N, 4 H], [N, H] */
  mb_rnn_array grad_input;         /* [N, G H], written */
  mb_rnn_array grad_hidden;        /* GRU: [N, 3 H], written */
  mb_rnn_array grad_h0, grad_c0;   /* [B, H] or NULL */
  cudaStream_t stream;
} mb_rnn_persistent_backward;

cudaError_t mb_rnn_persistent_backward_cuda(mb_rnn_persistent_backward launch);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_RNN_RNN_CUDA_H */
