"""Checkpoints of bundles whose models have changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from changing_case import Net, assert_same_bits, batches, everything, nets, same
from torch import nn

from modelbatch import CheckpointError, ModelBatch
from modelbatch.checkpoint import checkpoint_info


def bundle(count: int = 3, **options: Any) -> ModelBatch:
    options = {"lr_list": [0.1] * count, "optimizer_cls": torch.optim.Adam, **options}
    return ModelBatch(nets(count, dropout=0.3), **options)


@pytest.fixture
def changed() -> ModelBatch:
    """Models 1, 3 and 4: model 0 has left, 2 was replaced by 3."""
    mb = bundle()
    mb.train_step(*batches(1)[0])
    mb.prune(0)
    mb.replace(1, Net(7, dropout=0.5), lr=0.2, weight_decay=0.1, seed=99)
    mb.append(nets(1, 8, dropout=0.3), lr=0.3)
    mb.train_step(*batches(1)[0])
    mb.append([Net(5)])
    mb.prune(-1)
    return mb


@pytest.mark.parametrize("count", [2, 3])
def test_a_bundle_becomes_what_was_saved(changed: ModelBatch, tmp_path: Path, count: int) -> None:
    changed.save_all(tmp_path, per_model=True)
    assert {p.name for p in tmp_path.glob("model_*")} == {f"model_000{i}" for i in (1, 3, 4)}
    assert [model["id"] for model in checkpoint_info(tmp_path)["models"]] == [1, 3, 4]
    mb = bundle(count)
    mb.load_all(tmp_path, resize=True)
    assert mb.model_ids == [1, 3, 4]
    assert [model.dropout.p for model in mb.models] == [0.3, 0.5, 0.3]
    for x, y in batches(3, 4):
        assert torch.equal(mb.train_step(x, y), changed.train_step(x, y))
    assert_same_bits(mb, changed)
    assert mb.append([Net(1)]) == changed.append([Net(1)]) == [6]


def test_equal_sizes_take_over_the_ids(changed: ModelBatch, tmp_path: Path) -> None:
    changed.save_all(tmp_path)
    mb = bundle()
    mb.models[1].dropout.p = 0.5
    mb.train()
    mb.load_all(tmp_path)
    assert mb.model_ids == [1, 3, 4]
    assert_same_bits(mb, changed)
    two = bundle(2)
    two.load_all(tmp_path, indices=[2, 0])
    assert two.model_ids == [4, 1]
    two.load_all(tmp_path, indices=[1, 1])
    assert two.model_ids == [4, 1]  # no two models have one id


def test_what_does_not_fit_is_refused_before_the_size_changes(
    changed: ModelBatch, tmp_path: Path
) -> None:
    changed.save_all(tmp_path)
    mb = ModelBatch([nn.Linear(3, 2) for _ in range(5)])
    before = everything(mb)
    with pytest.raises(CheckpointError, match="tensor"):
        mb.load_all(tmp_path, resize=True)
    assert same(everything(mb), before)
    with pytest.raises(CheckpointError, match="another bundle: it never had a model 6"):
        bundle(7).load_all(tmp_path, resize=True)
    with pytest.raises(CheckpointError, match="no indices="):
        mb.load_all(tmp_path, resize=True, indices=[0, 1, 2])
    with pytest.raises(CheckpointError, match="has 3 models, the bundle 4"):
        bundle(4).load_all(tmp_path)


def test_checkpoints_of_earlier_versions_have_no_next_id(tmp_path: Path) -> None:
    mb = bundle(2)
    mb.save_all(tmp_path)
    manifest = json.loads((tmp_path / "bundle.json").read_bytes())
    assert manifest["next_id"] == 2
    from modelbatch.checkpoint.format import dump

    manifest.pop("sha256")
    manifest.pop("next_id")
    (tmp_path / "bundle.json").write_bytes(dump(manifest))
    other = bundle(2)
    other.load_all(tmp_path)
    assert other.append([Net(3)]) == [2]
