"""A record of norms and trust ratios over the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import numpy as np
from array_api_compat import array_namespace

from lars_array._arrays import device_context, synchronize
from lars_array._messages import shown
from lars_array.telemetry import StepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recorder"]

QUANTITIES = ("parameter_norm", "gradient_norm", "trust_ratio")
MOST_UNREAD = 256  # steps on the host: what a rule reads of a step takes more memory than its results


class Recorder:
    """Records the norms and the trust ratio of each layer over the steps of an optimizer.

    The numbers are those with which the steps were taken: recording makes no pass over parameters or gradients, and
    does not wait for a GPU, where copies of the sums of a step are kept until they are read.

    Parameters
    ----------
    optimizer : lars_array.LARS, lars_torch.LARS or lars_jax.LARS
        The optimizer. The recorder holds a weak reference to it, and keeps neither parameters nor gradients alive.
    every : int
        Only steps whose number is a multiple of this are recorded.

    Raises
    ------
    TypeError
        If the optimizer is of another class, or `every` is no integer.
    ValueError
        If `every` is less than 1.

    Notes
    -----
    Reading `steps`, `layers` or the arrays waits for the device. Steps that it has skipped or rejected are left out
    then; until it has reported one, `every` counts it as taken. Copies and pickles hold what was recorded, and no
    optimizer: assign one to `optimizer` to go on.

    Examples
    --------
    >>> import numpy as np
    >>> from lars_array import LARS, Recorder
    >>> params = {"w": np.array([3.0, 4.0]), "b": np.ones(1)}
    >>> optimizer = LARS(params, lr=0.1, weight_decay=1e-4)
    >>> recorder = Recorder(optimizer, every=10)
    >>> for _ in range(25):
    ...     optimizer.step({"w": params["w"] / 5, "b": None})
    ...     recorder.record()
    >>> recorder.steps
    array([ 0, 10, 20])
    >>> recorder.layers
    ['w']
    >>> recorder.trust_ratios.round(4)
    array([[0.005],
           [0.005],
           [0.005]])
    """

    def __init__(self, optimizer: Any, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an integer; got {shown(every)}")
        if every < 1:
            raise ValueError(f"every must be at least 1; got {shown(every)}")
        self._every = every
        self.clear()
        self.optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        """The optimizer; None if it does not exist any more, and in copies."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        if not hasattr(optimizer, "_copying"):
            raise TypeError(
                f"optimizer must be a LARS of lars_array, lars_torch or lars_jax, not functions; got {shown(optimizer)}"
            )
        self._optimizer: ref[Any] | None = ref(optimizer)
        with optimizer._copying():
            self._last = _Position.of(optimizer)

    def record(self, step: int | None = None) -> None:
        """Record the step that the optimizer has just taken; call this after each of its steps.

        Does nothing if no step was taken since the last call, or its number is no multiple of `every`.

        Parameters
        ----------
        step : int, optional
            Its number. The default counts the steps of the optimizer from 0, those of a checkpoint included, which
            those of torch do not count.

        Raises
        ------
        RuntimeError
            If there is no optimizer.
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise RuntimeError("record needs an optimizer, of which there is none any more; assign one to optimizer")
        with optimizer._copying():
            before, self._last = self._last, (now := _Position.of(optimizer))
            if now.device is None and now.is_at(before):
                return
            if not now.results or (optimizer.steps - 1 if step is None else step) % self._every:
                return
            self._unread.append(_Unread(step, before, now, [result.copied() for result in optimizer._results]))
        if now.device is None and len(self._unread) >= MOST_UNREAD:
            self._read()

    @property
    def steps(self) -> Any:
        """The numbers of the recorded steps, an integer array of shape (steps,)."""
        self._read()
        return np.array([step for step, *_ in self._records], np.int64)

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in the order in which they appeared: the keys of the optimizer's `norms`."""
        self._read()
        return list(dict.fromkeys(name for names in self._names() for name in names))

    @property
    def parameter_norms(self) -> Any:
        """The norms of the parameters before each step, float64, shape (steps, layers); NaN without a gradient."""
        return self._array(0)

    @property
    def gradient_norms(self) -> Any:
        """The norms of the gradients as passed to each step, float64, shape (steps, layers); NaN without a gradient."""
        return self._array(1)

    @property
    def trust_ratios(self) -> Any:
        """The trust ratios, float64, shape (steps, layers); 1 where a layer is not adapted, NaN without a gradient."""
        return self._array(2)

    def clear(self) -> None:
        """Forget all recorded steps."""
        self._records: list[tuple[int, Sequence[str], Any]] = []  # step, names, and an array of shape (names, 3)
        self._unread: list[_Unread] = []

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all recorded steps to a CSV file, with one line a step and layer.

        Parameters
        ----------
        path : str or path
            The file, which is replaced. Its columns are "step", "layer", "parameter_norm", "gradient_norm" and
            "trust_ratio".
        """
        import csv  # which importing lars_array need not wait for

        self._read()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "layer", *QUANTITIES])
            writer.writerows([step, name, *numbers] for step, name, numbers in self._rows())

    def to_tensorboard(self, writer: Any, *, tag: str = "lars") -> None:
        """Write all recorded steps to TensorBoard; with `clear` after it each is written once.

        Parameters
        ----------
        writer : SummaryWriter or callable
            A ``torch.utils.tensorboard.SummaryWriter``, that of tensorboardX, or a function that is called as its
            ``add_scalar(tag, value, step)``.
        tag : str
            The first part of the tags, as in "lars/trust_ratio/w".
        """
        add: Callable[[str, float, int], Any] = getattr(writer, "add_scalar", writer)
        if not callable(add):
            raise TypeError(f"writer must be a SummaryWriter or its add_scalar; got {shown(writer)}")
        self._read()
        for step, name, numbers in self._rows():
            for quantity, number in zip(QUANTITIES, numbers, strict=True):
                add(f"{tag}/{quantity}/{name}", number, step)

    def plot(self) -> Figure:
        """Draw the trust ratios, and the norms of parameters and gradients, as heat maps of layers over steps.

        Returns
        -------
        matplotlib.figure.Figure
            To be shown in a notebook, or written by its ``savefig``.

        Raises
        ------
        ImportError
            Without matplotlib.
        ValueError
            If nothing was recorded.
        """
        from lars_array._heat_maps import figure_of

        steps, layers = self.steps, self.layers
        if not layers:
            raise ValueError("plot needs recorded steps; there are none")
        norms = {"norm of the parameter": self.parameter_norms, "norm of the gradient": self.gradient_norms}
        return figure_of(steps, layers, {"trust ratio": self.trust_ratios} | norms)

    def __len__(self) -> int:
        self._read()
        return len(self._records)

    def __repr__(self) -> str:
        return f"Recorder(every={self._every}, steps={len(self._records) + len(self._unread)})"

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        return self.__dict__ | {"_records": list(self._records), "_unread": [], "_optimizer": None, "_last": None}

    def _read(self) -> None:
        """Evaluate the steps that were recorded since the last call."""
        if self._unread:
            for S in (result.S for result in self._unread[-1].results):
                synchronize(S)
        unread, self._unread = self._unread, []
        for own in unread:
            number = own.number()
            if number is not None:
                names = [result.names for result in own.results]
                joined = names[0] if len(names) == 1 else [name for x in names for name in x]
                self._records.append((number, joined, np.concatenate([result.table() for result in own.results])))

    def _names(self) -> list[Sequence[str]]:
        """Return the different lists of names, by identity: that of a step is usually that of the step before."""
        return list({id(names): names for _, names, _ in self._records}.values())

    def _array(self, column: int) -> Any:
        place = {name: i for i, name in enumerate(self.layers)}
        index = {id(names): [place[name] for name in names] for names in self._names()}
        array = np.full((len(self._records), len(place)), np.nan)
        for row, (_, names, table) in zip(array, self._records):
            row[index[id(names)]] = table[:, column]
        return array

    def _rows(self) -> Iterator[tuple[int, str, list[float]]]:
        for step, names, table in self._records:
            for name, numbers in zip(names, table.tolist()):
                yield step, name, numbers


class _Position(NamedTuple):
    """How far an optimizer is, without what its results keep alive on a device."""

    results: Any  # on the host; whether there are any on a device
    steps: int
    device: Any = None  # its counts, which steps overwrite
    counts: Any = None  # a copy of them

    @classmethod
    def of(cls, optimizer: Any) -> _Position:
        results = optimizer._results
        device = next((result.device for result in results if result.device is not None), None)
        if device is None:
            return cls(results, optimizer.steps)
        with device_context(device.counts):
            counts = array_namespace(device.counts).asarray(device.counts, copy=True)
        return cls(True, optimizer.steps - device.expected_steps, device.counts, counts)

    def is_at(self, other: _Position) -> bool:
        """Return whether both have the results of the same step."""
        theirs = other.results if isinstance(other.results, list) else []
        return len(self.results) == len(theirs) and all(map(is_, self.results, theirs))

    def taken(self) -> int:
        """Return how many steps the device has taken; waits for it."""
        with device_context(self.counts):
            return int(self.counts[0])


class _Unread(NamedTuple):
    """A step that may have been taken."""

    step: int | None
    before: _Position
    now: _Position
    results: list[StepResult]

    def number(self) -> int | None:
        """Return the number of the step; None if the device has not taken it."""
        now = self.now
        if now.device is None:
            return now.steps - 1 if self.step is None else self.step
        taken, known = now.taken(), self.before.taken() if self.before.device is now.device else 0
        if taken <= known:
            return None
        return now.steps + taken - 1 if self.step is None else self.step
