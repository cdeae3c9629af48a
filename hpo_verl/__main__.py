"""`python -m hpo_verl`: the command `hpo-verl`, for a Ray job that has only the code."""

from hpo_verl.cli import main

main()
