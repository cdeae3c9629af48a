"""Files and processes of a run: metrics, checkpoints, lock, child process."""
