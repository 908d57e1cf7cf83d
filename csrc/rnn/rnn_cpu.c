/* LSTM, GRU and RNN of one model.
 *
 * access_body.h, forward_body.h and backward_body.h are the code of one dtype; they are included
 * once for each. The includer defines
 *   NAME(stem)           the stem with the dtype's suffix
 *   REAL, VECTOR, INTS   the elements, vectors of them, and integers of their size
 *   LANES, PANEL         of a vector, and of a panel of the matrix products
 *   GEMM                 the table of the matrix products
 * and the last one undefines them.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "common/isa.h"
#include "common/vector_functions.h"
#include "gemm/gemm.h"
#include "rnn/rnn.h"

extern const mb_gemm_kernels MB_NAME(mb_gemm_kernels);

/* A block of steps in the backward: its size where that is enough rows for long sums. */
#define BLOCK_ROWS 128
#define BLOCK_BYTES (256 * 1024)

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Parts of the workspace begin at cache lines. */
static inline int64_t rounded_up(int64_t elements) { return (elements + 15) / 16 * 16; }

#define NAME(stem) stem##_f32
#define REAL float
#define VECTOR f32v
#define INTS i32v
#define LANES MB_F32_LANES
#define PANEL (2 * MB_F32_LANES)
#define GEMM MB_NAME(mb_gemm_kernels).f32
#include "rnn/access_body.h"
#include "rnn/forward_body.h"
/* after the forward, whose helpers it uses */
#include "rnn/backward_body.h"

#define NAME(stem) stem##_f64
#define REAL double
#define VECTOR f64v
#define INTS i64v
#define LANES MB_F64_LANES
#define PANEL (2 * MB_F64_LANES)
#define GEMM MB_NAME(mb_gemm_kernels).f64
#include "rnn/access_body.h"
#include "rnn/forward_body.h"
/* after the forward, whose helpers it uses */
#include "rnn/backward_body.h"

#define CELL(stem, dtype)                                   \
  {.forward_workspace = stem##_forward_workspace_##dtype,   \
   .forward = stem##_forward_##dtype,                       \
   .backward_workspace = stem##_backward_workspace_##dtype, \
   .backward = stem##_backward_##dtype}

extern const mb_rnn_kernels MB_NAME(mb_rnn_kernels);
const mb_rnn_kernels MB_NAME(mb_rnn_kernels) = {
    .cells = {{CELL(lstm, f32), CELL(lstm, f64)},
              {CELL(gru, f32), CELL(gru, f64)},
              {CELL(rnn_tanh, f32), CELL(rnn_tanh, f64)},
              {CELL(rnn_relu, f32), CELL(rnn_relu, f64)}},
};
