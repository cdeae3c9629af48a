"""Looks into what checks found."""


def only(findings, name):
    """The one finding of this name."""
    (finding,) = [f for f in findings if f.name == name]
    return finding
