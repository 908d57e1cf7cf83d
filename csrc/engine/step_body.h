/* One training step of one model for one dtype: forward, loss, backward, optimizer. */

typedef struct NAME(context) {
  const mb_engine_plan* plan;
  const mb_engine_model* model;
  REAL* workspace;
  const void* transform; /* of the gradients on their way to the optimizer, or NULL */
  int status;
  VEC grad_zeros, weight_zeros; /* sums of zeros, unless a number was not finite */
} NAME(context);

INLINED REAL* NAME(at)(const NAME(context) * c, int64_t place) {
  return place == MB_PLACE_NONE ? NULL : c->workspace + place;
}

INLINED const REAL* NAME(value)(const NAME(context) * c, int64_t place) {
  return place == MB_PLACE_INPUT ? (const REAL*)c->model->x_panels : NAME(at)(c, place);
}

INLINED REAL* NAME(parameter)(const NAME(context) * c, int32_t index) {
  return index < 0 ? NULL : (REAL*)c->model->params[index];
}

INLINED int NAME(is_trained)(const NAME(context) * c, int32_t index) {
  return index >= 0 && c->plan->params[index].is_optimized;
}

/* ---- forward --------------------------------------------------------------------------------- */

static void NAME(forward_op)(const NAME(context) * c, const mb_engine_op* op) {
  const mb_engine_plan* plan = c->plan;
  const mb_engine_model* m = c->model;
  const int64_t batch = plan->batch, padded = plan->padded;
  const int64_t n = op->rows * op->in_width * padded;
  const REAL* x = op->opcode == MB_OP_EMBEDDING ? NULL : NAME(value)(c, op->x);
  REAL* y = NAME(at)(c, op->y);
  const double a = op->number < 0 ? 0.0 : NAME(number)(m, op->number);
  switch (op->opcode) {
    case MB_OP_LINEAR:
      NAME(linear_forward)(op, padded, x, NAME(parameter)(c, op->weight),
                           NAME(parameter)(c, op->bias), y);
      if (op->activation > MB_OP_RELU) {
        NAME(activate)(op->activation, 0, y, y, op->rows * op->width * padded, 0, 0);
      }
      break;
    case MB_OP_LAYER_NORM:
      NAME(layer_norm)(op, batch, x, NAME(parameter)(c, op->weight), NAME(parameter)(c, op->bias),
                       (REAL)a, NAME(at)(c, op->saved), y);
      break;
    case MB_OP_BATCH_NORM: {
      const double count = m->weight_sum == 0 ? 1 : m->weight_sum;
      REAL* saved = NAME(at)(c, op->saved);
      NAME(batch_norm)(op, batch, x, m->lane_weight, count, NAME(parameter)(c, op->weight),
                       NAME(parameter)(c, op->bias), a, saved, y);
      if (m->trains) {
        NAME(batch_norm_running)(op->width, saved, count, NAME(number)(m, op->number + 1),
                                 m->sample_weight != NULL,
                                 op->mean < 0 ? NULL : (REAL*)m->buffers[op->mean],
                                 op->var < 0 ? NULL : (REAL*)m->buffers[op->var],
                                 op->extra < 0 ? NULL : (int64_t*)m->buffers[op->extra]);
      }
      break;
    }
    case MB_OP_DROPOUT: {
      REAL* scales = NAME(at)(c, op->saved);
      NAME(dropout_scales)(plan->dropout, batch, op->rows * op->in_width, a,
                           mb_philox_open(m->seed, m->stream_step, op->extra),
                           NAME(at)(c, plan->scratch), scales);
      NAME(scale_kept)(x, scales, y, n, 0);
      break;
    }
    case MB_OP_ADD:
      NAME(add)(x, NAME(value)(c, op->x2), y, n);
      break;
    case MB_OP_EMBEDDING:
      NAME(embed)(op, batch, m->x_index, NAME(parameter)(c, op->weight), y);
      break;
    case MB_OP_MEAN_ROWS:
      NAME(mean_rows)(op, batch, x, y);
      break;
    default:
      NAME(activate)(op->opcode, op->extra, x, y, n, a,
                     op->opcode == MB_OP_SOFTPLUS ? NAME(number)(m, op->number + 1) : 0.0);
  }
}

