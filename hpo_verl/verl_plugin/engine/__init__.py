"""What this package adds to verl's training engines."""
