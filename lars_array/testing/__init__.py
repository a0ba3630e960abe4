"""A conformance kit: compare a LARS of any project with the rules of `lars_array`, step by step.

The rules reproduce recorded trajectories of the original implementations; the kit computes with them, in float64, what
a step should have done, and names the term that is wrong. Importing it imports no array library but NumPy.
"""

from lars_array.testing.conformance import assert_conforms
from lars_array.testing.wrappers import layer_step, optax_step, torch_step

__all__ = ["assert_conforms", "layer_step", "optax_step", "torch_step"]
