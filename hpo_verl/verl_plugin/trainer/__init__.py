"""What this package adds to verl's trainers."""
