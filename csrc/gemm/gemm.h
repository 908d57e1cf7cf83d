/* Small matrix products for one model and one thread.
 *
 * Matrices are row-major; a leading dimension is the distance of rows in elements. An element of
 * the result is its initial value and one sum after the other over 128 steps of k, each in the
 * order of k: its bits depend neither on the other rows and columns, nor on how many there are, nor
 * on whether B is packed. No function allocates, and none reads or writes beyond the sizes it is
 * given.
 */
#ifndef MODELBATCH_GEMM_GEMM_H
#define MODELBATCH_GEMM_GEMM_H

#include <stdint.h>

/* A packed B [k, n] is a sequence of panels of `panel` columns, each [k, panel], the last one
 * padded with zeros. */
#define MB_GEMM_DECLARE(real, name)                                                            \
  typedef struct name {                                                                        \
    int64_t panel; /* two vectors */                                                           \
    /* C [m, n] = init + A B. Element (i, p) of A is a[i a_row + p a_col]. init is [m, n] too: \
     * C itself to add to it, a row with ld_init = 0, or NULL for zeros. */                    \
    void (*multiply)(real * c, int64_t ldc, const real* init, int64_t ld_init, const real* a,  \
                     int64_t a_row, int64_t a_col, const real* b, int64_t ldb, int64_t m,      \
                     int64_t n, int64_t k);                                                    \
    /* The same with a packed B. */                                                            \
    void (*multiply_packed)(real * c, int64_t ldc, const real* init, int64_t ld_init,          \
                            const real* a, int64_t a_row, int64_t a_col, const real* packed,   \
                            int64_t m, int64_t n, int64_t k);                                  \
    /* Packs B; its element (p, j) is b[p b_row + j b_col]. */                                 \
    void (*pack)(real * packed, const real* b, int64_t b_row, int64_t b_col, int64_t k,        \
                 int64_t n);                                                                   \
    /* The elements of a packed B. */                                                          \
    int64_t (*packed_size)(int64_t k, int64_t n);                                              \
  } name

MB_GEMM_DECLARE(float, mb_gemm_f32);
MB_GEMM_DECLARE(double, mb_gemm_f64);

typedef struct mb_gemm_kernels {
  mb_gemm_f32 f32;
  mb_gemm_f64 f64;
} mb_gemm_kernels;

#endif /* MODELBATCH_GEMM_GEMM_H */
