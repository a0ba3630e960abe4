"""Train a network on handwritten digits with Lightning, whose Trainer runs the loop, the schedule and the checkpoints.

Only `configure_optimizers` concerns LARS: it returns the optimizer, and a schedule that advances with each step.
Options of the Trainer such as precision="bf16-mixed" and gradient_clip_val=1.0 need nothing more.

pip install lightning
python examples/digits_lightning.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lars_array import warmup_cosine
from lars_torch import LARS, param_groups


class Digits(lightning.LightningModule):
    """A classifier of images of 8 x 8 pixels."""

    def __init__(self, lr=1.0):
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch, _):
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        groups = param_groups(self, weight_decay=1e-4)  # biases and norms are neither decayed nor adapted
        optimizer = LARS(groups, lr=self.lr, momentum=0.9, trust_coefficient=0.02)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(1.0, steps, steps // 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
images, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits))
train, test = random_split(data, [1280, len(data) - 1280])
model = Digits()
trainer = lightning.Trainer(max_epochs=30, devices=1, logger=False, enable_checkpointing=False)
trainer.fit(model, DataLoader(train, batch_size=256, shuffle=True))
(results,) = trainer.test(model, DataLoader(test, batch_size=len(test)), verbose=False)
print(f"test accuracy {results['accuracy']:.4f} after {trainer.global_step} steps")
