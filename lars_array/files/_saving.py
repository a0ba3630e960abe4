"""What `save` writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lars_array._arrays import is_array
from lars_array._messages import shown
from lars_array._stepper import StatefulOptimizer
from lars_array._version import __version__
from lars_array.files._container import write_container
from lars_array.files._document import document_of
from lars_array.files._values import NotStorableError, stored_value
from lars_array.functional import State
from lars_array.optimizer import LARS
from lars_array.state.inputs import read_parameters

__all__ = ["by_name", "save"]


def save(
    path: Any,
    optimizer_or_state: Any,
    *,
    params: Any = None,
    metadata: Mapping[str, Any] | None = None,
    omit: Collection[str] = (),
) -> None:
    """Save the state of an optimizer in a file of safetensors.

    The file is written whole or not at all: whatever happens, an old file under this path stays as it was until the new
    one is complete on the disk.

    Parameters
    ----------
    path : str or path
        Of a new file, or of one that is replaced. Of a symbolic link, the file that it leads to is replaced.
    optimizer_or_state : LARS, State, or dict
        An optimizer, the state of `update`, or a state dict, such as that of `lars_jax.to_state_dict`. Not modified.
    params : mapping of name to array, or any other form that `LARS` accepts, optional
        Parameters to save with it, and other arrays that training goes on with. Not modified.
    metadata : dict, optional
        Anything else: None, numbers, strings, and lists, tuples and dicts of these.
    omit : collection of str, optional
        Hyper-parameters that are not saved, such as "lr" if it is a function of your own. The optimizer that loads the
        file keeps its own.

    Raises
    ------
    TypeError
        For a rule, a schedule or another value that is only code; then nothing was written. Rules that are registered
        under a name and schedules of `lars_array.schedules` are saved.
    ValueError
        If a name or an array can't be saved; then nothing was written.
    OSError
        If the file can't be written; then the old one is as it was.
    NonFiniteError
        As `LARS.state_dict` does.

    Examples
    --------
    >>> import numpy as np
    >>> from tempfile import mkdtemp
    >>> from lars_array import LARS, load, save
    >>> path = f"{mkdtemp()}/run.safetensors"
    >>> params = {"w": np.array([3.0, 4.0])}
    >>> optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> optimizer.step({"w": np.array([0.6, 0.8])})
    >>> save(path, optimizer, params=params, metadata={"epoch": 1})

    And in a later process:

    >>> params = {"w": np.zeros(2)}
    >>> optimizer = LARS(params, lr=0.1)
    >>> load(path, optimizer, params=params).metadata
    {'epoch': 1}
    >>> optimizer.steps, params["w"]
    (1, array([2.9997, 3.9996]))
    """
    if isinstance(omit, str):
        raise TypeError(f"omit must be a collection of names, such as ('lr',); got {shown(omit)}")
    document, arrays = document_of(_state_of(optimizer_or_state), frozenset(omit))
    document["optimizer"] = _kind_of(optimizer_or_state)
    for name, p in ({} if params is None else by_name(params)).items():
        if not is_array(p):
            raise TypeError(f"parameter {shown(name)} must be an array; got {shown(p)}")
        arrays[f"param/{name}"] = p
    document["has_params"] = params is not None
    if metadata is not None and not (isinstance(metadata, Mapping) and all(type(key) is str for key in metadata)):
        raise TypeError(f"metadata must be a mapping with names as keys; got {shown(metadata)}")
    try:
        document["metadata"] = stored_value(dict(metadata or {}))
    except NotStorableError as error:
        raise TypeError(
            f"metadata must hold None, numbers, strings, and lists, tuples and dicts of these; got {error}. Arrays can "
            "be saved among params"
        ) from None
    write_container(path, {"library": __version__, **document}, arrays)


def _state_of(given: Any) -> Any:
    """Return a `State` or a state dict, without copies where that can be."""
    if isinstance(given, LARS):
        return given._saved(lambda x: x)
    if isinstance(given, StatefulOptimizer):
        return given.state_dict()  # type: ignore[attr-defined]
    if isinstance(given, Mapping) and {"steps", "skipped_steps", "param_groups", "state"} <= given.keys():
        return given
    if isinstance(given, State):
        return given
    way = "; lars_torch.save saves its optimizers" if hasattr(given, "state_dict") else ""
    raise TypeError(f"optimizer_or_state must be a LARS, a State or a state dict of these; got {shown(given)}{way}")


def _kind_of(given: Any) -> str:
    return f"{type(given).__module__.partition('.')[0]}.{type(given).__name__}"


def by_name(params: Any) -> dict[str, Any]:
    """Return parameters by name."""
    if isinstance(params, Mapping):
        wrong = next((name for name in params if not isinstance(name, str)), None)
        if wrong is not None:
            raise TypeError(f"params must be by name; got {shown(wrong)}")
        return dict(params)
    layout = read_parameters(params)
    return {name: p for group in layout.groups for name, p in zip(group.names, group.arrays, strict=True)}
