"""`train_steps_` against torch, model by model, in float64."""

import copy
import itertools

import pytest
import torch
from engine_networks import Drop, Loss, MeanRows, Network, Residual, Training
from torch import nn

ONE_STEP, MANY_STEPS = 1e-12, 1e-9


def mlp(*widths, layer=nn.Tanh):
    layers = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), layer()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def models(build, count=3, seed=0):
    torch.manual_seed(seed)
    return [build(i).double() for i in range(count)]


def check(training, tolerance=ONE_STEP):
    """One step at 1e-12; more steps at 1e-9."""
    want, norms = training.reference()
    losses, status, found = training.run(grad_norm=True)
    torch.testing.assert_close(losses, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, norms, rtol=tolerance, atol=tolerance)
    assert status.eq(0).all()
    training.compare(tolerance)


def train(network, batch=9, steps=1, features=(5,), **kwargs):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(steps, batch, *features, generator=generator, dtype=torch.float64)
    y = torch.randint(network.sizes[-1][1], (steps, batch), generator=generator)
    return Training(network, x, y, **kwargs)


# ---- sizes


@pytest.mark.parametrize("batch", [1, 3, 17, 32, 33, 100])
@pytest.mark.parametrize("width", [1, 3, 16, 33])
def test_odd_sizes(batch, width):
    net = Network(models(lambda i: mlp(width, 7, width, 3)), Loss("cross_entropy"), (1, width))
    check(train(net, batch, features=(width,)))


@pytest.mark.parametrize("width", [1, 16, 100])
def test_a_network_without_hidden_layer(width):
    built = models(lambda i: nn.Sequential(nn.Linear(width, 2)))
    net = Network(built, Loss("cross_entropy"), (1, width))
    check(train(net, features=(width,)))


def test_a_weight_of_more_columns_than_a_chunk():
    net = Network(models(lambda i: mlp(9000, 2, 3)), Loss("cross_entropy"), (1, 9000))
    check(train(net, 5, features=(9000,), optimizer=torch.optim.Adam, options={"lr": 1e-3}))


def test_many_rows_of_weights():
    net = Network(models(lambda i: mlp(70, 300, 150, 3)), Loss("cross_entropy"), (1, 70))
    check(train(net, 70, features=(70,), optimizer=torch.optim.Adam, options={"lr": 1e-3}))


# ---- layers

LAYERS = {
    "relu": lambda i: nn.ReLU(),
    "leaky_relu": lambda i: nn.LeakyReLU(0.1 * (i + 1)),
    "leaky_relu_that_rises": lambda i: nn.LeakyReLU(-0.5),
    "elu": lambda i: nn.ELU(0.5 + i),
    "gelu": lambda i: nn.GELU(),
    "gelu_tanh": lambda i: nn.GELU(approximate="tanh"),
    "silu": lambda i: nn.SiLU(),
    "tanh": lambda i: nn.Tanh(),
    "sigmoid": lambda i: nn.Sigmoid(),
    "softplus": lambda i: nn.Softplus(0.5 + i, 0.3 + i),
    "layer_norm": lambda i: nn.LayerNorm(8, eps=1e-5 * (i + 1)),
    "layer_norm_plain": lambda i: nn.LayerNorm(8, elementwise_affine=False),
    "layer_norm_without_bias": lambda i: nn.LayerNorm(8, bias=False),
    "batch_norm": lambda i: nn.BatchNorm1d(8, eps=1e-5 * (i + 1), momentum=0.1 * (i + 1)),
    "batch_norm_average": lambda i: nn.BatchNorm1d(8, momentum=None),
    "batch_norm_plain": lambda i: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    "dropout": lambda i: Drop(0.2 * i, 3),
    "dropout_of_all": lambda i: Drop(1.0 if i == 1 else 0.5, 0),
    "residual": lambda i: Residual(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
    "two_activations": lambda i: nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Sigmoid()),
    "two_residuals": lambda i: Residual(Residual(nn.Linear(8, 8), nn.ReLU())),
}


def with_layer(name, count=3):
    return Network(
        models(lambda i: nn.Sequential(nn.Linear(5, 8), LAYERS[name](i), nn.Linear(8, 3)), count),
        Loss("cross_entropy"),
        (1, 5),
    )


@pytest.mark.parametrize("batch", [2, 9, 33])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, batch):
    check(train(with_layer(name), batch))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_after_many_steps(name):
    options = [{"lr": 0.01 * (i + 1), "momentum": 0.9} for i in range(2)]
    check(train(with_layer(name, 2), 19, 100, options=options), MANY_STEPS)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_as_the_first_and_the_last(name):
    layer = LAYERS[name]

    def build(i):
        return nn.Sequential(layer(i), nn.Linear(8, 8), layer(i))

    check(train(Network(models(build), Loss("cross_entropy"), (1, 8)), features=(8,)))


