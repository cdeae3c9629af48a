"""verl on a machine without an accelerator, which verl 0.9.1 says that it does not support."""
