"""Entry point of the group `torch.backends`: torch (2.5 and later) calls `main` as the last lines of `import torch`.

It must be cheap, must never raise (an exception here breaks `import torch` for everything in the environment) and must
not connect: launchers import torch too. With KT_COPROC set it patches torch and arranges for transformers, PEFT and
accelerate to be patched when they are imported. What goes wrong on the way is kept in `patching` and raised by the
first `from_pretrained`, so that nothing falls back silently.

A module that should be patched can be in one of three states:
    not imported yet      the finder below patches it right after its import
    imported              it is patched now
    half imported         (it is what imports torch) it stays in `_pending`, which the next import statement drains
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import environment, patching

Patch = Callable[[ModuleType], None]

_targets: dict[str, Patch] = {}
_pending: dict[str, Patch] = {}
_main_pending = False
_installed = False


def main() -> None:
    """Called by torch. Returns at once unless KT_COPROC is set."""
    if environment.configured():
        install()


def install() -> None:
    """Patches torch and its ecosystem, once per process. Never raises."""
    global _main_pending, _installed
    if _installed:
        return
    _installed = True
    sys.meta_path.insert(0, _Finder())
    if _own_import_running():
        _main_pending = True  # One of our own modules is being imported and is what imports torch.
    else:
        _patch_everything()


def _patch_everything() -> None:
    try:
        _patch_torch()
        _targets.update(_patches_after_import())
    except BaseException as error:  # Whatever it is, the import must survive; see the module's text.
        patching.keep_failure(error)
        _targets["transformers.modeling_utils"] = _refuse_loading
    _pending.update({name: patch for name, patch in _targets.items() if name in sys.modules})
    _drain()


def _patch_torch() -> None:
    from .hooks import torch_checkpoint, torch_clipping, torch_optimizer, torch_parallel

    for hooks in (torch_optimizer, torch_clipping, torch_parallel, torch_checkpoint):
        hooks.patch()


def _patches_after_import() -> dict[str, Patch]:
    """Module -> what is done to it right after its import (or now, when it is imported already)."""
    from .hooks import accelerate, peft, torch_checkpoint, torch_parallel, transformers

    return {
        "torch.distributed.checkpoint.state_dict": torch_checkpoint.patch_distributed_checkpoint,
        "torch.distributed.fsdp": torch_parallel.patch_fsdp,
        "transformers.modeling_utils": transformers.patch,
        "peft.tuners.lora.layer": peft.patch_layer,
        "peft.tuners.tuners_utils": peft.patch_tuners,
        "accelerate.accelerator": accelerate.patch,
    }


def _refuse_loading(modeling_utils: ModuleType) -> None:
    """Used when our hooks could not be installed: loading a model says so instead of running without them."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        patching.raise_failure()

    modeling_utils.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _own_import_running() -> bool:
    prefix = __package__ + "."
    return any(
        name.startswith(prefix) and name != __name__ and _half_imported(module) for name, module in _loaded_modules()
    )


def _loaded_modules() -> list[tuple[str, Any]]:
    return list(sys.modules.items())


def _half_imported(module: Any) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _drain() -> None:
    global _main_pending
    if _main_pending:
        if _own_import_running():
            return
        _main_pending = False
        _patch_everything()
    for name in list(_pending):
        module = sys.modules.get(name)
        if module is not None and not _half_imported(module):
            _apply(_pending.pop(name), module)


def _apply(patch: Patch, module: ModuleType) -> None:
    try:
        patch(module)
    except BaseException as error:  # Whatever it is, the import must survive; see the module's text.
        patching.keep_failure(error)


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then our patch."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner = inner
        self._name = name

    def create_module(self, spec: Any) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._inner  # inspect and pickle see the real loader.
        self._inner.exec_module(module)
        _apply(_targets[self._name], module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    """First in sys.meta_path. Finds nothing itself: it puts _Loader around the loader of the modules to patch."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if _pending or _main_pending:
            _drain()
        if name not in _targets or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)
        return spec
