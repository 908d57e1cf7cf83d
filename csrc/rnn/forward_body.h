/* The forward kernels for one dtype; no include guard. See rnn_cpu.c for what the includer defines.
 *
 * A step takes hidden units in blocks of one panel of the matrix product: it computes the panels of
 * all gates for all rows, and applies the gates while they are in the first-level cache.
 */

/* Hidden units j of a block hold `slots` sums: those of the gates, and for the GRU what h adds to
 * the gate n, which the gate r multiplies. */
static inline int64_t NAME(slots)(int cell) { return cell < MB_RNN_TANH ? 4 : 1; }

/* Elements that the packed weights of a block's slots begin after. Slots of the GRU's gate n see
 * only x or only h. */
static inline int64_t NAME(slot_depth)(int cell, const mb_rnn_shape* s, int64_t slot) {
  if (cell == MB_RNN_GRU && slot == 2) return s->inputs;
  if (cell == MB_RNN_GRU && slot == 3) return s->outputs;
  return s->inputs + s->outputs;
}

typedef struct NAME(forward_space) {
  REAL* weights;    /* [blocks, slots, depth of the slot, panel] */
  REAL* bias;       /* [blocks, slots, panel] */
  REAL* projection; /* w_hr, packed */
  REAL* operand[2]; /* [rows, I + P]: x and h of the step, and the h of the next one */
  REAL* sums;       /* [rows, slots, panel] */
  REAL* c;          /* [rows, blocks panel] */
  REAL* h;          /* [rows, H] before the projection */
  int64_t elements;
} NAME(forward_space);

static NAME(forward_space)
    NAME(forward_space_of)(int cell, const mb_rnn_shape* s, int64_t rows, REAL* memory) {
  const int64_t blocks = (s->hidden + PANEL - 1) / PANEL;
  const int64_t slots = NAME(slots)(cell);
  const int64_t projected = s->outputs != s->hidden || cell == MB_RNN_LSTM;
  int64_t depth = 0;
  for (int64_t slot = 0; slot < slots; ++slot) depth += NAME(slot_depth)(cell, s, slot);
  NAME(forward_space) space;
  int64_t at = 0;
#define PLACE(field, count)                          \
  space.field = memory == NULL ? NULL : memory + at; \
  at += rounded_up(count)
  PLACE(weights, blocks * PANEL * depth);
  PLACE(bias, blocks * slots * PANEL);
  PLACE(projection, projected ? GEMM.packed_size(s->hidden, s->outputs) : 0);
  PLACE(operand[0], rows * (s->inputs + s->outputs));
  PLACE(operand[1], rows * (s->inputs + s->outputs));
  PLACE(sums, rows * slots * PANEL);
  PLACE(c, cell == MB_RNN_LSTM ? rows * blocks * PANEL : 0);
  PLACE(h, projected ? rows * s->hidden : 0);
#undef PLACE
  space.elements = at;
  return space;
}

/* Packs the weights of one slot of one block, and adds up its biases. */
static void NAME(pack_slot)(int cell, const mb_rnn_shape* s, const mb_rnn_forward* args,
                            int64_t slot, int64_t unit, int64_t units, REAL* weights, REAL* bias) {
  const int64_t gate = cell == MB_RNN_GRU && slot == 3 ? 2 : slot;
  const int64_t row = gate * s->hidden + unit;
  const REAL *b_ih = args->b_ih, *b_hh = args->b_hh;
  const int has_x = !(cell == MB_RNN_GRU && slot == 3);
  const int has_h = !(cell == MB_RNN_GRU && slot == 2);
  for (int64_t j = 0; j < PANEL; ++j) {
    const int exists = j < units;
    bias[j] = exists && has_x && b_ih != NULL ? b_ih[row + j] : 0;
    if (exists && has_h && b_hh != NULL) bias[j] += b_hh[row + j];
  }
  if (has_x) {
    GEMM.pack(weights, (const REAL*)args->w_ih + row * s->inputs, 1, s->inputs, s->inputs, units);
    weights += s->inputs * PANEL;
  }
  if (has_h) {
    GEMM.pack(weights, (const REAL*)args->w_hh + row * s->outputs, 1, s->outputs, s->outputs,
              units);
  }
}

