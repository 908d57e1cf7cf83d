"""The text of float32 numbers: read back as the same bits, and in printf's form."""

import struct

import torch

from modelbatch._extension import format_rows


def test_edges() -> None:
    """Zeros, the largest and smallest numbers, powers of ten from both sides, ties."""
    powers = torch.tensor([float(f"1e{k}") for k in range(-45, 39)])
    below, above = (powers.nextafter(torch.tensor(to)) for to in (0.0, torch.inf))
    others = torch.tensor([0.0, 1.4e-45, 1.17549435e-38, 3.4028235e38, 520424.0625, 999999999.0])
    finite = torch.cat([powers, below, above, others])
    values = torch.cat([finite, -finite, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    (line,) = format_rows(values.unsqueeze(0))
    assert line.split(",") == [f"{value:.9g}" for value in values.tolist()]


def test_every_kind_of_bits() -> None:
    """Random bits: all exponents, denormal numbers and NaN included."""
    bits = torch.randint(2**32, (400, 500)) - 2**31
    values = bits.to(torch.int32).view(torch.float32)
    lines = format_rows(values)
    assert len(lines) == 400
    for line, row in zip(lines, values, strict=True):
        numbers = [float(text) for text in line.split(",")]
        back = torch.frombuffer(bytearray(struct.pack("500f", *numbers)), dtype=torch.float32)
        torch.testing.assert_close(back, row, rtol=0, atol=0, equal_nan=True)
        assert back.signbit()[~row.isnan()].equal(row.signbit()[~row.isnan()])


def test_shapes() -> None:
    """No rows, no columns, one number, and rows that do not lie one after the other."""
    assert format_rows(torch.zeros(0, 3)) == []
    assert format_rows(torch.zeros(2, 0)) == ["", ""]
    assert format_rows(torch.tensor([[0.5]])) == ["0.5"]
    assert format_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T) == ["1,3", "2,4"]
