/* The losses and their derivatives for one dtype. */

/* What a model's loss reads besides the output. */
typedef struct NAME(loss_input) {
  const mb_engine_plan* plan;
  const mb_engine_model* model;
  const REAL* z; /* the output, panels */
  REAL* dz;      /* its gradient; NULL: the loss alone */
  REAL* work;    /* panels of the output */
} NAME(loss_input);

INLINED double NAME(number)(const mb_engine_model* model, int64_t row) {
  return model->numbers[row * model->number_step];
}

/* sum(numerators) / denominator with the conventions of a mean of nothing. */
INLINED double NAME(mean_of)(const mb_engine_model* model, double total, double denominator) {
  if (model->sample_weight != NULL && denominator == 0) return 0;
  return total / denominator;
}

/* 1 / denominator, the factor of every derivative. */
INLINED double NAME(share_of)(const mb_engine_model* model, double denominator) {
  if (model->sample_weight != NULL && denominator == 0) return 0;
  return 1 / denominator;
}

/* What class losses have for a whole batch. */
typedef struct NAME(classes) {
  int64_t count;
  const REAL* share; /* [padded]: the samples' weights; 0 of those that do not count */
  REAL kept, spread; /* label smoothing: what stays, what every class gets */
  int64_t weight_row;
  REAL factor; /* of every derivative */
} NAME(classes);

/* One panel of cross entropy or NLL; `width`, `soft` and `normalises` are constants. With a_c the
 * target's weight of class c, the loss of a sample is -sum a_c log p_c, and its derivative
 * p_c sum a - a_c. Subtracts the losses from `totals`. */
INLINED void NAME(class_panel)(const NAME(loss_input) * in, const NAME(classes) * classes,
                               int64_t first, const int64_t width, const int soft,
                               const int normalises, REAL* restrict totals) {
  const int64_t C = classes->count;
  const REAL* restrict z = in->z + first * C;
  const REAL* restrict target = (const REAL*)in->model->target_panels + (soft ? first * C : 0);
  const INTEGER* restrict label = (const INTEGER*)in->model->target_panels + (soft ? 0 : first);
  REAL* restrict e = in->work + in->plan->padded + first * C; /* exponentials */
  REAL largest[PANEL], logs[PANEL], inverse[PANEL], a_sum[PANEL], dot[PANEL];
  const REAL* restrict share = classes->share + first;
  const REAL kept = classes->kept, spread = classes->spread;
  for (int64_t l = 0; l < width; ++l) largest[l] = logs[l] = inverse[l] = a_sum[l] = dot[l] = 0;
  if (normalises) {
    for (int64_t l = 0; l < width; ++l) largest[l] = z[l];
    for (int64_t c = 1; c < C; ++c) {
      for (int64_t l = 0; l < width; ++l) {
        const REAL value = z[c * width + l];
        largest[l] = value > largest[l] || value != value ? value : largest[l];
      }
    }
    REAL sum[PANEL];
    for (int64_t l = 0; l < width; ++l) sum[l] = 0;
    for (int64_t i = 0; i < C * width; i += width) {
      for (int64_t l = 0; l < width; ++l) e[i + l] = EXP_NONPOSITIVE(z[i + l] - largest[l]);
      for (int64_t l = 0; l < width; ++l) sum[l] += e[i + l];
    }
    for (int64_t l = 0; l < width; ++l) inverse[l] = 1 / sum[l];
    for (int64_t l = 0; l < width; ++l) logs[l] = LOG(sum[l]);
  }
#define CLASS_WEIGHT(c) \
  (classes->weight_row < 0 ? 1 : (REAL)NAME(number)(in->model, classes->weight_row + (c)))
#define A(c, l)                                                    \
  (((soft                       ? target[(c) * width + (l)] * kept \
     : label[l] == (INTEGER)(c) ? kept                             \
                                : 0) +                             \
    spread) *                                                      \
   class_weight)
  for (int64_t c = 0; c < C; ++c) {
    const REAL class_weight = CLASS_WEIGHT(c);
    for (int64_t l = 0; l < width; ++l) {
      const REAL a = A(c, l), log_p = (z[c * width + l] - largest[l]) - logs[l];
      a_sum[l] += a;
      dot[l] += a != 0 ? a * log_p : 0; /* a class without a part may have probability 0 */
    }
  }
  /* Selected, not skipped: loops without branches become vectors. */
  for (int64_t l = 0; l < width; ++l) {
    const REAL s = share[l], counted = dot[l] * s;
    totals[l] -= s != 0 ? counted : 0;
  }
  if (in->dz == NULL) return;
  REAL* restrict dz = in->dz + first * C;
  const REAL factor = classes->factor;
  for (int64_t c = 0; c < C; ++c) {
    const REAL class_weight = CLASS_WEIGHT(c);
    for (int64_t l = 0; l < width; ++l) {
      const REAL a = A(c, l), p = normalises ? e[c * width + l] * inverse[l] : 0;
      const REAL s = share[l], slope = (p * a_sum[l] - a) * (s * factor);
      dz[c * width + l] = s != 0 ? slope : 0;
    }
  }
#undef A
#undef CLASS_WEIGHT
}

