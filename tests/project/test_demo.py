"""The demo: its network, its data, its runs, and `main` from end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from lars_array.demo import data, main, plan, summary
from lars_array.demo.experiment import (
    CHANCE,
    OPTIMIZERS,
    Outcome,
    Run,
    batches,
    fit,
    make_optimizer,
    train,
    trust_ratios,
)
from lars_array.demo.network import WIDTHS, accuracy, init_params, loss_and_gradients

RUN = Run("lars", batch_size=128, lr=0.1, seed=(0, 0, 0), epochs=3, scored_on="validation", init="he")


@pytest.fixture(scope="module")
def digits():
    return data.load(seed=0)


def assert_same_outcome(a: Outcome, b: Outcome) -> None:
    assert replace(a, seconds=0) == replace(b, seconds=0)


# ------------------------------------------------------------------------------------------------------------- network


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(0)
    params = init_params(rng, widths=(5, 7, 6, 4), dtype=np.float64)
    for name in params:
        params[name] += 0.1 * rng.standard_normal(params[name].shape)  # Biases of zero would hide mistakes.
    x, y = rng.standard_normal((9, 5)), rng.integers(4, size=9)
    _, gradients = loss_and_gradients(params, x, y)

    assert gradients.keys() == params.keys()
    step = 1e-6
    for name, param in params.items():
        differences = np.empty_like(param)
        for i in np.ndindex(param.shape):
            kept = param[i]
            losses = []
            for param[i] in (kept + step, kept - step):
                losses.append(loss_and_gradients(params, x, y)[0])
            param[i] = kept
            differences[i] = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(gradients[name], differences, rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_guessing_network_loses_the_logarithm_of_the_classes():
    params = {name: np.zeros_like(param) for name, param in init_params(np.random.default_rng(0)).items()}
    loss, _ = loss_and_gradients(params, np.ones((3, 64), np.float32), np.array([1, 2, 3]))
    assert loss == pytest.approx(np.log(10))


@pytest.mark.parametrize("init", ["uniform", "he"])
def test_params_of_seven_layers_are_in_single_precision(init):
    params = init_params(np.random.default_rng(0), init=init)
    assert list(params)[:2] == ["1/weight", "1/bias"]
    assert len(params) == 2 * (len(WIDTHS) - 1) == 14
    assert {param.dtype for param in params.values()} == {np.dtype(np.float32)}


def test_he_initialisation_has_normal_weights_of_variance_2_over_fan_in_and_zero_biases():
    params = init_params(np.random.default_rng(0), widths=(50, 400, 10), init="he")
    assert params["1/weight"].std() == pytest.approx(np.sqrt(2 / 50), rel=0.05)
    assert params["2/weight"].std() == pytest.approx(np.sqrt(2 / 400), rel=0.05)
    assert not params["1/bias"].any()


def test_the_default_initialisation_is_that_of_torch():
    """Uniform within ±1/sqrt(fan_in), weights and biases, as documented for torch.nn.Linear."""
    params = init_params(np.random.default_rng(0), widths=(50, 400, 300))
    for layer, fan_in in ((1, 50), (2, 400)):
        for kind in ("weight", "bias"):
            drawn = np.sort(params[f"{layer}/{kind}"].ravel()) * np.sqrt(fan_in)
            uniform = np.linspace(-1, 1, drawn.size)
            np.testing.assert_allclose(drawn, uniform, atol=0.15)
            assert abs(drawn).max() <= 1 + 1e-6


def test_the_default_initialisation_agrees_with_torch_itself():
    torch = pytest.importorskip("torch")
    params = init_params(np.random.default_rng(0), widths=(50, 400, 300))
    for layer, (fan_in, fan_out) in ((1, (50, 400)), (2, (400, 300))):
        linear = torch.nn.Linear(fan_in, fan_out)
        for kind, theirs in (("weight", linear.weight), ("bias", linear.bias)):
            ours, theirs = params[f"{layer}/{kind}"], theirs.detach().numpy()
            assert ours.std() == pytest.approx(theirs.std(), rel=0.1)
            assert abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.05)


def test_gradients_keep_single_precision(digits):
    params = init_params(np.random.default_rng(0))
    _, gradients = loss_and_gradients(params, digits.train.x[:8], digits.train.y[:8])
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}


def test_accuracy_is_the_share_of_largest_logits():
    params = {"1/weight": np.eye(3), "1/bias": np.zeros(3)}
    assert accuracy(params, np.eye(3), np.array([0, 1, 0])) == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------------------- data


def test_parts_share_no_row_and_leave_none_out(digits):
    parts = [digits.train, digits.validation, digits.test]
    for one, other in combinations(parts, 2):
        assert not set(one.index) & set(other.index)
    assert sorted(np.concatenate([part.index for part in parts])) == list(range(1797))


def test_parts_hold_the_classes_in_proportion_and_are_scaled(digits):
    for part in (digits.train, digits.validation, digits.test):
        np.testing.assert_allclose(np.bincount(part.y) / len(part.y), 0.1, atol=0.01)
        assert part.x.dtype == np.float32
        assert (part.x.min(), part.x.max()) == (0, 1)


def test_the_seed_decides_the_split(digits):
    assert np.array_equal(data.load(seed=0).test.index, digits.test.index)
    assert not np.array_equal(data.load(seed=2**40).test.index, digits.test.index)


# ----------------------------------------------------------------------------------------------------------------- run


def poisoned(part: data.Part) -> data.Part:
    return replace(part, x=np.full_like(part.x, np.nan), y=np.zeros_like(part.y))


def test_a_tuning_run_sees_no_test_row(digits):
    assert_same_outcome(train(RUN, digits), train(RUN, replace(digits, test=poisoned(digits.test))))


def test_a_final_run_sees_no_validation_row(digits):
    run = replace(RUN, scored_on="test")
    assert_same_outcome(train(run, digits), train(run, replace(digits, validation=poisoned(digits.validation))))


def test_learning_rates_are_chosen_on_validation_only():
    for settings in plan.full(seed=0):
        assert {run.scored_on for run in plan.tuning_runs(settings)} == {"validation"}
        choice = plan.choose(settings, {run: Outcome(run.lr, False, 0) for run in plan.tuning_runs(settings)})
        finals = [run for runs in plan.final_runs(settings, choice).values() for run in runs]
        assert {run.scored_on for run in finals} == {"test"}
        assert not {run.seed for run in finals} & {run.seed for run in plan.tuning_runs(settings)}


def test_two_initialisations_are_compared_over_five_seeds_or_more():
    experiments = plan.full(seed=0)
    assert [settings.init for settings in experiments] == ["uniform", "he"]
    assert all(settings.final_seeds >= 5 for settings in experiments)
    assert {run.init for run in plan.tuning_runs(experiments[1])} == {"he"}


def test_learning_rates_grow_as_the_threshold_of_clipping_shrinks():
    settings = plan.Settings(seed=0, lrs=(0.03, 0.1))
    grids = {optimizer: plan.grid(settings, optimizer) for optimizer in OPTIMIZERS}
    assert grids == {"sgd": [0.03, 0.1], "clip-1": [0.03, 0.1], "clip-0.1": [0.3, 1.0], "lars": [0.03, 0.1]}


def test_every_optimizer_has_a_tuned_and_a_scaled_rate():
    kinds = sorted((method.optimizer, method.scaled) for method in plan.METHODS.values())
    assert kinds == sorted((optimizer, scaled) for optimizer in OPTIMIZERS for scaled in (False, True))


def test_a_run_learns(digits):
    assert train(RUN, digits).accuracy > 0.5


def test_equal_runs_are_bit_identical_and_the_seed_matters(digits):
    one, other = fit(RUN, digits, lambda: False), fit(RUN, digits, lambda: False)
    third = fit(replace(RUN, seed=(0, 0, 1)), digits, lambda: False)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(one["1/weight"], third["1/weight"])


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e3), ("sgd", 1e30), ("clip-1", 1e30), ("lars", 1e30)])
def test_a_diverged_run_counts_as_chance_without_a_warning(digits, optimizer, lr):
    outcome = train(replace(RUN, optimizer=optimizer, lr=lr), digits)
    assert outcome.diverged
    assert outcome.accuracy == CHANCE == 0.1


def test_sgd_adapts_no_layer_and_lars_the_weights_only(digits):
    for optimizer, adapted in (("sgd", ()), ("clip-1", ()), ("lars", [f"{layer}/weight" for layer in range(1, 8)])):
        params = init_params(np.random.default_rng(0))
        lars = make_optimizer(replace(RUN, optimizer=optimizer), params, steps=10)
        lars.step(loss_and_gradients(params, digits.train.x, digits.train.y)[1])
        ratios = lars.trust_ratios()
        assert {name for name in ratios if ratios[name] != 1} == set(adapted)


def test_trust_ratios_are_those_that_the_optimizer_reports_at_every_step(digits):
    run = replace(RUN, batch_size=512, epochs=4, init="uniform")
    recorded = trust_ratios(run, digits)
    assert list(recorded) == [f"{layer}/weight" for layer in range(1, 8)]
    assert {len(ratios) for ratios in recorded.values()} == {4 * 1077 // 512}

    rng = np.random.default_rng(run.seed)
    params = init_params(rng)
    first = next(batches(rng, 1077, run))
    _, gradients = loss_and_gradients(params, digits.train.x[first], digits.train.y[first])
    for name, ratios in recorded.items():
        p, g = np.linalg.norm(params[name]), np.linalg.norm(gradients[name])
        assert ratios[0] == pytest.approx(0.05 * p / (g + 5e-4 * p), rel=1e-4)


def test_trust_ratios_of_a_diverged_run_end_with_it(digits):
    recorded = trust_ratios(replace(RUN, optimizer="sgd", lr=1e30), digits)
    assert all(0 < len(ratios) < 3 * 1077 // 128 for ratios in recorded.values())


def test_every_batch_is_full_and_every_epoch_complete():
    run = replace(RUN, batch_size=8, epochs=4)
    steps = list(batches(np.random.default_rng(0), rows=10, run=run))
    assert [len(step) for step in steps] == [8] * 5
    stream = np.concatenate(steps)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream.reshape(4, 10))


# ------------------------------------------------------------------------------------------------------ choice, verdict


def test_the_best_rate_is_chosen_and_scaled_with_the_batch():
    settings = plan.Settings(seed=0)
    tuned = {run: Outcome(1 - abs(run.lr - 0.03), False, 0) for run in plan.tuning_runs(settings)}
    choice = plan.choose(settings, tuned)
    assert choice["sgd", 1024] == choice["lars", 256] == 0.03
    assert choice["clip-0.1", 256] == 0.3  # The smallest of its grid.
    for scaled in ("sgd-scaled", "clip-1-scaled", "lars-scaled"):
        assert [choice[scaled, size] for size in (256, 1024)] == pytest.approx([0.03, 0.12])


def cells(lars: float, other: float, error: float) -> dict[tuple[str, int], summary.Cell]:
    return {
        (name, size): summary.Cell(0.1, lars if name == "lars" else other - method.scaled, 0.0, error, diverged=0)
        for name, method in plan.METHODS.items()
        for size in plan.Settings(0).batch_sizes
    }


@pytest.mark.parametrize(
    ("lars", "other", "error", "said"),
    [
        (90, 80, 1, "LARS over SGD clipped at 1, lr tuned, batches of 1024: +10.0 ± 3.9 points"),
        (80, 90, 1, "LARS over SGD clipped at 1, lr tuned, batches of 1024: -10.0 ± 3.9 points"),
        (90, 80, 3, "LARS over SGD clipped at 1, lr tuned, batches of 1024: +10.0 ± 11.8 points (unclear)"),
        (90, 80, 1, "LARS over SGD clipped at 1, lr scaled, batches of 1024: +0.0 ± 3.9 points (unclear)"),
    ],
)
def test_the_verdict_follows_the_numbers_and_compares_like_with_like(lars, other, error, said):
    assert said in summary.verdict(plan.Settings(0), cells(lars, other, error))


def test_caveats_name_rates_that_end_the_grid_and_diverged_runs():
    settings = plan.Settings(seed=0, lrs=(0.1, 0.2))
    diverged = cells(90, 80, 1)
    diverged["sgd-scaled", 1024] = replace(diverged["sgd-scaled", 1024], diverged=3)
    ends, lost = summary.caveats(settings, diverged)
    assert "LARS, lr tuned at 1024" in ends
    assert "scaled" not in ends  # Its rate is not of the grid.
    assert lost == "Diverged, and counted as guessing: SGD, lr scaled at 1024, 3 of 5 runs"
    assert summary.caveats(plan.Settings(seed=0, lrs=(0.001, 0.01, 0.1, 1.0)), cells(90, 80, 1)) == []


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two equal quick runs, and what the second printed."""
    folders = [tmp_path_factory.mktemp("demo") / "new" / "folder" for _ in range(2)]
    command = [sys.executable, "-W", "error", "-m", "lars_array", "demo", "--quick", "--seed", "3", "--out"]
    started = [subprocess.Popen([*command, str(folder)], stdout=-1, stderr=-1, text=True) for folder in folders]
    printed = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    return folders, printed[1]


