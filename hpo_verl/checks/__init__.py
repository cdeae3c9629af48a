"""What would go wrong in a run, found before it starts.

`list.py` is the list. A file holds the checks of one thing that is looked at. A check is a function
from a `PlannedRun` to findings; it trains nothing and writes nothing.
"""
