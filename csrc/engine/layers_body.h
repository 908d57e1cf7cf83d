/* Normalisation, dropout, embedding and the rest of the layers for one dtype. Their loops over the
 * samples of a panel are plain ones, which compilers vectorise. */

/* For each panel of a batch: its `first` sample and its `width` lanes. */
#define EACH_PANEL(batch)                                          \
  for (int64_t first = 0, width = (batch) > LANES ? PANEL : LANES; \
       first<(batch); first += PANEL, width = (batch) - first> LANES ? PANEL : LANES)

/* ---- layer normalisation --------------------------------------------------------------------- */

/* saved: a panel of 2 `rows` features, mean and 1 / deviation of each row. */
static void NAME(layer_norm)(const mb_engine_op* op, int64_t batch, const REAL* x,
                             const REAL* weight, const REAL* bias, REAL eps, REAL* saved, REAL* y) {
  const int64_t rows = op->rows, F = op->width;
  EACH_PANEL(batch) {
    for (int64_t r = 0; r < rows; ++r) {
      const REAL* in = x + (first * rows + r * width) * F;
      REAL* out = y + (first * rows + r * width) * F;
      REAL* mean = saved + (first * rows + r * width) * 2;
      REAL* scale = mean + width;
      REAL sum[PANEL] = {0}, square[PANEL] = {0};
      for (int64_t f = 0; f < F; ++f) {
        for (int64_t l = 0; l < width; ++l) sum[l] += in[f * width + l];
      }
      for (int64_t l = 0; l < width; ++l) mean[l] = sum[l] / (REAL)F;
      for (int64_t f = 0; f < F; ++f) {
        for (int64_t l = 0; l < width; ++l) {
          const REAL d = in[f * width + l] - mean[l];
          square[l] += d * d;
        }
      }
      for (int64_t l = 0; l < width; ++l) scale[l] = 1 / SQRT(square[l] / (REAL)F + eps);
      for (int64_t f = 0; f < F; ++f) {
        const REAL w = weight == NULL ? 1 : weight[f], b = bias == NULL ? 0 : bias[f];
        for (int64_t l = 0; l < width; ++l) {
          out[f * width + l] = (in[f * width + l] - mean[l]) * scale[l] * w + b;
        }
      }
    }
  }
}

/* Where dweight is not NULL, `work` becomes dy x_hat, of the size of x. */
static void NAME(layer_norm_backward)(const mb_engine_op* op, int64_t batch, const REAL* x,
                                      const REAL* weight, const REAL* saved, const REAL* dy,
                                      REAL* dx, REAL* work) {
  const int64_t rows = op->rows, F = op->width;
  EACH_PANEL(batch) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first * rows + r * width) * F;
      const REAL *in = x + at, *g = dy + at;
      const REAL* mean = saved + (first * rows + r * width) * 2;
      const REAL* scale = mean + width;
      REAL sum[PANEL] = {0}, dot[PANEL] = {0};
      for (int64_t f = 0; f < F; ++f) {
        const REAL w = weight == NULL ? 1 : weight[f];
        for (int64_t l = 0; l < width; ++l) {
          const REAL hat = (in[f * width + l] - mean[l]) * scale[l];
          if (work != NULL) work[at + f * width + l] = g[f * width + l] * hat;
          sum[l] += g[f * width + l] * w;
          dot[l] += g[f * width + l] * w * hat;
        }
      }
      if (dx == NULL) continue;
      for (int64_t l = 0; l < width; ++l) {
        sum[l] /= (REAL)F;
        dot[l] /= (REAL)F;
      }
      for (int64_t f = 0; f < F; ++f) {
        const REAL w = weight == NULL ? 1 : weight[f];
        for (int64_t l = 0; l < width; ++l) {
          const REAL hat = (in[f * width + l] - mean[l]) * scale[l];
          const REAL value = (g[f * width + l] * w - sum[l] - hat * dot[l]) * scale[l];
          const int64_t to = at + f * width + l;
          dx[to] = op->adds_dx ? dx[to] + value : value;
        }
      }
    }
  }
}

/* ---- batch normalisation --------------------------------------------------------------------- */

/* saved: [C, 4]: the mean, the part of it that was lost in rounding, the biased variance and 1 /
 * deviation of each feature. The sums of the second pass are of small numbers: what the rounding
 * of the first mean lost is found there. */
