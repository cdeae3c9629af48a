"""Commands that write training data and the tiny policy."""
