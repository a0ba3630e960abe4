"""Train a network on handwritten digits with CuPy, in a loop in which the host never waits for the GPU.

The parameters are CuPy arrays, which LARS updates in place. Without a GPU the script runs the same loop on NumPy arrays
and prints that it does.

pip install '.[cuda12,demo]'
python examples/digits_cupy.py
"""

import numpy as np
from sklearn.datasets import load_digits

from lars_array import LARS, param_groups, warmup_cosine

EPOCHS, BATCH, TRAIN = 30, 256, 1280


def array_module():
    """Return CuPy if it is installed and finds a GPU, otherwise NumPy, and a description."""
    try:
        import cupy
    except ImportError:
        return np, "NumPy, because CuPy is not installed"
    if not cupy.cuda.is_available():
        return np, "NumPy, because CuPy finds no GPU"
    return cupy, "CuPy on " + cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def forward(x):
    """Return the hidden units and the logits."""
    hidden = xp.maximum(x @ params["hidden.weight"] + params["hidden.bias"], 0)
    return hidden, hidden @ params["out.weight"] + params["out.bias"]


xp, description = array_module()
rng = np.random.default_rng(0)
images, digits = load_digits(return_X_y=True)
order = rng.permutation(len(digits))
x, y = xp.asarray(images[order] / 16, dtype=xp.float32), xp.asarray(digits[order])
one_hot = xp.eye(10, dtype=xp.float32)[y]
epochs = xp.asarray(np.stack([rng.permutation(TRAIN) for _ in range(EPOCHS)]))  # one transfer to the GPU for all epochs
params = {}
for name, shape in {"hidden": (64, 128), "out": (128, 10)}.items():
    params[f"{name}.weight"] = xp.asarray(rng.normal(0, shape[0] ** -0.5, shape), dtype=xp.float32)
    params[f"{name}.bias"] = xp.zeros(shape[1], dtype=xp.float32)

groups = param_groups(params, weight_decay=1e-4)  # biases are neither decayed nor adapted
schedule = warmup_cosine(1.0, total_steps=EPOCHS * TRAIN // BATCH, warmup_steps=15)
optimizer = LARS(groups, schedule, momentum=0.9, trust_coefficient=0.02)
for batch in epochs.reshape(-1, BATCH):
    hidden, logits = forward(x[batch])
    odds = xp.exp(logits - logits.max(axis=1, keepdims=True))
    delta = (odds / odds.sum(axis=1, keepdims=True) - one_hot[batch]) / BATCH  # gradient of the mean cross-entropy
    back = (delta @ params["out.weight"].T) * (hidden > 0)
    grads = {"hidden.weight": x[batch].T @ back, "hidden.bias": back.sum(axis=0)}
    optimizer.step(grads | {"out.weight": hidden.T @ delta, "out.bias": delta.sum(axis=0)})
optimizer.synchronize()  # waits for the GPU, and raises if a step met NaN or infinity
accuracy = float((forward(x[TRAIN:])[1].argmax(axis=1) == y[TRAIN:]).mean())
print(f"{description}: test accuracy {accuracy:.4f} after {optimizer.steps} steps")
