"""The parts of NVIDIA's driver API that a launch needs: load a compiled kernel, and run it.

Triton's own launcher is C code that it compiles for every signature, which takes a third of a second each and a C
compiler. Here, the arguments of a launch are an array of addresses, and nothing has to be compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

#: what each of Triton's types of a kernel's parameters is in C
CELLS: dict[str, Any] = {
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}
#: shared memory that a program may have without asking
UNASKED_BYTES = 48 * 1024
_INVALID_CONTEXT = 201
_MAX_THREADS_PER_BLOCK = 0
_MAX_DYNAMIC_SHARED_BYTES = 8
_PREFER_SHARED = 1
# Triton's numbers of element types are the driver's, but for bfloat16, float32 and float64
_ELEMENTS = {**{i: i for i in range(16)}, 8: 10, 9: 8, 10: 9}
_MAP_BYTES, _MAP_ALIGNED = 128, 64
_L2_PROMOTION_128_BYTES = 2
_MAY_START_EARLY = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its number, and a value of 64 bytes, of which a flag has the first four."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("_pad", ctypes.c_char * 4),
        ("flag", ctypes.c_int),
        ("_rest", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_EARLY = _Attribute(id=_MAY_START_EARLY, flag=1)


@cache
def _driver() -> Any:
    # the library is in the process already: torch found the GPU through it
    return ctypes.CDLL("libcuda.so.1")


class Function:
    """A kernel on one device, loaded into the driver. `warps` of 32 threads and `shared` bytes a program; `early` where
    its programs may start before the kernel in front of it has ended, and wait for that themselves."""

    def __init__(self, image: bytes, name: str, warps: int, shared: int, device: int, early: bool = False):
        """Load `image`, a cubin; OutOfResources where the device has not what the kernel takes."""
        limit: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        if shared > limit:
            raise OutOfResources(shared, limit, "shared memory")
        self.device = device
        _ensure_context(device)
        driver = _driver()
        module, function, threads = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        _check(driver.cuModuleLoadData(ctypes.byref(module), image), f"cannot load the kernel {name}")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"there is no kernel {name}")
        _check(driver.cuFuncGetAttribute(ctypes.byref(threads), _MAX_THREADS_PER_BLOCK, function), "no attribute")
        if warps * 32 > threads.value:
            raise OutOfResources(warps * 32, threads.value, "threads")
        if shared > UNASKED_BYTES:
            _check(driver.cuFuncSetCacheConfig(function, _PREFER_SHARED), "cannot configure shared memory")
            status = driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, ctypes.c_int(shared))
            _check(status, f"cannot give {name} {shared} bytes of shared memory")
        self.name, self.handle, self.early = name, function, early
        self.threads, self.shared = 32 * warps, shared

    def ready(self, grid: int, arguments: ctypes.Array[ctypes.c_void_p]) -> Launch:
        """A launch of `grid` programs; `arguments` are the addresses of the parameters' values."""
        return Launch(self, grid, arguments)


class Launch:
    """A launch that may be made again and again, by one thread at a time: all that the driver is told of it lies ready,
    and is read while a call lasts."""

    def __init__(self, function: Function, grid: int, arguments: ctypes.Array[ctypes.c_void_p]):
        attributes = (ctypes.pointer(_EARLY), 1) if function.early else (None, 0)
        self._config = _Config((grid, 1, 1), (function.threads, 1, 1), function.shared, None, *attributes)
        self._stream = 0
        self._function = function
        self._told = ctypes.byref(self._config), function.handle, arguments, None
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        """Queue the programs on a stream."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        status = self._launch(*self._told)
        if status == _INVALID_CONTEXT:  # this thread has not used the device yet
            _ensure_context(self._function.device)
            status = self._launch(*self._told)
        if status:
            _check(status, f"cannot launch {self._function.name}")


class Box:
    """A descriptor for the tensor memory accelerator: a tensor's shape and strides, and the tile that is copied.

    `facts` is what Triton's compiler decided: block size, element type and size, swizzle. `address` is where the map
    lies; the tensor it describes can be replaced by another of the same kind.
    """

    def __init__(self, descriptor: Any, facts: Mapping[str, Any], pointer: int):
        if facts["fp4_padded"]:
            raise NotImplementedError("descriptors of 4-bit elements")
        shape, strides, block = descriptor.shape, descriptor.strides, facts["block_size"]
        rank, size = len(block), facts["elem_size"]
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNED)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _MAP_ALIGNED
        status = _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address),
            ctypes.c_int(_ELEMENTS[facts["elem_type"]]),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * rank)(*(size * s for s in reversed(strides[:-1])), 0),
            (ctypes.c_uint32 * rank)(*reversed(block)),
            (ctypes.c_uint32 * rank)(*([1] * rank)),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(facts["swizzle"]),
            ctypes.c_int(_L2_PROMOTION_128_BYTES),
            ctypes.c_int(descriptor.padding == "nan"),
        )
        _check(status, f"cannot describe a tensor of shape {tuple(shape)}, strides {tuple(strides)}")
        self._map, self._replace = ctypes.c_void_p(self.address), _driver().cuTensorMapReplaceAddress
        self.pointer = pointer

    def point(self, pointer: int) -> None:
        """Describe the tensor at another address; for that of `pointer` there is nothing to do."""
        status = self._replace(self._map, ctypes.c_void_p(pointer))
        if status:
            _check(status, "cannot move a descriptor")
        self.pointer = pointer


def _ensure_context(device: int) -> None:
    """Give this thread the context of the device, the one that torch uses, if it has none."""
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "there is no CUDA context")
    if not context:
        _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"there is no CUDA device {device}")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "there is no CUDA context")
        _check(driver.cuCtxSetCurrent(context), "cannot use the CUDA context")


def _check(status: int, what: str) -> None:
    """Raise what the driver says of a call that failed."""
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status}: {(text.value or b'unknown').decode()}")
