"""Compare algorithms over many seeds: one process per run, a tiny policy, no cluster.

The advantages, losses and settings are those that the verl adapters use; the contract test
`tests/contract/test_lab_gradients.py` holds their gradients equal.
"""
