"""`Recorder`: norms and trust ratios over steps, what it does not record, and that it keeps nothing alive."""

from __future__ import annotations

import copy
import csv
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import to_numpy

from lars_array import LARS, NonFiniteError, Recorder, init, update
from lars_array.recorder import MOST_UNREAD

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


def model(xp: Any = np) -> dict[str, Any]:
    return {"w": xp.asarray([[3.0, 4.0]], dtype=xp.float64), "b": xp.asarray([0.6, 0.8], dtype=xp.float64)}


def gradients(step: int, xp: Any = np) -> dict[str, Any]:
    w, b = np.array([[0.3, 0.4]]) / (step + 1), np.array([0.15, 0.2]) + step
    return {"w": xp.asarray(w, dtype=xp.float64), "b": xp.asarray(b, dtype=xp.float64)}


def arrays(recorder: Recorder) -> list[Any]:
    return [recorder.steps, recorder.parameter_norms, recorder.gradient_norms, recorder.trust_ratios]


def assert_recorded(recorder: Recorder, steps: list[int], expected: dict[int, dict[str, Any]]) -> None:
    """The steps are these, and each array has what the optimizer itself reported, NaN for layers without a gradient."""
    assert recorder.steps.tolist() == steps
    assert recorder.steps.dtype == np.int64
    shape = len(steps), len(recorder.layers)
    for name, array in zip(("parameter", "gradient", "ratio"), arrays(recorder)[1:], strict=True):
        assert (array.shape, array.dtype) == (shape, np.float64), name
        wanted = [[expected[k].get(layer, {}).get(name, np.nan) for layer in recorder.layers] for k in steps]
        np.testing.assert_array_equal(array, np.array(wanted).reshape(shape))


def reported(optimizer: Any) -> dict[str, Any]:
    ratios = optimizer.trust_ratios()
    return {
        k: {"parameter": n.parameter, "gradient": n.gradient, "ratio": ratios[k]} for k, n in optimizer.norms().items()
    }


@pytest.mark.parametrize("kernel", ["blocked", "compiled", None])
def test_arrays_hold_the_norms_and_ratios_of_each_step(xp: Any, kernel: str | None) -> None:
    if "jax" in xp.__name__ or (kernel is not None and xp is not np):
        pytest.skip("not for these arrays")
    params = model(xp)
    optimizer = LARS(params, **HYPER, kernel=kernel)
    recorder, expected = Recorder(optimizer), {}
    for step in range(4):
        optimizer.step(gradients(step, xp))
        recorder.record()
        expected[step] = reported(optimizer)
    assert recorder.layers == ["w", "b"]
    assert_recorded(recorder, [0, 1, 2, 3], expected)
    assert recorder.gradient_norms[0] == pytest.approx([0.5, 0.25], rel=1e-15)
    assert len(recorder) == 4
    assert to_numpy(params["w"]).shape == (1, 2)


def test_nothing_is_known_before_the_first_step() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    recorder.record()
    assert recorder.layers == []
    assert_recorded(recorder, [], {})
    with pytest.raises(ValueError, match="plot needs recorded steps; there are none"):
        recorder.plot()


def test_a_step_before_the_recorder_is_not_recorded() -> None:
    optimizer = LARS(model(), **HYPER)
    optimizer.step(gradients(0))
    recorder = Recorder(optimizer)
    recorder.record()
    assert recorder.steps.tolist() == []
    optimizer.step(gradients(1))
    recorder.record()
    assert recorder.steps.tolist() == [1]


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_skipped_and_rejected_steps_are_not_recorded(nonfinite: str) -> None:
    optimizer = LARS(model(), **HYPER, nonfinite=nonfinite)
    recorder, expected = Recorder(optimizer), {}
    for k in range(5):
        bad = k in (0, 2)
        if bad and nonfinite == "raise":
            with pytest.raises(NonFiniteError):
                optimizer.step({"w": np.array([[np.nan, 1.0]]), "b": None})
        else:
            optimizer.step({"w": np.array([[np.nan, 1.0]]), "b": None} if bad else gradients(k))
        recorder.record()
        expected[optimizer.steps - 1] = reported(optimizer)
    assert_recorded(recorder, [0, 1, 2], expected)


def test_a_step_is_recorded_once() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    optimizer.step(gradients(0))
    recorder.record()
    recorder.record()
    assert recorder.steps.tolist() == [0]


def test_every_chooses_steps_by_their_number() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder, numbered = Recorder(optimizer, every=3), Recorder(optimizer, every=50)
    for step in range(8):
        optimizer.step(gradients(step))
        recorder.record()
        numbered.record(100 + 10 * step)
    assert recorder.steps.tolist() == [0, 3, 6]
    assert numbered.steps.tolist() == [100, 150]
    np.testing.assert_array_equal(numbered.gradient_norms[1], [0.5 / 6, np.hypot(5.15, 5.2)])


