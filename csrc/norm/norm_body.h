/* The kernels for one dtype; no include guard. The includer defines
 *   NAME(stem)    the stem with the dtype's suffix
 *   STORAGE       the elements in memory
 *   REAL, VECTOR  the type that they are computed in, and LANES of it
 *   WIDEN(value), NARROW(value)   STORAGE to REAL and back
 * and this file undefines them.
 */

static inline VECTOR NAME(load)(const STORAGE* p) {
  REAL lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = WIDEN(p[i]);
  VECTOR v;
  memcpy(&v, lanes, sizeof v);
  return v;
}

static inline void NAME(store)(STORAGE* p, const VECTOR* v) {
  REAL lanes[LANES];
  memcpy(lanes, v, sizeof *v);
  for (int i = 0; i < LANES; ++i) p[i] = NARROW(lanes[i]);
}

static inline f64x8 NAME(load_wide)(const STORAGE* p) {
  return __builtin_convertvector(NAME(load)(p), f64x8);
}

/* ---- elementwise halves: y = (x - center) scale + offset and its counterpart ----------------- */

/* The numbers of one channel, rounded to REAL. What the rounding of the mean loses is given back by
 * the offset. */
typedef struct NAME(affine) {
  REAL center, scale, offset;
} NAME(affine);

static inline NAME(affine)
    NAME(make_affine)(double mean, double var, double eps, double weight, double bias) {
  const double scale = weight / sqrt(var + eps);
  const REAL center = (REAL)mean;
  /* An infinite mean has no remainder; the result is NaN without it already. */
  const double lost = isfinite(mean) ? mean - (double)center : 0.0;
  const NAME(affine) result = {center, (REAL)scale, (REAL)(bias - lost * scale)};
  return result;
}

/* grad_x = (grad_y - average - (x - center) slope) scale */
typedef struct NAME(slope) {
  REAL center, average, slope, scale;
} NAME(slope);

static inline NAME(slope) NAME(make_slope)(double mean, double var, double eps, double weight,
                                           double grad_weight, double grad_bias, double count) {
  const double inverse = 1.0 / sqrt(var + eps);
  const NAME(slope) result = {(REAL)mean, (REAL)(grad_bias / count),
                              (REAL)(grad_weight * inverse / count), (REAL)(weight * inverse)};
  return result;
}

/* ---- planar: [B, C, S] ----------------------------------------------------------------------- */

INLINED void NAME(forward_planar_as)(const void* x_, const double* weight, const double* bias,
                                     double eps, mb_norm_size size, const double* sample,
                                     double count, int64_t begin, int64_t end, double* mean,
                                     double* var, void* y_) {
  const int64_t B = size.batch, S = size.positions, step = size.channels * S;
  const int64_t whole = S - S % (2 * LANES);
  for (int64_t c = begin; c < end; ++c) {
    const STORAGE* x = (const STORAGE*)x_ + c * S;
    STORAGE* y = (STORAGE*)y_ + c * S;

    f64x8 sum0 = {0}, sum1 = {0};
    double tail = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      const double w = sample == NULL ? 1.0 : sample[b];
      if (w == 0.0) continue;
      const STORAGE* row = x + b * step;
      const int64_t ahead = b + 1 < B ? step : 0;
      for (int64_t s = 0; s < whole; s += 2 * LANES) {
        /* the next image's plane of this channel is a page or more away: no hardware prefetcher
         * follows */
        __builtin_prefetch(row + ahead + s);
        sum0 += NAME(load_wide)(row + s) * w;
        sum1 += NAME(load_wide)(row + s + LANES) * w;
      }
      for (int64_t s = whole; s < S; ++s) tail += (double)WIDEN(row[s]) * w;
    }
    const double m = (sum_lanes(&sum0, &sum1) + tail) / count;

    sum0 = sum1 = (f64x8){0};
    tail = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      const double w = sample == NULL ? 1.0 : sample[b];
      if (w == 0.0) continue;
      const STORAGE* row = x + b * step;
      for (int64_t s = 0; s < whole; s += 2 * LANES) {
        const f64x8 d0 = NAME(load_wide)(row + s) - m, d1 = NAME(load_wide)(row + s + LANES) - m;
        sum0 += d0 * w * d0;
        sum1 += d1 * w * d1;
      }
      for (int64_t s = whole; s < S; ++s) {
        const double d = (double)WIDEN(row[s]) - m;
        tail += d * w * d;
      }
    }
    mean[c] = m;
    var[c] = (sum_lanes(&sum0, &sum1) + tail) / count;

    const NAME(affine) a = NAME(make_affine)(m, var[c], eps, weight == NULL ? 1.0 : weight[c],
                                             bias == NULL ? 0.0 : bias[c]);
    for (int64_t b = 0; b < B; ++b) {
      const STORAGE* in = x + b * step;
      STORAGE* out = y + b * step;
      const int64_t ahead = b + 1 < B ? step : 0;
      for (int64_t s = 0; s < whole; s += LANES) {
        __builtin_prefetch(out + ahead + s, 1);
        const VECTOR v = (NAME(load)(in + s) - a.center) * a.scale + a.offset;
        NAME(store)(out + s, &v);
      }
      for (int64_t s = whole; s < S; ++s) {
        out[s] = NARROW((WIDEN(in[s]) - a.center) * a.scale + a.offset);
      }
    }
  }
}

