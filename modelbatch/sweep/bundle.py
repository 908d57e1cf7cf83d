"""Trials that train together, each at its own epoch, while others leave and join."""

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import BestModel
from ..checkpoint import GlobalRandomState
from ..checkpoint.reading import read
from ..errors import CheckpointError, ModelBatchError
from ..optim import OptimizerFactory
from ..structure import same_structure
from ..training.history import History
from ..training.loop import Loop
from ..training.position import generators_of
from .assembly import assemble, seed_generators
from .copying import copy_training
from .gather import Settings
from .own_epochs import OwnEpochs
from .trials import Trial
from .watching import Reasons, diverged, with_nan_callback
from .weights import Weights, seeded

__all__ = ["Round", "TrialBundle"]


@dataclass
class Round:
    """What came of one epoch of a bundle; lists are in the order of `trials`.

    Attributes:
        trials: the ids.
        epochs: the epoch that each trial has just done, from 0: its own, not the bundle's.
        values: numbers by name: `"loss"`, `"val_loss"`, `"val_<metric>"`; they may be NaN.
        ended: of trials that will not go on, by id, whether they have `"finished"` all their
            epochs, `"diverged"` (something was not finite) or were `"stopped"` by a callback.
        reasons: why trials diverged or were stopped, by id.
        seconds: the time that the epoch took.
    """

    trials: list[int]
    epochs: list[int]
    values: dict[str, list[float]]
    ended: dict[int, str]
    reasons: dict[int, str]
    seconds: float


