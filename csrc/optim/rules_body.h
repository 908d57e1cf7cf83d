/* The rules in one floating-point type: included by rules.h with
 *   REAL, REAL_SQRT   the type and its square root
 *   NAME(stem)        stem with the type's suffix
 * Expressions follow torch.optim's single-tensor functions, operation by operation, so that results
 * differ from theirs by rounding alone. What a coefficient switches off is selected away, never
 * multiplied by zero: zero times infinity would be NaN.
 */

/* ---- gradients ------------------------------------------------------------------------------ */

typedef struct NAME(mb_grad_transform) {
  REAL inv_scale, clip_factor, clip_value; /* 1, 1, infinity: no change */
} NAME(mb_grad_transform);

MB_HOST_DEVICE static inline NAME(mb_grad_transform)
    NAME(mb_make_grad_transform)(float inv_scale, double clip_factor, double clip_value) {
  NAME(mb_grad_transform) t;
  t.inv_scale = (REAL)inv_scale;
  t.clip_factor = (REAL)clip_factor;
  t.clip_value = (REAL)clip_value;
  return t;
}

/* NaN compares false twice and stays NaN. */
MB_HOST_DEVICE static inline REAL NAME(mb_transform_grad)(const NAME(mb_grad_transform) * t,
                                                          REAL grad) {
  const REAL scaled = grad * t->inv_scale * t->clip_factor;
  const REAL above = scaled < -t->clip_value ? -t->clip_value : scaled;
  return above > t->clip_value ? t->clip_value : above;
}

MB_HOST_DEVICE static inline REAL NAME(mb_decayed_grad)(REAL sign, REAL weight_decay, REAL grad,
                                                        REAL param) {
  const REAL signed_grad = sign * grad;
  return weight_decay != 0 ? signed_grad + weight_decay * param : signed_grad;
}

/* from + w (to - from) for the w of mb_lerp_weight. */
MB_HOST_DEVICE static inline REAL NAME(mb_lerp)(REAL from, REAL to, REAL weight, int from_end) {
  return (from_end ? to : from) + weight * (to - from);
}

/* ---- SGD ------------------------------------------------------------------------------------ */

typedef struct NAME(mb_sgd) {
  REAL sign; /* -1: maximize */
  REAL weight_decay;
  REAL lr;
  REAL momentum;
  REAL grad_weight; /* 1 - dampening */
  int has_momentum;
  int is_first; /* the buffer becomes the gradient */
  int nesterov;
} NAME(mb_sgd);

/* Reads and writes the buffer only where c->has_momentum. */
MB_HOST_DEVICE static inline void NAME(mb_sgd_update)(const NAME(mb_sgd) * c, REAL grad,
                                                      REAL* param, REAL* momentum_buffer) {
  REAL step = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  if (c->has_momentum) {
    const REAL moved = *momentum_buffer * c->momentum + c->grad_weight * step;
    const REAL buffer = c->is_first ? step : moved;
    *momentum_buffer = buffer;
    step = c->nesterov ? step + c->momentum * buffer : buffer;
  }
  *param -= c->lr * step;
}

/* ---- Adam and AdamW ------------------------------------------------------------------------- */

typedef struct NAME(mb_adam) {
  REAL sign;
  REAL weight_decay; /* added to the gradient; 0 where decoupled */
  REAL param_factor; /* 1 - lr weight_decay where decoupled, else 1 */
  REAL lerp_weight;  /* of the first moment, see mb_lerp_weight */
  REAL beta2, one_minus_beta2;
  REAL step_size;            /* lr / (1 - beta1^step) */
  REAL inv_sqrt_correction2; /* 1 / sqrt(1 - beta2^step) */
  REAL eps;
  int lerp_from_end;
  int amsgrad;
} NAME(mb_adam);

/* Reads and writes the maximum only where c->amsgrad. */
MB_HOST_DEVICE static inline void NAME(mb_adam_update)(const NAME(mb_adam) * c, REAL grad,
                                                       REAL* param, REAL* exp_avg, REAL* exp_avg_sq,
                                                       REAL* max_exp_avg_sq) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL first = NAME(mb_lerp)(*exp_avg, g, c->lerp_weight, c->lerp_from_end);
  REAL second = *exp_avg_sq * c->beta2 + c->one_minus_beta2 * g * g;
  *exp_avg = first;
  *exp_avg_sq = second;
  if (c->amsgrad) {
    const REAL before = *max_exp_avg_sq;
    second = second > before || second != second ? second : before; /* NaN wins */
    *max_exp_avg_sq = second;
  }
  const REAL denominator = REAL_SQRT(second) * c->inv_sqrt_correction2 + c->eps;
  *param = *param * c->param_factor - c->step_size * first / denominator;
}