static void NAME(forward_planar)(const void* x, const double* weight, const double* bias,
                                 double eps, mb_norm_size size, mb_norm_samples samples,
                                 int64_t begin, int64_t end, double* mean, double* var, void* y) {
  const double count = samples.count;
  if (samples.weight == NULL) { /* a copy of the code without the weights */
    NAME(forward_planar_as)(x, weight, bias, eps, size, NULL, count, begin, end, mean, var, y);
  } else {
    NAME(forward_planar_as)(x, weight, bias, eps, size, samples.weight, count, begin, end, mean,
                            var, y);
  }
}

INLINED void NAME(backward_planar_as)(const void* grad_y_, const void* x_, const double* weight,
                                      const double* mean, const double* var, double eps,
                                      mb_norm_size size, const double* sample, double count,
                                      int64_t begin, int64_t end, double* grad_weight,
                                      double* grad_bias, void* grad_x_) {
  const int64_t B = size.batch, S = size.positions, step = size.channels * S;
  const int64_t whole = S - S % (2 * LANES);
  for (int64_t c = begin; c < end; ++c) {
    const STORAGE* x = (const STORAGE*)x_ + c * S;
    const STORAGE* grad_y = (const STORAGE*)grad_y_ + c * S;
    const double m = mean[c];

    f64x8 sum0 = {0}, sum1 = {0}, dot0 = {0}, dot1 = {0};
    double tail_sum = 0.0, tail_dot = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      if (sample != NULL && sample[b] == 0.0) continue;
      const STORAGE *gs = grad_y + b * step, *xs = x + b * step;
      const int64_t ahead = b + 1 < B ? step : 0;
      for (int64_t s = 0; s < whole; s += 2 * LANES) {
        __builtin_prefetch(gs + ahead + s);
        __builtin_prefetch(xs + ahead + s);
        const f64x8 g0 = NAME(load_wide)(gs + s), g1 = NAME(load_wide)(gs + s + LANES);
        sum0 += g0;
        sum1 += g1;
        dot0 += g0 * (NAME(load_wide)(xs + s) - m);
        dot1 += g1 * (NAME(load_wide)(xs + s + LANES) - m);
      }
      for (int64_t s = whole; s < S; ++s) {
        const double g = (double)WIDEN(gs[s]);
        tail_sum += g;
        tail_dot += g * ((double)WIDEN(xs[s]) - m);
      }
    }
    grad_bias[c] = sum_lanes(&sum0, &sum1) + tail_sum;
    grad_weight[c] = (sum_lanes(&dot0, &dot1) + tail_dot) / sqrt(var[c] + eps);
    if (grad_x_ == NULL) continue;

    STORAGE* grad_x = (STORAGE*)grad_x_ + c * S;
    const NAME(slope) k = NAME(make_slope)(m, var[c], eps, weight == NULL ? 1.0 : weight[c],
                                           grad_weight[c], grad_bias[c], count);
    for (int64_t b = 0; b < B; ++b) {
      const STORAGE *gs = grad_y + b * step, *xs = x + b * step;
      STORAGE* out = grad_x + b * step;
      const double w = sample == NULL ? 1.0 : sample[b];
      if (w == 0.0) {
        memset(out, 0, S * sizeof *out);
        continue;
      }
      const REAL average = (REAL)w * k.average, slope = (REAL)w * k.slope;
      const int64_t ahead = b + 1 < B ? step : 0;
      for (int64_t s = 0; s < whole; s += LANES) {
        __builtin_prefetch(out + ahead + s, 1);
        const VECTOR d = NAME(load)(xs + s) - k.center;
        const VECTOR v = ((NAME(load)(gs + s) - average) - d * slope) * k.scale;
        NAME(store)(out + s, &v);
      }
      for (int64_t s = whole; s < S; ++s) {
        const REAL d = WIDEN(xs[s]) - k.center;
        out[s] = NARROW(((WIDEN(gs[s]) - average) - d * slope) * k.scale);
      }
    }
  }
}

