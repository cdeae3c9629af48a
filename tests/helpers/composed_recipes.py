"""Recipes composed once per test process, and with each algorithm merged in."""

import json
import re
from functools import lru_cache, reduce
from operator import getitem

from omegaconf import OmegaConf

from hpo_verl.config.recipes import compose_recipe, recipes_directory, without_hydra

PRODUCTION = [
    f"{t}-{s}" for t in ("countdown3", "countdown4", "telelogs") for s in ("1.5b", "3b", "7b")
]


@lru_cache
def composed(recipe, extra, hardware):
    """A recipe on some hardware as Hydra composes it, without an algorithm."""
    return without_hydra(compose_recipe(recipe, [*extra, f"hardware={hardware}", "~algo"]))


@lru_cache
def plain(recipe, extra, hardware):
    return OmegaConf.to_container(composed(recipe, extra, hardware), resolve=True)


def algorithm_file(name):
    return OmegaConf.to_container(OmegaConf.load(recipes_directory() / "algo" / f"{name}.yaml"))


class View(dict):
    """A plain dictionary that is read like a DictConfig."""

    def __getattr__(self, name):
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return View(value) if isinstance(value, dict) else value


def merged(base, changes):
    """Plain dictionaries, the second over the first."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{k: merged(base.get(k), v) for k, v in changes.items()}}


# What verl's own tree sets to the value of another key, among the keys of algorithms.
FOLLOWERS = {
    ("rollout", "n"): [("actor", "rollout_n"), ("ref", "rollout_n")],
    ("actor", "use_dynamic_bsz"): [
        ("rollout", "log_prob_use_dynamic_bsz"),
        ("ref", "log_prob_use_dynamic_bsz"),
    ],
}


def repeat_as_verl_does(settings):
    for (section, key), followers in FOLLOWERS.items():
        if key in settings.get(section, {}):
            for role, name in followers:
                settings.setdefault(role, {})[name] = settings[section][key]


def resolved(node, base):
    """An algorithm's settings with what they take from the rest of the recipe."""
    if isinstance(node, dict):
        return {key: resolved(value, base) for key, value in node.items()}
    found = re.fullmatch(r"\$\{(?:oc\.select:)?([a-z_.]+)(?:,\d+)?\}", str(node))
    return reduce(getitem, found[1].split("."), base) if found else node


def with_algorithm(recipe, extra, hardware, algorithm):
    """The resolved configuration with an algorithm's settings; its names keep `grpo`'s."""
    base = plain(recipe, extra, hardware)
    settings = resolved(algorithm_file(algorithm), base)
    repeat_as_verl_does(settings["actor_rollout_ref"])
    assert "${" not in json.dumps(settings)
    return View(merged(base, settings))
