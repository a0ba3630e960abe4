"""What `load` reads, and the checks that come before anything is changed by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lars_array._arrays import device_context, is_array
from lars_array._interrupts import uninterrupted
from lars_array._messages import Problems, listed, shown
from lars_array.files._container import Container, opened
from lars_array.files._document import functional_state_in, state_dict_in
from lars_array.files._host import numpy_form, write_into
from lars_array.files._saving import by_name
from lars_array.files._values import read_value
from lars_array.optimizer import LARS
from lars_array.state.checkpoint import check_params, fitted, read_checkpoint
from lars_array.state.memory import check_writable
from lars_array.state.store import KEPT, allocate_buffers

__all__ = ["Saved", "load"]


class Saved(NamedTuple):
    """The contents of a file that `save` has written.

    Parameters
    ----------
    state : dict or State, or None
        What was saved: a state dict, which `LARS.load_state_dict` takes, or a `State`. Its arrays are NumPy's. None if
        it was loaded into an optimizer.
    params : dict of str to array, or None
        The parameters by name. None if none were saved, and if they were loaded into arrays.
    metadata : dict
        As it was given to `save`.
    """

    state: Any
    params: dict[str, Any] | None
    metadata: dict[str, Any]


def load(path: Any, optimizer: LARS | None = None, *, params: Any = None) -> Saved:
    """Load a file that `save` has written.

    Parameters
    ----------
    path : str or path
        The file. Also of `lars_torch.save` and `lars_jax.save`.
    optimizer : LARS, optional
        Takes over the state, as by `LARS.load_state_dict`. Its parameters have the names in the file.
    params : mapping of name to array, or any other form that `LARS` accepts, optional
        Arrays into which the parameters in the file are written, which have their names, shapes and types.

    Returns
    -------
    Saved
        Of new NumPy arrays, of what was not loaded into `optimizer` and `params`.

    Raises
    ------
    ValueError
        If it is no such file, is damaged or of a later version; or if names, shapes or types differ, all in one
        message. Then nothing was changed.
    OSError
        If it can't be read.
    """
    if optimizer is not None and not isinstance(optimizer, LARS):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        way = "; lars_torch.load and lars_jax.load load into their optimizers"
        raise TypeError(f"optimizer must be a lars_array.LARS; got an object of {kind}{way}")
    given = None if params is None else by_name(params)
    with opened(path) as file:
        metadata = read_value(file.document.get("metadata"))
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata must be a mapping; got {shown(metadata)}")
        _check_keys_of(file)
        if optimizer is None and given is None:
            return Saved(_whole_state(file), _params_in(file), metadata)
        problems, loaded = Problems(), dict[str, Any]()
        if optimizer is not None:
            with problems.noted():
                loaded = _fitted_state(file, optimizer)
        with problems.noted():
            _check_params(file, given)
        problems.raise_all()
        with uninterrupted():  # and nothing is refused
            for name, p in (given or {}).items():
                write_into(p, file.read(f"param/{name}"))
            if optimizer is not None:
                _load_state(file, optimizer, loaded)
        state = None if optimizer is not None else _whole_state(file)
        return Saved(state, None if given is not None else _params_in(file), metadata)


def _check_keys_of(file: Container) -> None:
    """Raise ValueError for arrays that no release has written."""
    kinds = {*KEPT, "param", "state"}
    strange = sorted(key for key in file.keys if key.partition("/")[0] not in kinds or "/" not in key)
    if strange:
        raise ValueError(f"its arrays must be those of a state and of parameters; got {listed(map(shown, strange))}")


def _whole_state(file: Container) -> Any:
    if file.document.get("kind") == "State":
        return functional_state_in(file)
    return state_dict_in(file, file.read)


def _names_of_params(file: Container) -> list[str]:
    return [key.removeprefix("param/") for key in sorted(file.keys) if key.startswith("param/")]


def _params_in(file: Container) -> dict[str, Any] | None:
    if not file.document.get("has_params"):
        return None
    return {name: file.read(f"param/{name}") for name in _names_of_params(file)}


def _fitted_state(file: Container, optimizer: LARS) -> dict[str, Any]:
    """Return the state for an optimizer, without the arrays themselves; raise with all misfits if it does not fit."""
    if file.document.get("kind") == "State":
        raise ValueError("it holds the state of lars_array.update, which LARS can't take over")
    own = optimizer._state
    state = fitted(state_dict_in(file, file.form), optimizer.param_groups)
    forms = [numpy_form(p) for p in own.params]
    read_checkpoint(state, [group["names"] for group in optimizer.param_groups], forms)
    return state


def _load_state(file: Container, optimizer: LARS, state: dict[str, Any]) -> None:
    """Have an optimizer take over the state; each array is copied once, to where steps find it."""
    own = optimizer._state
    place = dict(zip(own.names, own.params, strict=True))
    with device_context(own.params[0]):
        for kind in KEPT:
            names = [name for name in own.names if kind in state["state"][name]]
            for name, v in zip(names, allocate_buffers([place[name] for name in names]), strict=True):
                write_into(v, file.read(f"{kind}/{name}"))
                state["state"][name][kind] = v
        before = [dict(group) for group in optimizer.param_groups]
        optimizer._load(state, copied=False)
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update({key: old[key] for key in file.document["omitted"]})  # the objects themselves


def _check_params(file: Container, given: Mapping[str, Any] | None) -> None:
    """Raise for parameters that don't fit, with all misfits."""
    if given is None:
        return
    for name, p in given.items():
        if not is_array(p):
            raise TypeError(f"parameter {shown(name)} must be an array; got {shown(p)}")
        check_writable(name, p)
    has_params = file.document.get("has_params")
    check_params({name: file.form(f"param/{name}") for name in _names_of_params(file)} if has_params else None, given)