static void NAME(backward_planar)(const void* grad_y, const void* x, const double* weight,
                                  const double* mean, const double* var, double eps,
                                  mb_norm_size size, mb_norm_samples samples, int64_t begin,
                                  int64_t end, double* grad_weight, double* grad_bias,
                                  void* grad_x) {
  const double count = samples.count;
  if (samples.weight == NULL) {
    NAME(backward_planar_as)(grad_y, x, weight, mean, var, eps, size, NULL, count, begin, end,
                             grad_weight, grad_bias, grad_x);
  } else {
    NAME(backward_planar_as)(grad_y, x, weight, mean, var, eps, size, samples.weight, count, begin,
                             end, grad_weight, grad_bias, grad_x);
  }
}

/* ---- channels last: [B S, C] ----------------------------------------------------------------- */

/* sum[c] += weighted sum over the rows of (x - center[c])^power, power 1 (center NULL) or 2; width
 * channels. */
INLINED void NAME(add_rows)(const STORAGE* x, int64_t rows, int64_t step, int64_t width,
                            const double* sample, const double* center, double* sum) {
  if (width == BLOCK) {
    f64x8 low, high, center_low = {0}, center_high = {0};
    memcpy(&low, sum, sizeof low);
    memcpy(&high, sum + LANES, sizeof high);
    if (center == NULL) {
      for (int64_t r = 0; r < rows; ++r) {
        const double w = sample == NULL ? 1.0 : sample[r];
        if (w == 0.0) continue;
        low += NAME(load_wide)(x + r * step) * w;
        high += NAME(load_wide)(x + r * step + LANES) * w;
      }
    } else {
      memcpy(&center_low, center, sizeof center_low);
      memcpy(&center_high, center + LANES, sizeof center_high);
      for (int64_t r = 0; r < rows; ++r) {
        const double w = sample == NULL ? 1.0 : sample[r];
        if (w == 0.0) continue;
        const f64x8 d0 = NAME(load_wide)(x + r * step) - center_low;
        const f64x8 d1 = NAME(load_wide)(x + r * step + LANES) - center_high;
        low += d0 * w * d0;
        high += d1 * w * d1;
      }
    }
    memcpy(sum, &low, sizeof low);
    memcpy(sum + LANES, &high, sizeof high);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const double w = sample == NULL ? 1.0 : sample[r];
    if (w == 0.0) continue;
    for (int64_t i = 0; i < width; ++i) {
      const double value = (double)WIDEN(x[r * step + i]);
      sum[i] += center == NULL ? value * w : (value - center[i]) * w * (value - center[i]);
    }
  }
}

