"""The sentence that the library is tested by: together equals alone.

An architecture says how to build one model and one batch; `BundleCase` holds what must be true.
Tolerances are derived: in float64 1e-9 relative to the largest value after 30 steps; in float32 and
bfloat16 twice the error that torch itself makes alone in that precision, measured against float64.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import modelbatch
from modelbatch import ModelBatch

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], list[float]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, [0.01, 0.03, 0.001]),
    "Adam": (torch.optim.Adam, {}, [0.001, 0.01, 0.003]),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, [0.001, 0.01, 0.003]),
    "RMSprop": (torch.optim.RMSprop, {}, [0.001, 0.003, 0.002]),
}


def largest(tensors: Any) -> float:
    """The largest absolute value in a structure of tensors."""
    leaves = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.numel()]
    return max((t.detach().double().abs().max().item() for t in leaves), default=0.0)


def difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two structures of tensors."""
    return largest(tree_map(lambda x, y: x.detach().double() - y.detach().double(), a, b))


def assert_relative(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Compare with an error relative to the largest expected value."""
    error, scale = difference(actual, expected), max(largest(expected), 1e-30)
    assert error <= tolerance * scale, f"{what}: {error:.3e} of {scale:.3e}"


def to_double(tree: Any) -> Any:
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def row(tree: Any, i: int) -> Any:
    """Model i's part of a stacked structure."""
    return tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, tree)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


