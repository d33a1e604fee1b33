"""transformers: which checkpoint is being loaded, and the swap of its experts before anything is allocated."""

from __future__ import annotations

import functools
import os
import threading
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from .. import environment, errors, same_model, swap
from ..adapter import Binding
from ..connection import default_client
from ..expert_names import expert_names
from ..experts import remote_modules
from ..patching import Function, raise_failure, wrap
from .torch_checkpoint import wrap_checkpoint

_local = threading.local()


class _Loading:
    """One call of from_pretrained. They nest: composite models, adapters that load their base model."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.files: list[str] | None = None
        self.parallel = [
            name
            for name in ("tp_plan", "tp_size", "distributed_config", "device_mesh")
            if arguments.get(name) is not None
        ]
        self._binding: Binding | None = None
        self._plain = False

    def __enter__(self) -> _Loading:
        self._outer = getattr(_local, "loading", None)
        _local.loading = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _local.loading = self._outer

    def swap(self, model: nn.Module) -> None:
        """post_init of a model that is being loaded: it is on meta, its device map is not computed yet.

        Raises:
            CoprocError: no daemon; CoprocModelMismatch: another model than the daemon's.
        """
        if self._plain or self.files is None or not environment.configured() or not swap.routed_experts(model):
            return  # Dense, built from a config, or the hooks are here because of an explicit connect().
        if self._binding is None:
            client = default_client()
            if self.parallel:
                raise errors.refusal(
                    "tensor and pipeline parallelism are not supported with experts in the co-process",
                    f"from_pretrained was given {', '.join(self.parallel)}",
                    "use data parallelism: DDP or FSDP2",
                )
            directory = os.path.dirname(self.files[0]) if self.files else ""
            try:
                same_model.require_same_model(client, type(model).__name__, directory, self.files)
            except errors.CoprocModelMismatch:
                if not environment.other_models_are_plain():
                    raise
                self._plain = True
                return
            self._binding = Binding(client)
        swap.swap(model, self._binding)


def patch(modeling_utils: ModuleType) -> None:
    """Public equivalents: none. An HfQuantizer could replace modules before loading too, but it sets quantisation flags
    that Trainer and PEFT look at, and collides with real quantisation."""
    model_class = modeling_utils.PreTrainedModel
    # Bound by `from torch.utils.checkpoint import checkpoint`; wrapped already unless it was imported before us.
    wrap(modeling_utils, "checkpoint", wrap_checkpoint)
    wrap(modeling_utils, "_get_resolved_checkpoint_files", _resolved)
    wrap(model_class, "post_init", _post_init)
    wrap(model_class, "save_pretrained", _save_pretrained)
    # from_pretrained of an adapter's directory adds the adapter before it returns: PEFT must find the placeholders.
    wrap(model_class, "load_adapter", _load_adapter)
    model_class.from_pretrained = classmethod(_from_pretrained(model_class.from_pretrained.__func__))


def _from_pretrained(original: Function) -> Function:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if environment.configured():
            raise_failure()
        with _Loading(kwargs):
            result = original(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        swap.add_placeholders(model, model.dtype)
        return result

    return from_pretrained


def _resolved(original: Function) -> Function:
    def _get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        loading: _Loading | None = getattr(_local, "loading", None)
        if loading is not None:
            files = [str(file) for file in result[0] or ()]
            loading.files = files if all(file.endswith(".safetensors") for file in files) else []
        return result

    return _get_resolved_checkpoint_files


def _post_init(original: Function) -> Function:
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        loading: _Loading | None = getattr(_local, "loading", None)
        if loading is not None:
            loading.swap(self)
        original(self, *args, **kwargs)
        if remote := remote_modules(self):
            # The loader must not complain of what a swapped model does not want.
            names = expert_names(remote[0][1]._kt_binding.client.connection.model)
            self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), names.loaded}

    return post_init


def _load_adapter(original: Function) -> Function:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        swap.add_placeholders(self, self.dtype)
        return original(self, *args, **kwargs)

    return load_adapter


def _save_pretrained(original: Function) -> Function:
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # With adapters that transformers manages, only those are written.
        if remote_modules(self) and not getattr(self, "_hf_peft_config_loaded", False):
            raise errors.weights_are_remote(f"{type(self).__name__}.save_pretrained({str(save_directory)!r}) refused")
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained
