"""Python values as JSON and tensors, without pickling.

Numbers, strings, None, lists and dicts with string keys are themselves in JSON. Everything else is
an object with one key that begins with `$`, so that it comes back as what it was: a tuple as a
tuple, an int as a key of a dict as an int, NaN as NaN. Tensors go to a safetensors file under a
name that says where they were.
"""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError

__all__ = ["Decoder", "Encoder", "dtype_name", "stored", "unstored"]

_NAMED_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
    )
}
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}
_NUMPY_KINDS = "biuf"
_LONGEST_INT = 1 << 12  # bits; Python refuses to read much longer decimal numbers


def dtype_name(tensor: Tensor, where: str) -> str:
    """The name of a tensor's dtype in a checkpoint.

    Raises:
        CheckpointError: the tensor is of a kind that a checkpoint cannot hold.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise CheckpointError(f"{where} is a sparse or nested tensor, which cannot be saved")
    if tensor.is_meta:
        raise CheckpointError(f"{where} is on the meta device, has no values and cannot be saved")
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or name not in _NAMED_DTYPES:
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__} of {name}, which cannot be saved"
        )
    return name


def stored(tensor: Tensor) -> Tensor:
    """A tensor as a file holds it: on the CPU, contiguous, complex numbers as pairs."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.cpu().contiguous()


