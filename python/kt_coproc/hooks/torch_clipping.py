"""torch's functions that clip gradients."""

from __future__ import annotations

from typing import Any

import torch

from .. import clipping
from ..patching import Function, wrap


def patch() -> None:
    import torch.nn.utils as utils
    import torch.nn.utils.clip_grad as clip_grad

    def clip_norm(original: Function) -> Function:
        def clip_grad_norm_(parameters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return clipping.clip_grad_norm(original, parameters, *args, **kwargs)

        return clip_grad_norm_

    def refuse(function: str) -> Any:
        def make(original: Function) -> Function:
            def checked(parameters: Any, *args: Any, **kwargs: Any) -> Any:
                parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
                clipping.refuse_remote(parameters, function)
                return original(parameters, *args, **kwargs)

            return checked

        return make

    # clip_grad_norm_ is bound under two names. The functions with a total norm that somebody else computed
    # (get_total_norm sees gradients, never parameters) would leave the experts out: they are refused, also below a
    # clip_grad_norm_ that a script imported by name before we came.
    wrap(clip_grad, "_clip_grads_with_norm_", refuse("clipping"))
    wrap(clip_grad, "clip_grad_norm_", clip_norm)
    wrap(clip_grad, "clip_grad_value_", refuse("clip_grad_value_"))
    utils.clip_grad_norm_ = clip_grad.clip_grad_norm_
    utils.clip_grad_value_ = clip_grad.clip_grad_value_
    wrap(utils, "clip_grads_with_norm_", refuse("clip_grads_with_norm_"))
    if hasattr(clip_grad, "clip_grads_with_norm_"):
        clip_grad.clip_grads_with_norm_ = utils.clip_grads_with_norm_