/* ---- gradients and the optimizer ------------------------------------------------------------- */

/* Zeros, unless one of the numbers is not finite. */
INLINED VEC NAME(zeros_of)(const REAL* data, int64_t n) {
  VEC sum = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += LOAD(data + i) * (VEC){0};
  if (i < n) sum += LOAD_PART(data + i, n - i) * (VEC){0};
  return sum;
}

/* Hands `count` gradients of a parameter to the optimizer. */
static void NAME(update)(NAME(context) * c, int32_t index, int64_t begin, const REAL* grad,
                         int64_t count) {
  const mb_engine_plan* plan = c->plan;
  const mb_engine_model* m = c->model;
  void* states[MB_OPTIM_MAX_STATES];
  for (int i = 0; i < MB_OPTIM_MAX_STATES; ++i) {
    char* state = m->states[index * MB_OPTIM_MAX_STATES + i];
    states[i] = state == NULL ? NULL : (REAL*)state + begin;
  }
  REAL* param = (REAL*)m->params[index] + begin;
  if (!plan->keeps_grads) c->grad_zeros += NAME(zeros_of)(grad, count);
  plan->update(m->coefficients, c->transform, param, grad, states, count);
  c->weight_zeros += NAME(zeros_of)(param, count);
}

/* Where a small parameter's gradient is to be written before `gradient_done`. */
INLINED REAL* NAME(gradient_of)(const NAME(context) * c, int32_t index) {
  const int64_t place = c->plan->params[index].grad;
  return NAME(at)(c, place == MB_PLACE_NONE ? c->plan->chunk : place);
}

INLINED void NAME(gradient_done)(NAME(context) * c, int32_t index, const REAL* grad) {
  if (c->plan->keeps_grads) return;
  NAME(update)(c, index, 0, grad, c->plan->params[index].numel);
}

static void NAME(prefetch)(const NAME(context) * c, int32_t index, int64_t begin, int64_t count) {
  const mb_engine_model* m = c->model;
  for (int i = 0; i < MB_OPTIM_MAX_STATES; ++i) {
    const char* state = m->states[index * MB_OPTIM_MAX_STATES + i];
    if (state == NULL) continue;
    const char* from = state + begin * (int64_t)sizeof(REAL);
    for (int64_t b = 0; b < count * (int64_t)sizeof(REAL); b += 64) __builtin_prefetch(from + b, 1);
  }
}

static void NAME(linear_weight)(NAME(context) * c, const mb_engine_op* op, const REAL* dy) {
  const mb_engine_plan* plan = c->plan;
  const int64_t I = op->in_width, O = op->width, batch = plan->batch;
  const REAL* rows =
      op->x_rows == MB_PLACE_INPUT ? (const REAL*)c->model->x_rows : NAME(at)(c, op->x_rows);
  if (op->fills_rows) {
    NAME(rows_from_panels)(NAME(value)(c, op->x), batch, op->rows * I, op->x_step,
                           NAME(at)(c, op->x_rows));
  }
  const NAME(products) products = {dy, rows, op->x_step, batch, op->rows, I, O};
  const int64_t kept = plan->params[op->weight].grad;
  if (plan->keeps_grads) {
    NAME(weight_gradient)(&products, 0, O, 0, I, NAME(at)(c, kept), I);
    return;
  }
  REAL* chunk = NAME(at)(c, plan->chunk);
  /* Whole rows, as many as fill the chunk; of a wide layer parts of one row after another. */
  const int64_t columns = I < MB_ENGINE_CHUNK ? I : MB_ENGINE_CHUNK;
  int64_t step = MB_ENGINE_CHUNK / columns;
  if (step > ROWS) step -= step % ROWS;
  for (int64_t o = 0; o < O; o += step) {
    const int64_t count = O - o < step ? O - o : step;
    for (int64_t i = 0; i < I; i += columns) {
      const int64_t width = I - i < columns ? I - i : columns;
      NAME(prefetch)(c, op->weight, o * I + i, count * width);
      NAME(weight_gradient)(&products, o, count, i, width, chunk, width);
      NAME(update)(c, op->weight, o * I + i, chunk, count * width);
    }
  }
}

