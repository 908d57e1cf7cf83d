"""The numbers that a program consists of; `csrc/engine/engine.h` says what they mean."""

import enum

VERSION = 1
HEADER_LENGTH = 15
LOSS_PARAMETERS = 8
INSTRUCTION_LENGTH = 10


class Op(enum.IntEnum):
    """What an instruction computes."""

    LINEAR = 0
    RELU = 1
    LEAKY_RELU = 2
    ELU = 3
    GELU = 4
    SILU = 5
    TANH = 6
    SIGMOID = 7
    SOFTPLUS = 8
    LAYER_NORM = 9
    BATCH_NORM = 10
    DROPOUT = 11
    ADD = 12
    RESHAPE = 13
    EMBEDDING = 14
    MEAN_ROWS = 15


class Loss(enum.IntEnum):
    """What the output is compared with its target by."""

    CROSS_ENTROPY = 0
    CROSS_ENTROPY_SOFT = 1
    NLL = 2
    MSE = 3
    L1 = 4
    HUBER = 5
    SMOOTH_L1 = 6
    BCE_LOGITS = 7


# Flags of the operator.
OWN_INPUT = 1
OWN_TARGET = 2
OWN_WEIGHT = 4
GRAD_NORM = 8
STOP_NONFINITE = 16

# Bits of the status of a model in a step.
STATUS_LOSS = 1
STATUS_GRAD = 2
STATUS_WEIGHTS = 4
STATUS_RESTED = 8

RULES = {"sgd": 0, "adam": 1, "adamw": 2, "rmsprop": 3, "adagrad": 4}
"""The optimizers' numbers, `mb_optim_rule`, by the names of `modelbatch.optim.rules`."""
