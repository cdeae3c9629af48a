"""What `hpo-verl init` writes into a folder of the user's."""
