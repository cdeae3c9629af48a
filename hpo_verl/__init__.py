"""Hysteretic policy optimisation for verl.

Importing this package pulls in neither torch nor verl; verl itself loads
`hpo_verl.verl_plugin` through the entry-point group `verl.plugins`.
"""

__version__ = "0.2.0.dev0"
