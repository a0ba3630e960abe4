"""Large batches in NumPy, saved after each epoch; a run that was stopped goes on where its file ends.

pip install '.[demo]'
python examples/digits_numpy.py run.safetensors --stop-after 5
python examples/digits_numpy.py run.safetensors
"""

import argparse
from pathlib import Path

import numpy as np

import lars_array
from lars_array import LARS, param_groups, warmup_cosine
from lars_array.demo.data import load
from lars_array.demo.network import accuracy, init_params, loss_and_gradients

EPOCHS, BATCH = 20, 256


def main() -> None:
    """Train the network of the demo on handwritten digits."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, help="the state of the run")
    parser.add_argument("--stop-after", type=int, default=EPOCHS, metavar="EPOCHS", help="default: %(default)s")
    options = parser.parse_args()

    digits = load(seed=0)
    params = init_params(np.random.default_rng(0), init="he")
    batches = len(digits.train.y) // BATCH
    schedule = warmup_cosine(0.1, EPOCHS * batches, EPOCHS * batches // 3)
    groups = param_groups(params, 5e-4, no_decay=["bias"], no_adapt=["bias"])
    optimizer = LARS(groups, schedule, momentum=0.9, trust_coefficient=0.05)

    epoch = 0
    if options.file.exists():  # the learning rate goes on by itself: it is a function of the step
        epoch = lars_array.load(options.file, optimizer, params=params).metadata["epoch"]
        print(f"{options.file} is of epoch {epoch}")
    while epoch < min(options.stop_after, EPOCHS):
        rows = np.random.default_rng([1, epoch]).permutation(len(digits.train.y))  # by the epoch: nothing to save
        for batch in rows[: batches * BATCH].reshape(batches, BATCH):
            optimizer.step(loss_and_gradients(params, digits.train.x[batch], digits.train.y[batch])[1])
        epoch += 1
        lars_array.save(options.file, optimizer, params=params, metadata={"epoch": epoch})
    print(f"test accuracy {accuracy(params, digits.test.x, digits.test.y):.4f} after {optimizer.steps} steps")


if __name__ == "__main__":
    main()
