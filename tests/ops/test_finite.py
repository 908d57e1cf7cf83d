"""`nonfinite` against torch's isfinite."""

import pytest
import torch

from modelbatch.ops.finite import nonfinite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
M = 5


def tensors(dtype):
    shapes = [(M, 3, 7), (M,), (M, 9000), (M, 0)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "max", "lowest"])
@pytest.mark.parametrize("place", [(0, (2, 1, 6)), (1, (2,)), (2, (2, 0)), (2, (2, 8999))])
def test_finds_the_model(dtype, value, place):
    own = tensors(dtype)
    info = torch.finfo(dtype)
    number = {"max": info.max, "lowest": info.min}.get(value)
    own[place[0]][place[1]] = float(value) if number is None else number
    expected = [i == 2 and number is None for i in range(M)]
    assert nonfinite(own).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    x = torch.randn(M, 6, 5).to(dtype)
    x[3, 4, 2] = float("nan")
    for view in (x.transpose(1, 2), x[:, ::2], x[:, :, 1:3], x.expand(2, M, 6, 5)[0], x.flip(1)):
        expected = ~torch.isfinite(view).flatten(1).all(1)
        assert torch.equal(nonfinite([view]), expected)
    # The bad element lies between those of the view.
    assert not nonfinite([x[:, 1::2]]).any()
    assert nonfinite([torch.full((1, 4), float("inf"), dtype=dtype).expand(M, 4)]).all()


def test_few_models_and_many_threads():
    assert nonfinite([torch.zeros(0, 3)]).shape == (0,)
    x = torch.randn(64, 4000)
    x[17, 3999] = float("inf")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert nonfinite([x]).nonzero().flatten().tolist() == [17]
    finally:
        torch.set_num_threads(before)


def test_opcheck_and_refusals():
    torch.library.opcheck(torch.ops.modelbatch.nonfinite.default, (tensors(torch.float32),))
    with pytest.raises(RuntimeError, match="int64|float32"):
        nonfinite([torch.zeros(3, 2, dtype=torch.int64)])
    with pytest.raises(RuntimeError):
        nonfinite([torch.zeros(3, 2), torch.zeros(4, 2)])
    with pytest.raises(RuntimeError):
        nonfinite([torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64)])
