/* The backward kernels for one dtype; no include guard. See rnn_cpu.c for what the includer
 * defines.
 *
 * Steps follow one another in the opposite order of the forward. The gradients of the gates' sums
 * are kept for a block of steps, small enough for the second-level cache: products that do not
 * depend on the recurrence (weights, biases, x) are computed for a block at a time. Their sums run
 * over blocks, and within a block over rows as they lie in memory.
 *
 * Slots of the gradients: the gates', and for the GRU r, z, what W_hn h adds to n, n.
 */

typedef struct NAME(backward_space) {
  REAL* w_hh;       /* packed: [G H, P] */
  REAL* w_ih;       /* packed: [G H, I], for the GRU [2 H, I] */
  REAL* w_in;       /* packed, GRU: [H, I] */
  REAL* projection; /* w_hr, packed: [P, H] */
  REAL* dh;         /* [B, P] */
  REAL* dc;         /* [B, H] */
  REAL* dh_full;    /* [B, H] before the projection */
  REAL* h_full;     /* [B, H]: o tanh(c) */
  REAL* dsums;      /* [rows of a block, slots, H] */
  int64_t block_rows;
  int64_t elements;
} NAME(backward_space);

static NAME(backward_space) NAME(backward_space_of)(int cell, const mb_rnn_shape* s, REAL* memory) {
  const int64_t H = s->hidden, slots = NAME(slots)(cell), gates = cell == MB_RNN_GRU ? 3 : slots;
  const int64_t projected = cell == MB_RNN_LSTM;
  NAME(backward_space) space;
  space.block_rows = most(BLOCK_ROWS, BLOCK_BYTES / (int64_t)sizeof(REAL) / (slots * H));
  space.block_rows = least(most(space.block_rows, s->batch), s->first_row[s->steps]);
  int64_t at = 0;
#define PLACE(field, count)                          \
  space.field = memory == NULL ? NULL : memory + at; \
  at += rounded_up(count)
  PLACE(w_hh, GEMM.packed_size(gates * H, s->outputs));
  PLACE(w_ih, GEMM.packed_size((cell == MB_RNN_GRU ? 2 : gates) * H, s->inputs));
  PLACE(w_in, cell == MB_RNN_GRU ? GEMM.packed_size(H, s->inputs) : 0);
  PLACE(projection, projected ? GEMM.packed_size(s->outputs, H) : 0);
  PLACE(dh, s->batch * s->outputs);
  PLACE(dc, cell == MB_RNN_LSTM ? s->batch * H : 0);
  PLACE(dh_full, projected ? s->batch * H : 0);
  PLACE(h_full, projected ? s->batch * H : 0);
  PLACE(dsums, space.block_rows * slots * H);
#undef PLACE
  space.elements = at;
  return space;
}

/* One row of one step. Pointers are to its H hidden units. */
typedef struct NAME(unit_grads) {
  const REAL *gates, *cells, *c_previous; /* [slots, H], [H], [H] */
  const REAL *y, *h_previous;
  const REAL* dh_in;
  REAL *dh, *dc, *h_full; /* dh: what reaches the previous step past the weights */
  REAL* dsums;            /* [slots, H] */
} NAME(unit_grads);

MB_INLINED void NAME(gate_gradients)(const int cell, NAME(unit_grads) row, int64_t hidden,
                                     int64_t j, int64_t count) {
  const VECTOR dh = NAME(get)(row.dh_in + j, count);
  if (cell == MB_RNN_LSTM) {
    const VECTOR i = NAME(get)(row.gates + j, count);
    const VECTOR f = NAME(get)(row.gates + hidden + j, count);
    const VECTOR g = NAME(get)(row.gates + 2 * hidden + j, count);
    const VECTOR o = NAME(get)(row.gates + 3 * hidden + j, count);
    const VECTOR squashed = NAME(tanh)(NAME(get)(row.cells + j, count));
    const VECTOR dc = NAME(get)(row.dc + j, count) + dh * o * (1 - squashed * squashed);
    NAME(put)(row.dsums + j, dc * g * (i * (1 - i)), count);
    NAME(put)(row.dsums + hidden + j, dc * NAME(get)(row.c_previous + j, count) * (f * (1 - f)),
              count);
    NAME(put)(row.dsums + 2 * hidden + j, dc * i * (1 - g * g), count);
    NAME(put)(row.dsums + 3 * hidden + j, dh * squashed * (o * (1 - o)), count);
    NAME(put)(row.dc + j, dc * f, count);
    if (row.h_full != NULL) NAME(put)(row.h_full + j, o * squashed, count);
  } else if (cell == MB_RNN_GRU) {
    const VECTOR r = NAME(get)(row.gates + j, count);
    const VECTOR z = NAME(get)(row.gates + hidden + j, count);
    const VECTOR n = NAME(get)(row.gates + 2 * hidden + j, count);
    const VECTOR from_h = NAME(get)(row.gates + 3 * hidden + j, count);
    const VECTOR dn = dh * (1 - z) * (1 - n * n);
    const VECTOR dz = dh * (NAME(get)(row.h_previous + j, count) - n) * (z * (1 - z));
    NAME(put)(row.dsums + j, dn * from_h * (r * (1 - r)), count);
    NAME(put)(row.dsums + hidden + j, dz, count);
    NAME(put)(row.dsums + 2 * hidden + j, dn * r, count);
    NAME(put)(row.dsums + 3 * hidden + j, dn, count);
    NAME(put)(row.dh + j, dh * z, count);
  } else {
    const VECTOR y = NAME(get)(row.y + j, count);
    const VECTOR d = cell == MB_RNN_TANH ? dh * (1 - y * y) : NAME(zero_where_not_positive)(dh, y);
    NAME(put)(row.dsums + j, d, count);
  }
}