/* ---- backward -------------------------------------------------------------------------------- */

static void NAME(backward_linear)(NAME(context) * c, const mb_engine_op* op) {
  const mb_engine_plan* plan = c->plan;
  REAL* dy = NAME(at)(c, op->dy);
  if (op->activation >= 0) {
    NAME(activate_backward)(op->activation, 0, NULL, NAME(at)(c, op->y), dy, dy,
                            op->rows * op->width * plan->padded, 0, 0, 0);
  }
  if (op->dx != MB_PLACE_NONE) {
    NAME(linear_backward)(op, plan->padded, dy, NAME(parameter)(c, op->weight),
                          NAME(at)(c, op->dx));
  }
  if (NAME(is_trained)(c, op->weight)) NAME(linear_weight)(c, op, dy);
  if (NAME(is_trained)(c, op->bias)) {
    REAL* grad = NAME(gradient_of)(c, op->bias);
    NAME(sum_samples)(dy, plan->batch, op->rows, op->width, grad);
    NAME(gradient_done)(c, op->bias, grad);
  }
}

static void NAME(backward_op)(NAME(context) * c, const mb_engine_op* op) {
  const mb_engine_plan* plan = c->plan;
  const mb_engine_model* m = c->model;
  const int64_t batch = plan->batch, padded = plan->padded;
  const int64_t n = op->rows * op->in_width * padded;
  const REAL* dy = NAME(at)(c, op->dy);
  REAL* dx = NAME(at)(c, op->dx);
  const double a = op->number < 0 ? 0.0 : NAME(number)(m, op->number);
  switch (op->opcode) {
    case MB_OP_LINEAR:
      NAME(backward_linear)(c, op);
      break;
    case MB_OP_LAYER_NORM: {
      const int has_weight = NAME(is_trained)(c, op->weight);
      REAL* work = has_weight ? NAME(at)(c, plan->scratch) : NULL;
      NAME(layer_norm_backward)(op, batch, NAME(value)(c, op->x), NAME(parameter)(c, op->weight),
                                NAME(at)(c, op->saved), dy, dx, work);
      if (has_weight) {
        REAL* grad = NAME(gradient_of)(c, op->weight);
        NAME(sum_samples)(work, batch, op->rows, op->width, grad);
        NAME(gradient_done)(c, op->weight, grad);
      }
      if (NAME(is_trained)(c, op->bias)) {
        REAL* grad = NAME(gradient_of)(c, op->bias);
        NAME(sum_samples)(dy, batch, op->rows, op->width, grad);
        NAME(gradient_done)(c, op->bias, grad);
      }
      break;
    }
    case MB_OP_BATCH_NORM: {
      const int has_weight = NAME(is_trained)(c, op->weight),
                has_bias = NAME(is_trained)(c, op->bias);
      REAL* unused = NAME(at)(c, plan->scratch); /* two rows of the layer's width */
      REAL* grads[2] = {unused, unused + op->width};
      if (plan->keeps_grads && has_weight) grads[0] = NAME(gradient_of)(c, op->weight);
      if (plan->keeps_grads && has_bias) grads[1] = NAME(gradient_of)(c, op->bias);
      NAME(batch_norm_backward)(
          op, batch, NAME(value)(c, op->x), m->lane_weight, m->weight_sum == 0 ? 1 : m->weight_sum,
          NAME(parameter)(c, op->weight), NAME(at)(c, op->saved), dy, dx, grads[0], grads[1]);
      if (has_weight) NAME(gradient_done)(c, op->weight, grads[0]);
      if (has_bias) NAME(gradient_done)(c, op->bias, grads[1]);
      break;
    }
    case MB_OP_DROPOUT:
      if (dx != NULL) NAME(scale_kept)(dy, NAME(at)(c, op->saved), dx, n, op->adds_dx);
      break;
    case MB_OP_ADD:
      if (dx != NULL) NAME(pass)(dy, dx, n, op->adds_dx);
      if (op->dx2 != MB_PLACE_NONE) NAME(pass)(dy, NAME(at)(c, op->dx2), n, op->adds_dx2);
      break;
    case MB_OP_EMBEDDING:
      if (NAME(is_trained)(c, op->weight)) {
        REAL* grad = NAME(gradient_of)(c, op->weight);
        NAME(embed_backward)(op, batch, m->x_index, dy, grad);
        NAME(gradient_done)(c, op->weight, grad);
      }
      break;
    case MB_OP_MEAN_ROWS:
      if (dx != NULL) NAME(mean_rows_backward)(op, batch, dy, dx);
      break;
    default:
      if (dx != NULL) {
        NAME(activate_backward)(op->opcode, op->extra, NAME(value)(c, op->x), NAME(at)(c, op->y),
                                dy, dx, n, op->adds_dx, a,
                                op->opcode == MB_OP_SOFTPLUS ? NAME(number)(m, op->number + 1) : 0);
      }
  }
}

