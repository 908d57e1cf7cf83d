/* Access to rows of hidden units for one dtype; no include guard. See rnn_cpu.c for what the
 * includer defines. */

MB_INLINED VECTOR NAME(get)(const REAL* p, int64_t count) {
  return count == LANES ? NAME(load)(p) : NAME(load_part)(p, count);
}

MB_INLINED void NAME(put)(REAL* p, VECTOR v, int64_t count) {
  if (count == LANES) {
    NAME(store)(p, v);
  } else {
    NAME(store_part)(p, v, count);
  }
}

/* The derivative of max(0, x), from its result y; NaN lets the gradient through, as in torch. */
MB_INLINED VECTOR NAME(zero_where_not_positive)(VECTOR grad, VECTOR y) {
  const INTS is_zero = y <= 0;
  return (VECTOR)((INTS)grad & ~is_zero);
}

static inline void NAME(copy)(REAL* to, const REAL* from, int64_t count) {
  if (count > 0) memcpy(to, from, (size_t)count * sizeof(REAL));
}

/* Into the second-level cache. */
static inline void NAME(prefetch)(const REAL* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof *p) __builtin_prefetch(p + i, 0, 2);
}