def test_large_mean_and_small_deviation():
    net = with_layer("batch_norm")
    training = train(net, 64)
    for m in range(3):
        training.params[net.names.index("0.bias")][m] += 1000.0
        with torch.no_grad():
            net.models[m][0].bias += 1000.0
    check(training, 1e-9)


def test_embedding_and_mean():
    def build(i):
        return nn.Sequential(
            nn.Embedding(11, 6, padding_idx=2), nn.LayerNorm(6), nn.Linear(6, 4), MeanRows(),
            nn.Linear(4, 3),
        )  # fmt: skip

    net = Network(models(build), Loss("cross_entropy"), (7, 1))
    x = torch.randint(11, (4, 9, 7))
    check(Training(net, x, torch.randint(3, (4, 9)), torch.optim.Adam, {"lr": 0.01}), 1e-9)


def test_rows_and_flatten():
    def build(i):
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))

    for batch in (9, 40):
        check(train(Network(models(build), Loss("cross_entropy"), (3, 5)), batch, features=(3, 5)))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "2.weight", "0", "2"])
def test_parameters_that_are_not_trained(frozen):
    def build(i):
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        for name, parameter in model.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)
        return model

    check(train(Network(models(build), Loss("cross_entropy"), (1, 5))))


# ---- losses


LOSS_CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"ignore_index": 1}),
    ("cross_entropy", {"ignore_index": 2, "label_smoothing": 0.2, "weight": True}),
    ("soft", {}),
    ("soft", {"label_smoothing": 0.1, "weight": True}),
    ("nll", {}),
    ("nll", {"ignore_index": 0, "weight": True}),
    ("mse", {}),
    ("l1", {}),
    ("huber", {"delta": 0.7}),
    ("smooth_l1", {"beta": 0.7}),
    ("smooth_l1", {"beta": 0.0}),
    ("bce", {}),
    ("bce", {"pos_weight": True}),
]


@pytest.mark.parametrize("batch", [2, 9, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "options"),
    LOSS_CASES,
)
def test_loss(name, options, reduction, batch):
    check(with_loss(name, {"reduction": reduction, **options}, batch, 3), 1e-11)


@pytest.mark.parametrize(("name", "options"), LOSS_CASES)
def test_loss_after_many_steps(name, options):
    check(with_loss(name, options, 9, 100), MANY_STEPS)


def with_loss(name, options, batch, steps):
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        own = dict(options)
        for key in ("weight", "pos_weight"):
            if key in own:
                own[key] = torch.rand(4, dtype=torch.float64) + 0.1
        losses.append(Loss(name, own))
    net = Network(models(lambda i: mlp(5, 7, 4)), losses, (1, 5))
    x = torch.randn(steps, batch, 5, dtype=torch.float64)
    if name in ("cross_entropy", "nll"):
        y = torch.randint(4, (steps, batch))
        y[:, 0] = 3
    elif name in ("soft", "bce"):
        y = torch.rand(steps, batch, 4, dtype=torch.float64)
    else:
        y = torch.randn(steps, batch, 4, dtype=torch.float64)
    return Training(net, x, y, options={"lr": 0.01})


def test_values_of_several_rows_in_a_loss():
    net = Network(models(lambda i: nn.Sequential(nn.Linear(5, 4))), Loss("mse"), (3, 5))
    x, y = (torch.randn(1, 9, 3, n, dtype=torch.float64) for n in (5, 4))
    check(Training(net, x, y))


def test_extreme_logits():
    for name in ("cross_entropy", "bce"):
        net = Network(models(lambda i: mlp(5, 4)), Loss(name), (1, 5))
        x = 1e4 * torch.randn(1, 9, 5, dtype=torch.float64)
        y = torch.randint(4, (1, 9)) if name == "cross_entropy" else torch.rand(1, 9, 4).double()
        check(Training(net, x, y))


def test_no_target_counts():
    net = Network(models(lambda i: mlp(5, 4)), Loss("cross_entropy"), (1, 5))
    training = train(net)
    training.y.fill_(-100)
    losses, status, _ = training.run()
    assert losses.isnan().all() and status.eq(1).all()
    training.reference()
    training.compare(0.0)


# ---- optimizers


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "maximize": True}),
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Rprop, {}),
    ],
)
def test_optimizer(optimizer, options):
    each = [{"lr": 0.01 * (i + 1), **options} for i in range(3)]
    net = Network(models(lambda i: mlp(5, 8, 3)), Loss("cross_entropy"), (1, 5))
    check(train(net, steps=1, optimizer=optimizer, options=each))
    check(train(net, steps=100, optimizer=optimizer, options=each), MANY_STEPS)


