"""CUDA's driver, by ctypes: addresses of MLX's arrays on the GPU, copies, pinned memory, streams and events.

MLX offers no address of an array on the GPU: a view on the host moves the array's memory to the host first. A kernel
does see the addresses of its inputs, and writes them where the host can read them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from .memory_kernels import addresses_kernel, pack_kernel, with_four_axes

if TYPE_CHECKING:
    import mlx.core as mx

BOXES, BOX = 64, 16  # places for addresses that may be under way at a time, and the addresses of one
_SMALLEST = 1 << 16  # bytes of pinned memory
_NOT_READY = 600
_NON_BLOCKING, _NO_TIMING, _PORTABLE = 1, 2, 1

_THREADS, _MOST_BLOCKS = 256, 1 << 20  # of the kernel that packs

Pointer = ctypes.c_void_p
Kind = tuple[Sequence[int], Any]  # the shape and the MLX dtype of an array
T = TypeVar("T")
_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


class CudaError(RuntimeError):
    """CUDA's driver is missing, or a call of it failed."""


class Driver:
    """CUDA on one GPU: the context that MLX uses, too.

    Attributes:
        uuid: The identity of the GPU.
    """

    def __init__(self, index: int):
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no CUDA driver: {error}") from None
        device, self._context, uuid = ctypes.c_int(), Pointer(), (ctypes.c_char * 16)()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuDeviceGetUuid", ctypes.byref(uuid), device)
        self.uuid = bytes(uuid).hex()
        self._free: dict[int, list[int]] = {}
        self.use()
        self.copies = self.stream()
        self._boxes = self.pinned(8 * BOXES * BOX)
        self._next = 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def use(self) -> None:
        """Make this GPU the one of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def stream(self) -> Pointer:
        """Make a stream whose kernels start before waiting ones of MLX."""
        least, greatest, stream = ctypes.c_int(), ctypes.c_int(), Pointer()
        self._call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self._call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, greatest)
        return stream

    def record(self, stream: Pointer) -> Pointer:
        """Make an event that is over when all earlier work of `stream` is. `over` frees it."""
        event = Pointer()
        self._call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        self._call("cuEventRecord", event, stream)
        return event

    def over(self, event: Pointer) -> bool:
        """Return whether `event` is over. Ask no more afterwards."""
        code = self._library.cuEventQuery(event)
        if code == _NOT_READY:
            return False
        self._library.cuEventDestroy_v2(event)
        if code:
            raise CudaError(f"a transfer between GPUs failed ({code})")
        return True

    def pinned(self, count: int) -> memoryview:
        """Return at least `count` bytes of the host that copies reach at full speed.

        To allocate them takes long, so they return to this driver when nothing refers to them.
        """
        self.use()
        size = max(_SMALLEST, 1 << (count - 1).bit_length() if count > 1 else 1)
        free = self._free.setdefault(size, [])
        if not free:
            address = Pointer()
            self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE)
            free.append(address.value or 0)
        at = free.pop()
        memory = (ctypes.c_char * size).from_address(at)
        weakref.finalize(memory, free.append, at).atexit = False
        return memoryview(memory).cast("B")

    def memory(self, count: int) -> int:
        """Allocate `count` bytes of the GPU, and return their address. They live as long as the process."""
        address = Pointer()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(count))
        return address.value or 0

    def copy_all(self, targets: Sequence[int], sources: Sequence[int], counts: Sequence[int]) -> None:
        """Copy bytes between addresses of the GPU or of pinned memory, and wait."""
        self.use()
        for target, source, count in zip(targets, sources, counts):
            if count:
                where = Pointer(target), Pointer(source)
                self._call("cuMemcpyAsync", *where, ctypes.c_size_t(count), self.copies)
        self._call("cuStreamSynchronize", self.copies)

    def locate(self, arrays: Sequence[mx.array]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Find the addresses of contiguous `arrays`; 0 for those without an element.

        Returns:
            Lazy arrays, and a function that evaluates them and returns the addresses, which hold as long as the arrays
            live and nobody views them on the host.
        """
        import mlx.core as mx

        found = [self._run(part, [((1,), mx.uint32)]) for part in _boxes([x for x in arrays if x.size])]
        return [done for (done,), _ in found], _joined(found, [x.size > 0 for x in arrays])

    def allocate(self, kinds: Sequence[Kind]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Make contiguous arrays of these shapes and dtypes, whose numbers are arbitrary, and find their addresses.

        Returns:
            The arrays, which are lazy, and a function that evaluates them and returns the addresses; see `locate`.
        """
        import mlx.core as mx

        sized = [0 not in shape for shape, _ in kinds]
        found = [self._run([], part) for part in _boxes([kind for kind, there in zip(kinds, sized) if there])]
        made = iter([x for arrays, _ in found for x in arrays])
        return [next(made) if there else mx.zeros(*kind) for kind, there in zip(kinds, sized)], _joined(found, sized)

    def pack(self, arrays: Sequence[mx.array], axes: Sequence[int], room: int) -> list[mx.array]:
        """Copy `arrays` to new ones, whose first axis is the tokens, with place for `room` tokens.

        Args:
            arrays: Arrays of any strides: ``[B, H, L, D]``, ``[B, H, L]`` or ``[B, L]``.
            axes: The token axis of each.
            room: At least the number of tokens; what is in further places is arbitrary.

        Returns:
            Lazy, contiguous arrays, such as ``[room, B, H, D]``.
        """
        whole = [with_four_axes(x, axis) for x, axis in zip(arrays, axes)]
        blocks = max(1, min(_MOST_BLOCKS, arrays[0].shape[axes[0]]))
        return pack_kernel(tuple(x.dtype for x in arrays))(
            inputs=whole,
            grid=(blocks * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(room, *x.shape[:axis], *x.shape[axis + 1 :]) for x, axis in zip(arrays, axes)],
            output_dtypes=[x.dtype for x in arrays],
        )

    def _run(self, arrays: Sequence[mx.array], kinds: Sequence[Kind]) -> tuple[list[mx.array], Callable[[], list[int]]]:
        """Run a kernel that reads `arrays`, makes arrays of these `kinds`, and notes the addresses of either."""
        import mlx.core as mx

        at = self._next
        self._next = (at + 1) % BOXES
        box = self._boxes[8 * BOX * at : 8 * BOX * (at + 1)].cast("Q")
        made = addresses_kernel(tuple(x.dtype for x in arrays), tuple(dtype for _, dtype in kinds))(
            inputs=[_constant(address_of(box)), *arrays],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[shape for shape, _ in kinds],
            output_dtypes=[dtype for _, dtype in kinds],
        )

        def read() -> list[int]:
            mx.eval(*made)
            return box[: len(arrays or kinds)].tolist()

        return made, read


def _boxes(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Divide `items` into parts whose addresses fit into a box."""
    return (items[i : i + BOX] for i in range(0, len(items), BOX))


def _joined(parts: Sequence[tuple[Any, Callable[[], list[int]]]], sized: Sequence[bool]) -> Callable[[], list[int]]:
    """Return a function that reads the addresses of all `parts`, with 0 in the places that are not `sized`."""

    def places() -> list[int]:
        addresses = iter([address for _, read in parts for address in read()])
        return [next(addresses) if there else 0 for there in sized]

    return places


def address_of(buffer: Any) -> int:
    """The address of a writable buffer of the host."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@lru_cache(maxsize=BOXES)
def _constant(value: int) -> mx.array:
    import mlx.core as mx

    x = mx.array([value], mx.uint64)
    mx.eval(x)
    return x


@cache
def has_gpu() -> bool:
    """Return whether MLX can use an NVIDIA GPU. To ask takes as long as the rest of a short call."""
    import mlx.core as mx

    return bool(mx.cuda.is_available())


def on_gpu() -> bool:
    """Return whether MLX's default device is an NVIDIA GPU."""
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.gpu and has_gpu()


def driver() -> Driver | None:
    """Return the driver for MLX's default device, or ``None`` where that is no NVIDIA GPU."""
    import mlx.core as mx

    return None if not on_gpu() else _driver(int(str(mx.default_device()).rstrip(")").rpartition(",")[2]))


@cache
def multiprocessors() -> int | None:
    """Return how many multiprocessors the first GPU has, or ``None`` where CUDA's driver does not tell."""
    device, count = ctypes.c_int(), ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    failed = library.cuInit(0) or library.cuDeviceGet(ctypes.byref(device), 0)
    failed = failed or library.cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSOR_COUNT, device)
    return None if failed else count.value


@lru_cache
def _driver(index: int) -> Driver:
    return Driver(index)
