"""MoEExperts: the routed experts of one layer, for models that are written for it."""

from __future__ import annotations

import torch

from . import api, errors
from .adapter import Binding
from .connection import Client
from .experts import RemoteExperts, expert_shapes


class MoEExperts(RemoteExperts):
    """The routed experts of one layer, with the call of transformers v5.

    Args:
        layer_idx: number of the decoder layer in the daemon's model.
        client: from `connect()`; without it the one that KT_COPROC names.

    Raises:
        CoprocError: no daemon, or the layer has no routed experts.
    """

    def __init__(self, layer_idx: int, client: Client | None = None) -> None:
        super().__init__()
        client = client or api.default()
        model = client.connection.model
        if layer_idx not in model["moe_layers"]:
            raise errors.refusal(
                f"layer {layer_idx} has no routed experts",
                f"the daemon's model has them in layers {list(model['moe_layers'])}",
                "use one of those layers",
            )
        self.num_experts = int(model["num_experts"])
        self.hidden_dim = int(model["hidden_size"])
        self.intermediate_dim = int(model["intermediate_size"])
        self._kt_bind(Binding(client), layer_idx, expert_shapes(model, torch.get_default_dtype()))
        self._kt_register_placeholders(torch.device("cpu"))