/* Fetches what step t, whose turn is next, will read of row b; the products of the step in between
 * hide the way. A step has read the c or h that the one before it began with. */
static inline void NAME(prefetch_row)(int cell, const mb_rnn_shape* s, const mb_rnn_backward* args,
                                      int64_t t, int64_t b) {
  const int64_t H = s->hidden, row = s->first_row[t] + b;
  NAME(prefetch)((const REAL*)args->gates + row * 4 * H, 4 * H);
  if (args->grad_y != NULL) {
    NAME(prefetch)((const REAL*)args->grad_y + row * s->outputs, s->outputs);
  }
  const int64_t previous = s->reverse ? t + 1 : t - 1;
  if (previous < 0 || previous >= s->steps) return;
  if (s->first_row[previous] + b >= s->first_row[previous + 1]) return;
  const REAL* states = cell == MB_RNN_LSTM ? args->cells : args->y;
  NAME(prefetch)(states + (s->first_row[previous] + b) * H, H);
}

/* out [columns] += the sums over the rows of [rows, ld]; four partial sums are more accurate than
 * one, and do not wait for each other. */
static void NAME(add_rows)(REAL* out, const REAL* from, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += LANES) {
    const int64_t count = least(LANES, columns - j);
    VECTOR sums[4] = {{0}};
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += NAME(get)(from + (row + i) * ld + j, count);
    }
    for (; row < rows; ++row) sums[0] += NAME(get)(from + row * ld + j, count);
    const VECTOR sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    NAME(put)(out + j, NAME(get)(out + j, count) + sum, count);
  }
}

/* dW_hh += dsums^T h for `rows` rows of the block. */
static void NAME(add_recurrent)(const mb_rnn_shape* s, const mb_rnn_backward* args,
                                const REAL* dsums, int64_t ld, int64_t gates, const REAL* h,
                                int64_t rows) {
  REAL* dw = args->dw_hh;
  GEMM.multiply(dw, s->outputs, dw, s->outputs, dsums, 1, ld, h, s->outputs, gates * s->hidden,
                s->outputs, rows);
}

/* Calls add_recurrent for all rows of the steps begin <= t < end with the h that they began with,
 * for as many rows at a time as have theirs together. */
static void NAME(recurrent_gradient)(const mb_rnn_shape* s, const mb_rnn_backward* args,
                                     const REAL* dsums, int64_t ld, int64_t gates, int64_t begin,
                                     int64_t end) {
  const int64_t P = s->outputs;
  const int64_t* first_row = s->first_row;
  int64_t start = 0, rows = 0; /* of the pending call, in the block */
  const REAL* h = NULL;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t previous = s->reverse ? t + 1 : t - 1;
    const int64_t count = first_row[t + 1] - first_row[t];
    int64_t have = 0;
    if (previous >= 0 && previous < s->steps) {
      have = least(count, first_row[previous + 1] - first_row[previous]);
    }
    for (int part = 0; part < 2; ++part) {
      const int64_t skipped = part == 0 ? 0 : have;
      const int64_t more = part == 0 ? have : count - have;
      if (more == 0) continue;
      const REAL* source = part == 0 ? (const REAL*)args->y + first_row[previous] * P
                                     : (const REAL*)args->h0 + skipped * P;
      const int64_t at = first_row[t] - first_row[begin] + skipped;
      if (rows > 0 && at == start + rows && source == h + rows * P) {
        rows += more;
        continue;
      }
      if (rows > 0) NAME(add_recurrent)(s, args, dsums + start * ld, ld, gates, h, rows);
      start = at;
      rows = more;
      h = source;
    }
  }
  if (rows > 0) NAME(add_recurrent)(s, args, dsums + start * ld, ld, gates, h, rows);
}

