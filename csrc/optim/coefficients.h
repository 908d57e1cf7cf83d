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

}  // namespace modelbatch
