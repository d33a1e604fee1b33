"""Parameters whose values live in the daemon: shape, dtype, device and requires_grad here, no storage.

    source is a LoraTensor    reads fetch from the daemon, in-place operations and assignments write to it
    source is a FrozenWeight  an expert's base weight: everything that would need its values raises

Both have read(), write() and discard().

`.grad` stays None, so torch's optimizers skip these parameters; their gradients and their optimizer state are the
daemon's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from . import errors, scopes
from .adapter import LoraTensor

aten = torch.ops.aten
_DATA: Any = torch.Tensor.data  # The attribute's descriptor.


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The identity of a base weight: layer and parameter name of one model."""

    layer: int
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenWeight:
        return self  # A copied model uses the same experts.

    def read(self) -> torch.Tensor:
        raise errors.weights_are_remote(f"the values of {self.name} of layer {self.layer} are needed in this process")

    def write(self, values: torch.Tensor) -> None:
        raise errors.weights_are_remote(f"{self.name} of layer {self.layer} would be changed in this process")

    def discard(self) -> None:
        """There are no gradients of a base weight."""


Source = LoraTensor | FrozenWeight


class RemoteTensor(torch.Tensor):
    """See the module's text. Made by `placeholder`."""

    source: Source

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: Source, requires_grad: bool = False
    ) -> RemoteTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        tensor.source = source
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def fetch(self) -> torch.Tensor:
        """The values, from the daemon. Raises CoprocError for a base weight."""
        return self.source.read().to("cpu" if self.device.type == "meta" else self.device, self.dtype)

    def push(self, values: torch.Tensor) -> None:
        """Replaces the values in the daemon."""
        if not values.is_meta or isinstance(self.source, FrozenWeight):
            self.source.write(values)

    def _like(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> RemoteTensor:
        return RemoteTensor(self.shape, dtype or self.dtype, device or self.device, self.source)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a function of no class.
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, list) and func._schema.name.startswith("aten::_foreach_"):
            return _foreach(func, args, kwargs)
        if isinstance(first, RemoteTensor):
            handler = _HANDLERS.get(func)
            if handler is not None:
                return handler(first, *args[1:], **kwargs)
            if _is_in_place(func):
                return _in_place(func, first, args, kwargs)
        if isinstance(kwargs.get("out"), RemoteTensor):
            raise errors.weights_are_remote(f"out= of {func} is a parameter of the routed experts")
        plain_args, plain_kwargs = _plain((args, kwargs))
        return func(*plain_args, **plain_kwargs)

    def data_ptr(self) -> int:
        if not scopes.are_pointers_names():
            raise errors.weights_are_remote("the memory of an expert parameter was asked for")
        return -id(self.source)  # Unique and stable; never a real address.

    def untyped_storage(self) -> Any:
        raise errors.weights_are_remote("the storage of an expert parameter was asked for")

    storage = untyped_storage

    @property
    def data(self) -> torch.Tensor:
        values: torch.Tensor = _DATA.__get__(self)
        return values

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if isinstance(values, RemoteTensor) and values.source is self.source:
            _DATA.__set__(self, values)  # A cast or a move of the same parameter.
        else:
            self.push(values.fetch() if isinstance(values, RemoteTensor) else values)

    @property
    def grad(self) -> torch.Tensor | None:
        """Always None; see kt_coproc.expert_gradients. Assigning None discards the adapter's gradients."""
        return None

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise errors.refusal(
                "the gradient of an expert parameter cannot be assigned",
                "gradients of the routed experts are summed in the co-process",
                "use backward(); kt_coproc.expert_gradients(model) shows them",
            )
        self.source.discard()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        import copy

        new: nn.Parameter | None = memo.get(id(self))
        if new is None:
            source = copy.deepcopy(self.source, memo)
            memo[id(self)] = new = placeholder(self.shape, self.dtype, self.device, source, self.requires_grad)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise errors.weights_are_remote("a parameter of the routed experts cannot be pickled or saved")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemoteTensor({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def is_remote(tensor: Any) -> bool:
    return isinstance(tensor, RemoteTensor)


def lora_tensor(parameter: Any) -> LoraTensor | None:
    """The adapter tensor behind a parameter, None for everything else."""
    source = getattr(parameter, "source", None) if isinstance(parameter, RemoteTensor) else None
    return source if isinstance(source, LoraTensor) else None


def placeholder(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, source: Source, requires_grad: bool
) -> nn.Parameter:
    return nn.Parameter(RemoteTensor(shape, dtype, device, source), requires_grad=requires_grad)


def _plain(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.fetch() if isinstance(leaf, RemoteTensor) else leaf, tree)


def _is_in_place(func: Any) -> bool:
    name = func._schema.name
    return name.endswith("_") and not name.endswith("__")


def _in_place(func: Any, target: RemoteTensor, args: Any, kwargs: Any) -> RemoteTensor:
    plain_args, plain_kwargs = _plain((args, kwargs))
    func(*plain_args, **plain_kwargs)
    target.push(plain_args[0])
    return target


def _foreach(func: Any, args: Any, kwargs: Any) -> Any:
    """A _foreach_ operation with remote tensors among real ones: one by one."""
    count = len(args[0])
    results: list[Any] = []
    for i in range(count):
        one = [arg[i : i + 1] if isinstance(arg, (list, tuple)) and len(arg) == count else arg for arg in args]
        plain = _plain(one)
        results += func(*plain, **kwargs) or []
        if isinstance(one[0][0], RemoteTensor) and _is_in_place(func):
            one[0][0].push(plain[0][0])
    return results or None


def _cast(tensor: RemoteTensor, **kwargs: Any) -> RemoteTensor:
    return tensor._like(kwargs.get("dtype"), kwargs.get("device"))


def _clone(tensor: RemoteTensor, **kwargs: Any) -> torch.Tensor:
    return tensor._like() if isinstance(tensor.source, FrozenWeight) else tensor.fetch()


def _zeros(tensor: RemoteTensor, **kwargs: Any) -> torch.Tensor:
    dtype, device = kwargs.get("dtype") or tensor.dtype, kwargs.get("device") or tensor.device
    if isinstance(tensor.source, FrozenWeight):
        return torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)  # Never that much memory.
    return torch.zeros(tensor.shape, dtype=dtype, device=device)


def _copy(target: RemoteTensor, values: torch.Tensor, non_blocking: bool = False) -> RemoteTensor:
    if isinstance(values, RemoteTensor):
        if isinstance(target.source, FrozenWeight) and values.source is target.source:
            return target
        values = values.fetch()
    target.push(values.expand(target.shape))
    return target


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda tensor: tensor._like(),
    aten.alias.default: lambda tensor: tensor._like(),
    aten._to_copy.default: _cast,
    aten.clone.default: _clone,
    aten.empty_like.default: _zeros,
    aten.zeros_like.default: _zeros,
    aten.copy_.default: _copy,
}
