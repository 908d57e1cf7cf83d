/* The kernels for one dtype; no include guard. The includer defines
 *   NAME(stem)   the stem with the dtype's suffix
 *   REAL, VECTOR, LANES
 * and this file undefines them.
 */

/* ROWS rows of C by one or two vectors of columns. `last` columns of the last vector exist; b_last
 * of them can be read from B. */
MB_INLINED void NAME(block)(const int rows, const int vectors, const int is_full, REAL* c,
                            int64_t ldc, const REAL* init, int64_t ld_init, const REAL* a,
                            int64_t a_row, int64_t a_col, const REAL* b, int64_t ldb, int64_t k,
                            int64_t last, int64_t b_last) {
  VECTOR sum[MAX_ROWS][2];
  const int tail = vectors - 1;
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) sum[r][v] = (VECTOR){0};
  }
  for (int64_t p = 0; p < k; ++p) {
    VECTOR columns[2];
    for (int v = 0; v < vectors; ++v) {
      columns[v] =
          is_full || v < tail ? NAME(load)(b + v * LANES) : NAME(load_part)(b + v * LANES, b_last);
    }
    for (int r = 0; r < rows; ++r) {
      const VECTOR factor = NAME(broadcast)(a[r * a_row]);
      for (int v = 0; v < vectors; ++v) sum[r][v] += factor * columns[v];
    }
    a += a_col;
    b += ldb;
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      const REAL* from = init == NULL ? NULL : init + r * ld_init + v * LANES;
      REAL* to = c + r * ldc + v * LANES;
      if (is_full || v < tail) {
        NAME(store)(to, from == NULL ? sum[r][v] : sum[r][v] + NAME(load)(from));
      } else {
        NAME(store_part)(to, from == NULL ? sum[r][v] : sum[r][v] + NAME(load_part)(from, last),
                         last);
      }
    }
  }
}

/* All m rows of one panel, in register blocks of nearly equal height. */
#define ROWS_OF(stem, vectors, is_full)                                                           \
  static void NAME(stem)(REAL * c, int64_t ldc, const REAL* init, int64_t ld_init, const REAL* a, \
                         int64_t a_row, int64_t a_col, const REAL* b, int64_t ldb, int64_t m,     \
                         int64_t k, int64_t last, int64_t b_last) {                               \
    for (int64_t blocks = (m + MAX_ROWS - 1) / MAX_ROWS; blocks > 0; --blocks) {                  \
      const int64_t rows = (m + blocks - 1) / blocks;                                             \
      switch (rows) { EACH_HEIGHT(vectors, is_full) }                                             \
      m -= rows;                                                                                  \
      a += rows * a_row;                                                                          \
      c += rows * ldc;                                                                            \
      if (init != NULL) init += rows * ld_init;                                                   \
    }                                                                                             \
  }
#define HEIGHT(rows, vectors, is_full)                                                           \
  case rows:                                                                                     \
    NAME(block)(rows, vectors, is_full, c, ldc, init, ld_init, a, a_row, a_col, b, ldb, k, last, \
                b_last);                                                                         \
    break;
ROWS_OF(two_vectors, 2, 1)
ROWS_OF(two_with_tail, 2, 0)
ROWS_OF(one_with_tail, 1, 0)
#undef HEIGHT
#undef ROWS_OF

/* One panel of at most 2 LANES columns. is_padded: B can be read beyond them. */
static void NAME(multiply_panel)(REAL* c, int64_t ldc, const REAL* init, int64_t ld_init,
                                 const REAL* a, int64_t a_row, int64_t a_col, const REAL* b,
                                 int64_t ldb, int64_t m, int64_t columns, int64_t k,
                                 int is_padded) {
  if (columns == 2 * LANES) {
    NAME(two_vectors)(c, ldc, init, ld_init, a, a_row, a_col, b, ldb, m, k, LANES, LANES);
  } else if (columns > LANES) {
    const int64_t last = columns - LANES;
    NAME(two_with_tail)(c, ldc, init, ld_init, a, a_row, a_col, b, ldb, m, k, last,
                        is_padded ? LANES : last);
  } else {
    NAME(one_with_tail)(c, ldc, init, ld_init, a, a_row, a_col, b, ldb, m, k, columns,
                        is_padded ? LANES : columns);
  }
}