class TrialBundle:
    """Trials that train together, each at an epoch of its own, while others leave and join.

    The result of a trial depends on its configuration and seed alone: in its epoch e it sees the
    samples in the order `epoch_order(n, settings.seed, e)`, whatever epoch the others are at, and
    optimizer, schedule and random stream begin when it joins. With an iterable of batches as data,
    whose order is not ours to repeat, trials cannot join a bundle that has begun.

    Args:
        trials: of one `key`.
        models: theirs, of one structure.
        settings: for all trials of the sweep.
        best: keeps the best weights of the models; None to keep none.

    Attributes:
        mb: the bundle.
        optimizer: its optimizer.
        scheduler: the schedules, None for none.

    Raises:
        ModelBatchError: the trials cannot train together.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        models: Sequence[nn.Module],
        settings: Settings,
        best: BestModel | None = None,
    ) -> None:
        for trial in trials[1:]:
            if trial.key != trials[0].key:
                raise ModelBatchError(
                    f"trials {trials[0].id} and {trial.id} cannot share a bundle: batch size, "
                    "optimizer class, loss or kind of clipping differ"
                )
        first = trials[0]
        self.settings, self.best = settings, best
        self.mb, self.optimizer = assemble(trials, models, settings)
        self._by_id = dict(zip(self.mb.model_ids, trials))  # by the id of the model
        self._done = dict.fromkeys(self._by_id, 0)  # epochs
        self._slots = list(trials)  # as they are, or are about to be
        self.scheduler = None
        if settings.scheduler is not None:
            self.scheduler = OptimizerFactory.create_lr_scheduler(self.optimizer, self._schedule)
        self._reference = seeded(settings.build, first.config, first.seed)
        self._reasons = Reasons()
        self._loop = self._make_loop(first)
        self._generators = generators_of([settings.train.loader, _loader(settings)])
        self._random = self._first_random_state()
        self._begun = False

    def _make_loop(self, first: Trial) -> Loop:
        settings = self.settings
        own = with_nan_callback(settings.callbacks([trial.id for trial in self._slots]))
        own += [*([] if self.best is None else [self.best]), self._reasons]
        train: Any = settings.train.loader
        if train is None:
            assert first.batch_size is not None
            train = OwnEpochs(settings.train, first.batch_size, self._epochs)
        return Loop(
            self.mb,
            train,
            None if settings.val is None else settings.val.validation(first.batch_size),
            optim=None,
            loss_fn=first.loss_fn,
            metric_fns=settings.metric_fns,
            callbacks=own,
            router=None,
            scheduler=self.scheduler,
            scheduler_interval=settings.scheduler_interval,
            accumulate=1,
            grad_scaler=None,
            amp_dtype=None,
            device=None,
            progress=False,
        )

    def _schedule(self, optimizer: Optimizer, slot: int) -> LRScheduler:
        assert self.settings.scheduler is not None
        return self.settings.scheduler(optimizer, dict(self._slots[slot].config))

    # ---- who is there

    @property
    def trials(self) -> list[Trial]:
        """The trials, in the order of the bundle's models."""
        return [self._by_id[own] for own in self.mb.model_ids if own in self._by_id]

    def __len__(self) -> int:
        return len(self._by_id)

    def _epochs(self) -> list[int]:
        return [self._done[own] for own in self.mb.model_ids]

    def _model_id(self, trial: int) -> int:
        for own, known in self._by_id.items():
            if known.id == trial:
                return own
        raise ModelBatchError(f"trial {trial} is not in this bundle")

    def _slot(self, trial: int) -> int:
        return self.mb.model_ids.index(self._model_id(trial))

    def epochs_done(self, trial: int) -> int:
        """How many epochs a trial has trained for."""
        return self._done[self._model_id(trial)]

    def fits(self, trial: Trial, model: nn.Module) -> bool:
        """Whether a trial with this model may join now."""
        first = next(iter(self._by_id.values()), None)
        if first is None or trial.key != first.key:
            return False
        if self._begun and self.settings.train.loader is not None:
            return False
        return same_structure(self._reference, model)

    # ---- training

    def run_epoch(self) -> Round:
        """Train every trial for its own next epoch, and validate.

        Trials that have ended are to leave before the next call.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step was finished.
            ModelBatchError: the training failed.
        """
        loop, start = self._loop, time.perf_counter()
        outside = self._swap_random_state(self._random)
        try:
            with loop.interrupts:
                if not self._begun:
                    self._begun = True
                    loop.tell("on_train_start")
                loop.event.stop = False
                loop.run_epoch()
        finally:
            self._random = self._swap_random_state(outside)
        # nobody reads the curves here, and they would grow with every trial that ever was
        loop.position.history = History(len(self.mb), self.mb.model_ids)
        return self._round(time.perf_counter() - start)

    def _round(self, seconds: float) -> Round:
        ids, stop = self.mb.model_ids, self._loop.event.stop
        results = self._loop.results
        rows = torch.stack([own.double() for own in results.values()]).cpu().tolist()
        active = dict(zip(ids, self.mb.active.tolist()))
        round_ = Round([], [], {name: [] for name in results}, {}, {}, seconds)
        for own, trial in list(self._by_id.items()):
            reason = self._reasons.known.get(own, "")
            round_.trials.append(trial.id)
            round_.epochs.append(self._done[own])
            slot = ids.index(own) if own in active else None  # a callback may have removed it
            for name, row in zip(results, rows):
                round_.values[name].append(torch.nan if slot is None else row[slot])
            self._done[own] += 1
            if not active.get(own, False):
                status = "diverged" if diverged(reason) else "stopped"
            elif self._done[own] >= trial.epochs:
                status = "finished"
            elif stop:
                status = "stopped"
            else:
                continue
            round_.ended[trial.id] = status
            if status != "finished":
                round_.reasons[trial.id] = reason or "a callback ended the training"
        return round_

    # ---- coming and going

    def exchange(
        self, leave: Iterable[int] = (), join: Sequence[tuple[Trial, nn.Module]] = ()
    ) -> None:
        """Let trials leave and others join, all in one change of the bundle.

        Those who join begin at their first step. They take the places of those who leave first.

        Args:
            leave: ids of trials.
            join: further trials with their models.

        Raises:
            StructureMismatchError: a model has another structure.
            ModelBatchError: a trial is not there, cannot join, or somebody who has something for
                each model cannot follow. Nothing has changed then.
        """
        gone = {self._model_id(trial) for trial in leave}
        for trial, _ in join:
            self._check_joiner(trial)
        if gone or join:
            self._change(gone, join)

    def _change(self, gone: set[int], join: Sequence[tuple[Trial, nn.Module]]) -> None:
        """Let the models with these ids leave, and others join."""
        ids = self.mb.model_ids
        stays = [own for own in ids if own in self._by_id and own not in gone]
        if not stays and not join:  # a bundle is never without models
            self._by_id.clear()
            return
        joining = list(join)
        source: list[int | None] = []
        slots: list[Trial] = []
        for slot, own in enumerate(ids):
            if own in stays:
                source.append(slot)
                slots.append(self._by_id[own])
            elif joining:
                source.append(None)
                slots.append(joining.pop(0)[0])
        source += [None] * len(joining)
        slots += [trial for trial, _ in joining]
        before, self._slots = self._slots, slots
        try:
            change = self.mb._change_models(
                source,
                [model for _, model in join],
                seeds=[trial.seed for trial, _ in join],
                hyper=[{**trial.options, **trial.clips} for trial, _ in join],
            )
        except BaseException:
            self._slots = before
            raise
        epochs = {own: self._done[own] for own in stays}
        self._by_id = dict(zip(change.ids, slots))
        self._done = {own: epochs.get(own, 0) for own in change.ids}

    def _check_joiner(self, trial: Trial) -> None:
        if any(trial.id == other.id for other in self._by_id.values()):
            raise ModelBatchError(f"trial {trial.id} is in the bundle already")
        first = next(iter(self._by_id.values()), None)
        if first is None or trial.key != first.key:
            raise ModelBatchError(f"trial {trial.id} cannot join this bundle, see `fits`")
        if self._begun and self.settings.train.loader is not None:
            raise ModelBatchError(
                f"trial {trial.id} cannot join: an iterable of batches cannot begin anew for one "
                "model alone; give the data as tensors or a Dataset"
            )

    def copy(self, source: int, target: int, trial: Trial) -> None:
        """Let a trial go on from where another one is, as population based training does.

        Weights, buffers, optimizer state, step counts and epochs become those of the other trial;
        hyper-parameters are those of `trial`, and a schedule is where it is after as many steps.
        The random stream stays the trial's own.

        Args:
            source: id of the trial to copy.
            target: id of the trial that is to go on from there.
            trial: what it is from then on; with the same id and key.

        Raises:
            ModelBatchError: no such trial, one that does not fit, or an option that is none.
        """
        own, epochs = self._model_id(target), self.epochs_done(source)
        if trial.id != target or trial.key != self._by_id[own].key or source == target:
            raise ModelBatchError(
                f"trial {target} cannot go on from trial {source} as {trial.config}"
            )
        model = seeded(self.settings.build, trial.config, trial.seed)
        streams, slot = self.mb._streams, self._slot(target)
        drawn = streams.step[slot].clone()
        self._change({own}, [(trial, model)])
        streams.step[slot] = drawn
        copy_training(self.mb, self.scheduler, self._slot(source), slot)
        self._done[self._model_id(target)] = epochs

    # ---- weights

    def keep(self, trial: int, weights: Weights) -> None:
        """Keep the weights of a trial that is about to leave, the best ones if `best` has any."""
        weights.keep(trial, self.mb, self._slot(trial), self.best)

    def state_dict_of(self, trial: int) -> dict[str, Any]:
        """The weights of a trial's model, copied to the CPU."""
        return {
            name: value.detach().to("cpu", copy=True)
            if isinstance(value, Tensor)
            else copy.deepcopy(value)
            for name, value in self.mb[self._slot(trial)].state_dict().items()
        }

    # ---- checkpoints

    def save(self, directory: Path) -> None:
        """Write everything that training goes on from, bit for bit.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.mb.save_all(directory, states={**self._loop.states(), "trials": self})

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote; the bundle must have been made with the same trials.

        Raises:
            CheckpointError: the files are damaged, or of other trials; nothing has changed then.
        """
        saved, own = self.saved_trials(directory), [trial.id for trial in self.trials]
        if saved != own:
            raise CheckpointError(f"{directory} is of the trials {saved}, not of {own}")
        trials = self.trials
        self.mb.load_all(directory, states={**self._loop.states(), "trials": self})
        ids = self.mb.model_ids  # those of the checkpoint
        self._by_id, self._done = dict(zip(ids, trials)), dict(zip(ids, self._done.values()))

    @staticmethod
    def saved_trials(directory: Path) -> list[int]:
        """The ids of the trials that a checkpoint is of, in the order of the models.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        manifest = read(directory, ()).manifest
        try:
            return [int(trial) for trial in manifest["states"]["trials"]["trials"]]
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory} is no checkpoint of a bundle of trials") from error

    def state_dict(self) -> dict[str, Any]:
        """Which trials there are, in the order of the models, and where each of them is."""
        return {
            "trials": [self._by_id[own].id for own in self.mb.model_ids],
            "epochs": self._epochs(),
            "random": self._random,
            "begun": self._begun,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the models may still have other ids."""
        self._done = dict(zip(self._by_id, map(int, state_dict["epochs"]), strict=True))
        self._random, self._begun = state_dict["random"], bool(state_dict["begun"])

    def close(self) -> None:
        """Tell the callbacks that the training is over."""
        if self._begun:
            self._loop.tell("on_train_end")

    # ---- what loaders and transforms draw

    def _first_random_state(self) -> dict[str, Any]:
        """The same for every bundle, whatever was drawn before."""
        before = self._swap_random_state(None)
        seed_generators(self.settings.seed)
        return self._swap_random_state(before)

    def _swap_random_state(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Put the generators into a state; returns the one that they were in."""
        shared = GlobalRandomState()
        before = {
            "shared": shared.state_dict(),
            "own": [generator.get_state() for generator in self._generators],
        }
        if state is not None:
            shared.load_state_dict(state["shared"])
            for generator, own in zip(self._generators, state["own"]):
                generator.set_state(own.cpu())
        return before


def _loader(settings: Settings) -> Any:
    return None if settings.val is None else settings.val.loader