/* Where the results of one row's hidden units go. */
typedef struct NAME(unit_row) {
  const REAL* sums; /* [slots, panel] */
  const REAL* h_previous;
  REAL *c, *gates, *cells, *y, *h_next;
} NAME(unit_row);

/* LANES or fewer units j of a block whose first unit is `unit`. */
MB_INLINED void NAME(apply_gates)(const int cell, NAME(unit_row) row, int64_t hidden, int64_t unit,
                                  int64_t j, int64_t count) {
  const int64_t at = unit + j;
  VECTOR h;
  if (cell == MB_RNN_LSTM) {
    const VECTOR i = NAME(sigmoid)(NAME(load)(row.sums + j));
    const VECTOR f = NAME(sigmoid)(NAME(load)(row.sums + PANEL + j));
    const VECTOR g = NAME(tanh)(NAME(load)(row.sums + 2 * PANEL + j));
    const VECTOR o = NAME(sigmoid)(NAME(load)(row.sums + 3 * PANEL + j));
    const VECTOR c = f * NAME(load)(row.c + at) + i * g;
    h = o * NAME(tanh)(c);
    NAME(store)(row.c + at, c);
    NAME(put)(row.gates + at, i, count);
    NAME(put)(row.gates + hidden + at, f, count);
    NAME(put)(row.gates + 2 * hidden + at, g, count);
    NAME(put)(row.gates + 3 * hidden + at, o, count);
    NAME(put)(row.cells + at, c, count);
  } else if (cell == MB_RNN_GRU) {
    const VECTOR r = NAME(sigmoid)(NAME(load)(row.sums + j));
    const VECTOR z = NAME(sigmoid)(NAME(load)(row.sums + PANEL + j));
    const VECTOR from_h = NAME(load)(row.sums + 3 * PANEL + j);
    const VECTOR n = NAME(tanh)(NAME(load)(row.sums + 2 * PANEL + j) + r * from_h);
    h = (NAME(get)(row.h_previous + at, count) - n) * z + n;
    NAME(put)(row.gates + at, r, count);
    NAME(put)(row.gates + hidden + at, z, count);
    NAME(put)(row.gates + 2 * hidden + at, n, count);
    NAME(put)(row.gates + 3 * hidden + at, from_h, count);
  } else {
    const VECTOR sum = NAME(load)(row.sums + j);
    h = cell == MB_RNN_TANH ? NAME(tanh)(sum) : NAME(bounded)(sum, 0, INFINITY);
  }
  if (row.y != NULL) NAME(put)(row.y + at, h, count);
  NAME(put)(row.h_next + at, h, count);
}