static inline int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

static void NAME(multiply_packed)(REAL* c, int64_t ldc, const REAL* init, int64_t ld_init,
                                  const REAL* a, int64_t a_row, int64_t a_col, const REAL* packed,
                                  int64_t m, int64_t n, int64_t k) {
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    const int64_t columns = NAME(least)(2 * LANES, n - j);
    const REAL* from = init == NULL ? NULL : init + j;
    int64_t from_step = ld_init;
    int64_t first = 0;
    do { /* also where k is 0 */
      const int64_t depth = NAME(least)(DEPTH, k - first);
      NAME(multiply_panel)(c + j, ldc, from, from_step, a + first * a_col, a_row, a_col,
                           packed + j * k + first * 2 * LANES, 2 * LANES, m, columns, depth, 1);
      from = c + j;
      from_step = ldc;
      first += depth;
    } while (first < k);
  }
}

/* Where many rows use a panel, it is copied together first: rows of B that are far apart share few
 * sets of the first-level cache. */
static void NAME(multiply)(REAL* c, int64_t ldc, const REAL* init, int64_t ld_init, const REAL* a,
                           int64_t a_row, int64_t a_col, const REAL* b, int64_t ldb, int64_t m,
                           int64_t n, int64_t k) {
  VECTOR panel[2 * DEPTH];
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    const int64_t columns = NAME(least)(2 * LANES, n - j);
    const int copies = m >= 4 * MAX_ROWS && ldb > 2 * LANES;
    const REAL* from = init == NULL ? NULL : init + j;
    int64_t from_step = ld_init;
    int64_t first = 0;
    do {
      const int64_t depth = NAME(least)(DEPTH, k - first);
      const REAL* rows = b + first * ldb + j;
      if (copies && columns == 2 * LANES) {
        for (int64_t p = 0; p < depth; ++p) {
          panel[2 * p] = NAME(load)(rows + p * ldb);
          panel[2 * p + 1] = NAME(load)(rows + p * ldb + LANES);
        }
      } else if (copies) {
        const int64_t left = NAME(least)(LANES, columns);
        for (int64_t p = 0; p < depth; ++p) {
          panel[2 * p] = NAME(load_part)(rows + p * ldb, left);
          panel[2 * p + 1] = NAME(load_part)(rows + p * ldb + left, columns - left);
        }
      }
      NAME(multiply_panel)(c + j, ldc, from, from_step, a + first * a_col, a_row, a_col,
                           copies ? (const REAL*)panel : rows, copies ? 2 * LANES : ldb, m, columns,
                           depth, copies);
      from = c + j;
      from_step = ldc;
      first += depth;
    } while (first < k);
  }
}

static int64_t NAME(packed_size)(int64_t k, int64_t n) {
  return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES) * k;
}

static void NAME(pack)(REAL* packed, const REAL* b, int64_t b_row, int64_t b_col, int64_t k,
                       int64_t n) {
  for (int64_t j = 0; j < n; j += 2 * LANES) {
    const int64_t columns = NAME(least)(2 * LANES, n - j);
    for (int64_t p = 0; p < k; ++p) {
      const REAL* row = b + j * b_col + p * b_row;
      if (columns < 2 * LANES) {
        for (int64_t i = columns; i < 2 * LANES; ++i) packed[i] = 0;
      }
      if (b_col == 1) {
        memcpy(packed, row, (size_t)columns * sizeof *row);
      } else {
        for (int64_t i = 0; i < columns; ++i) packed[i] = row[i * b_col];
      }
      packed += 2 * LANES;
    }
  }
}

#undef NAME
#undef REAL
#undef VECTOR
#undef LANES
