"""A pruner that several bundles share."""

import pickle
import random
from typing import Any

import pytest
from ray.exceptions import RayActorError

import modelbatch.integrations.ray.rungs as module
from modelbatch import ModelBatchError
from modelbatch.integrations.ray import RungBoard
from modelbatch.integrations.ray.rungs import Board
from modelbatch.sweep import MedianPruner, SuccessiveHalving


class LocalBoards:
    """Boards by name, as Ray would have them, in this process."""

    def __init__(self) -> None:
        self.there: dict[str, Board] = {}
        self.calls: list[str] = []

    def kill(self) -> None:
        self.there.clear()


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> LocalBoards:
    local = LocalBoards()

    def call(self: RungBoard, method: str, *arguments: Any) -> Any:
        board = local.there.setdefault(self.name, Board(pickle.loads(pickle.dumps(self.pruner))))
        local.calls.append(method)
        # as across processes
        given = pickle.loads(pickle.dumps(arguments))
        return pickle.loads(pickle.dumps(getattr(board, method)(*given)))

    monkeypatch.setattr(RungBoard, "_call", call)
    return local


def values_of(bundle: int, epoch: int, count: int = 6) -> dict[int, float]:
    generator = random.Random(100 * bundle + epoch)
    return {10 * bundle + place: generator.random() for place in range(count)}


def schedule(epochs: int = 6) -> list[tuple[int, int]]:
    """Epochs of three bundles, of which the last one lags behind."""
    asked = [(bundle, epoch) for epoch in range(epochs) for bundle in (0, 1)]
    return asked + [(2, epoch) for epoch in range(epochs)]


def play(
    clients: dict[int, RungBoard], boards: LocalBoards, kill_at: frozenset[int] = frozenset()
) -> dict[tuple[int, int], list[int]]:
    """Let bundles ask; models that were ended ask no more."""
    gone: set[int] = set()
    answers = {}
    for place, (bundle, epoch) in enumerate(schedule()):
        if place in kill_at:
            boards.kill()
        values = {n: v for n, v in values_of(bundle, epoch).items() if n not in gone}
        answers[bundle, epoch] = clients[bundle].ask(f"b{bundle}", epoch, values)
        gone |= set(answers[bundle, epoch])
    return answers


def clients_of(pruner: Any, name: str = "board") -> dict[int, RungBoard]:
    board = RungBoard(pruner, name)
    return {bundle: pickle.loads(pickle.dumps(board)) for bundle in range(3)}


PRUNERS = [MedianPruner(1), SuccessiveHalving(1, 2)]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_bundles_compare_with_each_other(pruner: Any, boards: LocalBoards) -> None:
    answers = play(clients_of(pruner), boards)
    pruner.reset()
    gone: set[int] = set()
    for bundle, epoch in schedule():
        values = {n: v for n, v in values_of(bundle, epoch).items() if n not in gone}
        expected = pruner.prune(epoch, values)
        gone |= set(expected)
        assert answers[bundle, epoch] == expected
    assert len(gone) > 9
    assert boards.calls.count("ask") == len(schedule()) + 3  # each has to get to know it once


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_board_that_dies_is_told_by_the_next_who_asks(pruner: Any, boards: LocalBoards) -> None:
    clients = {0: RungBoard(pruner, "board")}
    clients[1] = clients[2] = clients[0]  # who asks is always who knows everything
    expected = play(clients_of(pruner, "whole"), boards)
    assert play(clients, boards, frozenset(range(0, 18, 2))) == expected


@pytest.mark.parametrize("kill_at", [{3}, {5, 6}, {12}, {13, 14}, set(range(18))])
def test_a_board_that_died_knows_everything_again(kill_at: set[int], boards: LocalBoards) -> None:
    clients = clients_of(MedianPruner(1))
    answers = play(clients, boards, frozenset(kill_at))
    for bundle in range(3):
        clients[bundle].ask(f"b{bundle}", 6, {10 * bundle: 0.5})
    board = boards.there["board"]
    for (bundle, epoch), pruned in answers.items():
        known = {n: board._known.get((f"b{bundle}", epoch, n)) for n in values_of(bundle, epoch)}
        assert [number for number, was in known.items() if was] == pruned
    curves: Any = board._pruner
    asked = [number for (_, _, number) in board._known if number < 10]
    assert len(curves._curves) == 18 and sum(len(c) for n, c in curves._curves.items() if n < 10)
    assert sum(len(c) for n, c in curves._curves.items() if n < 10) == len(asked)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_same_question_has_the_same_answer(pruner: Any, boards: LocalBoards) -> None:
    clients = clients_of(pruner)
    answers = play(clients, boards)
    # bundle 1 goes on from a checkpoint after its second epoch
    again = RungBoard(pruner, "board")
    gone = {number for epoch in range(2) for number in answers[1, epoch]}
    for epoch in range(2, 6):
        values = {n: v for n, v in values_of(1, epoch).items() if n not in gone}
        assert again.ask("b1", epoch, values) == answers[1, epoch]
        gone |= set(answers[1, epoch])


def test_what_is_known_is_in_the_checkpoint(boards: LocalBoards) -> None:
    pruner = SuccessiveHalving(1, 2)
    clients = clients_of(pruner)
    answers = play(clients, boards)
    boards.kill()  # a new cluster
    again = RungBoard(pruner, "board")
    again.load_state_dict(pickle.loads(pickle.dumps(clients[2].state_dict())))
    assert again.ask("b0", 0, values_of(0, 0)) == answers[0, 0]
    late = {90: 0.99, 91: -1.0}
    expected = play(clients_of(pruner, "other"), boards)
    assert expected == answers
    assert again.ask("b9", 0, late) == [90]  # as the best of all bundles, not of its own


def test_no_other_bundle_is_disturbed_by_a_pruner_of_ones_own() -> None:
    pruner = MedianPruner(1)
    pruner.prune(0, {1: 0.5})
    board = RungBoard(pruner)
    assert board.pruner is not pruner and not board.pruner._curves
    assert pruner._curves
    assert RungBoard(pruner).name != board.name


def test_a_board_that_does_not_stay_alive_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def __getattr__(self, name: str) -> Any:
            raise RayActorError

    monkeypatch.setattr(RungBoard, "_start", lambda self: Dead())
    monkeypatch.setattr(module, "_ATTEMPTS", 3)
    with pytest.raises(ModelBatchError, match="the actor mine does not stay alive"):
        RungBoard(MedianPruner(), "mine").ask("b", 0, {1: 0.5})


def test_what_is_no_pruner_is_refused() -> None:
    with pytest.raises(ModelBatchError, match="pruner must have a method"):
        RungBoard(MedianPruner)  # type: ignore[arg-type]