def unstored(tensor: Tensor, record: Any, where: str) -> Tensor:
    """A tensor from a file with the dtype and shape that bundle.json gives it.

    Raises:
        CheckpointError: the file holds another one.
    """
    try:
        dtype, shape = _NAMED_DTYPES[record["dtype"]], tuple(record["shape"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: bundle.json describes it wrongly: {record!r}") from error
    if dtype.is_complex and tensor.dtype == dtype.to_real() and tensor.shape[-1:] == (2,):
        tensor = torch.view_as_complex(tensor)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{where} is a {tensor.dtype} of shape {tuple(tensor.shape)}, bundle.json says {dtype} "
            f"of shape {shape}"
        )
    return tensor


class Encoder:
    """Turns values into JSON.

    Attributes:
        tensors: what has to be saved beside the JSON, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._open: set[int] = set()

    def tensor(self, name: str, tensor: Tensor, where: str) -> dict[str, Any]:
        """Keeps a tensor under a name like this one; returns what describes it."""
        dtype = dtype_name(tensor, where)
        unique, count = name, 1
        while unique in self.tensors or unique == "__metadata__":
            count += 1
            unique = f"{name}~{count}"
        self.tensors[unique] = tensor.detach()
        return {
            "$tensor": unique,
            "dtype": dtype,
            "shape": list(tensor.shape),
            "device": tensor.device.type,
        }

    def encode(self, value: Any, name: str, where: str) -> Any:
        """The value in JSON.

        Args:
            value: of plain containers, numbers, strings, bytes, tensors, arrays.
            name: how tensors in it are called, followed by the way to them.
            where: what to call the value in a message.

        Raises:
            CheckpointError: there is something else in it.
        """
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int and value.bit_length() <= _LONGEST_INT:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return self.tensor(name, value, where)
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, np.generic | np.ndarray):
            return self._numpy(value, name, where)
        if kind in (list, tuple, dict, OrderedDict, Counter):
            if id(value) in self._open:
                raise CheckpointError(f"{where} contains itself, so it cannot be saved")
            self._open.add(id(value))
            try:
                return self._container(value, name, where)
            finally:
                self._open.discard(id(value))
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be saved: "
            "checkpoints hold None, bool, int, float, str, bytes, list, tuple, dict, numpy scalars "
            "and arrays, and tensors"
        )

    def _container(self, value: Any, name: str, where: str) -> Any:
        if isinstance(value, list | tuple):
            items = [
                self.encode(item, f"{name}.{i}", f"{where}[{i}]") for i, item in enumerate(value)
            ]
            return items if isinstance(value, list) else {"$tuple": items}
        plain = type(value) is dict
        if plain and all(type(key) is str and key[:1] != "$" for key in value):
            return {
                key: self.encode(item, f"{name}.{key}", f"{where}[{key!r}]")
                for key, item in value.items()
            }
        pairs = []
        for key, item in value.items():
            if isinstance(key, Tensor | np.ndarray):
                raise CheckpointError(f"{where} has a {type(key).__name__} as a key")
            saved_key = self.encode(key, name, f"a key of {where}")
            pairs.append([saved_key, self.encode(item, f"{name}.{key}", f"{where}[{key!r}]")])
        return {_MAPPINGS[type(value)]: pairs}

    def _numpy(self, value: Any, name: str, where: str) -> Any:
        if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize > 8:
            raise CheckpointError(f"{where} is a numpy {value.dtype}, which cannot be saved")
        if isinstance(value, np.generic):
            return {"$numpy": [value.dtype.name, self.encode(value.item(), name, where)]}
        if type(value) is not np.ndarray:
            raise CheckpointError(f"{where} is a {type(value).__name__}, which cannot be saved")
        array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        return {"$array": self.tensor(name, torch.from_numpy(array), where)}


class Decoder:
    """Turns JSON made by `Encoder` back into the values.

    Args:
        tensors: what the file beside the JSON holds.
        file: its name, for messages.
        device: where tensors go that were not on the CPU when they were saved.
    """

    def __init__(self, tensors: Mapping[str, Tensor], file: str, device: torch.device) -> None:
        self._tensors = tensors
        self._file = file
        self._device = device
        self._by_tag: dict[str, Callable[[Any], Any]] = {
            "$float": self._float,
            "$bytes": lambda text: base64.b64decode(text, validate=True),
            "$tuple": lambda items: tuple(self._list(items)),
            "$dict": lambda pairs: dict(self._pairs(pairs)),
            "$ordered": lambda pairs: OrderedDict(self._pairs(pairs)),
            "$counter": lambda pairs: Counter(dict(self._pairs(pairs))),
            "$numpy": self._scalar,
            "$array": lambda record: self.tensor(record).cpu().numpy(),
        }

    def decode(self, value: Any) -> Any:
        """The value that was encoded; tensors in it are its own.

        Raises:
            CheckpointError: this is no encoded value, or a tensor of it is missing.
        """
        if isinstance(value, list):
            return self._list(value)
        if not isinstance(value, dict):
            return value
        if "$tensor" in value:
            tensor = self.tensor(value).clone()
            return tensor if value.get("device") == "cpu" else tensor.to(self._device)
        tags = [key for key in value if key[:1] == "$"]
        if not tags:
            return {key: self.decode(item) for key, item in value.items()}
        try:
            return self._by_tag[tags[0]](value[tags[0]])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"bundle.json: {tags[0]} is not what it should be") from error

    def tensor(self, record: Any) -> Tensor:
        """The tensor that a record describes, as it is in the file.

        Raises:
            CheckpointError: it is not there, or is another one.
        """
        name = record["$tensor"]
        where = f"{self._file}: tensor '{name}'"
        if name not in self._tensors:
            raise CheckpointError(f"{where} is missing")
        return unstored(self._tensors[name], record, where)

    def _list(self, items: list[Any]) -> list[Any]:
        return [self.decode(item) for item in items]

    def _pairs(self, pairs: Any) -> Iterator[tuple[Any, Any]]:
        return ((self.decode(key), self.decode(item)) for key, item in pairs)

    def _scalar(self, content: Any) -> Any:
        name, item = content
        dtype = np.dtype(name)
        if dtype.kind not in _NUMPY_KINDS:
            raise CheckpointError(f"bundle.json: a number cannot be a numpy {name}")
        return dtype.type(self.decode(item))

    def _float(self, text: str) -> float:
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text]
