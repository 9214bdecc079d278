"""A GPU that is none, for `pytest -p pretended_gpu`: what a CPU computes, kept from meeting what lies on the CPU.

Its tensors hold their data on the CPU. As with those of a real GPU, an operation that takes some of them and some of
the CPU's fails, and so does drawing on it by a generator of the CPU; numbers without dimensions, and indices, may lie
on the CPU. Where there is no GPU, tests of devices run on it (`test_devices.py`), in a process of their own: the
device is one for the whole process, and what PyTorch does in C++ past `__torch_dispatch__` is done in Python here.
"""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=_Module())
DEVICE = torch.device("pretended:0")
# These take indices from anywhere; what is written by them must lie where it is written to.
_BY_INDEX = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# These tell something of tensors that is on the CPU then.
_TELLING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::is_pinned"}


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU; `data_on_cpu` is what it holds."""

    data_on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> "PretendedTensor":
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "layout": data.layout}
        own = Tensor._make_wrapper_subclass(cls, data.size(), dtype=data.dtype, device=DEVICE, **layout)
        own.data_on_cpu = data
        return own

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "PretendedTensor":
        return PretendedTensor(inner["data_on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_on_cpu.untyped_storage()


class _Pretending(TorchDispatchMode):
    """Reaches what makes tensors from none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def on_cpu(values: Any) -> Any:
    """Tensors, in whatever they lie, as what they hold."""
    return tree_map(lambda value: value.data_on_cpu if isinstance(value, PretendedTensor) else value, values)


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, device = function._schema.name, kwargs.get("device")
    if name == "aten::copy_":
        function(*on_cpu(args))
        return args[0]
    leaves = tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, PretendedTensor)]
    if name != "aten::_to_copy":
        _refuse_to_mix(name, args[2:] if name in _BY_INDEX and isinstance(args[0], PretendedTensor) else leaves, ours)
    to_gpu = bool(ours) if device is None else torch.device(device).type == DEVICE.type
    drawn_by = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    if to_gpu and drawn_by:
        raise RuntimeError(f"Expected a generator of the GPU but found one of the CPU ({name})")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*on_cpu(args), **on_cpu(kwargs))
    if not to_gpu or name in _TELLING:
        return result
    wrapped = tree_map(lambda value: PretendedTensor(value) if isinstance(value, Tensor) else value, result)
    return wrapped if name == "aten::_to_copy" else return_and_correct_aliasing(function, args, kwargs, wrapped)


def _refuse_to_mix(name: str, values: Any, ours: list[PretendedTensor]) -> None:
    others = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.dim() > 0]
    shapes = [tuple(value.shape) for value in others if not isinstance(value, PretendedTensor)]
    if ours and shapes:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {shapes} are on the CPU ({name})")


def _patched(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _tensor(original: Callable) -> Callable:
    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = original(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return tensor


def _new_tensor(original: Callable) -> Callable:
    return lambda self, data, **kwargs: original(on_cpu(self), data, **kwargs).to(self.device)


def _item(original: Callable) -> Callable:
    def by_index(self: Tensor, index: Any, *value: Any) -> Any:
        if isinstance(self, PretendedTensor):
            parts = index if isinstance(index, tuple) else (index,)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
        return original(self, index, *value)

    return by_index


_patched(torch, "tensor", _tensor)
_patched(torch, "save", lambda original: lambda content, *args, **kwargs: original(on_cpu(content), *args, **kwargs))
_patched(Tensor, "new_tensor", _new_tensor)
_patched(Tensor, "tolist", lambda original: lambda self: original(on_cpu(self)))
_patched(Tensor, "__getitem__", _item)
_patched(Tensor, "__setitem__", _item)
_device = accelerate.Accelerator.device
accelerate.Accelerator.device = property(lambda self: _device.fget(self) if self.on_cpu else DEVICE)


def _on_gpu(original: Callable) -> Callable:
    def __init__(self: accelerate.Accelerator, *args: Any, cpu: bool = False, **kwargs: Any) -> None:
        self.on_cpu = cpu
        original(self, *args, cpu=True, **kwargs)

    return __init__


_patched(accelerate.Accelerator, "__init__", _on_gpu)


@pytest.fixture(autouse=True)
def _pretending():
    with _Pretending():
        yield
