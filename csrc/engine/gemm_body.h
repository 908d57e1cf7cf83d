/* The products of a linear layer: samples in the lanes, weights as torch keeps them. For one dtype;
 * the includer defines what engine_cpu.c lists. */

/* z[o, lanes] = bias[o] + sum over k of w[o * out_step + k * in_step] x[k, lanes] for R outputs and
 * V vectors of samples. `add`: to what z holds, without a bias. Long sums are sums of shorter ones,
 * whose rounding errors stay smaller. */
INLINED void NAME(block)(const REAL* w, int64_t out_step, int64_t in_step, const REAL* x,
                         int64_t depth, const REAL* bias, REAL* z, const int R, const int V,
                         const int relu, const int add) {
  for (int64_t begin = 0; begin < depth; begin += SUM_LENGTH) {
    const int64_t end = depth - begin < SUM_LENGTH ? depth : begin + SUM_LENGTH;
    VEC sum[ROWS][2];
    UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int v = 0; v < V; ++v) sum[r][v] = (VEC){0}; }
    for (int64_t k = begin; k < end; ++k) {
      VEC in[2];
      UNROLL for (int v = 0; v < V; ++v) in[v] = LOAD(x + (k * V + v) * LANES);
      UNROLL for (int r = 0; r < R; ++r) {
        const VEC factor = BROADCAST(w[r * out_step + k * in_step]);
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] += factor * in[v];
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int v = 0; v < V; ++v) {
        REAL* to = z + (r * V + v) * LANES;
        VEC value = sum[r][v];
        if (add || begin > 0) {
          value += LOAD(to);
        } else if (bias != NULL) {
          value += BROADCAST(bias[r]);
        }
        if (relu && end == depth) value = (VEC)((INTEGERS)value & ~(value < 0)); /* NaN stays */
        STORE(to, value);
      }
    }
  }
}

/* `count` outputs, at most ROWS at a time. */
INLINED void NAME(outputs)(const REAL* w, int64_t out_step, int64_t in_step, const REAL* x,
                           int64_t depth, const REAL* bias, REAL* z, int64_t count, const int V,
                           const int relu, const int add) {
  int64_t o = 0;
#define BLOCKS(R)                                                                              \
  for (; o + (R) <= count; o += (R)) {                                                         \
    NAME(block)(w + o * out_step, out_step, in_step, x, depth, bias == NULL ? NULL : bias + o, \
                z + o * V * LANES, R, V, relu, add);                                           \
  }
  BLOCKS(ROWS)
#if ROWS > 8
  BLOCKS(8)
#endif
  BLOCKS(4)
  BLOCKS(2)
  BLOCKS(1)
#undef BLOCKS
}

#define DEFINE_OUTPUTS(name, V, out_step, in_step, relu, add)                                   \
  static void name(const REAL* w, int64_t step, const REAL* x, int64_t depth, const REAL* bias, \
                   REAL* z, int64_t count) {                                                    \
    NAME(outputs)(w, out_step, in_step, x, depth, bias, z, count, V, relu, add);                \
  }
DEFINE_OUTPUTS(NAME(forward_2), 2, step, 1, 0, 0)
DEFINE_OUTPUTS(NAME(forward_1), 1, step, 1, 0, 0)
DEFINE_OUTPUTS(NAME(forward_relu_2), 2, step, 1, 1, 0)
DEFINE_OUTPUTS(NAME(forward_relu_1), 1, step, 1, 1, 0)
DEFINE_OUTPUTS(NAME(backward_2), 2, 1, step, 0, 0)
DEFINE_OUTPUTS(NAME(backward_1), 1, 1, step, 0, 0)
DEFINE_OUTPUTS(NAME(backward_add_2), 2, 1, step, 0, 1)
DEFINE_OUTPUTS(NAME(backward_add_1), 1, 1, step, 0, 1)
#undef DEFINE_OUTPUTS

