"""Files: the state of an optimizer, and parameters, saved by safetensors and loaded again."""

from lars_array.files._loading import Saved, load
from lars_array.files._saving import save

__all__ = ["Saved", "load", "save"]