/* ---- RMSprop -------------------------------------------------------------------------------- */

typedef struct NAME(mb_rmsprop) {
  REAL sign;
  REAL weight_decay;
  REAL lr;
  REAL alpha, one_minus_alpha;
  REAL lerp_weight; /* of the mean gradient */
  REAL eps;
  REAL momentum;
  int lerp_from_end;
  int centered;
  int has_momentum;
} NAME(mb_rmsprop);

/* Reads and writes the mean gradient only where c->centered, the buffer only where
 * c->has_momentum. */
MB_HOST_DEVICE static inline void NAME(mb_rmsprop_update)(const NAME(mb_rmsprop) * c, REAL grad,
                                                          REAL* param, REAL* square_avg,
                                                          REAL* grad_avg, REAL* momentum_buffer) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  REAL variance = *square_avg * c->alpha + c->one_minus_alpha * g * g;
  *square_avg = variance;
  if (c->centered) {
    const REAL mean = NAME(mb_lerp)(*grad_avg, g, c->lerp_weight, c->lerp_from_end);
    *grad_avg = mean;
    variance = variance - mean * mean;
  }
  const REAL denominator = REAL_SQRT(variance) + c->eps;
  if (c->has_momentum) {
    const REAL buffer = *momentum_buffer * c->momentum + g / denominator;
    *momentum_buffer = buffer;
    *param -= c->lr * buffer;
  } else {
    *param -= c->lr * g / denominator;
  }
}

/* ---- Adagrad -------------------------------------------------------------------------------- */

typedef struct NAME(mb_adagrad) {
  REAL sign;
  REAL weight_decay;
  REAL lr; /* lr / (1 + (step - 1) lr_decay) */
  REAL eps;
} NAME(mb_adagrad);

MB_HOST_DEVICE static inline void NAME(mb_adagrad_update)(const NAME(mb_adagrad) * c, REAL grad,
                                                          REAL* param, REAL* sum) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL total = *sum + g * g;
  *sum = total;
  *param -= c->lr * g / (REAL_SQRT(total) + c->eps);
}

/* ---- Adadelta ------------------------------------------------------------------------------- */

typedef struct NAME(mb_adadelta) {
  REAL sign;
  REAL weight_decay;
  REAL lr;
  REAL rho, one_minus_rho;
  REAL eps;
} NAME(mb_adadelta);

MB_HOST_DEVICE static inline void NAME(mb_adadelta_update)(const NAME(mb_adadelta) * c, REAL grad,
                                                           REAL* param, REAL* square_avg,
                                                           REAL* acc_delta) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL square = *square_avg * c->rho + c->one_minus_rho * g * g;
  const REAL delta = REAL_SQRT(*acc_delta + c->eps) / REAL_SQRT(square + c->eps) * g;
  *square_avg = square;
  *acc_delta = *acc_delta * c->rho + c->one_minus_rho * delta * delta;
  *param -= c->lr * delta;
}

/* ---- Adamax --------------------------------------------------------------------------------- */

typedef struct NAME(mb_adamax) {
  REAL sign;
  REAL weight_decay;
  REAL lerp_weight;
  REAL beta2;
  REAL step_size; /* lr / (1 - beta1^step) */
  REAL eps;
  int lerp_from_end;
} NAME(mb_adamax);

MB_HOST_DEVICE static inline void NAME(mb_adamax_update)(const NAME(mb_adamax) * c, REAL grad,
                                                         REAL* param, REAL* exp_avg,
                                                         REAL* exp_inf) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL mean = NAME(mb_lerp)(*exp_avg, g, c->lerp_weight, c->lerp_from_end);
  const REAL decayed = *exp_inf * c->beta2;
  const REAL now = (g < 0 ? -g : g) + c->eps;
  const REAL norm = now > decayed || now != now ? now : decayed; /* NaN wins */
  *exp_avg = mean;
  *exp_inf = norm;
  *param -= c->step_size * mean / norm;
}

/* ---- RAdam ---------------------------------------------------------------------------------- */