#define DEFINE_CLASS_PANELS(name, soft, normalises)                                       \
  static void name(const NAME(loss_input) * in, const NAME(classes) * c, REAL * totals) { \
    EACH_PANEL(in->plan->batch) {                                                         \
      if (width == PANEL) {                                                               \
        NAME(class_panel)(in, c, first, PANEL, soft, normalises, totals);                 \
      } else {                                                                            \
        NAME(class_panel)(in, c, first, LANES, soft, normalises, totals);                 \
      }                                                                                   \
    }                                                                                     \
  }
DEFINE_CLASS_PANELS(NAME(hard_panels), 0, 1)
DEFINE_CLASS_PANELS(NAME(soft_panels), 1, 1)
DEFINE_CLASS_PANELS(NAME(nll_panels), 0, 0)
#undef DEFINE_CLASS_PANELS

static double NAME(class_loss)(const NAME(loss_input) * in) {
  const mb_engine_plan* plan = in->plan;
  const mb_engine_model* model = in->model;
  const int64_t C = plan->out_width, batch = plan->batch, padded = plan->padded;
  const int64_t smoothing_row = plan->loss_parameters[MB_LOSS_SMOOTHING];
  const int64_t weight_row = plan->loss_parameters[MB_LOSS_CLASS_WEIGHT];
  const double smoothing = smoothing_row < 0 ? 0.0 : NAME(number)(model, smoothing_row);
  const int is_sum = plan->loss_parameters[MB_LOSS_REDUCTION] == 1;
  const int soft = plan->loss == MB_ENGINE_CROSS_ENTROPY_SOFT;
  const INTEGER* restrict labels = model->target_panels;
  const REAL* restrict weights = model->lane_weight;
  /* The denominator comes first: every derivative is divided by it. */
  double denominator = model->weight_sum;
  const REAL* share = weights;
  if (!soft) {
    REAL* restrict own = in->work;
    VEC counted = {0};
    for (int64_t b = 0; b < padded; b += LANES) {
      for (int64_t l = b; l < b + LANES; ++l) {
        const REAL w = weights[l];
        own[l] = labels[l] >= 0 ? w : 0;
      }
      counted += LOAD(own + b);
    }
    share = own;
    if (weight_row >= 0 || model->sample_weight != NULL || batch >= 1 << 24) {
      denominator = 0;
      for (int64_t b = 0; b < batch; ++b) {
        const double w = model->sample_weight == NULL ? 1.0 : model->sample_weight[b];
        if (labels[b] < 0 || w == 0) continue;
        denominator +=
            weight_row < 0 ? w : w * NAME(number)(model, weight_row + (int64_t)labels[b]);
      }
    } else {
      denominator = (double)NAME(sum_lanes)(counted);
    }
  }
  if (is_sum) denominator = 1;
  const NAME(classes) classes = {C,
                                 share,
                                 (REAL)(1 - smoothing),
                                 (REAL)(smoothing / (double)C),
                                 weight_row,
                                 (REAL)NAME(share_of)(model, denominator)};
  REAL totals[PANEL] = {0};
  (soft                          ? NAME(soft_panels)
   : plan->loss == MB_ENGINE_NLL ? NAME(nll_panels)
                                 : NAME(hard_panels))(in, &classes, totals);
  double total = 0;
  for (int l = 0; l < PANEL; ++l) total += (double)totals[l];
  return is_sum ? total : NAME(mean_of)(model, total, denominator);
}

#define SIGN(d) ((d) > 0 ? (REAL)1 : (d) < 0 ? (REAL) - 1 : (d))

