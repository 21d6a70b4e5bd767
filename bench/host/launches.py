"""Logs of Triton's launches on the rig, and what differs between two of them.

Two calls launch the same if their logs are equal once every pointer is replaced by a name: that of the tensor it points
into, or p0, p1, … in the order in which memory that belongs to no named tensor first appears.
"""

import ctypes
import itertools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import rig


class Pointer(NamedTuple):
    """An address, and the end of what was asked for with the allocation it lies in."""

    address: int
    end: int


class Descriptor(NamedTuple):
    """What a tensor map for the copy engine was made of; sizes are listed from the last dimension on."""

    base: Pointer
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, without the last dimension's
    box: tuple[int, ...]
    rest: tuple[int, ...]  # dtype, rank, interleave, swizzle, promotion, fill, element strides


Parameter = int | Pointer | Descriptor


class Launch(NamedTuple):
    kernel: str
    number: int  # of the loaded module: kernels of one name differ in what Triton specialised them for
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int  # how many launch attributes there are: clusters, cooperative launches and the like
    stream: int  # 0 for the current one
    device: int  # the current one
    parameters: tuple[Parameter, ...]


class Log(NamedTuple):
    """Launches with names for pointers, and the memory behind p0, p1, … and behind the named tensors."""

    rows: list[tuple[Any, ...]]
    scratch: dict[str, Pointer]
    named: dict[str, Pointer]


class _Function(ctypes.Structure):
    _fields_ = [
        ("image", ctypes.c_void_p),
        ("loaded", ctypes.c_int),
        ("count", ctypes.c_int),
        ("sizes", ctypes.c_int * 64),
        ("name", ctypes.c_char * 128),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.POINTER(_Function)),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("parameters", ctypes.c_ubyte * 1024),
    ]


_streams = itertools.count(1)


def record(call: Callable[[], Any]) -> tuple[list[Launch], Any]:
    """Every Triton launch of a call on a new stream, those of autograd's device thread included, and its result."""
    stream = next(_streams)
    rig.cuda.rig_launch.restype = ctypes.POINTER(_Launch)
    rig.fake.set_stream(stream)
    rig.cuda.rig_log(1)
    try:
        result = call()
    finally:
        rig.cuda.rig_log(0)
        rig.fake.set_stream(0)
    return [_read(rig.cuda.rig_launch(i).contents, stream) for i in range(rig.cuda.rig_launches())], result


def _read(raw: Any, stream: int) -> Launch:
    function, at, parameters = raw.function.contents, 0, []
    for size in function.sizes[: function.count]:
        parameters.append(_parameter(bytes(raw.parameters[at : at + size])))
        at += size
    return Launch(
        function.name.decode(),
        rig.cuda.rig_number(raw.function),
        tuple(raw.grid),
        tuple(raw.block),
        raw.shared,
        raw.attributes,
        raw.stream - stream,
        raw.device,
        tuple(parameters),
    )


def _parameter(raw: bytes) -> Parameter:
    if len(raw) == 128:
        base, *sizes = struct.unpack_from("<10Q5I11B", raw)
        shape, strides, box, rest = sizes[:5], sizes[5:9], sizes[9:14], sizes[14:]
        return Descriptor(_pointer(base), tuple(shape), tuple(strides), tuple(box), tuple(rest))
    value = int.from_bytes(raw, "little")
    pointer = _pointer(value)
    return pointer if len(raw) == 8 and pointer.end else value


def _pointer(address: int) -> Pointer:
    """With 0 for an end where the address is in none of the rig's allocations."""
    start, size, _ = rig.fake.block(address)
    return Pointer(address, start + size if start else 0)


def live(pointer: Pointer) -> bool:
    """Whether somebody still holds the memory."""
    return rig.fake.block(pointer.address)[2]


def extent(tensor: Tensor) -> Pointer:
    """From the first element of a tensor to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Pointer(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize if tensor.numel() else 0)


def log(launches: list[Launch], named: dict[str, Pointer]) -> Log:
    """The log of launches, given the memory that has a name. Of two names for one address the first counts."""
    starts = {p.address: name for name, p in reversed(named.items()) if p.end}
    names: dict[int, str] = {}
    scratch: dict[str, Pointer] = {}

    def name(p: Pointer) -> str:
        if p.address in starts:
            return starts[p.address]
        for each, whole in named.items():
            if whole.address < p.address < whole.end:
                return f"{each} + {p.address - whole.address} bytes"
        if p.address not in names:
            names[p.address] = f"p{len(names)}"
            scratch[names[p.address]] = p
        return names[p.address]

    def parameter(value: Parameter) -> Any:
        if isinstance(value, Pointer):
            return name(value)
        return (name(value.base), *value[1:]) if isinstance(value, Descriptor) else value

    return Log([(*launch[:-1], *map(parameter, launch.parameters)) for launch in launches], scratch, dict(named))


def differences(expected: Log, found: Log) -> list[str]:
    """What is wrong with `found`, in words; nothing where both launch the same.

    Memory without a name may lie elsewhere, but at the same distance from the end of its allocation.
    """
    wrong = []
    if (want := [row[0] for row in expected.rows]) != (have := [row[0] for row in found.rows]):
        wrong.append(f"launches {', '.join(have) or 'nothing'}; expected {', '.join(want) or 'nothing'}")
    labels = Launch._fields[:-1]
    for i, (a, b) in enumerate(zip(expected.rows, found.rows)):
        for j in range(1, max(len(a), len(b))):
            x, y = (row[j] if j < len(row) else "nothing" for row in (a, b))
            if x != y:
                label = labels[j] if j < len(labels) else f"parameter {j - len(labels)}"
                wrong.append(f"launch {i}, {b[0]}: {label} is {y}, expected {x}")
    for key, p in found.scratch.items():
        like = expected.scratch.get(key)
        if like and p.end - p.address != like.end - like.address:
            wrong.append(f"{key} has {p.end - p.address} bytes to the end, expected {like.end - like.address}")
    return wrong
