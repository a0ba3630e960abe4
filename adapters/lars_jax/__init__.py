"""LARS for JAX: `lars_array` under jit as a gradient transformation, and eagerly on the memory of its arrays."""

try:
    from lars_jax.checkpoint import from_state_dict, to_state_dict
    from lars_jax.files import load, save
    from lars_jax.optimizer import LARS
    from lars_jax.param_groups import param_groups
    from lars_jax.transformation import LarsState, lars
except ModuleNotFoundError as error:
    if error.name not in ("jax", "optax"):
        raise
    message = f"lars_jax needs {error.name}, which is not installed: pip install 'lars-array[jax]'"
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["LARS", "LarsState", "from_state_dict", "lars", "load", "param_groups", "save", "to_state_dict"]
