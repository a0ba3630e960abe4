"""Train a network on handwritten digits with Equinox, where LARS is an optax gradient transformation over a module.

pip install equinox
python examples/digits_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from lars_jax import lars, param_groups

EPOCHS, BATCH, TRAIN = 30, 256, 1280


def loss_of(model, x, y):
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


@eqx.filter_jit(donate="all-except-first")
def train_step(batch, model, state):
    """Return the new model and the new state of the optimizer, in the memory of the old ones."""
    grads = eqx.filter_grad(loss_of)(model, *batch)
    updates, state = solver.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state


images, digits = load_digits(return_X_y=True)
keys = jax.random.split(jax.random.key(0), EPOCHS + 2)
order = jax.random.permutation(keys[0], len(digits))
x, y = jnp.asarray(images / 16, jnp.float32)[order], jnp.asarray(digits)[order]

model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=keys[1])
params = eqx.filter(model, eqx.is_inexact_array)
steps = EPOCHS * TRAIN // BATCH
schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=steps // 10, decay_steps=steps)
masks = param_groups(params, 1e-4)  # biases are neither decayed nor adapted
solver = lars(schedule, momentum=0.9, trust_coefficient=0.02, **masks)
state = solver.init(params)
for key in keys[2:]:
    for batch in jax.random.permutation(key, TRAIN).reshape(-1, BATCH):
        model, state = train_step((x[batch], y[batch]), model, state)
accuracy = (jax.vmap(model)(x[TRAIN:]).argmax(axis=1) == y[TRAIN:]).mean()
print(f"test accuracy {accuracy:.4f} after {steps} steps")