static void NAME(batch_norm)(const mb_engine_op* op, int64_t batch, const REAL* x,
                             const REAL* lane_weight, double count, const REAL* weight,
                             const REAL* bias, double eps, REAL* saved, REAL* y) {
  const int64_t F = op->width;
  for (int64_t f = 0; f < F; ++f) {
    REAL lanes[PANEL] = {0}, squares[PANEL] = {0};
    EACH_PANEL(batch) {
      const REAL *in = x + first * F + f * width, *w = lane_weight + first;
      for (int64_t l = 0; l < width; ++l) lanes[l] += w[l] != 0 ? in[l] * w[l] : 0;
    }
    double total = 0;
    for (int l = 0; l < PANEL; ++l) total += (double)lanes[l];
    const REAL center = (REAL)(total / count);
    for (int l = 0; l < PANEL; ++l) lanes[l] = 0;
    EACH_PANEL(batch) {
      const REAL *in = x + first * F + f * width, *w = lane_weight + first;
      for (int64_t l = 0; l < width; ++l) {
        const REAL d = in[l] - center;
        lanes[l] += w[l] != 0 ? d * w[l] : 0;
        squares[l] += w[l] != 0 ? d * w[l] * d : 0;
      }
    }
    double rest = 0, square = 0;
    for (int l = 0; l < PANEL; ++l) {
      rest += (double)lanes[l];
      square += (double)squares[l];
    }
    rest /= count;
    const double var = square / count - rest * rest;
    const double inverse = 1 / sqrt(var + eps);
    REAL* s = saved + 4 * f;
    s[0] = center;
    s[1] = (REAL)rest;
    s[2] = (REAL)var;
    s[3] = (REAL)inverse;
    const double scale = inverse * (weight == NULL ? 1.0 : (double)weight[f]);
    const REAL factor = (REAL)scale;
    const REAL offset = (REAL)((bias == NULL ? 0.0 : (double)bias[f]) - rest * scale);
    EACH_PANEL(batch) {
      const REAL* in = x + first * F + f * width;
      REAL* out = y + first * F + f * width;
      for (int64_t l = 0; l < width; ++l) out[l] = (in[l] - center) * factor + offset;
    }
  }
}

/* running = (1 - factor) running + factor batch */
static void NAME(batch_norm_running)(int64_t F, const REAL* saved, double count, double momentum,
                                     int weighted, REAL* mean, REAL* var, int64_t* batches) {
  if (batches != NULL) *batches += 1;
  if (mean == NULL) return;
  const double unbiased =
      weighted ? fmax(count, 1) / fmax(count - 1, 1) : count / fmax(count - 1, 1);
  const int cumulative = momentum != momentum && batches != NULL;
  const double factor = cumulative ? 1 / (double)*batches : momentum != momentum ? 0 : momentum;
  for (int64_t f = 0; f < F; ++f) {
    const REAL* s = saved + 4 * f;
    mean[f] = (REAL)((1 - factor) * (double)mean[f] + factor * ((double)s[0] + (double)s[1]));
    var[f] = (REAL)((1 - factor) * (double)var[f] + factor * ((double)s[2] * unbiased));
  }
}

/* dweight and dbias [F]; dx may be NULL. */
static void NAME(batch_norm_backward)(const mb_engine_op* op, int64_t batch, const REAL* x,
                                      const REAL* lane_weight, double count, const REAL* weight,
                                      const REAL* saved, const REAL* dy, REAL* dx, REAL* dweight,
                                      REAL* dbias) {
  const int64_t F = op->width;
  for (int64_t f = 0; f < F; ++f) {
    const REAL center = saved[4 * f], rest = saved[4 * f + 1], inverse = saved[4 * f + 3];
    REAL sums[PANEL] = {0}, dots[PANEL] = {0};
    EACH_PANEL(batch) {
      const int64_t at = first * F + f * width;
      const REAL* w = lane_weight + first;
      for (int64_t l = 0; l < width; ++l) {
        const REAL g = dy[at + l];
        sums[l] += w[l] != 0 ? g : 0;
        dots[l] += w[l] != 0 ? g * ((x[at + l] - center) - rest) : 0;
      }
    }
    double sum = 0, dot = 0;
    for (int l = 0; l < PANEL; ++l) {
      sum += (double)sums[l];
      dot += (double)dots[l];
    }
    dot *= (double)inverse;
    dbias[f] = (REAL)sum;
    dweight[f] = (REAL)dot;
    if (dx == NULL) continue;
    const REAL average = (REAL)(sum / count), slope = (REAL)(dot / count * (double)inverse);
    const REAL scale = inverse * (weight == NULL ? 1 : weight[f]);
    EACH_PANEL(batch) {
      const int64_t at = first * F + f * width;
      const REAL* w = lane_weight + first;
      for (int64_t l = 0; l < width; ++l) {
        const REAL d = (x[at + l] - center) - rest;
        const REAL value = w[l] != 0 ? (dy[at + l] - w[l] * (average + d * slope)) * scale : 0;
        dx[at + l] = op->adds_dx ? dx[at + l] + value : value;
      }
    }
  }
}

