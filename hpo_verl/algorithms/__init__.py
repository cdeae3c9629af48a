"""One file per algorithm: paper, equation, settings, pure functions; torch only."""