INLINED void NAME(forward_channels_last_as)(const void* x_, const double* weight,
                                            const double* bias, double eps, mb_norm_size size,
                                            const double* sample, double count, int64_t begin,
                                            int64_t end, double* mean, double* var, void* y_) {
  const STORAGE* x = (const STORAGE*)x_;
  STORAGE* y = (STORAGE*)y_;
  const int64_t C = size.channels, N = size.batch * size.positions;
  for (int64_t c = begin; c < end; ++c) mean[c] = var[c] = 0.0;
  for (int64_t r = 0; r < N; r += ROWS) {
    const int64_t rows = N - r < ROWS ? N - r : ROWS;
    for (int64_t c = begin; c < end; c += BLOCK) {
      const int64_t width = end - c < BLOCK ? end - c : BLOCK;
      NAME(add_rows)(x + r * C + c, rows, C, width, sample == NULL ? NULL : sample + r, NULL,
                     mean + c);
    }
  }
  for (int64_t c = begin; c < end; ++c) mean[c] /= count;
  for (int64_t r = 0; r < N; r += ROWS) {
    const int64_t rows = N - r < ROWS ? N - r : ROWS;
    for (int64_t c = begin; c < end; c += BLOCK) {
      const int64_t width = end - c < BLOCK ? end - c : BLOCK;
      NAME(add_rows)(x + r * C + c, rows, C, width, sample == NULL ? NULL : sample + r, mean + c,
                     var + c);
    }
  }
  for (int64_t c = begin; c < end; ++c) var[c] /= count;
  for (int64_t c = begin; c < end; c += BLOCK) {
    const int64_t width = end - c < BLOCK ? end - c : BLOCK;
    REAL center[BLOCK] = {0}, scale[BLOCK] = {0}, offset[BLOCK] = {0};
    for (int64_t i = 0; i < width; ++i) {
      const NAME(affine) a =
          NAME(make_affine)(mean[c + i], var[c + i], eps, weight == NULL ? 1.0 : weight[c + i],
                            bias == NULL ? 0.0 : bias[c + i]);
      center[i] = a.center;
      scale[i] = a.scale;
      offset[i] = a.offset;
    }
    if (width == BLOCK) {
      VECTOR center0, center1, scale0, scale1, offset0, offset1;
      memcpy(&center0, center, sizeof center0);
      memcpy(&center1, center + LANES, sizeof center1);
      memcpy(&scale0, scale, sizeof scale0);
      memcpy(&scale1, scale + LANES, sizeof scale1);
      memcpy(&offset0, offset, sizeof offset0);
      memcpy(&offset1, offset + LANES, sizeof offset1);
      for (int64_t r = 0; r < N; ++r) {
        const STORAGE* in = x + r * C + c;
        STORAGE* out = y + r * C + c;
        const VECTOR v0 = (NAME(load)(in) - center0) * scale0 + offset0;
        const VECTOR v1 = (NAME(load)(in + LANES) - center1) * scale1 + offset1;
        NAME(store)(out, &v0);
        NAME(store)(out + LANES, &v1);
      }
    } else {
      for (int64_t r = 0; r < N; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const REAL d = WIDEN(x[r * C + c + i]) - center[i];
          y[r * C + c + i] = NARROW(d * scale[i] + offset[i]);
        }
      }
    }
  }
}

static void NAME(forward_channels_last)(const void* x, const double* weight, const double* bias,
                                        double eps, mb_norm_size size, mb_norm_samples samples,
                                        int64_t begin, int64_t end, double* mean, double* var,
                                        void* y) {
  const double count = samples.count;
  if (samples.weight == NULL) {
    NAME(forward_channels_last_as)(x, weight, bias, eps, size, NULL, count, begin, end, mean, var,
                                   y);
  } else {
    NAME(forward_channels_last_as)(x, weight, bias, eps, size, samples.weight, count, begin, end,
                                   mean, var, y);
  }
}

/* sum[c] += sum of grad_y and dot[c] += sum of grad_y (x - center[c]) over the rows of weight other
 * than 0. */
INLINED void NAME(add_grad_rows)(const STORAGE* grad_y, const STORAGE* x, int64_t rows,
                                 int64_t step, int64_t width, const double* sample,
                                 const double* center, double* sum, double* dot) {
  if (width == BLOCK) {
    f64x8 sum0, sum1, dot0, dot1, center0, center1;
    memcpy(&sum0, sum, sizeof sum0);
    memcpy(&sum1, sum + LANES, sizeof sum1);
    memcpy(&dot0, dot, sizeof dot0);
    memcpy(&dot1, dot + LANES, sizeof dot1);
    memcpy(&center0, center, sizeof center0);
    memcpy(&center1, center + LANES, sizeof center1);
    for (int64_t r = 0; r < rows; ++r) {
      if (sample != NULL && sample[r] == 0.0) continue;
      const f64x8 g0 = NAME(load_wide)(grad_y + r * step);
      const f64x8 g1 = NAME(load_wide)(grad_y + r * step + LANES);
      sum0 += g0;
      sum1 += g1;
      dot0 += g0 * (NAME(load_wide)(x + r * step) - center0);
      dot1 += g1 * (NAME(load_wide)(x + r * step + LANES) - center1);
    }
    memcpy(sum, &sum0, sizeof sum0);
    memcpy(sum + LANES, &sum1, sizeof sum1);
    memcpy(dot, &dot0, sizeof dot0);
    memcpy(dot + LANES, &dot1, sizeof dot1);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (sample != NULL && sample[r] == 0.0) continue;
    for (int64_t i = 0; i < width; ++i) {
      const double g = (double)WIDEN(grad_y[r * step + i]);
      sum[i] += g;
      dot[i] += g * ((double)WIDEN(x[r * step + i]) - center[i]);
    }
  }
}

