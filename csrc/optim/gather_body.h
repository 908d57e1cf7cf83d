/* Gathers a slice of any strides into a dense run, for elements of BITS bits: included by
 * optim_cpu.c once for each width. */
#define ELEMENT MB_JOIN_BITS(uint, _t)
#define VECTOR MB_JOIN_BITS(quad, )
#define NAME(stem) MB_JOIN(stem, BITS)
#define MB_JOIN_BITS_(before, bits, after) before##bits##after
#define MB_JOIN_BITS__(before, bits, after) MB_JOIN_BITS_(before, bits, after)
#define MB_JOIN_BITS(before, after) MB_JOIN_BITS__(before, BITS, after)

typedef ELEMENT VECTOR __attribute__((vector_size(4 * sizeof(ELEMENT))));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VECTOR){__VA_ARGS__})
#endif

/* out = [4, 4] with rows of `columns` elements, from four columns that are runs of memory. */
static inline void NAME(transpose_4x4)(ELEMENT* restrict out, int64_t columns,
                                       const ELEMENT* restrict in, int64_t column_stride) {
  VECTOR in0, in1, in2, in3;
  memcpy(&in0, in, sizeof in0);
  memcpy(&in1, in + column_stride, sizeof in1);
  memcpy(&in2, in + 2 * column_stride, sizeof in2);
  memcpy(&in3, in + 3 * column_stride, sizeof in3);
  const VECTOR low01 = SHUFFLE(in0, in1, 0, 4, 1, 5), high01 = SHUFFLE(in0, in1, 2, 6, 3, 7);
  const VECTOR low23 = SHUFFLE(in2, in3, 0, 4, 1, 5), high23 = SHUFFLE(in2, in3, 2, 6, 3, 7);
  const VECTOR row0 = SHUFFLE(low01, low23, 0, 1, 4, 5), row1 = SHUFFLE(low01, low23, 2, 3, 6, 7);
  const VECTOR row2 = SHUFFLE(high01, high23, 0, 1, 4, 5);
  const VECTOR row3 = SHUFFLE(high01, high23, 2, 3, 6, 7);
  memcpy(out, &row0, sizeof row0);
  memcpy(out + columns, &row1, sizeof row1);
  memcpy(out + 2 * columns, &row2, sizeof row2);
  memcpy(out + 3 * columns, &row3, sizeof row3);
}

static inline void NAME(gather_run)(ELEMENT* restrict out, const ELEMENT* restrict in,
                                    int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i * stride];
}

/* Whole rows. A transposed slice's columns are runs of memory: few of them are read at a time, for
 * all rows, so that their cache lines are used whole before they are dropped. */
static void NAME(gather_rows)(ELEMENT* restrict out, const ELEMENT* restrict in, int64_t rows,
                              int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t square_rows = row_stride == 1 ? rows / 4 * 4 : 0;
  const int64_t square_columns = columns / 4 * 4;
  for (int64_t begin = 0; begin < square_columns && square_rows > 0; begin += GATHER_COLUMNS) {
    const int64_t end = min_i64(begin + GATHER_COLUMNS, square_columns);
    for (int64_t row = 0; row < square_rows; row += 4) {
      for (int64_t column = begin; column < end; column += 4) {
        NAME(transpose_4x4)(out + row * columns + column, columns,
                            in + row + column * column_stride, column_stride);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t done = row < square_rows ? square_columns : 0;
    NAME(gather_run)(out + row * columns + done, in + row * row_stride + done * column_stride,
                     column_stride, columns - done);
  }
}

/* Elements `first` to `last` - 1 of a plane of rows and columns: a part of a row, whole rows, a
 * part of a row, any of which may be missing. */
static void NAME(gather_plane)(ELEMENT* restrict out, const ELEMENT* restrict plane,
                               int64_t columns, int64_t row_stride, int64_t column_stride,
                               int64_t first, int64_t last) {
  int64_t row = first / columns;
  const int64_t skipped = first - row * columns;
  if (skipped != 0) {
    const int64_t count = min_i64(columns - skipped, last - first);
    NAME(gather_run)(out, plane + row * row_stride + skipped * column_stride, column_stride, count);
    out += count;
    ++row;
  }
  const int64_t rows = last / columns - row;
  if (rows < 0) return; /* the range ended within its first row */
  NAME(gather_rows)(out, plane + row * row_stride, rows, columns, row_stride, column_stride);
  row += rows;
  NAME(gather_run)(out + rows * columns, plane + row * row_stride, column_stride,
                   last - row * columns);
}

/* The last two dimensions are a plane; the others are looped over. */
static void NAME(gather)(void* dense, const void* slice, const mb_optim_layout* layout,
                         int64_t begin, int64_t end) {
  ELEMENT* out = dense;
  const int64_t dims = layout->dims;
  const int64_t columns = layout->sizes[dims - 1];
  const int64_t rows = dims > 1 ? layout->sizes[dims - 2] : 1;
  const int64_t row_stride = dims > 1 ? layout->strides[dims - 2] : 0;
  const int64_t plane_numel = rows * columns;
  for (int64_t plane = begin / plane_numel; plane * plane_numel < end; ++plane) {
    const ELEMENT* in = slice;
    for (int64_t dim = dims - 3, rest = plane; dim >= 0; --dim) {
      in += rest % layout->sizes[dim] * layout->strides[dim];
      rest /= layout->sizes[dim];
    }
    const int64_t offset = plane * plane_numel;
    const int64_t first = begin > offset ? begin - offset : 0;
    const int64_t last = min_i64(end - offset, plane_numel);
    NAME(gather_plane)(out, in, columns, row_stride, layout->strides[dims - 1], first, last);
    out += last - first;
  }
}

#undef ELEMENT
#undef VECTOR
#undef NAME
#undef MB_JOIN_BITS_
#undef MB_JOIN_BITS__
#undef MB_JOIN_BITS
#undef SHUFFLE
#undef BITS