class BundleCase:
    """Inherit, give `make_model` and `make_batch`, and get the sentence tested."""

    num_models = 3
    steps = 30
    has_dropout = False
    loss_fn: Callable[..., Tensor] = staticmethod(F.cross_entropy)

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def make_batch(self) -> tuple[Any, Any]:
        """One (x, y); x a tensor or a tuple of arguments."""
        raise NotImplementedError

    # ---- building

    def make_models(self, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
        torch.manual_seed(0)
        return [self.make_model().to(dtype) for _ in range(self.num_models)]

    def make_batches(self, count: int, dtype: torch.dtype = torch.float64) -> list[Any]:
        torch.manual_seed(1)
        batches = [self.make_batch() for _ in range(count)]
        return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, batches)

    def bundle(self, models: list[nn.Module], **kwargs: Any) -> ModelBatch:
        """A bundle of copies; with dropout it draws as separate models do."""
        if self.has_dropout:
            kwargs = {"rng": "torch", "seeds": list(range(100, 100 + len(models))), **kwargs}
        return ModelBatch(copy.deepcopy(models), fallback="error", **kwargs)

    def call(self, model: nn.Module, x: Any) -> Any:
        return model(*x) if isinstance(x, tuple) else model(x)

    def train_alone(
        self,
        model: nn.Module,
        i: int,
        batches: list[Any],
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> list[float]:
        loss_fn = loss_fn or self.loss_fn
        losses = []
        torch.manual_seed(100 + i)
        for x, y in batches:
            optimizer.zero_grad()
            loss = loss_fn(self.call(model, x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    # ---- the sentence

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_outputs_and_gradients_equal_alone(self, mode: str) -> None:
        models = self.make_models()
        bundle = self.bundle(models).train(mode == "train")
        ((x, y),) = self.make_batches(1)
        outputs = self.call(bundle, x)
        loss = bundle.compute_loss(outputs, y, self.loss_fn)
        loss.backward()
        own = []
        for i, model in enumerate(models):
            model.train(mode == "train")
            torch.manual_seed(100 + i)
            expected = self.call(model, x)
            assert type(row(outputs, i)) is type(expected)
            assert_relative(row(outputs, i), expected, 1e-9, f"outputs of model {i}")
            own.append(self.loss_fn(expected, y))
            own[-1].backward()
            for name, grad in gradients(model).items():
                got = bundle.gradients(i)[name]
                assert got is not None
                assert_relative(got, grad, 1e-9, f"gradient of {name}, model {i}")
        assert_relative(bundle.latest_losses, torch.stack(own), 1e-9, "losses")
        assert_relative(loss, torch.stack(own).mean(), 1e-9, "the printed mean")

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "own_data"])
    def test_training_equals_alone(self, name: str, shared: bool) -> None:
        optimizer_cls, options, rates = OPTIMIZERS[name]
        models = self.make_models()
        bundle = self.bundle(
            models,
            lr_list=rates,
            optimizer_cls=optimizer_cls,
            optimizer_kwargs=options,
            shared_input=shared,
        )
        count = 1 if shared else self.num_models
        data = [self.make_batches(self.steps * count)[k::count] for k in range(count)]
        for step in range(self.steps):
            if shared:
                x, y = data[0][step]
            else:
                x, y = tree_map(lambda *t: torch.stack(t), *(d[step] for d in data))
            bundle.train_step(x, y, loss_fn=self.loss_fn)
        for i, model in enumerate(models):
            optimizer = optimizer_cls(model.parameters(), lr=rates[i], **options)
            self.train_alone(model, i, data[0 if shared else i], optimizer)
            assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")

    @pytest.mark.parametrize("name", ["SGD", "Adam"])
    def test_float32_is_as_exact_as_torch(self, name: str) -> None:
        optimizer_cls, options, rates = OPTIMIZERS[name]
        exact, models = self.make_models(torch.float64), self.make_models(torch.float32)
        # the same starting point in both precisions
        for a, b in zip(exact, models):
            a.load_state_dict(
                {k: v.double() if v.is_floating_point() else v for k, v in b.state_dict().items()}
            )
        bundle = self.bundle(
            models, lr_list=rates, optimizer_cls=optimizer_cls, optimizer_kwargs=options
        )
        batches = self.make_batches(10, torch.float32)
        for x, y in batches:
            bundle.train_step(x, y, loss_fn=self.loss_fn)
        errors, own_errors = [], []
        for i in range(self.num_models):
            for model, data in ((exact[i], to_double(batches)), (models[i], batches)):
                optimizer = optimizer_cls(model.parameters(), lr=rates[i], **options)
                self.train_alone(model, i, data, optimizer)
            errors.append(difference(state(bundle[i]), state(exact[i])))
            own_errors.append(difference(state(models[i]), state(exact[i])))
        # one rounding of the largest value is the least that any float32 result may be off by
        floor = torch.finfo(torch.float32).eps * largest([state(m) for m in exact])
        assert max(errors) <= 2 * max(own_errors) + floor

    def test_autocast_has_the_dtypes_and_precision_of_one_model(self) -> None:
        models = self.make_models(torch.float32)
        exact = [copy.deepcopy(m).double() for m in models]
        bundle = self.bundle(models)
        ((x, y),) = self.make_batches(1, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.call(bundle, x)
            loss = bundle.compute_loss(outputs, y, self.loss_fn)
        loss.backward()
        errors: dict[str, list[float]] = {}
        for i, (model, reference) in enumerate(zip(models, exact)):
            torch.manual_seed(100 + i)
            with torch.autocast("cpu", torch.bfloat16):
                expected = self.call(model, x)
                own = self.loss_fn(expected, y)
            own.backward()
            torch.manual_seed(100 + i)
            self.loss_fn(self.call(reference, to_double(x)), to_double(y)).backward()
            kinds = tree_map(lambda t: t.dtype, (expected, gradients(model)))
            got = {k: g for k, g in bundle.gradients(i).items() if g is not None}
            assert tree_map(lambda t: t.dtype, (row(outputs, i), got)) == kinds
            exact_grads = gradients(reference)
            scale = largest(exact_grads)
            errors.setdefault("ours", []).append(difference(got, exact_grads) / scale)
            errors.setdefault("torch", []).append(difference(gradients(model), exact_grads) / scale)
        floor = torch.finfo(torch.bfloat16).eps
        assert max(errors["ours"]) <= 2 * max(errors["torch"]) + floor

    def test_neither_slot_nor_number_of_models_matters(self) -> None:
        models = self.make_models()
        seeds = [5, 6, 7]
        ((x, _),) = self.make_batches(1)
        full = self.call(ModelBatch(copy.deepcopy(models), seeds=seeds, fallback="error"), x)
        order = [2, 0]
        some = ModelBatch(
            copy.deepcopy([models[i] for i in order]),
            seeds=[seeds[i] for i in order],
            fallback="error",
        )
        part = self.call(some, x)
        for slot, i in enumerate(order):
            assert_relative(row(part, slot), row(full, i), 1e-12, f"model {i} in slot {slot}")

    def test_nan_in_one_model_leaves_the_others_bit_identical(self) -> None:
        rates = [0.01] * self.num_models
        ((x, y),) = self.make_batches(1, torch.float32)
        states = []
        for spoil in (False, True):
            bundle = self.bundle(
                self.make_models(torch.float32), lr_list=rates, optimizer_cls=torch.optim.Adam
            )
            if spoil:
                with torch.no_grad():
                    next(bundle[1].parameters()).fill_(float("nan"))
            for _ in range(3):
                bundle.train_step(x, y, loss_fn=self.loss_fn)
            states.append([state(bundle[i]) for i in (0, 2)])
        for a, b in zip(tree_leaves(states[0]), tree_leaves(states[1])):
            assert torch.equal(a, b)

    def test_a_frozen_model_keeps_every_bit(self) -> None:
        rates = [0.01] * self.num_models
        options = {"weight_decay": 0.1}
        ((x, y),) = self.make_batches(1, torch.float32)
        bundle = self.bundle(
            self.make_models(torch.float32),
            lr_list=rates,
            optimizer_cls=torch.optim.AdamW,
            optimizer_kwargs=options,
        )
        bundle.train_step(x, y, loss_fn=self.loss_fn)
        bundle.freeze(1)
        before = [state(m) for m in bundle.models]
        bundle.train_step(x, y, loss_fn=self.loss_fn)
        bundle.train_step(x, y, loss_fn=self.loss_fn)
        assert all(torch.equal(v, before[1][k]) for k, v in bundle[1].state_dict().items())
        assert any(not torch.equal(v, before[0][k]) for k, v in bundle[0].state_dict().items())
        bundle.unfreeze(1)
        bundle.train_step(x, y, loss_fn=self.loss_fn)
        assert any(not torch.equal(v, before[1][k]) for k, v in bundle[1].state_dict().items())

    def test_state_dict_and_export(self) -> None:
        bundle = self.bundle(self.make_models())
        ((x, _),) = self.make_batches(1)
        bundle.eval()
        saved = {k: v.clone() for k, v in bundle.state_dict().items()}
        assert set(saved) == set(bundle[0].state_dict())
        other = self.bundle(list(reversed(self.make_models()))).eval()
        other.load_state_dict(saved)
        expected = self.call(bundle, x)
        assert_relative(self.call(other, x), expected, 1e-12)
        for i in range(self.num_models):
            alone = bundle.export(i)
            shared = {t.untyped_storage().data_ptr() for t in bundle.state_dict().values()}
            mine = {t.untyped_storage().data_ptr() for t in alone.state_dict().values()}
            assert not shared & mine
            assert_relative(self.call(alone, x), row(expected, i), 1e-9)
            assert_relative(self.call(bundle[i], x), row(expected, i), 1e-9)

    def test_compiled_equals_eager(self) -> None:
        models = self.make_models()
        seeds = list(range(self.num_models))
        plain = ModelBatch(copy.deepcopy(models), seeds=seeds, fallback="error")
        compiled = ModelBatch(copy.deepcopy(models), seeds=seeds, fallback="error")
        compiled.enable_compile(backend="aot_eager")
        for x, y in self.make_batches(2):
            for bundle in (plain, compiled):
                bundle.zero_grad()
                outputs = self.call(bundle, x)
                bundle.compute_loss(outputs, y, self.loss_fn).backward()
            assert compiled.latest_losses is not None
            assert_relative(compiled.latest_losses, plain.latest_losses, 1e-10)
            assert_relative(gradients(compiled), gradients(plain), 1e-10)
            assert_relative(compiled.state_dict(), plain.state_dict(), 1e-10)


__all__ = ["BundleCase", "assert_relative", "difference", "modelbatch", "row", "state"]