def test_models_with_and_without_momentum():
    each = [{"lr": 0.1, "momentum": 0.5 * i} for i in range(3)]
    net = Network(models(lambda i: mlp(5, 8, 3)), Loss("cross_entropy"), (1, 5))
    training = train(net, steps=5, options=each)
    check(training, 1e-11)
    assert training.step.tolist() == [0, 5, 5]


def test_learning_rates_of_the_steps():
    net = Network(models(lambda i: mlp(5, 8, 3)), Loss("cross_entropy"), (1, 5))
    training = train(net, steps=6, optimizer=torch.optim.Adam, options={"lr": 0.1})
    training.lr = torch.rand(6, 3, dtype=torch.float64) * 0.1
    check(training, 1e-11)


@pytest.mark.parametrize("which", ["norm", "value", "both"])
def test_clipping(which):
    net = Network(models(lambda i: mlp(5, 8, 3)), Loss("cross_entropy"), (1, 5))
    training = train(net, steps=5)
    if which != "value":
        training.clip_norm = [0.01, 0.1, 1e9]
    if which != "norm":
        training.clip_value = [0.001, 0.02, float("inf")]
    check(training, 1e-11)


# ---- own inputs, targets and weights


@pytest.mark.parametrize("own_x", [False, True])
@pytest.mark.parametrize("own_y", [False, True])
@pytest.mark.parametrize("weights", [None, "shared", "own"])
@pytest.mark.parametrize("name", ["cross_entropy", "soft", "mse", "nll"])
def test_own_data(own_x, own_y, weights, name):
    torch.manual_seed(3)
    K, M, B = 3, 3, 19
    loss = Loss(name)
    if name == "cross_entropy":
        loss.options = {"ignore_index": 1, "weight": torch.rand(3, dtype=torch.float64)}

    def build(i):
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    net = Network(models(build), loss, (1, 5))
    x = torch.randn(*((K, M, B) if own_x else (K, B)), 5, dtype=torch.float64)
    lead = (K, M, B) if own_y else (K, B)
    y = (
        torch.randint(3, lead)
        if name in ("cross_entropy", "nll")
        else torch.rand(*lead, 3, dtype=torch.float64)
    )
    w = None
    if weights is not None:
        w = torch.randint(0, 3, (K, M, B) if weights == "own" else (K, B)).double()
        w[..., 0] = 1.0
    training = Training(net, x, y, own_x=own_x, own_y=own_y, weight=w)
    if weights is None:
        check(training, 1e-11)
        return
    # batch normalisation of weighted samples: torch gets each sample as often as it counts
    losses, _, _ = training.run()
    repeated = [copy_of(training, m) for m in range(M)]
    for m, (state, want) in enumerate(repeated):
        torch.testing.assert_close(losses[:, m], want, rtol=1e-11, atol=1e-11)
        for key, stacked in zip(net.names + net.buffer_names, training.params + training.buffers):
            torch.testing.assert_close(stacked[m], state[key], rtol=1e-9, atol=1e-11, msg=key)


def copy_of(training, m):
    """Model m trained by torch on its samples, each as often as it counts."""
    model = copy.deepcopy(training.network.models[m])
    optimizer = training.optimizer(model.parameters(), **training.per_model[m])
    losses = []
    for k in range(training.K):
        w = training.weight[k, m] if training.weight.dim() == 3 else training.weight[k]
        rows = torch.arange(len(w)).repeat_interleave(w.long())
        x = training.x[k, m] if training.own_x else training.x[k]
        y = training.y[k, m] if training.own_y else training.y[k]
        optimizer.zero_grad()
        loss = training.network.losses[m](model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model.state_dict(), torch.stack(losses)


def test_fractional_weights():
    net = Network(models(lambda i: mlp(5, 8, 3)), Loss("cross_entropy"), (1, 5))
    training = train(net, 21, 4)
    training.weight = torch.rand(4, 3, 21, dtype=torch.float64)
    want, _ = training.reference()
    losses, _, _ = training.run()
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-12)
    training.compare(1e-11)


# ---- float32


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_float64_rounded(name):
    """Within what a hundred roundings of the largest weight make of three steps."""
    wide = with_layer(name)
    training = train(wide, 40, 3, options={"lr": 0.01})
    training.run()
    narrow = Network([m.float() for m in wide.models], Loss("cross_entropy"), (1, 5))
    other = Training(narrow, training.x.float(), training.y, options={"lr": 0.01})
    other.run()
    for a, b in zip(training.params, other.params, strict=True):
        bound = 100 * 2.0**-24 * float(a.abs().max())
        torch.testing.assert_close(b.double(), a, rtol=0, atol=bound)
