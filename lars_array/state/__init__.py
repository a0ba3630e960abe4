"""The state of an optimizer: parameters and what is kept for each of them between steps."""
