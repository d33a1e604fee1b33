"""How the daemon's checkpoint spells its expert tensors: by what the daemon says, for no family is known here."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class ExpertNames(NamedTuple):
    """<prefix>layers.<layer>.<path>.<rest>, where <rest> is <expert>.<projection>.weight or a fused tensor's name."""

    tensor: re.Pattern[str]  # Groups: layer, rest.
    per_expert: re.Pattern[str]  # Of a rest. Groups: expert, projection.
    projections: tuple[str, str, str]  # Of gate, up, down.
    gate_up: str  # Fused: [E, 2I, H], the gate's rows first.
    down: str  # Fused: [E, H, I].
    loaded: str  # A regular expression of the keys that a model without its experts does not want.


def expert_names(model: dict[str, Any]) -> ExpertNames:
    """Of Client.model. Where the daemon gives no names, `tensor` matches nothing."""
    names = model["expert_names"]
    gate, up, down = names["projections"] or ("", "", "")
    fused_gate_up, fused_down = names["fused"] or ("", "")
    path = re.escape(names["path"])
    prefix = "|".join(map(re.escape, names["prefixes"]))
    fused = "|".join(map(re.escape, names["fused"]))
    return ExpertNames(
        tensor=re.compile(rf"^(?:{prefix})layers\.(\d+)\.{path}\.(.+)$"),
        per_expert=re.compile(rf"^(\d+)\.({'|'.join(map(re.escape, names['projections']))})\.weight$"),
        projections=(gate, up, down),
        gate_up=fused_gate_up,
        down=fused_down,
        loaded=rf"layers\.\d+\.{path}\.({fused}|\d+\.)",
    )