/* ---- dropout --------------------------------------------------------------------------------- */

/* The scales 0 or 1 / (1 - p) of every element as panels: what the general path's operator makes
 * of ones. `work` holds two matrices [B, F]. */
static void NAME(dropout_scales)(mb_dropout_fn dropout, int64_t batch, int64_t features, double p,
                                 mb_philox_stream stream, REAL* work, REAL* scales) {
  REAL* ones = work;
  REAL* drawn = work + batch * features;
  for (int64_t i = 0; i < batch * features; ++i) ones[i] = 1;
  dropout(ones, drawn, 0, batch * features, 1, p, stream);
  NAME(panels_from_rows)(drawn, NULL, batch, features, scales);
}

/* y (+)= x scale; selected, never multiplied by zero. */
static void NAME(scale_kept)(const REAL* x, const REAL* scales, REAL* y, int64_t n, int add) {
  NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    const REAL value = scales[i] != 0 ? x[i] * scales[i] : 0;
    y[i] = add ? y[i] + value : value;
  }
}

/* ---- embedding ------------------------------------------------------------------------------- */

/* index [B, rows] */
static void NAME(embed)(const mb_engine_op* op, int64_t batch, const int64_t* index,
                        const REAL* weight, REAL* y) {
  const int64_t rows = op->rows, E = op->width;
  EACH_PANEL(batch) {
    const int64_t samples = batch - first < width ? batch - first : width;
    for (int64_t r = 0; r < rows; ++r) {
      REAL* out = y + (first * rows + r * width) * E;
      for (int64_t l = 0; l < samples; ++l) {
        const REAL* from = weight + index[(first + l) * rows + r] * E;
        for (int64_t e = 0; e < E; ++e) out[e * width + l] = from[e];
      }
      for (int64_t l = samples; l < width; ++l) {
        for (int64_t e = 0; e < E; ++e) out[e * width + l] = 0;
      }
    }
  }
}

/* grad [N, E], sample by sample */
static void NAME(embed_backward)(const mb_engine_op* op, int64_t batch, const int64_t* index,
                                 const REAL* dy, REAL* grad) {
  const int64_t rows = op->rows, E = op->width;
  memset(grad, 0, (size_t)(op->vocabulary * E) * sizeof *grad);
  EACH_PANEL(batch) {
    const int64_t samples = batch - first < width ? batch - first : width;
    for (int64_t l = 0; l < samples; ++l) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t word = index[(first + l) * rows + r];
        if (word == op->extra) continue; /* padding_idx */
        const REAL* in = dy + (first * rows + r * width) * E + l;
        for (int64_t e = 0; e < E; ++e) grad[word * E + e] += in[e * width];
      }
    }
  }
}

/* ---- elementwise ----------------------------------------------------------------------------- */

static void NAME(add)(const REAL* a, const REAL* b, REAL* y, int64_t n) {
  NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

/* to (+)= from */
static void NAME(pass)(const REAL* from, REAL* to, int64_t n, int add) {
  if (add) {
    NAME(add)(from, to, to, n);
  } else {
    memcpy(to, from, (size_t)n * sizeof *to);
  }
}

static void NAME(mean_rows)(const mb_engine_op* op, int64_t batch, const REAL* x, REAL* y) {
  const int64_t rows = op->rows, F = op->width;
  EACH_PANEL(batch) {
    const REAL* in = x + first * rows * F;
    REAL* out = y + first * F;
    for (int64_t i = 0; i < F * width; ++i) out[i] = in[i];
    for (int64_t r = 1; r < rows; ++r) {
      for (int64_t i = 0; i < F * width; ++i) out[i] += in[r * F * width + i];
    }
    for (int64_t i = 0; i < F * width; ++i) out[i] /= (REAL)rows;
  }
}

static void NAME(mean_rows_backward)(const mb_engine_op* op, int64_t batch, const REAL* dy,
                                     REAL* dx) {
  const int64_t rows = op->rows, F = op->width;
  EACH_PANEL(batch) {
    const REAL* in = dy + first * F;
    REAL* out = dx + first * rows * F;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < F * width; ++i) {
        const REAL value = in[i] / (REAL)rows;
        const int64_t to = r * F * width + i;
        out[to] = op->adds_dx ? out[to] + value : value;
      }
    }
  }
}
