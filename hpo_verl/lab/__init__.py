"""Compare algorithms over many seeds, on the functions that verl calls: one process per run."""
