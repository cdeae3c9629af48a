"""Typed `policy_loss` sections that a recipe reaches by `_target_`; verl checks them on the driver.

A loss whose settings are `MineSettings` has `MinePolicyLossConfig` here: verl's PolicyLossConfig
with these settings, their defaults and their checks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from verl.workers.config import PolicyLossConfig

from hpo_verl.algorithms.base import Loss
from hpo_verl.algorithms.registry import OUR_LOSSES


def _typed_section(loss: Loss, settings: type[Any]) -> type[PolicyLossConfig]:
    hints = get_type_hints(settings)
    fields = dataclasses.fields(settings)

    def check(self: Any) -> None:
        settings(**{field.name: getattr(self, field.name) for field in fields})

    return dataclasses.make_dataclass(
        f"{settings.__name__.removesuffix('Settings')}PolicyLossConfig",
        [
            ("loss_mode", str, loss.name),
            *((field.name, hints[field.name], field.default) for field in fields),
        ],
        bases=(PolicyLossConfig,),
        namespace={
            "__doc__": f"verl's `policy_loss` section with the settings of the loss `{loss.name}`.",
            "__module__": __name__,
            "__post_init__": check,
        },
    )


SECTIONS: dict[str, type[PolicyLossConfig]] = {
    name: _typed_section(loss, loss.settings)
    for name, loss in OUR_LOSSES.items()
    if loss.settings is not None
}
"""Typed section by `loss_mode`."""

globals().update({section.__name__: section for section in SECTIONS.values()})
