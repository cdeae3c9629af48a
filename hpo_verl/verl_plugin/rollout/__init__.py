"""What this package adds to verl's rollouts and rewards."""
