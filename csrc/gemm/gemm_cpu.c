/* Small matrix products of one model. A panel of B, two vectors wide, stays in the first-level
 * cache while register blocks of C go down its rows; elements of A are broadcast, so A may have any
 * strides.
 *
 * gemm_body.h is the code of one dtype; it is included once for each.
 */
#include <stddef.h>
#include <string.h>

#include "common/isa.h"
#include "common/vectors.h"
#include "gemm/gemm.h"

/* The height of a register block: two sums per row, the panel's two vectors and a factor have to
 * fit into 32 or 16 registers. */
#if defined(__AVX512F__)
#define MAX_ROWS 8
#define EACH_HEIGHT(vectors, is_full) \
  HEIGHT(1, vectors, is_full)         \
  HEIGHT(2, vectors, is_full)         \
  HEIGHT(3, vectors, is_full)         \
  HEIGHT(4, vectors, is_full)         \
  HEIGHT(5, vectors, is_full)         \
  HEIGHT(6, vectors, is_full) HEIGHT(7, vectors, is_full) HEIGHT(8, vectors, is_full)
#else
#define MAX_ROWS 6
#define EACH_HEIGHT(vectors, is_full) \
  HEIGHT(1, vectors, is_full)         \
  HEIGHT(2, vectors, is_full)         \
  HEIGHT(3, vectors, is_full)         \
  HEIGHT(4, vectors, is_full) HEIGHT(5, vectors, is_full) HEIGHT(6, vectors, is_full)
#endif

/* Rows of a panel that are used at a time: 16 KiB with vectors of 64 bytes. Shorter sums are also
 * more accurate ones. */
#define DEPTH 128

#define NAME(stem) stem##_f32
#define REAL float
#define VECTOR f32v
#define LANES MB_F32_LANES
#include "gemm/gemm_body.h"

#define NAME(stem) stem##_f64
#define REAL double
#define VECTOR f64v
#define LANES MB_F64_LANES
#include "gemm/gemm_body.h"

#define TABLE(dtype, lanes)                    \
  {.panel = 2 * (lanes),                       \
   .multiply = multiply_##dtype,               \
   .multiply_packed = multiply_packed_##dtype, \
   .pack = pack_##dtype,                       \
   .packed_size = packed_size_##dtype}

extern const mb_gemm_kernels MB_NAME(mb_gemm_kernels);
const mb_gemm_kernels MB_NAME(mb_gemm_kernels) = {
    .f32 = TABLE(f32, MB_F32_LANES),
    .f64 = TABLE(f64, MB_F64_LANES),
};
