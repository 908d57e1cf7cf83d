/* The kernels of one dtype: included by optim_cpu.c with
 *   NAME(stem), RULE(stem)    stem with the suffix of the dtype, of the arithmetic's type
 *   STORAGE, REAL             the types of parameters and gradients, of states and arithmetic
 *   WIDEN(value), NARROW(value)
 */

/* One loop over the slice. The arguments are statements on the parameter `p` and the gradient `g`
 * that load and store the states. Where the gradient is used as it is, no transform is loaded. */
#define EACH_ELEMENT(...)                                                           \
  do {                                                                              \
    if (transform == NULL) {                                                        \
      NO_OVERLAP                                                                    \
      for (int64_t e = 0; e < numel; ++e) {                                         \
        const REAL g = WIDEN(grad[e]);                                              \
        REAL p = WIDEN(param[e]);                                                   \
        __VA_ARGS__;                                                                \
        param[e] = NARROW(p);                                                       \
      }                                                                             \
    } else {                                                                        \
      const RULE(mb_grad_transform) t = *(const RULE(mb_grad_transform)*)transform; \
      NO_OVERLAP                                                                    \
      for (int64_t e = 0; e < numel; ++e) {                                         \
        const REAL g = RULE(mb_transform_grad)(&t, WIDEN(grad[e]));                 \
        REAL p = WIDEN(param[e]);                                                   \
        __VA_ARGS__;                                                                \
        param[e] = NARROW(p);                                                       \
      }                                                                             \
    }                                                                               \
  } while (0)

#define UPDATE_PARAMETERS                                                                    \
  (const void* coefficients, const void* transform, void* param_data, const void* grad_data, \
   void* const* states, int64_t numel)