typedef struct NAME(mb_radam) {
  REAL sign;
  REAL weight_decay; /* added to the gradient; 0 where decoupled */
  REAL param_factor;
  REAL lerp_weight;
  REAL beta2, one_minus_beta2;
  REAL step_size; /* lr / (1 - beta1^step) */
  REAL rectifier; /* times sqrt(1 - beta2^step) */
  REAL eps;
  int lerp_from_end;
  int is_rectified; /* before that the step is that of momentum */
} NAME(mb_radam);

MB_HOST_DEVICE static inline void NAME(mb_radam_update)(const NAME(mb_radam) * c, REAL grad,
                                                        REAL* param, REAL* exp_avg,
                                                        REAL* exp_avg_sq) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL first = NAME(mb_lerp)(*exp_avg, g, c->lerp_weight, c->lerp_from_end);
  const REAL second = *exp_avg_sq * c->beta2 + c->one_minus_beta2 * g * g;
  const REAL step = c->step_size * first;
  *exp_avg = first;
  *exp_avg_sq = second;
  *param = *param * c->param_factor -
           (c->is_rectified ? step * (c->rectifier / (REAL_SQRT(second) + c->eps)) : step);
}

/* ---- Rprop ---------------------------------------------------------------------------------- */

typedef struct NAME(mb_rprop) {
  REAL sign;
  REAL lr;
  REAL eta_minus, eta_plus;
  REAL min_step_size, max_step_size;
  int is_first; /* the step size becomes the learning rate */
} NAME(mb_rprop);

/* A product that is NaN leaves the step size. */
MB_HOST_DEVICE static inline void NAME(mb_rprop_update)(const NAME(mb_rprop) * c, REAL grad,
                                                        REAL* param, REAL* prev, REAL* step_size) {
  const REAL signed_grad = c->sign * grad;
  const REAL product = signed_grad * *prev;
  const REAL eta = product > 0 ? c->eta_plus : product < 0 ? c->eta_minus : (REAL)1;
  const REAL moved = (c->is_first ? c->lr : *step_size) * eta;
  const REAL above = moved < c->min_step_size ? c->min_step_size : moved;
  const REAL size = above > c->max_step_size ? c->max_step_size : above;
  const REAL g = product < 0 ? (REAL)0 : signed_grad; /* turned round: no step */
  *step_size = size;
  *prev = g;
  *param -= g > 0 ? size : g < 0 ? -size : (REAL)0;
}

/* ---- NAdam ---------------------------------------------------------------------------------- */

typedef struct NAME(mb_nadam) {
  REAL sign;
  REAL weight_decay; /* added to the gradient; 0 where decoupled */
  REAL param_factor;
  REAL lerp_weight;
  REAL beta2, one_minus_beta2;
  REAL inv_correction2; /* 1 / (1 - beta2^step) */
  REAL grad_step_size, momentum_step_size;
  REAL eps;
  int lerp_from_end;
} NAME(mb_nadam);

MB_HOST_DEVICE static inline void NAME(mb_nadam_update)(const NAME(mb_nadam) * c, REAL grad,
                                                        REAL* param, REAL* exp_avg,
                                                        REAL* exp_avg_sq) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL first = NAME(mb_lerp)(*exp_avg, g, c->lerp_weight, c->lerp_from_end);
  const REAL second = *exp_avg_sq * c->beta2 + c->one_minus_beta2 * g * g;
  const REAL denominator = REAL_SQRT(second * c->inv_correction2) + c->eps;
  *exp_avg = first;
  *exp_avg_sq = second;
  *param = *param * c->param_factor - c->grad_step_size * g / denominator -
           c->momentum_step_size * first / denominator;
}

/* ---- ASGD ----------------------------------------------------------------------------------- */

typedef struct NAME(mb_asgd) {
  REAL sign;
  REAL weight_decay;
  REAL param_factor; /* 1 - lambd eta */
  REAL eta;
  REAL mu;
  int is_copied; /* mu = 1: the average becomes the parameter */
} NAME(mb_asgd);

MB_HOST_DEVICE static inline void NAME(mb_asgd_update)(const NAME(mb_asgd) * c, REAL grad,
                                                       REAL* param, REAL* ax) {
  const REAL g = NAME(mb_decayed_grad)(c->sign, c->weight_decay, grad, *param);
  const REAL p = *param * c->param_factor - c->eta * g;
  *ax = c->is_copied ? p : *ax + (p - *ax) * c->mu;
  *param = p;
}

#undef REAL
#undef REAL_SQRT
#undef NAME
