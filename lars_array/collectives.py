"""Functions for ``LARS(..., all_reduce=...)``, and the pieces of layers in a slice of a flat vector.

Not imported by `lars_array`: ``from lars_array import collectives``. mpi4py and CuPy are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array

from lars_array._arrays import is_array
from lars_array._messages import shown

__all__ = ["flat_pieces", "mpi", "nccl"]


class mpi:  # noqa: N801 - used as a function, like functools.partial
    """Adds arrays over the processes of an MPI communicator, in place.

    NumPy arrays are passed to ``comm.Allreduce`` as they are. CuPy arrays are copied to the host, added there and
    copied back, so that the MPI library need not support CUDA; the host waits for CuPy's current stream, once.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The processes that hold pieces of the layers, such as ``MPI.COMM_WORLD``.

    Attributes
    ----------
    size : int
        The number of processes.

    Raises
    ------
    TypeError
        If `comm` is no communicator.

    Notes
    -----
    What MPI raises goes through `lars_array.LARS.step`, which has changed nothing then. Copies of an optimizer share
    the communicator.
    """

    def __init__(self, comm: Any) -> None:
        if not callable(getattr(comm, "Allreduce", None)):
            raise TypeError(f"comm must be a communicator of mpi4py, such as MPI.COMM_WORLD; got {shown(comm)}")
        self._comm, self.size = comm, comm.Get_size()

    def __call__(self, table: Any) -> None:
        """Add an array over all processes.

        Parameters
        ----------
        table : float64 array
            Of the same shape on all processes; modified in place.
        """
        from mpi4py import MPI

        if is_cupy_array(table):
            host = table.get()
            self._comm.Allreduce(MPI.IN_PLACE, host)
            table.set(host)
        else:
            self._comm.Allreduce(MPI.IN_PLACE, table)

    def __deepcopy__(self, memo: Any) -> mpi:
        return self


class nccl:  # noqa: N801 - see mpi
    """Adds CuPy arrays over the GPUs of an NCCL communicator, in place, on CuPy's current stream.

    The host does not wait.

    Parameters
    ----------
    comm : cupyx.distributed.NCCLBackend or cupy.cuda.nccl.NcclCommunicator
        What ``cupyx.distributed.init_process_group`` returns, or NCCL's communicator itself; one GPU a process.

    Attributes
    ----------
    size : int or None
        The number of GPUs; None if it is unknown.

    Raises
    ------
    TypeError
        If `comm` is neither.
    """

    def __init__(self, comm: Any) -> None:
        self._is_backend = callable(getattr(comm, "all_reduce", None))
        if not self._is_backend and not callable(getattr(comm, "allReduce", None)):
            kinds = "an NCCLBackend of cupyx.distributed or an NcclCommunicator of cupy.cuda.nccl"
            raise TypeError(f"comm must be {kinds}; got {shown(comm)}")
        # The size of an NCCLBackend has no public name.
        self._comm, self.size = comm, getattr(comm, "_n_devices", None) if self._is_backend else comm.size()

    def __call__(self, table: Any) -> None:
        """Add an array over all GPUs.

        Parameters
        ----------
        table : float64 CuPy array
            Of the same shape on all processes; contiguous, modified in place.
        """
        if self._is_backend:
            self._comm.all_reduce(table, table)
            return
        from cupy.cuda import get_current_stream
        from cupy.cuda.nccl import NCCL_FLOAT64, NCCL_SUM

        at = table.data.ptr  # NCCL adds in place where both addresses are the same
        self._comm.allReduce(at, at, table.size, NCCL_FLOAT64, NCCL_SUM, get_current_stream().ptr)

    def __deepcopy__(self, memo: Any) -> nccl:
        return self


def flat_pieces(buffer: Any, start: int, table: Iterable[tuple[str, int, int]]) -> dict[str, Any]:
    """Return the pieces of all layers in a slice of a flat vector, such as ZeRO gives each process.

    Parameters
    ----------
    buffer : array of shape (length,)
        The elements `start` to ``start + length`` of the vector: parameters, or gradients. Not modified.
    start : int
        Where the slice begins in the vector.
    table : iterable of (layer, offset, length)
        The name of each layer, where it begins in the vector, and its number of elements, in the order of the vector;
        the same on all processes. Elements between and behind the layers are padding, which no piece contains.

    Returns
    -------
    dict of str to array
        One entry a layer, in the order of `table`, so that all processes have the same: a view of `buffer`, of length 0
        where nothing of the layer is in it.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If `buffer` has not one axis, a number is negative, or layers overlap, are not in order or have the same name.

    Notes
    -----
    Pieces have one axis whatever the layer has: exclude biases from weight decay by name, not by number of axes, as in
    ``param_groups(pieces, 1e-4, no_decay=["bias"], no_adapt=["bias"])``.

    Examples
    --------
    >>> import numpy as np
    >>> table = [("weight", 0, 6), ("bias", 6, 2)]
    >>> flat_pieces(np.arange(5.0), 0, table)
    {'weight': array([0., 1., 2., 3., 4.]), 'bias': array([], dtype=float64)}
    >>> flat_pieces(np.arange(5.0, 10.0), 5, table)  # the last two are padding
    {'weight': array([5.]), 'bias': array([6., 7.])}
    """
    if not is_array(buffer):
        raise TypeError(f"buffer must be an array; got {shown(buffer)}")
    if buffer.ndim != 1:
        raise ValueError(f"buffer must have one axis; got shape {shown(tuple(buffer.shape))}")
    begin, count = _natural("start", start), int(buffer.shape[0])
    pieces: dict[str, Any] = {}
    last, free = "", 0  # the layer before, and where it ends
    for entry in table:
        name, offset, length = _entry(entry)
        if name in pieces:
            raise ValueError(f"table must have each layer once; got {shown(name)} twice")
        if offset < free:
            ends = f"{shown(name)} begins at {offset}, and {shown(last)} before it ends at {free}"
            raise ValueError(f"the layers of table must be in order and must not overlap; {ends}")
        last, free = name, offset + length
        first, end = (min(max(x - begin, 0), count) for x in (offset, free))
        pieces[name] = buffer[first:end]
    return pieces


def _entry(entry: Any) -> tuple[str, int, int]:
    if not isinstance(entry, tuple | list) or len(entry) != 3 or not isinstance(entry[0], str):
        raise TypeError(f"table must hold (layer, offset, length), with a name first; got {shown(entry)}")
    name, offset, length = entry
    place = f" of {shown(name)} in table"
    return name, _natural(f"the offset{place}", offset), _natural(f"the length{place}", length)


def _natural(what: str, x: Any) -> int:
    if not isinstance(x, Integral) or isinstance(x, bool | np.bool_):
        raise TypeError(f"{what} must be an integer; got {shown(x)}")
    if x < 0:
        raise ValueError(f"{what} must not be negative; got {shown(x)}")
    return int(x)
