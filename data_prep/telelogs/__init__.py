"""TeleLogs, and its synthetic twin."""
