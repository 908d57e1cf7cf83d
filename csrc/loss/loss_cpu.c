/* The CPU kernels of the loss family. */
#include <math.h>

#include "common/elementary.h"
#include "common/isa.h"
#include "loss/loss.h"

#define T float
#define SUFFIX f32
#define MB_EXP mb_exp_nonpositive_f32
#define MB_LOG mb_log_f32
#include "loss/loss_body.h"
#undef T
#undef SUFFIX
#undef MB_EXP
#undef MB_LOG

#define T double
#define SUFFIX f64
#define MB_EXP exp
#define MB_LOG log
#include "loss/loss_body.h"

extern const mb_loss_kernels MB_NAME(mb_loss_kernels);
const mb_loss_kernels MB_NAME(mb_loss_kernels) = {
    .cross_entropy = {[MB_LOSS_F32] = cross_entropy_f32, [MB_LOSS_F64] = cross_entropy_f64},
};