/* What the steps begin <= t < end of a block contribute to the weights, the biases and x. */
static void NAME(finish_block)(int cell, const mb_rnn_shape* s, const mb_rnn_backward* args,
                               const NAME(backward_space) * space, int64_t begin, int64_t end) {
  const int64_t H = s->hidden, I = s->inputs, ld = NAME(slots)(cell) * H;
  const int64_t gates = cell == MB_RNN_GRU ? 3 : NAME(slots)(cell);
  const int64_t shared = cell == MB_RNN_GRU ? 2 : gates; /* slots that x and h see alike */
  const int64_t rows = s->first_row[end] - s->first_row[begin];
  const REAL *dsums = space->dsums, *dn = dsums + 3 * H;
  if (args->db_ih != NULL) {
    const REAL* x = (const REAL*)args->x + s->first_row[begin] * I;
    REAL *dw_ih = args->dw_ih, *db_ih = args->db_ih;
    GEMM.multiply(dw_ih, I, dw_ih, I, dsums, 1, ld, x, I, shared * H, I, rows);
    NAME(add_rows)(db_ih, dsums, ld, rows, shared * H);
    if (cell == MB_RNN_GRU) {
      REAL* dw_in = dw_ih + 2 * H * I;
      GEMM.multiply(dw_in, I, dw_in, I, dn, 1, ld, x, I, H, I, rows);
      NAME(add_rows)(db_ih + 2 * H, dn, ld, rows, H);
      NAME(add_rows)(args->db_hh, dsums, ld, rows, 3 * H);
    }
    NAME(recurrent_gradient)(s, args, dsums, ld, gates, begin, end);
  }
  if (args->dx != NULL) {
    REAL* dx = (REAL*)args->dx + s->first_row[begin] * I;
    GEMM.multiply_packed(dx, I, NULL, 0, dsums, ld, 1, space->w_ih, rows, I, shared * H);
    if (cell == MB_RNN_GRU) {
      GEMM.multiply_packed(dx, I, dx, I, dn, ld, 1, space->w_in, rows, I, H);
    }
  }
}

static void NAME(copy_or_zero)(REAL* to, const REAL* from, int64_t count) {
  for (int64_t i = 0; from == NULL && i < count; ++i) to[i] = 0;
  if (from != NULL) NAME(copy)(to, from, count);
}

/* The steps of the block whose first one in order of computation is t. */
static void NAME(find_block)(const mb_rnn_shape* s, int64_t t, int64_t block_rows, int64_t* begin,
                             int64_t* end) {
  const int64_t* first_row = s->first_row;
  *begin = t;
  *end = t + 1;
  if (s->reverse) {
    while (*end < s->steps && first_row[*end + 1] - first_row[t] <= block_rows) ++*end;
  } else {
    while (*begin > 0 && first_row[t + 1] - first_row[*begin - 1] <= block_rows) --*begin;
  }
}

