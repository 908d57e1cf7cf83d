/* The kernels of the engine, for float32 and float64 and one instruction set. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "common/isa.h"
#include "common/vectors.h"
#include "engine/elementary_f32.h"
#include "engine/engine_kernels.h"
#include "optim/rules.h"

#define INLINED MB_INLINED
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__GNUC__) && !defined(__clang__)
#define NO_OVERLAP _Pragma("GCC ivdep")
#else
#define NO_OVERLAP
#endif

/* Rows of a weight that are multiplied at once, with two vectors of samples: what the registers
 * hold. */
#if defined(__AVX512F__)
#define ROWS 12
#else
#define ROWS 4
#endif

#define PANEL (2 * LANES)

/* The most products that are added one after another. */
#define SUM_LENGTH 128

/* ---- float32 --------------------------------------------------------------------------------- */

#if MB_F32_LANES == 16
static const i32v lane_numbers_f32 = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const i64v lane_numbers_f64 = {0, 1, 2, 3, 4, 5, 6, 7};
#elif MB_F32_LANES == 8
static const i32v lane_numbers_f32 = {0, 1, 2, 3, 4, 5, 6, 7};
static const i64v lane_numbers_f64 = {0, 1, 2, 3};
#else
static const i32v lane_numbers_f32 = {0, 1, 2, 3};
static const i64v lane_numbers_f64 = {0, 1};
#endif

#define NAME(stem) stem##_f32
#define REAL float
#define VEC f32v
#define INTEGER int32_t
#define INTEGERS i32v
#define LANES MB_F32_LANES
#define LOAD load_f32
#define STORE store_f32
#define LOAD_PART load_part_f32
#define STORE_PART store_part_f32
#define BROADCAST broadcast_f32
#define SQRT sqrtf
#define EXP_NONPOSITIVE mb_exp_nonpositive_f32
#define EXPM1_NONPOSITIVE mb_expm1_nonpositive_f32
#define LOG1P_UNIT mb_log1p_unit_f32
#define LOG mb_log_f32
#define TANH mb_tanh_f32
#define NORMAL_CDF mb_normal_cdf_f32
#define TRANSFORM mb_grad_transform_f32
#define MAKE_TRANSFORM mb_make_grad_transform_f32
#include "engine/activation_body.h"
#include "engine/gemm_body.h"
#include "engine/layers_body.h"
#include "engine/loss_body.h"
#include "engine/step_body.h"
#undef NAME
#undef REAL
#undef VEC
#undef INTEGER
#undef INTEGERS
#undef LANES
#undef LOAD
#undef STORE
#undef LOAD_PART
#undef STORE_PART
#undef BROADCAST
#undef SQRT
#undef EXP_NONPOSITIVE
#undef EXPM1_NONPOSITIVE
#undef LOG1P_UNIT
#undef LOG
#undef TANH
#undef NORMAL_CDF
#undef TRANSFORM
#undef MAKE_TRANSFORM

/* ---- float64: libm --------------------------------------------------------------------------- */

static inline double normal_cdf_f64(double x, double bell) {
  (void)bell;
  return 0.5 * erfc(-x * 0.7071067811865476);
}

#define NAME(stem) stem##_f64
#define REAL double
#define VEC f64v
#define INTEGER int64_t
#define INTEGERS i64v
#define LANES MB_F64_LANES
#define LOAD load_f64
#define STORE store_f64
#define LOAD_PART load_part_f64
#define STORE_PART store_part_f64
#define BROADCAST broadcast_f64
#define SQRT sqrt
#define EXP_NONPOSITIVE exp
#define EXPM1_NONPOSITIVE expm1
#define LOG1P_UNIT log1p
#define LOG log
#define TANH tanh
#define NORMAL_CDF normal_cdf_f64
#define TRANSFORM mb_grad_transform_f64
#define MAKE_TRANSFORM mb_make_grad_transform_f64
#include "engine/activation_body.h"
#include "engine/gemm_body.h"
#include "engine/layers_body.h"
#include "engine/loss_body.h"
#include "engine/step_body.h"

extern const mb_engine_kernels MB_NAME(mb_engine_kernels);
const mb_engine_kernels MB_NAME(mb_engine_kernels) = {
    .lanes = {[MB_ENGINE_F32] = MB_F32_LANES, [MB_ENGINE_F64] = MB_F64_LANES},
    .panels = {panels_from_rows_f32, panels_from_rows_f64},
    .labels = {label_lanes_f32, label_lanes_f64},
    .step = {step_f32, step_f64},
};
