"""Track storages created by code and count their live bytes, on any device.

The meta device may emulate another one. Scratch memory, which CUDA kernels allocate while they run and no tensor of the
program holds, counts as in the allocator if it grows with the batch or with weights.

Meta tensors have no contents, and many operators compute sizes in Python. Layers of a model are alike, so a cached
result applies to all calls with the same sizes.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .known_contents import knows_all

DeviceKind = Literal["cpu", "cuda"]

META_STANDS_FOR: ContextVar[DeviceKind] = ContextVar("META_STANDS_FOR", default="cpu")
"""Kind of device emulated by the meta device in this context."""


def device_kind(tensor: torch.Tensor) -> str:
    """Return the type of a tensor's device, such as "cuda"; for the meta device, the emulated one."""
    return META_STANDS_FOR.get() if tensor.is_meta else tensor.device.type


def storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of tensors, including those inside tensor subclasses (quantised weights)."""
    for tensor in tensors:
        if type(tensor) is torch.Tensor:
            yield tensor.untyped_storage()
            continue
        inner = getattr(tensor, "__tensor_flatten__", None)
        if inner is not None:
            parts = (getattr(tensor, name) for name in inner()[0])
            yield from storages(part for part in parts if isinstance(part, torch.Tensor))
        else:
            yield tensor.untyped_storage()


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that reports storages created by operators inside it, and their release.

    No tensor holds the scratch memory of an operator. That of CUDA kernels (`scratch_bytes`) counts as a storage that
    is freed at once.

    Args:
        created: called with the serial number and bytes of each new storage, in creation order.
        freed: called with the serial number of each freed storage.

    Attributes:
        now: number of operators run.
        count: number of storages created.
    """

    def __init__(self, created: Callable[[int, int], None], freed: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.count: int = 0
        self._created, self._freed = created, freed
        # By `_cdata`, unique among live storages, including empty ones.
        self._seen: dict[int, tuple[int | None, weakref.ref[torch.UntypedStorage]]] = {}

    def serial(self, tensor: torch.Tensor) -> int | None:
        """Return the serial number of a tensor's storage; None if it was created outside the context."""
        entry = self._seen.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and report new storages among its results."""
        options = options or {}
        result, is_new = run_on_meta(operator, arguments, options)
        self.now += 1
        if is_new:
            storage = result.untyped_storage()
            self._created(self._follow(storage), storage.nbytes())
        elif type(result) is not torch.Tensor or result.untyped_storage()._cdata not in self._seen:
            unseen = {each._cdata: each for each in storages(tensors_in(result)) if each._cdata not in self._seen}
            self._see(unseen, tensors_in([*arguments, *options.values()]))
        if scratch := scratch_bytes(operator, arguments, options):
            serial, self.count = self.count, self.count + 1
            self._created(serial, scratch)
            self._freed(serial)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so torch calls `__torch_dispatch__` without its wrapper, which would double the overhead.

        The wrapper disables torch.compile; callers of this context must do so themselves with the stance "force_eager".
        """
        return False

    def _see(self, unseen: dict[int, torch.UntypedStorage], inputs: Iterable[torch.Tensor]) -> None:
        """Record storages seen for the first time; those that are not inputs of the operator are new."""
        old = {storage._cdata for storage in storages(inputs)}
        for key, storage in unseen.items():
            if key in old:
                self._seen[key] = None, weakref.ref(storage, partial(self._forget, key))
            else:
                self._created(self._follow(storage), storage.nbytes())

    def _follow(self, storage: torch.UntypedStorage) -> int:
        """Watch for the release of a storage, and return its serial number."""
        key, serial = storage._cdata, self.count
        self.count += 1

        def freed(reference: object) -> None:
            self._forget(key, reference)
            self._freed(serial)

        self._seen[key] = serial, weakref.ref(storage, freed)
        return serial

    def _forget(self, key: int, reference: object) -> None:
        self._seen.pop(key, None)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors among an operator's inputs or results; much faster than pytree, for use on every operator."""
    if isinstance(values, torch.Tensor):
        return [values]
    found: list[torch.Tensor] = []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return found
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value)
    return found


class LivePeak(LiveStorages):  # type: ignore[no-untyped-call]
    """A context that counts the live bytes of the storages created inside it.

    Attributes:
        bytes: current live bytes.
        peak: the highest value of `bytes` so far.
    """

    def __init__(self) -> None:
        super().__init__(self._add, self._drop)
        self.bytes: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Subtract existing tensors from `bytes` once they are freed; views of larger storages are ignored."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == tensor.nbytes and storage._cdata not in self._seen:
                self._sizes[self._follow(storage)] = tensor.nbytes

    def _add(self, serial: int, size: int) -> None:
        self._sizes[serial] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _drop(self, serial: int) -> None:
        self.bytes -= self._sizes.pop(serial)


DEQUANTISED_ABOVE = 8
"""Row count above which a 4-bit product may dequantise the whole weight first (bitsandbytes 0.50)."""


