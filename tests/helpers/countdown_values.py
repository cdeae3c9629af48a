"""Every expression over a few numbers, valued one by one by the reward's reader."""

from fractions import Fraction

from data_prep.countdown.trees import trees
from hpo_verl.rewards.expression import read_expression


def value_of(text):
    """Exact value of a text; None if it divides by zero."""
    read = read_expression(text)
    return Fraction(read.numerator, read.denominator) if read.denominator else None


def expressions(numbers):
    """Text and value of every tree that does not divide by zero."""
    texts = [tree.text.format(*numbers) for tree in trees(len(numbers))]
    return [(text, value) for text in texts if (value := value_of(text)) is not None]
