/* The CPU kernels of the pointwise family. */
#include "common/elementary.h"
#include "common/isa.h"
#include "pointwise/pointwise.h"

static void tanh_f32(const float* restrict x, float* restrict y, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) y[i] = mb_tanh_f32(x[i]);
}

extern const mb_pointwise_kernels MB_NAME(mb_pointwise_kernels);
const mb_pointwise_kernels MB_NAME(mb_pointwise_kernels) = {.tanh = tanh_f32};