/* y = x weight^T + bias for every sample; weight [O, I]. */
static void NAME(linear_forward)(const mb_engine_op* op, int64_t padded, const REAL* x,
                                 const REAL* weight, const REAL* bias, REAL* y) {
  const int64_t I = op->in_width, O = op->width, rows = op->rows;
  const int relu = op->activation == MB_OP_RELU;
  /* Blocks of weights stay in the first cache while the panels pass by. */
  const int64_t block = padded > PANEL && I > 64 ? ROWS : O;
  for (int64_t o = 0; o < O; o += block) {
    const int64_t count = O - o < block ? O - o : block;
    const REAL* b = bias == NULL ? NULL : bias + o;
    for (int64_t first = 0; first < padded; first += PANEL) {
      const int64_t width = padded - first < PANEL ? LANES : PANEL;
      for (int64_t r = 0; r < rows; ++r) {
        const REAL* from = x + first * rows * I + r * I * width;
        REAL* to = y + first * rows * O + (r * O + o) * width;
        (width == PANEL ? relu ? NAME(forward_relu_2) : NAME(forward_2)
         : relu ? NAME(forward_relu_1)
                        : NAME(forward_1))(weight + o * I, I, from, I, b, to, count);
      }
    }
  }
}

/* dx (+)= dy weight */
static void NAME(linear_backward)(const mb_engine_op* op, int64_t padded, const REAL* dy,
                                  const REAL* weight, REAL* dx) {
  const int64_t I = op->in_width, O = op->width, rows = op->rows;
  const int add = op->adds_dx;
  for (int64_t first = 0; first < padded; first += PANEL) {
    const int64_t width = padded - first < PANEL ? LANES : PANEL;
    for (int64_t r = 0; r < rows; ++r) {
      const REAL* from = dy + first * rows * O + r * O * width;
      REAL* to = dx + first * rows * I + r * I * width;
      (width == PANEL ? add ? NAME(backward_add_2) : NAME(backward_2)
       : add ? NAME(backward_add_1)
                      : NAME(backward_1))(weight, I, from, O, NULL, to, I);
    }
  }
}

/* The gradient of R rows of a weight and V vectors of its columns:
 * out[r, c] = sum over samples and rows of dy[r, sample] x[sample, c]. The last vector has `last`
 * columns. */
typedef struct NAME(products) {
  const REAL* dy; /* panels, from the first of the R rows on */
  const REAL* x;  /* rows, from the first column on */
  int64_t x_step;
  int64_t batch, rows; /* B, rows of the value */
  int64_t in_width, width;
} NAME(products);

INLINED void NAME(product)(const NAME(products) * p, int64_t row, int64_t column, REAL* out,
                           int64_t out_step, int64_t last, const int R, const int V,
                           const int partial) {
  VEC sum[ROWS][4];
  int64_t summed = 0;
  int begun = 0;
#define FLUSH                                                                      \
  UNROLL for (int r = 0; r < R; ++r) {                                             \
    UNROLL for (int v = 0; v < V; ++v) {                                           \
      REAL* to = out + r * out_step + v * LANES;                                   \
      if (partial && v == V - 1) {                                                 \
        STORE_PART(to, begun ? LOAD_PART(to, last) + sum[r][v] : sum[r][v], last); \
      } else {                                                                     \
        STORE(to, begun ? LOAD(to) + sum[r][v] : sum[r][v]);                       \
      }                                                                            \
    }                                                                              \
  }
  UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int v = 0; v < V; ++v) sum[r][v] = (VEC){0}; }
  for (int64_t q = 0; q < p->rows; ++q) {
    for (int64_t first = 0; first < p->batch; first += PANEL) {
      const int64_t left = p->batch - first;
      const int64_t width = left > LANES ? PANEL : LANES;
      const int64_t samples = left < width ? left : width;
      const REAL* g = p->dy + first * p->rows * p->width + (q * p->width + row) * width;
      const REAL* x = p->x + first * p->x_step + q * p->in_width + column;
      if (summed > SUM_LENGTH - PANEL) { /* as in `block` */
        FLUSH
        begun = 1;
        summed = 0;
        UNROLL for (int r = 0; r < R; ++r) {
          UNROLL for (int v = 0; v < V; ++v) sum[r][v] = (VEC){0};
        }
      }
      summed += samples;
      for (int64_t b = 0; b < samples; ++b) {
        VEC in[4];
        UNROLL for (int v = 0; v < V; ++v) {
          in[v] = partial && v == V - 1 ? LOAD_PART(x + v * LANES, last) : LOAD(x + v * LANES);
        }
        x += p->x_step;
        UNROLL for (int r = 0; r < R; ++r) {
          const VEC factor = BROADCAST(g[r * width + b]);
          UNROLL for (int v = 0; v < V; ++v) sum[r][v] += factor * in[v];
        }
      }
    }
  }
  FLUSH
