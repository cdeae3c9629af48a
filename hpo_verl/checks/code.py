"""Whose code a configuration would run; see `hpo_verl.checks.code_origin`."""

from __future__ import annotations

from typing import Any

from hpo_verl.checks.code_origin import (
    OWN_PACKAGES,
    strange_code,
    strange_targets,
    targets,
    trusted_remotes,
)
from hpo_verl.checks.finding import Finding, error, ok, warning


def check_targets(whole: Any) -> Finding:
    """Every `_target_` must belong to verl, to this package, or be one of Hydra's own.

    To be made before anything of the configuration is instantiated.

    Args:
        whole: the composed configuration as plain containers, Hydra's part included.
    """
    strange, count = strange_targets(whole), len(targets(whole))
    if strange:
        return error(
            "targets",
            f"{'; '.join(strange)}: would be called; permitted are names below "
            f"{' and '.join(OWN_PACKAGES)} and Hydra's own launchers and callbacks",
            "remove the setting",
        )
    return ok("targets", f"{count} `_target_` entries, all of verl, hpo_verl or Hydra")


def check_code(config: Any) -> Finding:
    """Modules, files and models' code that verl would load besides its own and this package's.

    Args:
        config: the resolved configuration as plain containers.
    """
    strange, files = strange_code(config)
    missing = [f"{key}={path}" for key, path in files if not path.is_file()]
    trusted = trusted_remotes(config)
    text = [f"{one}: not code of verl or hpo_verl" for one in strange]
    text += [f"{one}: no such file" for one in missing]
    text += [f"{key}=True: would execute code out of a model's folder" for key in trusted]
    fixes = [f"{key}=false" for key in trusted]
    if strange or missing:
        fixes.append("name a file of yours, which is shown, or pkg://hpo_verl.<module>")
    if text:
        return error("code", "; ".join(text), ", ".join(fixes))
    if files:
        return warning(
            "code",
            "; ".join(f"{key}={path} will be executed" for key, path in files),
            "go on only if you have read these files",
        )
    return ok("code", "nothing is loaded but verl and hpo_verl")
