"""LARS for JAX: `lars_array` under jit as a gradient transformation, and eagerly on the memory of its arrays."""

from lars_jax.checkpoint import from_state_dict, to_state_dict
from lars_jax.optimizer import LARS
from lars_jax.param_groups import param_groups
from lars_jax.transformation import LarsState, lars

__all__ = ["LARS", "LarsState", "from_state_dict", "lars", "param_groups", "to_state_dict"]