#undef FLUSH
}

/* `count` rows of the gradient, for V vectors of columns. */
INLINED void NAME(product_rows)(const NAME(products) * p, int64_t row, int64_t count,
                                int64_t column, REAL* out, int64_t out_step, int64_t last,
                                const int V, const int partial) {
  int64_t r = 0;
#define BLOCKS(R)                                                                         \
  for (; r + (R) <= count; r += (R)) {                                                    \
    NAME(product)(p, row + r, column, out + r * out_step, out_step, last, R, V, partial); \
  }
  if (V <= 2) {
    BLOCKS(ROWS)
#if ROWS > 8
    BLOCKS(8)
#endif
  } else {
    BLOCKS(ROWS / 2)
  }
#if ROWS > 8
  BLOCKS(4)
#endif
  BLOCKS(2)
  BLOCKS(1)
#undef BLOCKS
}

#define DEFINE_PRODUCTS(name, V, partial)                                                \
  static void name(const NAME(products) * p, int64_t row, int64_t count, int64_t column, \
                   REAL* out, int64_t out_step, int64_t last) {                          \
    NAME(product_rows)(p, row, count, column, out, out_step, last, V, partial);          \
  }
DEFINE_PRODUCTS(NAME(products_4), 4, 0)
DEFINE_PRODUCTS(NAME(products_2), 2, 0)
DEFINE_PRODUCTS(NAME(products_1), 1, 0)
DEFINE_PRODUCTS(NAME(products_2_part), 2, 1)
DEFINE_PRODUCTS(NAME(products_1_part), 1, 1)
#undef DEFINE_PRODUCTS

/* out [count, columns] = rows `row` on, columns `column` on, of the gradient of a weight. */
static void NAME(weight_gradient)(const NAME(products) * p, int64_t row, int64_t count,
                                  int64_t column, int64_t columns, REAL* out, int64_t out_step) {
  const int64_t end = column + columns, whole = end - columns % LANES;
  const int64_t last = columns % LANES;
  int64_t c = column;
  for (; c + 4 * LANES <= whole; c += 4 * LANES) {
    NAME(products_4)(p, row, count, c, out + (c - column), out_step, 0);
  }
  for (; c + 2 * LANES <= whole; c += 2 * LANES) {
    NAME(products_2)(p, row, count, c, out + (c - column), out_step, 0);
  }
  if (last != 0) {
    (c < whole ? NAME(products_2_part) : NAME(products_1_part))(p, row, count, c,
                                                                out + (c - column), out_step, last);
  } else if (c < whole) {
    NAME(products_1)(p, row, count, c, out + (c - column), out_step, 0);
  }
}

/* ---- transposing ----------------------------------------------------------------------------- */

