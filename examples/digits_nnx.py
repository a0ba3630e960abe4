"""Train a network on handwritten digits with Flax NNX, where LARS is the gradient transformation of an nnx.Optimizer.

pip install flax
python examples/digits_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

from lars_jax import lars, param_groups

EPOCHS, BATCH, TRAIN = 30, 256, 1280


class Network(nnx.Module):
    """A classifier of images of 8 x 8 pixels."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.norm(self.hidden(x))))


def loss_of(model, x, y):
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    """Update the parameters and the state of the optimizer in place, as NNX does."""
    optimizer.update(model, nnx.grad(loss_of)(model, x, y))


images, digits = load_digits(return_X_y=True)
keys = jax.random.split(jax.random.key(0), EPOCHS + 1)
order = jax.random.permutation(keys[0], len(digits))
x, y = jnp.asarray(images / 16, jnp.float32)[order], jnp.asarray(digits)[order]

model = Network(nnx.Rngs(0))
masks = param_groups(nnx.state(model, nnx.Param), 1e-4)  # biases and norms are neither decayed nor adapted
steps = EPOCHS * TRAIN // BATCH
schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=steps // 10, decay_steps=steps)
optimizer = nnx.Optimizer(model, lars(schedule, momentum=0.9, trust_coefficient=0.02, **masks), wrt=nnx.Param)
for key in keys[1:]:
    for batch in jax.random.permutation(key, TRAIN).reshape(-1, BATCH):
        train_step(model, optimizer, x[batch], y[batch])
accuracy = (model(x[TRAIN:]).argmax(axis=1) == y[TRAIN:]).mean()
print(f"test accuracy {accuracy:.4f} after {steps} steps")