/* ---- the step -------------------------------------------------------------------------------- */

/* All gradients are there: their norm, clipping, the optimizer. */
static void NAME(update_kept)(NAME(context) * c, mb_engine_result* result) {
  const mb_engine_plan* plan = c->plan;
  const mb_engine_model* m = c->model;
  double squares = 0;
  for (int64_t i = 0; i < plan->num_optimized; ++i) {
    const mb_engine_parameter* p = &plan->params[i];
    int nonfinite = 0;
    squares += plan->sum_squares(NAME(at)(c, p->grad), p->numel, &nonfinite);
    if (nonfinite) c->status |= MB_STATUS_GRAD;
  }
  const double norm = sqrt(squares);
  result->grad_norm = norm;
  double factor = 1;
  if (m->clip_norm == m->clip_norm) {
    factor = m->clip_norm / (norm + 1e-6);
    factor = factor > 1 ? 1 : factor; /* NaN stays */
  }
  const double limit = m->clip_value == m->clip_value ? m->clip_value : (double)INFINITY;
  const TRANSFORM transform = MAKE_TRANSFORM(1.0f, factor, limit);
  if (m->clip_norm == m->clip_norm || m->clip_value == m->clip_value) c->transform = &transform;
  for (int64_t i = 0; i < plan->num_optimized; ++i) {
    const mb_engine_parameter* p = &plan->params[i];
    for (int64_t begin = 0; begin < p->numel; begin += MB_ENGINE_CHUNK) {
      const int64_t left = p->numel - begin;
      NAME(update)(c, (int32_t)i, begin, NAME(at)(c, p->grad) + begin,
                   left < MB_ENGINE_CHUNK ? left : MB_ENGINE_CHUNK);
    }
  }
  c->transform = NULL;
}

static void NAME(step)(const mb_engine_plan* plan, const mb_engine_model* model, void* workspace,
                       mb_engine_result* result) {
  NAME(context) c = {plan, model, workspace, NULL, 0, {0}, {0}};
  for (int64_t i = 0; i < plan->num_ops; ++i) NAME(forward_op)(&c, &plan->ops[i]);
  const NAME(loss_input) loss = {plan, model, NAME(value)(&c, plan->output),
                                 model->trains ? NAME(at)(&c, plan->output_grad) : NULL,
                                 NAME(at)(&c, plan->loss_scratch)};
  result->loss = (double)(REAL)NAME(loss)(&loss);
  result->grad_norm = 0;
  if (!(fabs(result->loss) <= DBL_MAX)) c.status |= MB_STATUS_LOSS;
  if (model->trains) {
    for (int64_t i = plan->num_ops - 1; i >= 0; --i) {
      if (plan->ops[i].dy != MB_PLACE_NONE) NAME(backward_op)(&c, &plan->ops[i]);
    }
    if (plan->keeps_grads) NAME(update_kept)(&c, result);
    if (NAME(sum_lanes)(c.grad_zeros) != 0) c.status |= MB_STATUS_GRAD;
    if (NAME(sum_lanes)(c.weight_zeros) != 0) c.status |= MB_STATUS_WEIGHTS;
  } else {
    c.status |= MB_STATUS_RESTED;
  }
  result->status = c.status;
}
