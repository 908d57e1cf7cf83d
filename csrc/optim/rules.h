/* The arithmetic of every update rule, for the CPU and the CUDA kernels alike.
 *
 * For each rule there are
 *   mb_<rule>_f64, mb_<rule>_f32       a model's coefficients in the type of the arithmetic
 *   mb_<rule>_coefficients(hyper, num_models, model, step)   them in double; `step` counts this
 *                                      step, so that it is 1 at the first
 *   mb_<rule>_round_f32(c), mb_<rule>_round_f64(c)           rounded from double
 *   mb_<rule>_update_f32, _f64(&c, grad, &param, &states...) one element, in place
 * AdamW has the structs and the update of Adam.
 */
#ifndef MODELBATCH_OPTIM_RULES_H
#define MODELBATCH_OPTIM_RULES_H

#include <math.h>
#include <stdint.h>

#include "common/host_device.h"
#include "optim/optim.h"

#define REAL double
#define REAL_SQRT(value) sqrt(value)
#define NAME(stem) stem##_f64
#include "optim/rules_body.h"

#define REAL float
#define REAL_SQRT(value) sqrtf(value)
#define NAME(stem) stem##_f32
#include "optim/rules_body.h"

/* ---- parts ---------------------------------------------------------------------------------- */

/* a + w (b - a) loses a digit of b where w is near 1; from there on it is b - (1 - w) (b - a). The
 * result is the factor of (b - a); *from_end tells which end it is added to. */
MB_HOST_DEVICE static inline double mb_lerp_weight(double weight, int* from_end) {
  *from_end = weight >= 0.5;
  return weight < 0.5 ? weight : -(1.0 - weight);
}

MB_HOST_DEVICE static inline double mb_sign(double maximize) { return maximize != 0 ? -1.0 : 1.0; }

/* ---- SGD ------------------------------------------------------------------------------------ */

/* Only models with momentum count their steps. */
MB_HOST_DEVICE static inline int mb_sgd_counts_step(const double* hyper, int64_t num_models,
                                                    int64_t model) {
  return hyper[MB_SGD_MOMENTUM * num_models + model] != 0;
}

