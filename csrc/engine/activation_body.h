/* Activations and their derivatives for one dtype: plain loops, which compilers vectorise. */

INLINED REAL NAME(sigmoid)(REAL x) {
  const REAL t = EXP_NONPOSITIVE(x < 0 ? x : -x);
  const REAL inverse = 1 / (1 + t);
  return x < 0 ? t * inverse : inverse;
}

/* log(1 + exp(x)) */
INLINED REAL NAME(softplus)(REAL x) {
  const REAL t = EXP_NONPOSITIVE(x < 0 ? x : -x);
  return (x > 0 ? x : x != x ? x : 0) + LOG1P_UNIT(t);
}

INLINED REAL NAME(gelu_inner)(REAL x) {
  return (REAL)0.7978845608028654 * (x + (REAL)0.044715 * x * x * x);
}

#define EACH(...)                     \
  do {                                \
    NO_OVERLAP                        \
    for (int64_t i = 0; i < n; ++i) { \
      __VA_ARGS__;                    \
    }                                 \
  } while (0)

/* y = f(x); x and y may be the same. `a` and `b` are the instruction's numbers. */
static void NAME(activate)(int opcode, int64_t extra, const REAL* x, REAL* y, int64_t n, double a_,
                           double b_) {
  const REAL a = (REAL)a_, b = (REAL)b_;
  switch (opcode) {
    case MB_OP_RELU:
      EACH(y[i] = x[i] < 0 ? 0 : x[i]);
      break;
    case MB_OP_LEAKY_RELU:
      EACH(y[i] = x[i] > 0 ? x[i] : x[i] * a);
      break;
    case MB_OP_ELU:
      EACH(const REAL v = x[i]; const REAL low = a * EXPM1_NONPOSITIVE(v > 0 ? 0 : v);
           y[i] = v > 0 ? v : low);
      break;
    case MB_OP_GELU:
      if (extra != 0) {
        EACH(const REAL v = x[i]; const REAL half = (REAL)0.5 * v;
             y[i] = half + half * TANH(NAME(gelu_inner)(v)));
      } else {
        EACH(const REAL v = x[i]; y[i] = v * NORMAL_CDF(v, EXP_NONPOSITIVE((REAL)-0.5 * v * v)));
      }
      break;
    case MB_OP_SILU:
      EACH(y[i] = x[i] * NAME(sigmoid)(x[i]));
      break;
    case MB_OP_TANH:
      EACH(y[i] = TANH(x[i]));
      break;
    case MB_OP_SIGMOID:
      EACH(y[i] = NAME(sigmoid)(x[i]));
      break;
    default: /* softplus: beta a, threshold b */
      EACH(const REAL v = x[i] * a; const REAL soft = NAME(softplus)(v) / a;
           y[i] = v > b ? x[i] : soft);
  }
}

/* dx = dy f'(x), added to dx where `add`. dx and dy may be the same. x and y are the input and the
 * result; where the result took its place, ReLU, tanh and sigmoid do without x. */
#define DERIVATIVE(statements, value)     \
  do {                                    \
    if (add) {                            \
      EACH(statements; dx[i] += (value)); \
    } else {                              \
      EACH(statements; dx[i] = (value));  \
    }                                     \
  } while (0)

static void NAME(activate_backward)(int opcode, int64_t extra, const REAL* x, const REAL* y,
                                    const REAL* dy, REAL* dx, int64_t n, int add, double a_,
                                    double b_) {
  const REAL a = (REAL)a_, b = (REAL)b_;
  switch (opcode) {
    case MB_OP_RELU:
      DERIVATIVE((void)0, y[i] <= 0 ? 0 : dy[i]);
      break;
    case MB_OP_LEAKY_RELU:
      DERIVATIVE((void)0, x[i] > 0 ? dy[i] : dy[i] * a);
      break;
    case MB_OP_ELU: /* a exp(x) = y + a, but not where that cancels */
      DERIVATIVE(const REAL e = EXP_NONPOSITIVE(x[i] > 0 ? 0 : x[i]),
                 x[i] > 0 ? dy[i] : dy[i] * a * e);
      break;
    case MB_OP_GELU:
      if (extra != 0) {
        DERIVATIVE(const REAL v = x[i]; const REAL t = TANH(NAME(gelu_inner)(v));
                   const REAL inner = (REAL)0.7978845608028654 * (1 + (REAL)0.134145 * v * v);
                   const REAL slope = (REAL)0.5 * (1 + t) + (REAL)0.5 * v * (1 - t * t) * inner,
                   dy[i] * slope);
      } else {
        DERIVATIVE(const REAL v = x[i]; const REAL bell = EXP_NONPOSITIVE((REAL)-0.5 * v * v);
                   const REAL slope = NORMAL_CDF(v, bell) + v * bell * (REAL)0.3989422804014327,
                   dy[i] * slope);
      }
      break;
    case MB_OP_SILU:
      DERIVATIVE(const REAL s = NAME(sigmoid)(x[i]), dy[i] * (s * (1 + x[i] * (1 - s))));
      break;
    case MB_OP_TANH:
      DERIVATIVE((void)0, dy[i] * (1 - y[i] * y[i]));
      break;
    case MB_OP_SIGMOID:
      DERIVATIVE((void)0, dy[i] * ((1 - y[i]) * y[i]));
      break;
    default:
      DERIVATIVE(const REAL v = x[i] * a, v > b ? dy[i] : dy[i] * NAME(sigmoid)(v));
  }
}

#undef DERIVATIVE
#undef EACH