MB_INLINED void NAME(backward_as)(const int cell, const mb_rnn_shape* s,
                                  const mb_rnn_backward* args, REAL* memory) {
  const int64_t B = s->batch, H = s->hidden, P = s->outputs, I = s->inputs;
  const int64_t ld = NAME(slots)(cell) * H;
  const int64_t gates = cell == MB_RNN_GRU ? 3 : NAME(slots)(cell);
  const int is_projected = args->w_hr != NULL;
  const NAME(backward_space) space = NAME(backward_space_of)(cell, s, memory);
  GEMM.pack(space.w_hh, args->w_hh, P, 1, gates * H, P);
  if (is_projected) GEMM.pack(space.projection, args->w_hr, H, 1, P, H);
  if (args->dx != NULL) {
    GEMM.pack(space.w_ih, args->w_ih, I, 1, (cell == MB_RNN_GRU ? 2 : gates) * H, I);
    if (cell == MB_RNN_GRU) {
      GEMM.pack(space.w_in, (const REAL*)args->w_ih + 2 * H * I, I, 1, H, I);
    }
  }
  if (args->db_ih != NULL) {
    NAME(copy_or_zero)(args->dw_ih, NULL, gates * H * I);
    NAME(copy_or_zero)(args->dw_hh, NULL, gates * H * P);
    NAME(copy_or_zero)(args->db_ih, NULL, gates * H);
    if (cell == MB_RNN_GRU) NAME(copy_or_zero)(args->db_hh, NULL, gates * H);
    if (is_projected) NAME(copy_or_zero)(args->dw_hr, NULL, P * H);
  }
  NAME(copy_or_zero)(space.dh, args->grad_h_n, B * P);
  if (cell == MB_RNN_LSTM) NAME(copy_or_zero)(space.dc, args->grad_c_n, B * H);
  /* The block of steps begins with step `block_first` and ends before step `block_end`. */
  int64_t block_first = 0, block_end = 0;
  for (int64_t i = 0; i < s->steps; ++i) {
    const int64_t t = s->reverse ? i : s->steps - 1 - i;
    const int64_t first = s->first_row[t], active = s->first_row[t + 1] - first;
    if (i == 0 || t < block_first || t >= block_end) {
      NAME(find_block)(s, t, space.block_rows, &block_first, &block_end);
    }
    const int64_t previous = s->reverse ? t + 1 : t - 1;
    int64_t have = 0; /* rows that the previous step has */
    if (previous >= 0 && previous < s->steps) {
      have = least(active, s->first_row[previous + 1] - s->first_row[previous]);
    }
    REAL* dsums = space.dsums + (first - s->first_row[block_first]) * ld;
    if (args->grad_y != NULL) {
      const REAL* grad_y = (const REAL*)args->grad_y + first * P;
      for (int64_t j = 0; j < active * P; ++j) space.dh[j] += grad_y[j];
    }
    if (is_projected) {
      GEMM.multiply_packed(space.dh_full, H, NULL, 0, space.dh, P, 1, space.projection, active, H,
                           P);
    }
    for (int64_t b = 0; b < active; ++b) {
      const int64_t at = first + b;
      NAME(unit_grads) row = {.dsums = dsums + b * ld, .dh = space.dh + b * P};
      row.dh_in = is_projected ? space.dh_full + b * H : row.dh;
      if (cell < MB_RNN_TANH) {
        row.gates = (const REAL*)args->gates + at * 4 * H;
      } else {
        row.y = (const REAL*)args->y + at * P;
      }
      if (cell == MB_RNN_GRU) {
        row.h_previous = b < have ? (const REAL*)args->y + (s->first_row[previous] + b) * P
                                  : (const REAL*)args->h0 + b * P;
      }
      if (cell == MB_RNN_LSTM) {
        row.cells = (const REAL*)args->cells + at * H;
        row.c_previous = b < have ? (const REAL*)args->cells + (s->first_row[previous] + b) * H
                                  : (const REAL*)args->c0 + b * H;
        row.dc = space.dc + b * H;
        row.h_full = is_projected ? space.h_full + b * H : NULL;
      }
      if (cell < MB_RNN_TANH && b < have) NAME(prefetch_row)(cell, s, args, previous, b);
      for (int64_t j = 0; j < H; j += LANES) {
        NAME(gate_gradients)(cell, row, H, j, least(LANES, H - j));
      }
    }
    if (is_projected && args->db_ih != NULL) { /* dW_hr += dh^T h_full */
      REAL* dw = args->dw_hr;
      GEMM.multiply(dw, H, dw, H, space.dh, 1, P, space.h_full, H, P, H, active);
    }
    if (i + 1 < s->steps || args->dh0 != NULL) {
      const REAL* past_weights = cell == MB_RNN_GRU ? space.dh : NULL;
      GEMM.multiply_packed(space.dh, P, past_weights, P, dsums, ld, 1, space.w_hh, active, P,
                           gates * H);
    }
    if (t == (s->reverse ? block_end - 1 : block_first)) {
      NAME(finish_block)(cell, s, args, &space, block_first, block_end);
    }
  }
  if (args->dh0 != NULL) NAME(copy)(args->dh0, space.dh, B * P);
  if (args->dc0 != NULL && cell == MB_RNN_LSTM) NAME(copy)(args->dc0, space.dc, B * H);
}

#define BACKWARD_OF(stem, cell)                                                         \
  static int64_t NAME(stem##_backward_workspace)(const mb_rnn_shape* s) {               \
    return NAME(backward_space_of)(cell, s, NULL).elements;                             \
  }                                                                                     \
  static void NAME(stem##_backward)(const mb_rnn_shape* s, const mb_rnn_backward* args, \
                                    void* workspace) {                                  \
    NAME(backward_as)(cell, s, args, workspace);                                        \
  }
BACKWARD_OF(lstm, MB_RNN_LSTM)
BACKWARD_OF(gru, MB_RNN_GRU)
BACKWARD_OF(rnn_tanh, MB_RNN_TANH)
BACKWARD_OF(rnn_relu, MB_RNN_RELU)
#undef BACKWARD_OF

#undef NAME
#undef REAL
#undef VECTOR
#undef INTS
#undef LANES
#undef PANEL
#undef GEMM