def test_layers_may_appear_later_and_be_missing() -> None:
    optimizer = LARS([{"params": {"w": model()["w"]}}], **HYPER)
    recorder, expected = Recorder(optimizer), {}
    for step, names in enumerate(["w", "wb", "b", "", "bw"]):
        if step == 1:
            optimizer.add_param_group({"params": {"b": model()["b"]}, "lr": 0.1})
        known = [name for group in optimizer.param_groups for name in group["names"]]
        optimizer.step({name: gradients(step)[name] if name in names else None for name in known})
        recorder.record()
        expected[step] = reported(optimizer)
    assert recorder.layers == ["w", "b"]
    assert_recorded(recorder, [0, 1, 2, 4], expected)
    assert np.isnan(recorder.trust_ratios).tolist() == [[False, True], [False, False], [True, False], [False, False]]


def test_slices_of_a_stack_and_joined_parameters_are_layers() -> None:
    params = {"stack": np.arange(1.0, 7.0).reshape(3, 2), "b": np.ones(2), "c": np.ones(3)}
    groups = [{"params": {"stack": params["stack"]}, "layer_axes": 1}, {"params": {x: params[x] for x in "bc"}}]
    optimizer = LARS(groups, **HYPER, layer_of={"b": "joined", "c": "joined"})
    recorder = Recorder(optimizer)
    optimizer.step({name: p / 2 for name, p in params.items()})
    recorder.record()
    assert recorder.layers == ["stack[0]", "stack[1]", "stack[2]", "b", "c"]
    assert_recorded(recorder, [0], {0: reported(optimizer)})
    np.testing.assert_array_equal(recorder.parameter_norms[0, 3:], [5**0.5, 5**0.5])


def test_changes_after_the_step_do_not_change_what_was_recorded() -> None:
    params = model()
    optimizer = LARS(params, **HYPER | {"rule": "timm", "trust_clip": True})
    recorder = Recorder(optimizer)
    optimizer.step(gradients(0))
    recorder.record()
    expected = {0: reported(optimizer)}
    optimizer.param_groups[0].update(lr=1e-9, weight_decay=0.5)
    params["w"][...] = 0
    optimizer.step(gradients(7))
    assert_recorded(recorder, [0], expected)


def test_a_state_that_is_loaded_goes_on_with_its_number() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    for step in range(3):
        optimizer.step(gradients(step))
        recorder.record()
    optimizer.load_state_dict(optimizer.state_dict() | {"steps": 10})
    recorder.record()  # of no step
    optimizer.step(gradients(3))
    recorder.record()
    assert recorder.steps.tolist() == [0, 1, 2, 10]