#if LANES == 16
#define HALVES(M)                                                \
  M(low, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) \
  M(high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define HALVES(M) M(low, 0, 8, 1, 9, 2, 10, 3, 11) M(high, 4, 12, 5, 13, 6, 14, 7, 15)
#elif LANES == 4
#define HALVES(M) M(low, 0, 4, 1, 5) M(high, 2, 6, 3, 7)
#else
#define HALVES(M) M(low, 0, 2) M(high, 1, 3)
#endif
/* The lower (higher) halves of two vectors, their lanes by turns. */
#define DEFINE_HALF(name, ...)                        \
  INLINED VEC NAME(interleave_##name)(VEC a, VEC b) { \
    const INTEGERS lanes = {__VA_ARGS__};             \
    return __builtin_shuffle(a, b, lanes);            \
  }
HALVES(DEFINE_HALF)
#undef DEFINE_HALF
#undef HALVES

/* A matrix of LANES by LANES is transposed by as many perfect shuffles as LANES has bits. */
INLINED void NAME(transpose)(VEC* v) {
  VEC w[LANES];
  UNROLL for (int size = LANES; size > 1; size /= 2) {
    UNROLL for (int i = 0; i < LANES / 2; ++i) {
      w[2 * i] = NAME(interleave_low)(v[i], v[i + LANES / 2]);
      w[2 * i + 1] = NAME(interleave_high)(v[i], v[i + LANES / 2]);
    }
    UNROLL for (int i = 0; i < LANES; ++i) v[i] = w[i];
  }
}

/* ---- sums over samples ----------------------------------------------------------------------- */

INLINED REAL NAME(sum_lanes)(VEC v) {
  REAL lanes[LANES];
  memcpy(lanes, &v, sizeof lanes);
  UNROLL for (int half = LANES / 2; half > 0; half /= 2) {
    UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/* Zero in the lanes from `count` on; all are kept where count >= LANES. */
INLINED VEC NAME(first_lanes)(VEC v, int64_t count) {
  return count >= LANES ? v : (VEC)((INTEGERS)v & (NAME(lane_numbers) < (INTEGER)count));
}

/* sums[f] = the sum over samples, and over the rows of the value, of feature f of `width`. */
static void NAME(sum_samples)(const REAL* panels, int64_t batch, int64_t rows, int64_t width,
                              REAL* sums) {
  for (int64_t f = 0; f < width; f += LANES) {
    const int64_t features = width - f < LANES ? width - f : LANES;
    VEC sum[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) sum[i] = (VEC){0};
    for (int64_t first = 0; first < batch; first += PANEL) {
      const int64_t left = batch - first, lanes = left > LANES ? PANEL : LANES;
      for (int64_t r = 0; r < rows; ++r) {
        const REAL* at = panels + first * rows * width + (r * width + f) * lanes;
        if (left >= PANEL) {
          for (int64_t i = 0; i < features; ++i) {
            sum[i] += LOAD(at + i * PANEL) + LOAD(at + i * PANEL + LANES);
          }
          continue;
        }
        for (int64_t i = 0; i < features; ++i) {
          sum[i] += NAME(first_lanes)(LOAD(at + i * lanes), left);
          if (lanes == PANEL) {
            sum[i] += NAME(first_lanes)(LOAD(at + i * lanes + LANES), left - LANES);
          }
        }
      }
    }
    NAME(transpose)(sum);
    UNROLL for (int half = LANES / 2; half > 0; half /= 2) {
      UNROLL for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    if (features == LANES) {
      STORE(sums + f, sum[0]);
    } else {
      STORE_PART(sums + f, sum[0], features);
    }
  }
}

/* ---- rows and panels ------------------------------------------------------------------------- */

static void NAME(panels_from_rows)(const void* rows_, const int64_t* source, int64_t batch,
                                   int64_t features, void* panels_) {
  const REAL* rows = rows_;
  REAL* panels = panels_;
  for (int64_t first = 0; first < batch; first += LANES) {
    const int64_t panel = first / PANEL * PANEL;
    const int64_t width = batch - panel > LANES ? PANEL : LANES;
    REAL* to = panels + panel * features + (first - panel);
    const REAL* from[LANES];
    for (int64_t b = 0; b < LANES; ++b) {
      const int64_t sample = first + b;
      from[b] =
          sample < batch ? rows + (source == NULL ? sample : source[sample]) * features : NULL;
    }
    for (int64_t f = 0; f < features; f += LANES) {
      const int64_t count = features - f < LANES ? features - f : LANES;
      VEC v[LANES];
      for (int b = 0; b < LANES; ++b) {
        v[b] = from[b] == NULL  ? (VEC){0}
               : count == LANES ? LOAD(from[b] + f)
                                : LOAD_PART(from[b] + f, count);
      }
      NAME(transpose)(v);
      for (int64_t i = 0; i < count; ++i) STORE(to + (f + i) * width, v[i]);
    }
  }
}

/* rows [B, step] from panels; step is a multiple of LANES, and what lies beyond the features
 * becomes 0. */
static void NAME(rows_from_panels)(const REAL* panels, int64_t batch, int64_t features,
                                   int64_t step, REAL* rows) {
  for (int64_t first = 0; first < batch; first += LANES) {
    const int64_t panel = first / PANEL * PANEL;
    const int64_t width = batch - panel > LANES ? PANEL : LANES;
    const int64_t samples = batch - first < LANES ? batch - first : LANES;
    const REAL* from = panels + panel * features + (first - panel);
    for (int64_t f = 0; f < features; f += LANES) {
      const int64_t count = features - f < LANES ? features - f : LANES;
      VEC v[LANES];
      for (int i = 0; i < LANES; ++i) v[i] = i < count ? LOAD(from + (f + i) * width) : (VEC){0};
      NAME(transpose)(v);
      for (int64_t b = 0; b < samples; ++b) STORE(rows + (first + b) * step + f, v[b]);
    }
  }
}
