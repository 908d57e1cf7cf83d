/* The engine: whole training steps of small networks. This file is the encoding of a network, its
 * loss and its parameters, as modelbatch::train_steps_ reads them; engine_kernels.h is what the
 * kernels see.
 *
 * program (int64, one dimension) is
 *
 *     header            MB_PROGRAM_HEADER numbers, see MB_HEADER_*
 *     values            V pairs (rows, width): value v holds [B, rows, width] numbers of a model
 *     instructions      N times MB_INSTRUCTION_LENGTH numbers, see MB_FIELD_*
 *
 * Value 0 is the input x; every other value is the result of exactly one instruction, which stands
 * before all that read it. A model's input [B, a, b, c] may be taken apart in any way with
 * rows * width = a b c; layers work on the last dimension, `width`, and take rows one by one.
 * Every instruction must lead to the output value. A parameter or buffer belongs to one instruction
 * only.
 *
 * params: contiguous [M, ...] of one dtype, float32 or float64. The first P belong to the
 * optimizer; those after them (requires_grad=False) are read only, and no gradient is computed for
 * them. Each must be used. buffers: running_mean and running_var [M, C] of the dtype of params,
 * num_batches_tracked int64 [M].
 *
 * numbers (float64 [A, M]): row a holds one number of every model. The field MB_FIELD_NUMBER of an
 * instruction is the first of its rows.
 */
#ifndef MODELBATCH_ENGINE_ENGINE_H
#define MODELBATCH_ENGINE_ENGINE_H

#include <stdint.h>

#define MB_PROGRAM_VERSION 1

enum { /* the header */
       MB_HEADER_VERSION = 0,
       MB_HEADER_VALUES = 1,       /* V */
       MB_HEADER_INSTRUCTIONS = 2, /* N */
       MB_HEADER_OUTPUT = 3,       /* the value that the loss reads */
       MB_HEADER_LOSS = 4,         /* MB_ENGINE_LOSS_* */
       MB_HEADER_LOSS_PARAMETERS = 5,
       MB_LOSS_PARAMETERS = 8,
       MB_HEADER_OPTIMIZED = 13, /* P */
       MB_HEADER_BUFFERS = 14,   /* the length of buffers */
       MB_PROGRAM_HEADER = 15
};

enum { /* an instruction; what it does not use is -1, flags 0 */
       MB_FIELD_OPCODE = 0,
       MB_FIELD_INPUT = 1,
       MB_FIELD_INPUT2 = 2,
       MB_FIELD_OUTPUT = 3,
       MB_FIELD_WEIGHT = 4, /* index in params */
       MB_FIELD_BIAS = 5,   /* index in params */
       MB_FIELD_MEAN = 6,   /* index in buffers */
       MB_FIELD_VAR = 7,    /* index in buffers */
       MB_FIELD_NUMBER = 8, /* the first row of numbers */
       MB_FIELD_EXTRA = 9,
       MB_INSTRUCTION_LENGTH = 10
};

/* in and out are (rows, width) of input and output. */
typedef enum mb_engine_opcode {
  MB_OP_LINEAR = 0,     /* (r, I) -> (r, O); weight [M, O, I], bias [M, O] or -1 */
  MB_OP_RELU = 1,       /* this and all up to MB_OP_DROPOUT: (r, w) -> (r, w) */
  MB_OP_LEAKY_RELU = 2, /* number: negative_slope */
  MB_OP_ELU = 3,        /* number: alpha */
  MB_OP_GELU = 4,       /* extra: 0 by erf, 1 by tanh */
  MB_OP_SILU = 5,
  MB_OP_TANH = 6,
  MB_OP_SIGMOID = 7,
  MB_OP_SOFTPLUS = 8,    /* numbers: beta, threshold (2 rows) */
  MB_OP_LAYER_NORM = 9,  /* over width; weight, bias [M, w] or -1; number: eps */
  MB_OP_BATCH_NORM = 10, /* r = 1, over the batch, training; weight, bias [M, w] or -1;
                            mean, var: running_mean, running_var, both or both -1;
                            numbers: eps, momentum, NaN for None: the cumulative average (2 rows);
                            extra: num_batches_tracked in buffers or -1 */
  MB_OP_DROPOUT = 11,    /* number: p in [0, 1]; extra: op_index of the draw (csrc/random/philox.h);
                            element (row, column) of sample b is number (b r + row) w + column */
  MB_OP_ADD = 12,        /* input + input2, all of (r, w) */
  MB_OP_RESHAPE = 13,    /* (r, w) -> (r', w') with r w = r' w'; costs nothing */
  MB_OP_EMBEDDING = 14,  /* of value 0 alone, which is then int64 (T, 1) -> (T, E);
                            weight [M, N, E]; extra: padding_idx in [0, N) or -1 */
  MB_OP_MEAN_ROWS = 15,  /* (r, w) -> (1, w): the mean over the rows */
  MB_OP_COUNT = 16
} mb_engine_opcode;