INLINED void NAME(backward_channels_last_as)(const void* grad_y_, const void* x_,
                                             const double* weight, const double* mean,
                                             const double* var, double eps, mb_norm_size size,
                                             const double* sample, double count, int64_t begin,
                                             int64_t end, double* grad_weight, double* grad_bias,
                                             void* grad_x_) {
  const STORAGE *grad_y = (const STORAGE*)grad_y_, *x = (const STORAGE*)x_;
  STORAGE* grad_x = (STORAGE*)grad_x_;
  const int64_t C = size.channels, N = size.batch * size.positions;
  for (int64_t c = begin; c < end; ++c) grad_weight[c] = grad_bias[c] = 0.0;
  for (int64_t r = 0; r < N; r += ROWS) {
    const int64_t rows = N - r < ROWS ? N - r : ROWS;
    for (int64_t c = begin; c < end; c += BLOCK) {
      const int64_t width = end - c < BLOCK ? end - c : BLOCK;
      NAME(add_grad_rows)(grad_y + r * C + c, x + r * C + c, rows, C, width,
                          sample == NULL ? NULL : sample + r, mean + c, grad_bias + c,
                          grad_weight + c);
    }
  }
  for (int64_t c = begin; c < end; ++c) grad_weight[c] /= sqrt(var[c] + eps);
  if (grad_x == NULL) return;
  for (int64_t c = begin; c < end; c += BLOCK) {
    const int64_t width = end - c < BLOCK ? end - c : BLOCK;
    REAL center[BLOCK] = {0}, average[BLOCK] = {0}, slope[BLOCK] = {0}, scale[BLOCK] = {0};
    for (int64_t i = 0; i < width; ++i) {
      const NAME(slope) k =
          NAME(make_slope)(mean[c + i], var[c + i], eps, weight == NULL ? 1.0 : weight[c + i],
                           grad_weight[c + i], grad_bias[c + i], count);
      center[i] = k.center;
      average[i] = k.average;
      slope[i] = k.slope;
      scale[i] = k.scale;
    }
    for (int64_t half = 0; half < BLOCK && width == BLOCK; half += LANES) {
      VECTOR centers, averages, slopes, scales;
      memcpy(&centers, center + half, sizeof centers);
      memcpy(&averages, average + half, sizeof averages);
      memcpy(&slopes, slope + half, sizeof slopes);
      memcpy(&scales, scale + half, sizeof scales);
      for (int64_t r = 0; r < N; ++r) {
        const int64_t at = r * C + c + half;
        const double w = sample == NULL ? 1.0 : sample[r];
        if (w == 0.0) {
          memset(grad_x + at, 0, LANES * sizeof *grad_x);
          continue;
        }
        const VECTOR d = NAME(load)(x + at) - centers;
        const VECTOR v =
            ((NAME(load)(grad_y + at) - averages * (REAL)w) - d * (slopes * (REAL)w)) * scales;
        NAME(store)(grad_x + at, &v);
      }
    }
    for (int64_t r = 0; r < N && width < BLOCK; ++r) {
      const double w = sample == NULL ? 1.0 : sample[r];
      if (w == 0.0) {
        memset(grad_x + r * C + c, 0, width * sizeof *grad_x);
        continue;
      }
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = r * C + c + i;
        const REAL d = WIDEN(x[at]) - center[i];
        const REAL own = average[i] * (REAL)w, steep = slope[i] * (REAL)w;
        grad_x[at] = NARROW(((WIDEN(grad_y[at]) - own) - d * steep) * scale[i]);
      }
    }
  }
}

static void NAME(backward_channels_last)(const void* grad_y, const void* x, const double* weight,
                                         const double* mean, const double* var, double eps,
                                         mb_norm_size size, mb_norm_samples samples, int64_t begin,
                                         int64_t end, double* grad_weight, double* grad_bias,
                                         void* grad_x) {
  const double count = samples.count;
  if (samples.weight == NULL) {
    NAME(backward_channels_last_as)(grad_y, x, weight, mean, var, eps, size, NULL, count, begin,
                                    end, grad_weight, grad_bias, grad_x);
  } else {
    NAME(backward_channels_last_as)(grad_y, x, weight, mean, var, eps, size, samples.weight, count,
                                    begin, end, grad_weight, grad_bias, grad_x);
  }
}

#undef NAME
#undef STORAGE
#undef REAL
#undef VECTOR
#undef WIDEN
#undef NARROW
