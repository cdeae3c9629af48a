"""`hpo-verl doctor`: what would go wrong in a run, found before it is started.

One file per family of checks. Each check returns findings, trains nothing and
writes nothing; a check that could not be made says so and is not "ok".
"""
