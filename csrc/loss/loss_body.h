/* Kernels for the element type T; included once for each. */

/* The largest logit of each row, NaN if there is one; and e[r, c] = exp(logits[r, c] - largest).
 * All exponentials of the block at once, because a row of few classes would not fill a vector. */
static void MB_JOIN(exponentials, SUFFIX)(const T* restrict logits, T* restrict e,
                                          T* restrict largest, int64_t rows, int64_t classes) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = logits + r * classes;
    T top = row[0];
    for (int64_t c = 1; c < classes; ++c) top = row[c] > top || row[c] != row[c] ? row[c] : top;
    largest[r] = top;
    for (int64_t c = 0; c < classes; ++c) e[r * classes + c] = row[c] - top;
  }
  for (int64_t i = 0; i < rows * classes; ++i) e[i] = MB_EXP(e[i]);
}

static double MB_JOIN(cross_entropy, SUFFIX)(const void* logits_, const int64_t* target,
                                             void* slope_, void* work, int64_t rows,
                                             int64_t classes, int64_t ignore_index) {
  const T* logits = logits_; /* [rows, classes] */
  T* slope = slope_;         /* [rows, classes] or NULL */
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) counted += target[r] != ignore_index;
  const T share = (T)1 / (T)counted;
  double total = 0.0;
  for (int64_t first = 0; first < rows; first += MB_LOSS_ROWS) {
    const int64_t some = rows - first < MB_LOSS_ROWS ? rows - first : MB_LOSS_ROWS;
    const T* block = logits + first * classes;
    T* e = slope != NULL ? slope + first * classes : (T*)work;
    T largest[MB_LOSS_ROWS], sum[MB_LOSS_ROWS], logs[MB_LOSS_ROWS];
    MB_JOIN(exponentials, SUFFIX)(block, e, largest, some, classes);
    for (int64_t r = 0; r < some; ++r) {
      T s = 0;
      for (int64_t c = 0; c < classes; ++c) s += e[r * classes + c];
      sum[r] = s;
    }
    for (int64_t r = 0; r < some; ++r) logs[r] = MB_LOG(sum[r]);
    for (int64_t r = 0; r < some; ++r) {
      const int64_t label = target[first + r];
      const int counts = label != ignore_index;
      if (counts) total += (double)(logs[r] - (block[r * classes + label] - largest[r]));
      if (slope == NULL) continue;
      const T factor = share / sum[r];
      for (int64_t c = 0; c < classes; ++c) {
        e[r * classes + c] = counts ? e[r * classes + c] * factor : (T)0;
      }
      if (counts) e[r * classes + label] -= share;
    }
  }
  return total / (double)counted;
}
