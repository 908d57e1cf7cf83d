/* The kernels of the rnn family: one layer and direction of one model's LSTM, GRU or RNN. */
#ifndef MODELBATCH_RNN_RNN_H
#define MODELBATCH_RNN_RNN_H

#include <stdint.h>

enum { MB_RNN_F32 = 0, MB_RNN_F64 = 1, MB_RNN_DTYPES = 2 };
enum { MB_RNN_LSTM = 0, MB_RNN_GRU = 1, MB_RNN_TANH = 2, MB_RNN_RELU = 3, MB_RNN_CELLS = 4 };

/* Rows of all steps lie one after another; step t has rows first_row[t] to first_row[t + 1], not
 * more than the step before. Its first row belongs to the batch's first sequence, and so on. */
typedef struct mb_rnn_shape {
  int64_t batch;            /* B */
  int64_t steps;            /* T */
  int64_t inputs;           /* I */
  int64_t hidden;           /* H */
  int64_t outputs;          /* P; H without projection */
  int64_t reverse;          /* steps run from the last one to the first */
  const int64_t* first_row; /* [T + 1] */
} mb_rnn_shape;

/* Everything is dense; G = 4 gates i, f, g, o of the LSTM, 3 (r, z, n) or 1. NULL where absent. */
typedef struct mb_rnn_forward {
  const void *x, *h0, *c0; /* [N, I], [B, P], [B, H] */
  const void *w_ih, *w_hh; /* [G H, I], [G H, P] */
  const void *b_ih, *b_hh; /* [G H] */
  const void* w_hr;        /* [P, H] */
  void *y, *h_n, *c_n;     /* [N, P], [B, P], [B, H] */
  void *gates, *cells;     /* [N, 4 H]: i, f, g, o or r, z, n and W_hn h + b_hn; c [N, H] */
} mb_rnn_forward;

/* Results that are not wanted are NULL. */
typedef struct mb_rnn_backward {
  const void *grad_y, *grad_h_n, *grad_c_n;
  const void *x, *h0, *c0, *w_ih, *w_hh, *w_hr, *y, *gates, *cells;
  void *dx, *dh0, *dc0;
  void *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr; /* all or none; db_hh: GRU only */
} mb_rnn_backward;

typedef struct mb_rnn_cell_kernels {
  /* Elements of workspace for `rows` sequences; it need not be initialised. */
  int64_t (*forward_workspace)(const mb_rnn_shape* shape, int64_t rows);
  /* Sequences begin <= b < end. A sequence's results do not depend on the range. */
  void (*forward)(const mb_rnn_shape* shape, const mb_rnn_forward* args, int64_t begin, int64_t end,
                  void* workspace);
  int64_t (*backward_workspace)(const mb_rnn_shape* shape);
  void (*backward)(const mb_rnn_shape* shape, const mb_rnn_backward* args, void* workspace);
} mb_rnn_cell_kernels;

typedef struct mb_rnn_kernels {
  mb_rnn_cell_kernels cells[MB_RNN_CELLS][MB_RNN_DTYPES];
} mb_rnn_kernels;

#endif /* MODELBATCH_RNN_RNN_H */
