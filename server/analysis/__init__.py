"""Analyses of finished runs: connectivity, the value of blocks, pruning, merging of adapters."""
