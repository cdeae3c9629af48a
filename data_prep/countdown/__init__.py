"""The Countdown data."""
