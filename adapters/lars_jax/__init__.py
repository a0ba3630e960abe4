"""LARS for JAX: `lars_array` under jit as a gradient transformation, and eagerly over DLPack."""

from lars_jax.transformation import LarsState, lars

__all__ = ["LarsState", "lars"]
