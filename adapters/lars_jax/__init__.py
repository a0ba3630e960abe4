"""LARS for JAX: `lars_array` under jit as a gradient transformation, and eagerly over DLPack."""
