// The coefficients of one model, whichever rule it steps by.
#pragma once

#include "optim/rules.h"

namespace modelbatch {

// A model's coefficients, in the type of the arithmetic, as the kernels read them.
union Coefficients {
  mb_sgd_f32 sgd_f32;
  mb_sgd_f64 sgd_f64;
  mb_adam_f32 adam_f32;
  mb_adam_f64 adam_f64;
  mb_rmsprop_f32 rmsprop_f32;
  mb_rmsprop_f64 rmsprop_f64;
  mb_adagrad_f32 adagrad_f32;
  mb_adagrad_f64 adagrad_f64;
  mb_adadelta_f32 adadelta_f32;
  mb_adadelta_f64 adadelta_f64;
  mb_adamax_f32 adamax_f32;
  mb_adamax_f64 adamax_f64;
  mb_radam_f32 radam_f32;
  mb_radam_f64 radam_f64;
  mb_rprop_f32 rprop_f32;
  mb_rprop_f64 rprop_f64;
  mb_nadam_f32 nadam_f32;
  mb_nadam_f64 nadam_f64;
  mb_asgd_f32 asgd_f32;
  mb_asgd_f64 asgd_f64;
};

// Model `model`'s coefficients for a step, the first of which is number 1, from its column of hyper
// [K, count]. NAdam and ASGD, which need further numbers, are not for this function. `correction`
// is that of an earlier model, which is used again where it fits.
inline void fill_coefficients(int rule, const double* hyper, int64_t count, int64_t model,
                              double step, bool wide, mb_adam_correction& correction,
                              Coefficients& to) {
  switch (rule) {
    case MB_RULE_SGD: {
      const mb_sgd_f64 c = mb_sgd_coefficients(hyper, count, model, step);
      wide ? void(to.sgd_f64 = c) : void(to.sgd_f32 = mb_sgd_round_f32(c));
      break;
    }
    case MB_RULE_ADAM:
    case MB_RULE_ADAMW: {
      const double beta1 = hyper[MB_ADAM_BETA1 * count + model];
      const double beta2 = hyper[MB_ADAM_BETA2 * count + model];
      if (correction.step != step || correction.beta1 != beta1 || correction.beta2 != beta2) {
        correction = mb_make_adam_correction(beta1, beta2, step);
      }
      const mb_adam_f64 c =
          mb_adam_coefficients_with(hyper, count, model, &correction, rule == MB_RULE_ADAMW);
      wide ? void(to.adam_f64 = c) : void(to.adam_f32 = mb_adam_round_f32(c));
      break;
    }
    case MB_RULE_RMSPROP: {
      const mb_rmsprop_f64 c = mb_rmsprop_coefficients(hyper, count, model, step);
      wide ? void(to.rmsprop_f64 = c) : void(to.rmsprop_f32 = mb_rmsprop_round_f32(c));
      break;
    }
    case MB_RULE_ADAGRAD: {
      const mb_adagrad_f64 c = mb_adagrad_coefficients(hyper, count, model, step);
      wide ? void(to.adagrad_f64 = c) : void(to.adagrad_f32 = mb_adagrad_round_f32(c));
      break;
    }
    case MB_RULE_ADADELTA: {
      const mb_adadelta_f64 c = mb_adadelta_coefficients(hyper, count, model, step);
      wide ? void(to.adadelta_f64 = c) : void(to.adadelta_f32 = mb_adadelta_round_f32(c));
      break;
    }
    case MB_RULE_ADAMAX: {
      const mb_adamax_f64 c = mb_adamax_coefficients(hyper, count, model, step);
      wide ? void(to.adamax_f64 = c) : void(to.adamax_f32 = mb_adamax_round_f32(c));
      break;
    }
    case MB_RULE_RADAM: {
      const mb_radam_f64 c = mb_radam_coefficients(hyper, count, model, step);
      wide ? void(to.radam_f64 = c) : void(to.radam_f32 = mb_radam_round_f32(c));
      break;
    }
    default: {
      const mb_rprop_f64 c = mb_rprop_coefficients(hyper, count, model, step);
      wide ? void(to.rprop_f64 = c) : void(to.rprop_f32 = mb_rprop_round_f32(c));
    }
  }
}

}  // namespace modelbatch
