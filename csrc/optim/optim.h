/* The optimizer family: what the rules read and write, and the CPU kernels for one model's slice.
 */
#ifndef MODELBATCH_OPTIM_OPTIM_H
#define MODELBATCH_OPTIM_OPTIM_H

#include <stdint.h>

enum {
  MB_OPTIM_F32 = 0,
  MB_OPTIM_F64 = 1,
  MB_OPTIM_BF16 = 2, /* state and arithmetic in float32 */
  MB_OPTIM_F16 = 3,
  MB_OPTIM_DTYPES = 4
};

typedef enum mb_optim_rule {
  MB_RULE_SGD = 0,      /* states: momentum_buffer */
  MB_RULE_ADAM = 1,     /* states: exp_avg, exp_avg_sq, max_exp_avg_sq */
  MB_RULE_ADAMW = 2,    /* as adam */
  MB_RULE_RMSPROP = 3,  /* states: square_avg, grad_avg, momentum_buffer */
  MB_RULE_ADAGRAD = 4,  /* states: sum */
  MB_RULE_ADADELTA = 5, /* states: square_avg, acc_delta */
  MB_RULE_ADAMAX = 6,   /* states: exp_avg, exp_inf */
  MB_RULE_RADAM = 7,    /* states: exp_avg, exp_avg_sq */
  MB_RULE_RPROP = 8,    /* states: prev, step_size */
  MB_RULE_NADAM = 9,    /* states: exp_avg, exp_avg_sq; per model: mu_product */
  MB_RULE_ASGD = 10,    /* states: ax; per model: eta, mu */
  MB_RULE_COUNT = 11
} mb_optim_rule;

#define MB_OPTIM_MAX_STATES 3
#define MB_OPTIM_MAX_SCALARS 2 /* further numbers per model, float32 [M] */

/* Rows of hyper = [K, M], float64: model m's value of a row is hyper[row * M + m]. */
enum {
  MB_SGD_LR,
  MB_SGD_MOMENTUM,
  MB_SGD_DAMPENING,
  MB_SGD_WEIGHT_DECAY,
  MB_SGD_NESTEROV,
  MB_SGD_MAXIMIZE,
  MB_SGD_ROWS
};

enum { /* adam and adamw */
       MB_ADAM_LR,
       MB_ADAM_BETA1,
       MB_ADAM_BETA2,
       MB_ADAM_EPS,
       MB_ADAM_WEIGHT_DECAY,
       MB_ADAM_AMSGRAD,
       MB_ADAM_MAXIMIZE,
       MB_ADAM_DECOUPLED,
       MB_ADAM_ROWS
};

enum {
  MB_RMSPROP_LR,
  MB_RMSPROP_ALPHA,
  MB_RMSPROP_EPS,
  MB_RMSPROP_WEIGHT_DECAY,
  MB_RMSPROP_MOMENTUM,
  MB_RMSPROP_CENTERED,
  MB_RMSPROP_MAXIMIZE,
  MB_RMSPROP_ROWS
};

enum {
  MB_ADAGRAD_LR,
  MB_ADAGRAD_LR_DECAY,
  MB_ADAGRAD_EPS,
  MB_ADAGRAD_WEIGHT_DECAY,
  MB_ADAGRAD_MAXIMIZE,
  MB_ADAGRAD_ROWS
};

enum {
  MB_ADADELTA_LR,
  MB_ADADELTA_RHO,
  MB_ADADELTA_EPS,
  MB_ADADELTA_WEIGHT_DECAY,
  MB_ADADELTA_MAXIMIZE,
  MB_ADADELTA_ROWS
};

enum {
  MB_ADAMAX_LR,
  MB_ADAMAX_BETA1,
  MB_ADAMAX_BETA2,
  MB_ADAMAX_EPS,
  MB_ADAMAX_WEIGHT_DECAY,
  MB_ADAMAX_MAXIMIZE,
  MB_ADAMAX_ROWS
};

enum {
  MB_RADAM_LR,
  MB_RADAM_BETA1,
  MB_RADAM_BETA2,
  MB_RADAM_EPS,
  MB_RADAM_WEIGHT_DECAY,
  MB_RADAM_DECOUPLED,
  MB_RADAM_MAXIMIZE,
  MB_RADAM_ROWS
};

enum {
  MB_RPROP_LR,
  MB_RPROP_ETAMINUS,
  MB_RPROP_ETAPLUS,
  MB_RPROP_STEP_SIZE_MIN,
  MB_RPROP_STEP_SIZE_MAX,
  MB_RPROP_MAXIMIZE,
  MB_RPROP_ROWS
};

enum {
  MB_NADAM_LR,
  MB_NADAM_BETA1,
  MB_NADAM_BETA2,
  MB_NADAM_EPS,
  MB_NADAM_WEIGHT_DECAY,
  MB_NADAM_MOMENTUM_DECAY,
  MB_NADAM_DECOUPLED,
  MB_NADAM_MAXIMIZE,
  MB_NADAM_ROWS
};

enum {
  MB_ASGD_LR,
  MB_ASGD_LAMBD,
  MB_ASGD_ALPHA,
  MB_ASGD_T0,
  MB_ASGD_WEIGHT_DECAY,
  MB_ASGD_MAXIMIZE,
  MB_ASGD_ROWS
};

/* How a slice lies in memory, read in the order of another, dense one: element e, whose index is
 * (i_0, ..., i_{dims-1}) in row-major order over `sizes`, is at sum of i_d strides[d]. Neighbouring
 * dimensions that are one run of memory are merged. */
typedef struct mb_optim_layout {
  int64_t dims; /* at least 1 */
  const int64_t* sizes;
  const int64_t* strides; /* in elements */
} mb_optim_layout;

/* Updates the `numel` elements of a dense slice. `coefficients` is the rule's struct of rules.h in
 * the arithmetic's type; `transform` an mb_grad_transform of that type, or NULL where the gradient
 * is used as it is. states[i] may be NULL where the coefficients do not ask for state i. */
typedef void (*mb_optim_update_fn)(const void* coefficients, const void* transform, void* param,
                                   const void* grad, void* const* states, int64_t numel);

/* dense[e - begin] = element e of the slice, for begin <= e < end. */
typedef void (*mb_optim_gather_fn)(void* dense, const void* slice, const mb_optim_layout* layout,
                                   int64_t begin, int64_t end);

/* The sum of the squares of a dense slice, always added in the same order, and whether an element
 * is infinite or NaN. */
typedef double (*mb_optim_sum_squares_fn)(const void* grad, int64_t numel, int* nonfinite);

/* Whether an element of a dense slice is infinite or NaN. */
typedef int (*mb_optim_nonfinite_fn)(const void* data, int64_t numel);

typedef struct mb_optim_kernels {
  mb_optim_update_fn update[MB_RULE_COUNT][MB_OPTIM_DTYPES];
  mb_optim_gather_fn gather[MB_OPTIM_DTYPES];
  mb_optim_sum_squares_fn sum_squares[MB_OPTIM_DTYPES];
  mb_optim_nonfinite_fn nonfinite[MB_OPTIM_DTYPES];
} mb_optim_kernels;

#endif /* MODELBATCH_OPTIM_OPTIM_H */
