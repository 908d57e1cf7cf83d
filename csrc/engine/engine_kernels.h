/* What the kernels of the engine see: a checked program with a place for everything, and one model.
 *
 * The samples of a batch lie in the lanes of vectors. A value of F = rows * width features is kept
 * as panels of 2 * lanes samples, the last one of `lanes` if that is enough; a panel is a matrix
 * [F, its samples], and panel p begins at element p * 2 * lanes * F. Lanes beyond the batch hold
 * anything: no sum over samples reads them. "Rows" of a value are the same numbers as a matrix
 * [B, step], step at least F.
 *
 * Places are numbers of elements from the beginning of the workspace, which belongs to a thread.
 */
#ifndef MODELBATCH_ENGINE_ENGINE_KERNELS_H
#define MODELBATCH_ENGINE_ENGINE_KERNELS_H

#include <stdint.h>

#include "engine/engine.h"
#include "optim/optim.h"
#include "random/random.h"

#define MB_ENGINE_F32 0
#define MB_ENGINE_F64 1
#define MB_ENGINE_DTYPES 2

#define MB_PLACE_NONE (-1)
#define MB_PLACE_INPUT (-2) /* not in the workspace: the model's input */

/* The longest vector of any instruction set, in bytes: what places are aligned to. */
#define MB_ENGINE_ALIGNMENT 64

/* Gradients of a weight that are computed before the optimizer takes them. */
#define MB_ENGINE_CHUNK 8192

typedef struct mb_engine_op {
  int32_t opcode;
  int32_t activation;        /* of a linear layer, applied to its result in place; or -1 */
  int64_t rows;              /* of the input */
  int64_t in_width, width;   /* of the input and the output */
  int64_t x, x2, y;          /* panels: inputs and output */
  int64_t dx, dx2, dy;       /* panels of the gradients, NONE where not needed */
  int32_t adds_dx, adds_dx2; /* the place holds a part of the gradient already */
  int64_t x_rows, x_step;    /* of a linear layer whose weight is trained: the rows of the input */
  int32_t fills_rows;        /* the rows are still to be made from x */
  int64_t saved;             /* norms: mean and 1 / deviation; dropout: the scales as panels */
  int32_t weight, bias;      /* parameters, or -1 */
  int32_t mean, var;         /* buffers, or -1 */
  int64_t number;
  int64_t extra;
  int64_t vocabulary; /* of an embedding */
} mb_engine_op;

typedef struct mb_engine_parameter {
  int64_t numel;
  int32_t is_optimized;
  int64_t grad; /* place in the workspace; NONE: the gradient is used up piece by piece */
} mb_engine_parameter;

typedef struct mb_engine_plan {
  int64_t batch;  /* B */
  int64_t padded; /* B, rounded up to a multiple of the lanes */
  int64_t num_ops;
  const mb_engine_op* ops;
  int64_t num_params; /* all of them; the optimized ones come first */
  int64_t num_optimized;
  const mb_engine_parameter* params;
  int32_t loss;
  int64_t loss_parameters[MB_LOSS_PARAMETERS];
  int64_t out_width, out_features; /* of the output value */
  int64_t output, output_grad;
  int64_t chunk;        /* gradients on their way to the optimizer */
  int64_t scratch;      /* what layers need for a moment */
  int64_t loss_scratch; /* a row [padded], and panels of the output */
  int32_t keeps_grads;  /* all gradients are kept until all of them are known */
  mb_optim_update_fn update;
  mb_optim_sum_squares_fn sum_squares;
  mb_dropout_fn dropout;
} mb_engine_plan;

/* One model in one step. */
typedef struct mb_engine_model {
  char* const* params;   /* [num_params] */
  char* const* states;   /* [num_optimized, MB_OPTIM_MAX_STATES] */
  char* const* buffers;  /* [number of buffers] */
  const double* numbers; /* row a: numbers[a * number_step] */
  int64_t number_step;
  const void* x_panels;
  const void* x_rows;          /* [B, features] */
  const int64_t* x_index;      /* [B, T]: of embeddings */
  const void* target_panels;   /* of the dtype, or integers as wide: a panel of one feature */
  const void* lane_weight;     /* [padded]: 1, or the sample's weight; 0 beyond the batch */
  const double* sample_weight; /* [B] or NULL */
  double weight_sum;           /* of the samples; B without weights */
  int64_t seed, stream_step;
  int32_t trains;               /* else the loss alone */
  const void* coefficients;     /* of the optimizer */
  double clip_norm, clip_value; /* NaN: no clip */
} mb_engine_model;

typedef struct mb_engine_result {
  double loss;
  double grad_norm; /* where gradients are kept */
  int32_t status;
} mb_engine_result;

/* Panels of the rows [B, features]; sample b is row source[b] where source is given. Lanes beyond
 * the batch become 0. */
typedef void (*mb_engine_panels_fn)(const void* rows, const int64_t* source, int64_t batch,
                                    int64_t features, void* panels);

/* Class numbers [B] as integers of the dtype's width, [padded]; samples of weight 0 and lanes
 * beyond the batch become -1, and so do ignored classes. */
typedef void (*mb_engine_labels_fn)(const int64_t* labels, const double* weight, int64_t batch,
                                    int64_t padded, int64_t ignore_index, void* lanes);

/* One training step of one model. */
typedef void (*mb_engine_step_fn)(const mb_engine_plan* plan, const mb_engine_model* model,
                                  void* workspace, mb_engine_result* result);

typedef struct mb_engine_kernels {
  int64_t lanes[MB_ENGINE_DTYPES]; /* of one vector */
  mb_engine_panels_fn panels[MB_ENGINE_DTYPES];
  mb_engine_labels_fn labels[MB_ENGINE_DTYPES];
  mb_engine_step_fn step[MB_ENGINE_DTYPES];
} mb_engine_kernels;

#endif /* MODELBATCH_ENGINE_ENGINE_KERNELS_H */
