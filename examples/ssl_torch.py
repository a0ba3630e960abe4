"""Learn features of digits without labels by a recipe like SimCLR's: two augmentations, NT-Xent, warm-up, AMP.

Weights are decayed and adapted; biases and norms are neither, and have their own learning rate, as in Barlow Twins. A
linear classifier, fitted to the features of 50 labelled images, shows what they are worth. Uses a GPU if there is one.

python examples/ssl_torch.py
"""

import torch
from sklearn import datasets, linear_model
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize

from lars_array import warmup_cosine
from lars_torch import LARS, param_groups

STEPS, BATCH, LR, LR_BIASES = 200, 256, 2.0, 0.1
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
torch.set_default_device(device)
torch.manual_seed(0)
pixels, digits = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
images = (pixels.float() / 16).reshape(-1, 1, 8, 8)
train, test = torch.randperm(len(images)).split([1280, len(images) - 1280])


def augment(x):
    """Move every image by a random affine map, and add noise."""
    grid = affine_grid(torch.eye(2, 3) + 0.6 * (torch.rand(len(x), 2, 3) - 0.5), list(x.shape), align_corners=False)
    return grid_sample(x, grid, align_corners=False) + 0.1 * torch.randn_like(x)


def accuracy(encoder):
    """Return the test accuracy of a linear classifier on the features."""
    features = normalize(encoder.eval()(images)).detach().cpu()
    known, unknown = ((features[part.cpu()], digits[part].cpu()) for part in (train[:50], test))
    return linear_model.LogisticRegression(C=10, max_iter=1000).fit(*known).score(*unknown)


blocks = [nn.Sequential(nn.Conv2d(n, m, 3), nn.BatchNorm2d(m), nn.ReLU()) for n, m in ((1, 32), (32, 64), (64, 128))]
encoder = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(512, 128))
model = nn.Sequential(encoder, nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
print(f"test accuracy from 50 labels: pixels {accuracy(nn.Flatten()):.4f}, untrained encoder {accuracy(encoder):.4f}")
weights, biases = param_groups(model, weight_decay=1e-4)
optimizer = LARS([weights, biases | {"lr": LR_BIASES}], lr=LR, momentum=0.9, trust_coefficient=0.02)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(1.0, STEPS, STEPS // 10))  # a factor for both
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")  # float16 needs it, bfloat16 does not
model.train()
for _ in range(STEPS):
    batch = images[train[torch.randperm(len(train))[:BATCH]]]
    with torch.autocast(device, dtype):
        z = normalize(model(torch.cat([augment(batch), augment(batch)])).float())
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)  # NT-Xent: the other view is the right class among all views
    loss = cross_entropy(logits, torch.arange(2 * BATCH).roll(BATCH))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
print(f"encoder trained without labels {accuracy(encoder):.4f}")
