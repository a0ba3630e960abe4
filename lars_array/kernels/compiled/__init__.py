"""The compiled kernel: loops over a table of layers, compiled by numba."""