MB_HOST_DEVICE static inline mb_sgd_f64 mb_sgd_coefficients(const double* hyper, int64_t num_models,
                                                            int64_t model, double step) {
  const double* h = hyper + model;
  mb_sgd_f64 c;
  c.sign = mb_sign(h[MB_SGD_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_SGD_WEIGHT_DECAY * num_models];
  c.lr = h[MB_SGD_LR * num_models];
  c.momentum = h[MB_SGD_MOMENTUM * num_models];
  c.grad_weight = 1.0 - h[MB_SGD_DAMPENING * num_models];
  c.has_momentum = c.momentum != 0;
  c.is_first = step == 1.0;
  c.nesterov = h[MB_SGD_NESTEROV * num_models] != 0;
  return c;
}

MB_HOST_DEVICE static inline mb_sgd_f32 mb_sgd_round_f32(mb_sgd_f64 c) {
  mb_sgd_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.lr = (float)c.lr;
  r.momentum = (float)c.momentum;
  r.grad_weight = (float)c.grad_weight;
  r.has_momentum = c.has_momentum;
  r.is_first = c.is_first;
  r.nesterov = c.nesterov;
  return r;
}

MB_HOST_DEVICE static inline mb_sgd_f64 mb_sgd_round_f64(mb_sgd_f64 c) { return c; }

/* ---- Adam and AdamW ------------------------------------------------------------------------- */

/* 1 - beta^step for both moments. Two powers cost more than the rest of a small model's
 * coefficients, so a caller may keep the result for the next model of equal betas and step. */
typedef struct mb_adam_correction {
  double beta1, beta2, step; /* what it was computed for */
  double correction1, power2, sqrt_correction2;
} mb_adam_correction;

MB_HOST_DEVICE static inline mb_adam_correction mb_make_adam_correction(double beta1, double beta2,
                                                                        double step) {
  mb_adam_correction a;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.step = step;
  a.correction1 = 1.0 - pow(beta1, step);
  a.power2 = pow(beta2, step);
  a.sqrt_correction2 = sqrt(1.0 - a.power2);
  return a;
}

/* `correction` must belong to the model's betas and step. */
MB_HOST_DEVICE static inline mb_adam_f64 mb_adam_coefficients_with(
    const double* hyper, int64_t num_models, int64_t model, const mb_adam_correction* correction,
    int is_adamw) {
  const double* h = hyper + model;
  const double lr = h[MB_ADAM_LR * num_models];
  const double weight_decay = h[MB_ADAM_WEIGHT_DECAY * num_models];
  const int decoupled = is_adamw || h[MB_ADAM_DECOUPLED * num_models] != 0;
  mb_adam_f64 c;
  c.sign = mb_sign(h[MB_ADAM_MAXIMIZE * num_models]);
  c.weight_decay = decoupled ? 0.0 : weight_decay;
  c.param_factor = decoupled && weight_decay != 0 ? 1.0 - lr * weight_decay : 1.0;
  c.lerp_weight = mb_lerp_weight(1.0 - correction->beta1, &c.lerp_from_end);
  c.beta2 = correction->beta2;
  c.one_minus_beta2 = 1.0 - correction->beta2;
  c.step_size = lr / correction->correction1;
  c.inv_sqrt_correction2 = 1.0 / correction->sqrt_correction2;
  c.eps = h[MB_ADAM_EPS * num_models];
  c.amsgrad = h[MB_ADAM_AMSGRAD * num_models] != 0;
  return c;
}

MB_HOST_DEVICE static inline mb_adam_f64 mb_adam_coefficients(const double* hyper,
                                                              int64_t num_models, int64_t model,
                                                              double step) {
  const mb_adam_correction correction = mb_make_adam_correction(
      hyper[MB_ADAM_BETA1 * num_models + model], hyper[MB_ADAM_BETA2 * num_models + model], step);
  return mb_adam_coefficients_with(hyper, num_models, model, &correction, 0);
}

MB_HOST_DEVICE static inline mb_adam_f64 mb_adamw_coefficients(const double* hyper,
                                                               int64_t num_models, int64_t model,
                                                               double step) {
  const mb_adam_correction correction = mb_make_adam_correction(
      hyper[MB_ADAM_BETA1 * num_models + model], hyper[MB_ADAM_BETA2 * num_models + model], step);
  return mb_adam_coefficients_with(hyper, num_models, model, &correction, 1);
}

MB_HOST_DEVICE static inline mb_adam_f32 mb_adam_round_f32(mb_adam_f64 c) {
  mb_adam_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.param_factor = (float)c.param_factor;
  r.lerp_weight = (float)c.lerp_weight;
  r.beta2 = (float)c.beta2;
  r.one_minus_beta2 = (float)c.one_minus_beta2;
  r.step_size = (float)c.step_size;
  r.inv_sqrt_correction2 = (float)c.inv_sqrt_correction2;
  r.eps = (float)c.eps;
  r.lerp_from_end = c.lerp_from_end;
  r.amsgrad = c.amsgrad;
  return r;
}

MB_HOST_DEVICE static inline mb_adam_f64 mb_adam_round_f64(mb_adam_f64 c) { return c; }

/* ---- RMSprop -------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_rmsprop_f64 mb_rmsprop_coefficients(const double* hyper,
                                                                    int64_t num_models,
                                                                    int64_t model, double step) {
  const double* h = hyper + model;
  mb_rmsprop_f64 c;
  (void)step; /* counted, but not used */
  c.sign = mb_sign(h[MB_RMSPROP_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_RMSPROP_WEIGHT_DECAY * num_models];
  c.lr = h[MB_RMSPROP_LR * num_models];
  c.alpha = h[MB_RMSPROP_ALPHA * num_models];
  c.one_minus_alpha = 1.0 - c.alpha;
  c.lerp_weight = mb_lerp_weight(c.one_minus_alpha, &c.lerp_from_end);
  c.eps = h[MB_RMSPROP_EPS * num_models];
  c.momentum = h[MB_RMSPROP_MOMENTUM * num_models];
  c.centered = h[MB_RMSPROP_CENTERED * num_models] != 0;
  c.has_momentum = c.momentum > 0;
  return c;
}

MB_HOST_DEVICE static inline mb_rmsprop_f32 mb_rmsprop_round_f32(mb_rmsprop_f64 c) {
  mb_rmsprop_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.lr = (float)c.lr;
  r.alpha = (float)c.alpha;
  r.one_minus_alpha = (float)c.one_minus_alpha;
  r.lerp_weight = (float)c.lerp_weight;
  r.eps = (float)c.eps;
  r.momentum = (float)c.momentum;
  r.lerp_from_end = c.lerp_from_end;
  r.centered = c.centered;
  r.has_momentum = c.has_momentum;
  return r;
}

MB_HOST_DEVICE static inline mb_rmsprop_f64 mb_rmsprop_round_f64(mb_rmsprop_f64 c) { return c; }

/* ---- Adagrad -------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_adagrad_f64 mb_adagrad_coefficients(const double* hyper,
                                                                    int64_t num_models,
                                                                    int64_t model, double step) {
  const double* h = hyper + model;
  mb_adagrad_f64 c;
  c.sign = mb_sign(h[MB_ADAGRAD_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_ADAGRAD_WEIGHT_DECAY * num_models];
  c.lr = h[MB_ADAGRAD_LR * num_models] / (1.0 + (step - 1.0) * h[MB_ADAGRAD_LR_DECAY * num_models]);
  c.eps = h[MB_ADAGRAD_EPS * num_models];
  return c;
}

MB_HOST_DEVICE static inline mb_adagrad_f32 mb_adagrad_round_f32(mb_adagrad_f64 c) {
  mb_adagrad_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.lr = (float)c.lr;
  r.eps = (float)c.eps;
  return r;
}

MB_HOST_DEVICE static inline mb_adagrad_f64 mb_adagrad_round_f64(mb_adagrad_f64 c) { return c; }

/* ---- Adadelta ------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_adadelta_f64 mb_adadelta_coefficients(const double* hyper,
                                                                      int64_t num_models,
                                                                      int64_t model, double step) {
  const double* h = hyper + model;
  mb_adadelta_f64 c;
  (void)step; /* counted, but not used */
  c.sign = mb_sign(h[MB_ADADELTA_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_ADADELTA_WEIGHT_DECAY * num_models];
  c.lr = h[MB_ADADELTA_LR * num_models];
  c.rho = h[MB_ADADELTA_RHO * num_models];
  c.one_minus_rho = 1.0 - c.rho;
  c.eps = h[MB_ADADELTA_EPS * num_models];
  return c;
}

MB_HOST_DEVICE static inline mb_adadelta_f32 mb_adadelta_round_f32(mb_adadelta_f64 c) {
  mb_adadelta_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.lr = (float)c.lr;
  r.rho = (float)c.rho;
  r.one_minus_rho = (float)c.one_minus_rho;
  r.eps = (float)c.eps;
  return r;
}

MB_HOST_DEVICE static inline mb_adadelta_f64 mb_adadelta_round_f64(mb_adadelta_f64 c) { return c; }

/* ---- Adamax --------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_adamax_f64 mb_adamax_coefficients(const double* hyper,
                                                                  int64_t num_models, int64_t model,
                                                                  double step) {
  const double* h = hyper + model;
  const double beta1 = h[MB_ADAMAX_BETA1 * num_models];
  mb_adamax_f64 c;
  c.sign = mb_sign(h[MB_ADAMAX_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_ADAMAX_WEIGHT_DECAY * num_models];
  c.lerp_weight = mb_lerp_weight(1.0 - beta1, &c.lerp_from_end);
  c.beta2 = h[MB_ADAMAX_BETA2 * num_models];
  c.step_size = h[MB_ADAMAX_LR * num_models] / (1.0 - pow(beta1, step));
  c.eps = h[MB_ADAMAX_EPS * num_models];
  return c;
}

MB_HOST_DEVICE static inline mb_adamax_f32 mb_adamax_round_f32(mb_adamax_f64 c) {
  mb_adamax_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.lerp_weight = (float)c.lerp_weight;
  r.beta2 = (float)c.beta2;
  r.step_size = (float)c.step_size;
  r.eps = (float)c.eps;
  r.lerp_from_end = c.lerp_from_end;
  return r;
}

MB_HOST_DEVICE static inline mb_adamax_f64 mb_adamax_round_f64(mb_adamax_f64 c) { return c; }

/* ---- RAdam ---------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_radam_f64 mb_radam_coefficients(const double* hyper,
                                                                int64_t num_models, int64_t model,
                                                                double step) {
  const double* h = hyper + model;
  const double lr = h[MB_RADAM_LR * num_models], beta2 = h[MB_RADAM_BETA2 * num_models];
  const double weight_decay = h[MB_RADAM_WEIGHT_DECAY * num_models];
  const int decoupled = h[MB_RADAM_DECOUPLED * num_models] != 0;
  const mb_adam_correction a = mb_make_adam_correction(h[MB_RADAM_BETA1 * num_models], beta2, step);
  const double rho_limit = 2.0 / (1.0 - beta2) - 1.0;
  const double rho = rho_limit - 2.0 * step * a.power2 / (1.0 - a.power2);
  mb_radam_f64 c;
  c.sign = mb_sign(h[MB_RADAM_MAXIMIZE * num_models]);
  c.weight_decay = decoupled ? 0.0 : weight_decay;
  c.param_factor = decoupled && weight_decay != 0 ? 1.0 - lr * weight_decay : 1.0;
  c.lerp_weight = mb_lerp_weight(1.0 - a.beta1, &c.lerp_from_end);
  c.beta2 = beta2;
  c.one_minus_beta2 = 1.0 - beta2;
  c.step_size = lr / a.correction1;
  c.is_rectified = rho > 5.0;
  c.rectifier = c.is_rectified ? sqrt((rho - 4.0) * (rho - 2.0) * rho_limit /
                                      ((rho_limit - 4.0) * (rho_limit - 2.0) * rho)) *
                                     a.sqrt_correction2
                               : 1.0;
  c.eps = h[MB_RADAM_EPS * num_models];
  return c;
}

MB_HOST_DEVICE static inline mb_radam_f32 mb_radam_round_f32(mb_radam_f64 c) {
  mb_radam_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.param_factor = (float)c.param_factor;
  r.lerp_weight = (float)c.lerp_weight;
  r.beta2 = (float)c.beta2;
  r.one_minus_beta2 = (float)c.one_minus_beta2;
  r.step_size = (float)c.step_size;
  r.rectifier = (float)c.rectifier;
  r.eps = (float)c.eps;
  r.lerp_from_end = c.lerp_from_end;
  r.is_rectified = c.is_rectified;
  return r;
}

MB_HOST_DEVICE static inline mb_radam_f64 mb_radam_round_f64(mb_radam_f64 c) { return c; }

/* ---- Rprop ---------------------------------------------------------------------------------- */

MB_HOST_DEVICE static inline mb_rprop_f64 mb_rprop_coefficients(const double* hyper,
                                                                int64_t num_models, int64_t model,
                                                                double step) {
  const double* h = hyper + model;
  mb_rprop_f64 c;
  c.lr = h[MB_RPROP_LR * num_models];
  c.is_first = step == 1.0;
  c.sign = mb_sign(h[MB_RPROP_MAXIMIZE * num_models]);
  c.eta_minus = h[MB_RPROP_ETAMINUS * num_models];
  c.eta_plus = h[MB_RPROP_ETAPLUS * num_models];
  c.min_step_size = h[MB_RPROP_STEP_SIZE_MIN * num_models];
  c.max_step_size = h[MB_RPROP_STEP_SIZE_MAX * num_models];
  return c;
}

MB_HOST_DEVICE static inline mb_rprop_f32 mb_rprop_round_f32(mb_rprop_f64 c) {
  mb_rprop_f32 r;
  r.sign = (float)c.sign;
  r.lr = (float)c.lr;
  r.eta_minus = (float)c.eta_minus;
  r.eta_plus = (float)c.eta_plus;
  r.min_step_size = (float)c.min_step_size;
  r.max_step_size = (float)c.max_step_size;
  r.is_first = c.is_first;
  return r;
}

MB_HOST_DEVICE static inline mb_rprop_f64 mb_rprop_round_f64(mb_rprop_f64 c) { return c; }

/* ---- NAdam ---------------------------------------------------------------------------------- */

/* The momentum of step number `step`. */
MB_HOST_DEVICE static inline double mb_nadam_mu(const double* hyper, int64_t num_models,
                                                int64_t model, double step) {
  const double* h = hyper + model;
  return h[MB_NADAM_BETA1 * num_models] *
         (1.0 - 0.5 * pow(0.96, step * h[MB_NADAM_MOMENTUM_DECAY * num_models]));
}

/* The product of the momenta up to this step, from that up to the step before, which is not read at
 * the first. */
MB_HOST_DEVICE static inline float mb_nadam_mu_product(const double* hyper, int64_t num_models,
                                                       int64_t model, double step, float before) {
  return (step == 1.0 ? 1.0f : before) * (float)mb_nadam_mu(hyper, num_models, model, step);
}

/* The same where it is kept in double. */
MB_HOST_DEVICE static inline double mb_nadam_wide_mu_product(const double* hyper,
                                                             int64_t num_models, int64_t model,
                                                             double step, double before) {
  return (step == 1.0 ? 1.0 : before) * mb_nadam_mu(hyper, num_models, model, step);
}

/* `product` is that of the momenta up to this step. */
MB_HOST_DEVICE static inline mb_nadam_f64 mb_nadam_coefficients_with(const double* hyper,
                                                                     int64_t num_models,
                                                                     int64_t model, double step,
                                                                     double product) {
  const double* h = hyper + model;
  const double lr = h[MB_NADAM_LR * num_models], beta2 = h[MB_NADAM_BETA2 * num_models];
  const double weight_decay = h[MB_NADAM_WEIGHT_DECAY * num_models];
  const int decoupled = h[MB_NADAM_DECOUPLED * num_models] != 0;
  const double mu = mb_nadam_mu(hyper, num_models, model, step);
  const double mu_next = mb_nadam_mu(hyper, num_models, model, step + 1.0);
  mb_nadam_f64 c;
  c.sign = mb_sign(h[MB_NADAM_MAXIMIZE * num_models]);
  c.weight_decay = decoupled ? 0.0 : weight_decay;
  c.param_factor = decoupled && weight_decay != 0 ? 1.0 - lr * weight_decay : 1.0;
  c.lerp_weight = mb_lerp_weight(1.0 - h[MB_NADAM_BETA1 * num_models], &c.lerp_from_end);
  c.beta2 = beta2;
  c.one_minus_beta2 = 1.0 - beta2;
  c.inv_correction2 = 1.0 / (1.0 - pow(beta2, step));
  c.grad_step_size = lr * (1.0 - mu) / (1.0 - product);
  c.momentum_step_size = lr * mu_next / (1.0 - product * mu_next);
  c.eps = h[MB_NADAM_EPS * num_models];
  return c;
}

/* `before` is the product of the momenta up to the step before. */
MB_HOST_DEVICE static inline mb_nadam_f64 mb_nadam_coefficients(const double* hyper,
                                                                int64_t num_models, int64_t model,
                                                                double step, float before) {
  const float product = mb_nadam_mu_product(hyper, num_models, model, step, before);
  return mb_nadam_coefficients_with(hyper, num_models, model, step, (double)product);
}

MB_HOST_DEVICE static inline mb_nadam_f32 mb_nadam_round_f32(mb_nadam_f64 c) {
  mb_nadam_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.param_factor = (float)c.param_factor;
  r.lerp_weight = (float)c.lerp_weight;
  r.beta2 = (float)c.beta2;
  r.one_minus_beta2 = (float)c.one_minus_beta2;
  r.inv_correction2 = (float)c.inv_correction2;
  r.grad_step_size = (float)c.grad_step_size;
  r.momentum_step_size = (float)c.momentum_step_size;
  r.eps = (float)c.eps;
  r.lerp_from_end = c.lerp_from_end;
  return r;
}

MB_HOST_DEVICE static inline mb_nadam_f64 mb_nadam_round_f64(mb_nadam_f64 c) { return c; }

/* ---- ASGD ----------------------------------------------------------------------------------- */

/* The step size and the weight of the average for the step after step number `step`. */
MB_HOST_DEVICE static inline double mb_asgd_next_eta(const double* hyper, int64_t num_models,
                                                     int64_t model, double step) {
  const double* h = hyper + model;
  const double lr = h[MB_ASGD_LR * num_models];
  return lr / pow(1.0 + h[MB_ASGD_LAMBD * num_models] * lr * step, h[MB_ASGD_ALPHA * num_models]);
}

MB_HOST_DEVICE static inline double mb_asgd_next_mu(const double* hyper, int64_t num_models,
                                                    int64_t model, double step) {
  const double steps = step - hyper[MB_ASGD_T0 * num_models + model];
  return 1.0 / (steps > 1.0 ? steps : 1.0);
}

/* `kept_eta` and `kept_mu` are those for this step. At the first they are lr and 1, whatever was
 * kept; `is_wide` tells that they are kept in double. */
MB_HOST_DEVICE static inline mb_asgd_f64 mb_asgd_coefficients(const double* hyper,
                                                              int64_t num_models, int64_t model,
                                                              double step, double kept_eta,
                                                              double kept_mu, int is_wide) {
  const double* h = hyper + model;
  const double lr = h[MB_ASGD_LR * num_models];
  const double first_eta = is_wide ? lr : (double)(float)lr;
  const double eta = step == 1.0 ? first_eta : kept_eta, mu = step == 1.0 ? 1.0 : kept_mu;
  mb_asgd_f64 c;
  c.sign = mb_sign(h[MB_ASGD_MAXIMIZE * num_models]);
  c.weight_decay = h[MB_ASGD_WEIGHT_DECAY * num_models];
  c.param_factor = 1.0 - h[MB_ASGD_LAMBD * num_models] * eta;
  c.eta = eta;
  c.mu = mu;
  c.is_copied = mu == 1.0;
  return c;
}

MB_HOST_DEVICE static inline mb_asgd_f32 mb_asgd_round_f32(mb_asgd_f64 c) {
  mb_asgd_f32 r;
  r.sign = (float)c.sign;
  r.weight_decay = (float)c.weight_decay;
  r.param_factor = (float)c.param_factor;
  r.eta = (float)c.eta;
  r.mu = (float)c.mu;
  r.is_copied = c.is_copied;
  return r;
}

MB_HOST_DEVICE static inline mb_asgd_f64 mb_asgd_round_f64(mb_asgd_f64 c) { return c; }

#endif /* MODELBATCH_OPTIM_RULES_H */