def test_quick_run_writes_the_figure_and_the_numbers_and_nothing_else(quick):
    (folder, _), (printed, errors) = quick
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "demo.png"]
    assert not errors
    assert "LARS, lr tuned" in printed
    assert "LARS over SGD clipped at 1, lr tuned, batches of 1024: " in printed
    assert re.search(r"^\d+ seconds\.$", printed, re.MULTILINE)
    assert "demo.png" in printed
    assert "demo.json" in printed


def test_figure_is_not_blank(quick):
    from matplotlib.image import imread

    image = imread(quick[0][0] / "demo.png")
    assert image.shape[0] > 1000
    assert image.shape[1] > 1000
    assert len(np.unique(image[::8, ::8, :3].reshape(-1, 3), axis=0)) > 20


def test_json_has_every_number(quick):
    document = json.loads((quick[0][0] / "demo.json").read_text())
    settings, he = plan.quick(seed=3)
    experiment, second = document["experiments"]
    assert experiment["settings"]["seed"] == 3
    assert [experiment["settings"]["init"], second["settings"]["init"]] == ["uniform", "he"]
    assert document["config"]["rows"] == {"train": 1077, "validation": 360, "test": 360}
    assert {"lars-array", "python", "numpy", "scikit-learn"} <= document["versions"].keys()
    for part in ("chosen_lrs", "summary"):
        assert experiment[part].keys() == second[part].keys() == plan.METHODS.keys()
        assert all(list(map(int, sizes)) == list(settings.batch_sizes) for sizes in experiment[part].values())
    for run in document["runs"]:
        described = {"optimizer", "batch_size", "lr", "seed", "epochs", "scored_on", "init"}
        assert described | {"accuracy", "diverged"} == run.keys()
    tuning = [*plan.tuning_runs(settings), *plan.tuning_runs(he)]
    assert sum(run["scored_on"] == "validation" for run in document["runs"]) == len(tuning)
    assert len(document["timings"]["seconds_of_runs"]) == len(document["runs"])
    assert experiment["verdict"] and second["verdict"]
    assert {len(ratios) for ratios in document["trust_ratios"].values()} == {settings.epochs * 1077 // 1024}

    lr = experiment["chosen_lrs"]["lars"]["1024"]
    wanted = {"optimizer": "lars", "batch_size": 1024, "lr": lr, "scored_on": "test", "init": "uniform"}
    tested = [100 * run["accuracy"] for run in document["runs"] if wanted.items() <= run.items()]
    assert experiment["summary"]["lars"]["1024"]["mean"] == pytest.approx(np.mean(tested))
    assert experiment["summary"]["lars"]["1024"]["std"] == pytest.approx(np.std(tested, ddof=1))


def test_equal_seeds_give_equal_numbers(quick):
    one, other = (json.loads((folder / "demo.json").read_text()) for folder in quick[0])
    assert one.pop("timings") != other.pop("timings")
    assert one == other


def processes_in_group(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if int(line.split()[0]) == group and line.split()[1][0] != "Z"]


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def ends(group: int) -> bool:
    # The tracker of multiprocessing's semaphores ends a moment after the process that it looks after.
    return wait_until(lambda: not processes_in_group(group), seconds=10)


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process group")
@pytest.mark.parametrize(
    ("send", "delay"),  # A terminal signals the whole group, `kill -INT` one process.
    [(os.killpg, 0.0), (os.killpg, 1.0), (os.kill, 1.0)],
    ids=["group, starting", "group, training", "parent, training"],
)
def test_ctrl_c_leaves_cleanly(tmp_path, send, delay):
    # A shell has what it runs in the background ignore Ctrl-C, and this would inherit it.
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", listen, sys.executable, "-m", "lars_array", "demo", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as demo:
        try:
            # Itself, the tracker, a worker.
            assert wait_until(lambda: len(processes_in_group(demo.pid)) >= 3, seconds=60)
            time.sleep(delay)
            send(demo.pid, signal.SIGINT)
            _, errors = demo.communicate(timeout=30)
            assert demo.returncode == 130
            assert errors == "Interrupted.\n"
            assert list(tmp_path.iterdir()) == []
            assert ends(demo.pid)
        finally:
            if demo.poll() is None:
                os.killpg(demo.pid, signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="looks for processes of a group")
def test_workers_do_not_outlive_a_killed_demo(tmp_path):
    command = [sys.executable, "-m", "lars_array", "demo", "--out", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert wait_until(lambda: len(processes_in_group(demo.pid)) >= 3, seconds=60)
    time.sleep(1)  # For the workers to come up: they watch their parent from then on.
    demo.kill()
    demo.wait()
    assert ends(demo.pid)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(quick=True, seed=0, out=tmp_path / "file" / "below") == 2
    printed, errors = capsys.readouterr()
    assert not printed
    assert errors.startswith("Cannot write to ")
    assert errors.count("\n") == 1


def test_a_negative_seed_is_refused(tmp_path, capsys):
    assert main(quick=True, seed=-1, out=tmp_path) == 2
    assert "seed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