def scratch_bytes(operator: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> int:
    """Return the scratch bytes of an operator's kernel; 0 except on CUDA."""
    size = _SCRATCH.get(operator.name())
    if size is None or device_kind(arguments[0]) != "cuda":
        return 0
    return size(*arguments, **options)


def _softmax_backward(gradient: torch.Tensor, *rest: Any, **options: Any) -> int:
    """Return the bytes of the product of gradient and output (aten/src/ATen/native/cuda/SoftMax.cu)."""
    return gradient.numel() * gradient.element_size()


def _flash_backward(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> int:
    """Return the bytes of the query gradient in fp32, row sums, and key and value gradients per query head.

    Source: transformers/cuda/flash_attn/flash_api.cpp: mha_bwd; lengths are rounded to 128, widths to 32.
    """
    rows, heads, length, width = query.shape
    rounded = rows * heads * _up(length, 128)
    expanded = 2 * rows * heads * key.shape[2] * width * query.element_size() if key.shape[1] != heads else 0
    return 4 * rounded * (_up(width, 32) + 1) + expanded


def _efficient_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any
) -> int:
    """Return the bytes of fp32 gradient buffers for half-precision inputs: query, and wide keys and values.

    Source: transformers/cuda/mem_eff_attention/kernel_backward.h: workspace_size; blocks of 64.
    """
    if query.element_size() > 2:
        return 0
    rows, heads, length, width = query.shape
    keys = 2 * _up(key.shape[2], 64) if width > 128 else 0
    return 4 * rows * heads * (_up(length, 64) + keys) * _up(width, 64)


def _four_bit_product(
    inputs: torch.Tensor, codes: torch.Tensor, shape: Sequence[int], *rest: Any, **options: Any
) -> int:
    """Return the bytes of the dequantised weight (bitsandbytes/backends/cuda/ops.py: gemm_4bit)."""
    rows = inputs.numel() // inputs.shape[-1]
    return math.prod(shape) * inputs.element_size() if rows > DEQUANTISED_ABOVE else 0


def _eight_bit_product(codes: torch.Tensor, weight: torch.Tensor, *rest: Any, dtype: Any = None, **options: Any) -> int:
    """Return the bytes of the int32 product, and of an fp16 one for other result dtypes (int8_scaled_mm)."""
    count = codes.numel() // codes.shape[-1] * weight.shape[0]
    return count * (4 if dtype in (None, torch.float16) else 6)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


_SCRATCH: dict[str, Callable[..., int]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "bitsandbytes::gemm_4bit": _four_bit_product,
    "bitsandbytes::int8_scaled_mm": _eight_bit_product,
}
"""Scratch bytes of operators as a function of their arguments."""


_RESULTS: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Size, strides and dtype of an operator's new tensor, by its arguments."""


def run_on_meta(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, bool]:
    """Run a dispatcher operator; one that creates a meta tensor runs once per set of sizes.

    Args:
        operator: an overload, as passed to `__torch_dispatch__`.
        arguments: its positional arguments.
        options: its keyword arguments.

    Returns:
        The result, and whether it is known to be a tensor with a storage of its own.
    """
    real = arguments and isinstance(arguments[0], torch.Tensor) and not arguments[0].is_meta
    key = None if real or not _makes_one_tensor(operator) else _key((operator, *arguments, *options.items()))
    if key is None or knows_all(tensors_in([*arguments, *options.values()])):
        return operator(*arguments, **options), False
    if key in _RESULTS:
        size, strides, dtype = _RESULTS[key]
        return torch.empty_strided(size, strides, dtype=dtype, device="meta"), True
    result = operator(*arguments, **options)
    if type(result) is torch.Tensor and result.is_meta and not _shares(result, (*arguments, *options.values())):
        made = result.shape, result.stride(), result.dtype
        plain = torch.empty_strided(*made[:2], dtype=made[2], device="meta")
        if plain.untyped_storage().nbytes() == result.untyped_storage().nbytes():
            _RESULTS[key] = made
    return result, False


@cache
def _makes_one_tensor(operator: Any) -> bool:
    """True if an operator's schema returns one new tensor, of a size free of contents, and mutates no inputs."""
    schema = operator._schema
    if torch.Tag.dynamic_output_shape in operator.tags:
        return False
    single = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    return single and schema.returns[0].alias_info is None and not schema.is_mutable


def _shares(result: torch.Tensor, arguments: tuple[Any, ...]) -> bool:
    """True if a result aliases an argument, regardless of the schema (`_unsafe_view`)."""
    own = result.untyped_storage()._cdata
    flat = (each for value in arguments for each in (value if isinstance(value, (list, tuple)) else (value,)))
    return any(isinstance(each, torch.Tensor) and each.untyped_storage()._cdata == own for each in flat)


def _key(values: Iterable[Any]) -> tuple[Any, ...] | None:
    """Return a hashable key of everything that affects result sizes; None beyond meta tensors and plain values."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            found.append((value.shape, value.stride(), value.dtype) if value.is_meta else None)
        elif isinstance(value, (tuple, list)):
            found.append(_key(value))
        else:
            found.append(None if isinstance(value, (torch.Tensor, dict)) else (kind, value))
    return None if None in found else tuple(found)