static void NAME(sgd) UPDATE_PARAMETERS {
  RULE(mb_sgd) c = *(const RULE(mb_sgd)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict buffers = states[0];
  if (!c.has_momentum) {
    c.has_momentum = 0; /* known to the compiler from here on, as the flags below */
    EACH_ELEMENT(RULE(mb_sgd_update)(&c, g, &p, NULL));
  } else if (c.is_first) {
    c.has_momentum = c.is_first = 1;
    EACH_ELEMENT({
      REAL buffer = 0; /* the memory may never have been written */
      RULE(mb_sgd_update)(&c, g, &p, &buffer);
      buffers[e] = buffer;
    });
  } else {
    c.has_momentum = 1;
    c.is_first = 0;
    EACH_ELEMENT({
      REAL buffer = buffers[e];
      RULE(mb_sgd_update)(&c, g, &p, &buffer);
      buffers[e] = buffer;
    });
  }
}

static void NAME(adam) UPDATE_PARAMETERS {
  RULE(mb_adam) c = *(const RULE(mb_adam)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict exp_avgs = states[0];
  REAL* restrict exp_avg_sqs = states[1];
  REAL* restrict maxima = states[2];
  if (!c.amsgrad) {
    c.amsgrad = 0;
    EACH_ELEMENT({
      REAL first = exp_avgs[e], second = exp_avg_sqs[e];
      RULE(mb_adam_update)(&c, g, &p, &first, &second, NULL);
      exp_avgs[e] = first;
      exp_avg_sqs[e] = second;
    });
  } else {
    c.amsgrad = 1;
    EACH_ELEMENT({
      REAL first = exp_avgs[e], second = exp_avg_sqs[e], maximum = maxima[e];
      RULE(mb_adam_update)(&c, g, &p, &first, &second, &maximum);
      exp_avgs[e] = first;
      exp_avg_sqs[e] = second;
      maxima[e] = maximum;
    });
  }
}

static void NAME(rmsprop) UPDATE_PARAMETERS {
  RULE(mb_rmsprop) c = *(const RULE(mb_rmsprop)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict square_avgs = states[0];
  REAL* restrict grad_avgs = states[1];
  REAL* restrict buffers = states[2];
  if (!c.centered && !c.has_momentum) {
    c.centered = c.has_momentum = 0;
    EACH_ELEMENT({
      REAL square = square_avgs[e];
      RULE(mb_rmsprop_update)(&c, g, &p, &square, NULL, NULL);
      square_avgs[e] = square;
    });
  } else if (!c.centered) {
    c.centered = 0;
    c.has_momentum = 1;
    EACH_ELEMENT({
      REAL square = square_avgs[e], buffer = buffers[e];
      RULE(mb_rmsprop_update)(&c, g, &p, &square, NULL, &buffer);
      square_avgs[e] = square;
      buffers[e] = buffer;
    });
  } else if (!c.has_momentum) {
    c.centered = 1;
    c.has_momentum = 0;
    EACH_ELEMENT({
      REAL square = square_avgs[e], mean = grad_avgs[e];
      RULE(mb_rmsprop_update)(&c, g, &p, &square, &mean, NULL);
      square_avgs[e] = square;
      grad_avgs[e] = mean;
    });
  } else {
    c.centered = c.has_momentum = 1;
    EACH_ELEMENT({
      REAL square = square_avgs[e], mean = grad_avgs[e], buffer = buffers[e];
      RULE(mb_rmsprop_update)(&c, g, &p, &square, &mean, &buffer);
      square_avgs[e] = square;
      grad_avgs[e] = mean;
      buffers[e] = buffer;
    });
  }
}

static void NAME(adagrad) UPDATE_PARAMETERS {
  const RULE(mb_adagrad) c = *(const RULE(mb_adagrad)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict sums = states[0];
  EACH_ELEMENT({
    REAL sum = sums[e];
    RULE(mb_adagrad_update)(&c, g, &p, &sum);
    sums[e] = sum;
  });
}

static void NAME(adadelta) UPDATE_PARAMETERS {
  const RULE(mb_adadelta) c = *(const RULE(mb_adadelta)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict states0 = states[0];
  REAL* restrict states1 = states[1];
  EACH_ELEMENT({
    REAL state0 = states0[e], state1 = states1[e];
    RULE(mb_adadelta_update)(&c, g, &p, &state0, &state1);
    states0[e] = state0;
    states1[e] = state1;
  });
}

static void NAME(adamax) UPDATE_PARAMETERS {
  const RULE(mb_adamax) c = *(const RULE(mb_adamax)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict states0 = states[0];
  REAL* restrict states1 = states[1];
  EACH_ELEMENT({
    REAL state0 = states0[e], state1 = states1[e];
    RULE(mb_adamax_update)(&c, g, &p, &state0, &state1);
    states0[e] = state0;
    states1[e] = state1;
  });
}

static void NAME(radam) UPDATE_PARAMETERS {
  const RULE(mb_radam) c = *(const RULE(mb_radam)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict states0 = states[0];
  REAL* restrict states1 = states[1];
  EACH_ELEMENT({
    REAL state0 = states0[e], state1 = states1[e];
    RULE(mb_radam_update)(&c, g, &p, &state0, &state1);
    states0[e] = state0;
    states1[e] = state1;
  });
}

static void NAME(rprop) UPDATE_PARAMETERS {
  const RULE(mb_rprop) c = *(const RULE(mb_rprop)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict states0 = states[0];
  REAL* restrict states1 = states[1];
  EACH_ELEMENT({
    REAL state0 = states0[e], state1 = states1[e];
    RULE(mb_rprop_update)(&c, g, &p, &state0, &state1);
    states0[e] = state0;
    states1[e] = state1;
  });
}

static void NAME(nadam) UPDATE_PARAMETERS {
  const RULE(mb_nadam) c = *(const RULE(mb_nadam)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict states0 = states[0];
  REAL* restrict states1 = states[1];
  EACH_ELEMENT({
    REAL state0 = states0[e], state1 = states1[e];
    RULE(mb_nadam_update)(&c, g, &p, &state0, &state1);
    states0[e] = state0;
    states1[e] = state1;
  });
}

static void NAME(asgd) UPDATE_PARAMETERS {
  const RULE(mb_asgd) c = *(const RULE(mb_asgd)*)coefficients;
  STORAGE* restrict param = param_data;
  const STORAGE* restrict grad = grad_data;
  REAL* restrict averages = states[0];
  EACH_ELEMENT({
    REAL average = averages[e];
    RULE(mb_asgd_update)(&c, g, &p, &average);
    averages[e] = average;
  });
}

/* Element e is added to lane e mod LANES; then the lanes are added in a fixed tree. */
static double NAME(sum_squares)(const void* grad_data, int64_t numel, int* nonfinite) {
  const STORAGE* restrict grad = grad_data;
  double sums[LANES] = {0};
  int64_t e = 0;
  for (; e + LANES <= numel; e += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      const double value = (double)WIDEN(grad[e + lane]);
      sums[lane] += value * value;
    }
  }
  for (int lane = 0; e + lane < numel; ++lane) {
    const double value = (double)WIDEN(grad[e + lane]);
    sums[lane] += value * value;
  }
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  /* A sum that overflows (possible for float64 alone) says nothing about the elements. */
  *nonfinite = 0;
  if (!(sums[0] <= DBL_MAX)) {
    for (int64_t i = 0; i < numel; ++i) *nonfinite |= !(fabs((double)WIDEN(grad[i])) <= DBL_MAX);
  }
  return sums[0];
}

#undef EACH_ELEMENT
#undef UPDATE_PARAMETERS
#undef NAME
#undef RULE
#undef STORAGE
#undef REAL
#undef WIDEN
#undef NARROW