@pytest.mark.parametrize("kernel", ["blocked", "compiled", "portable"])
def test_neither_parameters_nor_gradients_nor_the_optimizer_are_kept_alive(kernel: str) -> None:
    class Array(np.ndarray):
        """One that can be referred to weakly, unlike a view of it."""

    params = {name: p.view(Array) for name, p in model().items()}
    grads = {name: g.view(Array) for name, g in gradients(0).items()}
    optimizer = LARS(params, **HYPER, kernel=kernel)
    recorder = Recorder(optimizer)
    optimizer.step(grads)
    recorder.record()
    watched = [weakref.ref(x) for x in (*params.values(), *grads.values(), optimizer)]
    del params, grads, optimizer
    gc.collect()
    assert [x() for x in watched] == [None] * 5
    assert recorder.optimizer is None
    assert recorder.gradient_norms.shape == (1, 2)
    with pytest.raises(RuntimeError, match="record needs an optimizer, of which there is none any more"):
        recorder.record()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_hold_what_was_recorded_and_take_another_optimizer(twin: Any) -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer, every=2)
    optimizer.step(gradients(0))
    recorder.record()
    again = twin(recorder)
    for one, other in zip(arrays(again), arrays(recorder), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(RuntimeError, match="assign one to optimizer"):
        again.record()
    again.optimizer = other = copy.deepcopy(optimizer)
    for step in range(1, 5):
        other.step(gradients(step))
        again.record()
    assert again.steps.tolist() == [0, 2, 4]
    assert recorder.steps.tolist() == [0]
    assert recorder.optimizer is optimizer


def test_an_optimizer_with_a_recorder_can_be_copied_and_pickled() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    optimizer.step(gradients(0))
    recorder.record()
    assert reported(pickle.loads(pickle.dumps(optimizer))) == reported(optimizer)
    assert reported(copy.deepcopy(optimizer)) == reported(optimizer)


def test_few_steps_are_unread() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    most = 0
    for step in range(2 * MOST_UNREAD + 5):
        optimizer.step(gradients(step))
        recorder.record()
        most = max(most, len(recorder._unread))
    assert most == MOST_UNREAD - 1
    assert recorder.steps.tolist() == list(range(2 * MOST_UNREAD + 5))


def test_a_csv_file_has_a_line_for_each_step_and_layer(tmp_path: Path) -> None:
    optimizer = LARS({"w": model()["w"], 'b, "quoted"': model()["b"]}, **HYPER)
    recorder = Recorder(optimizer)
    for step in range(2):
        grads = gradients(step)
        optimizer.step({"w": grads["w"], 'b, "quoted"': None if step else grads["b"]})
        recorder.record()
    recorder.to_csv(tmp_path / "lars.csv")
    with open(tmp_path / "lars.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["step", "layer", "parameter_norm", "gradient_norm", "trust_ratio"]
    assert [line[:2] for line in lines] == [["0", "w"], ["0", 'b, "quoted"'], ["1", "w"]]
    found = np.array([line[2:] for line in lines], float)
    wanted = np.stack([recorder.parameter_norms, recorder.gradient_norms, recorder.trust_ratios], axis=-1)
    np.testing.assert_array_equal(found, wanted[[0, 0, 1], [0, 1, 0]])


def test_tensorboard_gets_each_number_once_with_clear() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer)
    calls: list[tuple[str, float, int]] = []
    for step in range(2):
        optimizer.step(gradients(step))
        recorder.record()
        recorder.to_tensorboard(lambda *arguments: calls.append(arguments), tag="run")
        recorder.clear()
    quantities = ("parameter_norm", "gradient_norm", "trust_ratio")
    tags = [f"run/{quantity}/{layer}" for layer in ("w", "b") for quantity in quantities]
    assert [call[::2] for call in calls] == [(tag, step) for step in (0, 1) for tag in tags]
    assert [number for _, number, _ in calls[-3:]] == list(reported(optimizer)["b"].values())
    assert all(type(number) is float and type(step) is int for _, number, step in calls)
    assert len(recorder) == 0
    with pytest.raises(TypeError, match="writer must be a SummaryWriter or its add_scalar; got 3"):
        recorder.to_tensorboard(3)


def test_a_plot_has_a_heat_map_for_each_quantity() -> None:
    pytest.importorskip("matplotlib")
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer, every=2)
    for step in range(6):
        optimizer.step(gradients(step) | ({"b": None} if step == 2 else {}))
        recorder.record()
    axes = [own for own in recorder.plot().axes if own.get_title(loc="left")]
    assert [own.get_title(loc="left") for own in axes] == [
        "trust ratio",
        "norm of the parameter",
        "norm of the gradient",
    ]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["w", "b"]
    for own, values in zip(
        axes, (recorder.trust_ratios, recorder.parameter_norms, recorder.gradient_norms), strict=True
    ):
        (mesh,) = own.collections
        shown = np.ma.filled(mesh.get_array().astype(float), np.nan).reshape(2, 3)
        np.testing.assert_array_equal(shown, values.T)
        np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [-1, 1, 3, 5])


def test_a_plot_of_one_step_of_many_layers_with_zeros_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    params = {f"block.{k}.{'x' * k}": np.zeros(2) for k in range(150)}
    optimizer = LARS(params, **HYPER)
    recorder = Recorder(optimizer)
    optimizer.step({name: np.zeros(2) for name in params})
    recorder.record()
    figure = recorder.plot()
    figure.savefig(tmp_path / "plot.png", dpi=20)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 50
    assert max(map(len, labels)) == 40


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"optimizer": update}, TypeError, "optimizer must be a LARS of lars_array, lars_torch or lars_jax, not func"),
        ({"optimizer": init(model())}, TypeError, "optimizer must be a LARS of lars_array, lars_torch or lars_jax"),
        ({"every": 0}, ValueError, "every must be at least 1; got 0"),
        ({"every": 2.0}, TypeError, "every must be an integer; got 2.0"),
        ({"every": True}, TypeError, "every must be an integer; got True"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    optimizer = LARS(model(), **HYPER)
    with pytest.raises(kind, match=message):
        Recorder(**{"optimizer": optimizer} | arguments)


def test_repr_shows_how_many_steps_there_are() -> None:
    optimizer = LARS(model(), **HYPER)
    recorder = Recorder(optimizer, every=2)
    optimizer.step(gradients(0))
    recorder.record()
    assert repr(recorder) == "Recorder(every=2, steps=1)"