/* Losses of single numbers: the statements set `loss` and `slope` from d = z - t, z and t. */
#define EACH_NUMBER(...)                                                              \
  EACH_PANEL(batch) {                                                                 \
    const REAL* w = (const REAL*)model->lane_weight + first;                          \
    for (int64_t f = 0; f < F; ++f) {                                                 \
      const int64_t at = first * F + f * width;                                       \
      const REAL pos_weight =                                                         \
          weight_row < 0 ? 1 : (REAL)NAME(number)(model, weight_row + f % columns);   \
      (void)pos_weight;                                                               \
      for (int64_t l = 0; l < width; ++l) {                                           \
        const REAL z = in->z[at + l], t = target[at + l], d = z - t;                  \
        REAL loss, slope;                                                             \
        (void)d;                                                                      \
        __VA_ARGS__;                                                                  \
        totals[l] += w[l] != 0 ? loss * w[l] : 0;                                     \
        if (in->dz != NULL) in->dz[at + l] = w[l] != 0 ? slope * (w[l] * factor) : 0; \
      }                                                                               \
    }                                                                                 \
  }

static double NAME(number_loss)(const NAME(loss_input) * in) {
  const mb_engine_plan* plan = in->plan;
  const mb_engine_model* model = in->model;
  const int64_t F = plan->out_features, columns = plan->out_width, batch = plan->batch;
  const int64_t weight_row = plan->loss_parameters[MB_LOSS_CLASS_WEIGHT];
  const int64_t delta_row = plan->loss_parameters[MB_LOSS_DELTA];
  const REAL delta = delta_row < 0 ? 1 : (REAL)NAME(number)(model, delta_row);
  const int is_sum = plan->loss_parameters[MB_LOSS_REDUCTION] == 1;
  const double denominator = is_sum ? 1 : model->weight_sum * (double)F;
  const REAL factor = (REAL)NAME(share_of)(model, denominator);
  const REAL* target = model->target_panels;
  REAL totals[PANEL] = {0};
  switch (plan->loss) {
    case MB_ENGINE_MSE:
      EACH_NUMBER(loss = d * d; slope = 2 * d)
      break;
    case MB_ENGINE_L1:
      EACH_NUMBER(loss = d < 0 ? -d : d; slope = SIGN(d))
      break;
    case MB_ENGINE_HUBER:
      EACH_NUMBER(const REAL size = d < 0 ? -d : d;
                  loss = size >= delta ? delta * (size - (REAL)0.5 * delta) : (REAL)0.5 * d * d;
                  slope = d >= delta    ? delta
                          : d <= -delta ? -delta
                                        : d)
      break;
    case MB_ENGINE_SMOOTH_L1:
      if (delta == 0) {
        EACH_NUMBER(loss = d < 0 ? -d : d; slope = SIGN(d))
      } else {
        EACH_NUMBER(const REAL size = d < 0 ? -d : d;
                    loss = size >= delta ? size - (REAL)0.5 * delta : (REAL)0.5 * d * d / delta;
                    slope = d >= delta    ? 1
                            : d <= -delta ? -1
                                          : d / delta)
      }
      break;
    default: /* binary cross entropy: log(sigmoid(z)) = min(z, 0) - log(1 + exp(-|z|)) */
      EACH_NUMBER(const REAL e = EXP_NONPOSITIVE(z < 0 ? z : -z);
                  const REAL log_p = (z < 0    ? z
                                      : z != z ? z
                                               : 0) -
                                     LOG1P_UNIT(e);
                  const REAL p = NAME(sigmoid)(z); const REAL positive = (pos_weight - 1) * t + 1;
                  loss = (1 - t) * z - positive * log_p;
                  slope = (pos_weight * t + 1 - t) * p - pos_weight * t)
  }
  double total = 0;
  for (int l = 0; l < PANEL; ++l) total += (double)totals[l];
  return is_sum ? total : NAME(mean_of)(model, total, denominator);
}
#undef EACH_NUMBER
#undef SIGN

static double NAME(loss)(const NAME(loss_input) * in) {
  return in->plan->loss <= MB_ENGINE_NLL ? NAME(class_loss)(in) : NAME(number_loss)(in);
}

/* ---- targets --------------------------------------------------------------------------------- */

static void NAME(label_lanes)(const int64_t* labels, const double* weight, int64_t batch,
                              int64_t padded, int64_t ignore_index, void* lanes_) {
  INTEGER* lanes = lanes_;
  for (int64_t b = 0; b < batch; ++b) {
    const int counts = labels[b] != ignore_index && (weight == NULL || weight[b] != 0);
    lanes[b] = (INTEGER)(counts ? labels[b] : -1);
  }
  for (int64_t b = batch; b < padded; ++b) lanes[b] = -1;
}