MB_INLINED void NAME(forward_as)(const int cell, const mb_rnn_shape* s, const mb_rnn_forward* args,
                                 int64_t begin, int64_t end, REAL* memory) {
  const int64_t rows = end - begin, H = s->hidden, P = s->outputs, I = s->inputs;
  const int64_t depth = I + P, slots = NAME(slots)(cell);
  const int64_t padded = (H + PANEL - 1) / PANEL * PANEL;
  const int is_projected = args->w_hr != NULL;
  NAME(forward_space) space = NAME(forward_space_of)(cell, s, rows, memory);
  REAL* at = space.weights;
  for (int64_t unit = 0; unit < H; unit += PANEL) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      NAME(pack_slot)(cell, s, args, slot, unit, least(PANEL, H - unit), at,
                      space.bias + (unit * slots + slot * PANEL));
      at += NAME(slot_depth)(cell, s, slot) * PANEL;
    }
  }
  if (is_projected) GEMM.pack(space.projection, args->w_hr, 1, H, H, P);
  for (int64_t b = 0; b < rows; ++b) {
    const REAL* h0 = (const REAL*)args->h0 + (begin + b) * P;
    NAME(copy)(space.operand[0] + b * depth + I, h0, P);
    NAME(copy)(space.operand[1] + b * depth + I, h0, P);
    if (cell == MB_RNN_LSTM) {
      REAL* c = space.c + b * padded;
      NAME(copy)(c, (const REAL*)args->c0 + (begin + b) * H, H);
      for (int64_t j = H; j < padded; ++j) c[j] = 0;
    }
  }
  for (int64_t i = 0; i < s->steps; ++i) {
    const int64_t t = s->reverse ? s->steps - 1 - i : i;
    const int64_t first = s->first_row[t] + begin;
    const int64_t active = least(s->first_row[t + 1] - s->first_row[t], end) - begin;
    REAL* operand = space.operand[i & 1];
    REAL* next = space.operand[(i + 1) & 1];
    for (int64_t b = 0; b < active; ++b) {
      NAME(copy)(operand + b * depth, (const REAL*)args->x + (first + b) * I, I);
    }
    const REAL* weights = space.weights;
    for (int64_t unit = 0; active > 0 && unit < H; unit += PANEL) {
      const int64_t units = least(PANEL, H - unit);
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t slot_depth = NAME(slot_depth)(cell, s, slot);
        const REAL* from = cell == MB_RNN_GRU && slot == 3 ? operand + I : operand;
        GEMM.multiply_packed(space.sums + slot * PANEL, slots * PANEL,
                             space.bias + unit * slots + slot * PANEL, 0, from, depth, 1, weights,
                             active, units > LANES ? PANEL : LANES, slot_depth);
        weights += slot_depth * PANEL;
      }
      for (int64_t b = 0; b < active; ++b) {
        NAME(unit_row)
        row = {.sums = space.sums + b * slots * PANEL, .h_previous = operand + b * depth + I};
        if (cell == MB_RNN_LSTM) {
          row.c = space.c + b * padded;
          row.cells = (REAL*)args->cells + (first + b) * H;
        }
        if (cell < MB_RNN_TANH) row.gates = (REAL*)args->gates + (first + b) * 4 * H;
        row.y = is_projected ? NULL : (REAL*)args->y + (first + b) * P;
        row.h_next = is_projected ? space.h + b * H : next + b * depth + I;
        for (int64_t j = 0; j < units; j += LANES) {
          NAME(apply_gates)(cell, row, H, unit, j, least(LANES, units - j));
        }
      }
    }
    if (is_projected && active > 0) {
      REAL* y = (REAL*)args->y + first * P;
      GEMM.multiply_packed(y, P, NULL, 0, space.h, H, 1, space.projection, active, P, H);
      for (int64_t b = 0; b < active; ++b) {
        NAME(copy)(next + b * depth + I, y + b * P, P);
      }
    }
  }
  /* What follows a sequence's last step: step 0 backwards, otherwise the last one that has it. */
  int64_t t = s->reverse ? 0 : s->steps - 1;
  for (int64_t b = begin; b < end; ++b) {
    while (t > 0 && s->first_row[t + 1] - s->first_row[t] <= b) --t;
    const int has_steps = s->first_row[t + 1] - s->first_row[t] > b;
    const int64_t row = s->first_row[t] + b;
    const REAL* h = has_steps ? (const REAL*)args->y + row * P : (const REAL*)args->h0 + b * P;
    NAME(copy)((REAL*)args->h_n + b * P, h, P);
    if (cell == MB_RNN_LSTM) {
      const REAL* c =
          has_steps ? (const REAL*)args->cells + row * H : (const REAL*)args->c0 + b * H;
      NAME(copy)((REAL*)args->c_n + b * H, c, H);
    }
  }
}

#define FORWARD_OF(stem, cell)                                                         \
  static int64_t NAME(stem##_forward_workspace)(const mb_rnn_shape* s, int64_t rows) { \
    return NAME(forward_space_of)(cell, s, rows, NULL).elements;                       \
  }                                                                                    \
  static void NAME(stem##_forward)(const mb_rnn_shape* s, const mb_rnn_forward* args,  \
                                   int64_t begin, int64_t end, void* workspace) {      \
    NAME(forward_as)(cell, s, args, begin, end, workspace);                            \
  }
FORWARD_OF(lstm, MB_RNN_LSTM)
FORWARD_OF(gru, MB_RNN_GRU)
FORWARD_OF(rnn_tanh, MB_RNN_TANH)
FORWARD_OF(rnn_relu, MB_RNN_RELU)
#undef FORWARD_OF