/* The loss of one model. o is the output value (r, w), w_b the weight of sample b. `target` is
 * int64 [.., B] for CROSS_ENTROPY and NLL, else of the dtype of params, [.., B, *] with r w numbers
 * for each sample (r w = 1: also [.., B]).
 *
 * Reduction mean is torch's; with sample_weight it is what modelbatch/loss.py makes of it:
 * sum(w l) / sum(w share), where share is 1, or, for class indices, the class weight of a target
 * that is not ignored; 0 where the denominator is 0. */
typedef enum mb_engine_loss {
  MB_ENGINE_CROSS_ENTROPY = 0,      /* r = 1, class indices */
  MB_ENGINE_CROSS_ENTROPY_SOFT = 1, /* r = 1, class probabilities [.., B, C] */
  MB_ENGINE_NLL = 2,                /* r = 1, class indices; o holds log probabilities */
  MB_ENGINE_MSE = 3,
  MB_ENGINE_L1 = 4,
  MB_ENGINE_HUBER = 5,     /* huber_loss(delta) */
  MB_ENGINE_SMOOTH_L1 = 6, /* smooth_l1_loss(beta) */
  MB_ENGINE_BCE_LOGITS = 7,
  MB_ENGINE_LOSSES = 8
} mb_engine_loss;

enum { /* the loss parameters; what a loss does not use is -1, ignore_index and reduction 0 */
       MB_LOSS_IGNORE_INDEX = 0, /* CROSS_ENTROPY, NLL; -100 is torch's default */
       MB_LOSS_SMOOTHING = 1,    /* row of numbers: label_smoothing of the cross entropies, or -1 */
       MB_LOSS_CLASS_WEIGHT = 2, /* first of w rows: class weights of the cross entropies and NLL,
                                    or pos_weight of BCE_LOGITS (a number per column), or -1 */
       MB_LOSS_DELTA = 3,        /* row: delta of HUBER, beta of SMOOTH_L1 */
       MB_LOSS_REDUCTION = 4     /* 0 mean; 1 sum, not with sample_weight */
                                 /* 5 to 7: 0 */
};

enum {                                /* flags of the operator */
       MB_ENGINE_OWN_INPUT = 1,       /* x is [K, M, B, *], not [K, B, *] */
       MB_ENGINE_OWN_TARGET = 2,      /* target is [K, M, B, *] */
       MB_ENGINE_OWN_WEIGHT = 4,      /* sample_weight is [K, M, B], not [K, B] */
       MB_ENGINE_GRAD_NORM = 8,       /* grad_norm is wanted: float64 [K, M], else [0] */
       MB_ENGINE_STOP_NONFINITE = 16, /* a model with a status of 1, 2 or 4 rests from the next step
                                         of the call on, as if frozen */
       MB_ENGINE_ALL_FLAGS = 31
};

enum {                        /* status uint8 [K, M] */
       MB_STATUS_LOSS = 1,    /* the loss is not finite */
       MB_STATUS_GRAD = 2,    /* a gradient is not finite (before clipping) */
       MB_STATUS_WEIGHTS = 4, /* an updated parameter is not finite */
       MB_STATUS_RESTED = 8   /* no step: frozen, without a sample, or stopped; nothing changed */
};

/* What a model that does not step gets: frozen (active false) or stopped: the loss of its samples
 * as ever, with the masks of the step that its stream is at; grad_norm 0. Without a sample (all
 * weights 0): loss 0. Its stream step does not advance: step k of the call draws with stream_step
 * plus the number of steps that the model took before in the call.
 *
 * hyper and states are those of the rule's own operator in csrc/library.cpp (all but nadam and
 * asgd); a kind of states is there if each model needs it or the options of any model ask for it.
 * clip_norm and clip_value: NaN is a model without that clip. */

#endif /* MODELBATCH_ENGINE_ENGINE_H */
