"""A simulated device: its tensors compute on the CPU, report another device, and refuse tensors of the CPU.

What runs here runs where no accelerator is, and yet notices a tensor that was made on the CPU and should have been made
beside the others, or a number that is copied to the device for an index or a literal, for which a real one waits.
Within `without_reads` it refuses to be read too: the host would wait until all that was asked of the device is done.
A copy to the CPU that does not wait holds no numbers until an `Event` that was recorded after it is synchronised.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.backend_registration as backends
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_refuses_reads = False


@contextlib.contextmanager
def without_reads() -> Iterator[None]:
    """In this context, reading a number from the device is an error."""
    global _refuses_reads
    _refuses_reads = True
    try:
        yield
    finally:
        _refuses_reads = False


_queued: list[tuple[Tensor, Tensor]] = []


class Event:
    """The end of all copies that were queued before it was recorded."""

    def __init__(self) -> None:
        self._copies = list(_queued)

    def synchronize(self) -> None:
        for copy, numbers in self._copies:
            copy.copy_(numbers)


class _Module(backends._DummyBackendModule):
    def is_available(self) -> bool:
        return False  # so that it does not count as the machine's accelerator

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(backends._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


backends._setup_privateuseone_for_python_backend("elsewhere", backend_module=_Module(), hook=_Hook())
ELSEWHERE = torch.device("elsewhere", 0)


class Elsewhere(Tensor):
    """A tensor with the numbers of `inner`, which is on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, inner.size(), **layout, dtype=inner.dtype, device=ELSEWHERE)
        tensor.inner = inner
        return tensor

    def tolist(self) -> Any:
        _check_read(torch.ops.aten._local_scalar_dense.default, (self,), {}, is_there=True)
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class Elsewheres(TorchDispatchMode):
    """A context in which the device exists."""

    def __enter__(self) -> Any:
        self._literals = _Literals()
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._literals.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Handles `torch.tensor` with a device, which torch does not dispatch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


def settle(model: torch.nn.Module) -> None:
    """Move a model to the device with new tensors; the CPU's cannot be changed in place."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(ELSEWHERE)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if there and strangers and function not in MOVES:
        raise RuntimeError(f"{function} of tensors on two devices")
    device = kwargs.get("device")
    is_there = bool(there) if device is None else torch.device(device).type == ELSEWHERE.type
    _check_read(function, args, kwargs, is_there=bool(there))
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not is_there:
        return _queue(result) if there and kwargs.get("non_blocking") else result

    def outer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return there[id(leaf)] if id(leaf) in there else Elsewhere(leaf)  # itself where it was changed in place

    return tree_map(outer, result)


def _queue(numbers: Tensor) -> Tensor:
    copy = torch.full_like(numbers, torch.nan if numbers.is_floating_point() else -1)
    _queued.append((copy, numbers))
    return copy


def _check_read(function: Any, args: Any, kwargs: dict[str, Any], *, is_there: bool) -> None:
    if not (_refuses_reads and is_there):
        return
    reads = any(tag in READS for tag in function.tags)
    if function is torch.ops.aten.index.Tensor:  # indices give a known shape; a mask must be read
        reads = any(index is not None and index.dtype == torch.bool for index in args[1])
    target = kwargs.get("device") if function is not torch.ops.aten.copy_.default else args[0].device
    waits = function in MOVES and not kwargs.get("non_blocking", False)
    if reads or (waits and target is not None and torch.device(target).type == "cpu"):
        raise RuntimeError(f"{function} reads from the device")


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, Elsewhere) else leaf
