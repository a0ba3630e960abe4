"""Lightning: Trainer and Fabric."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from common import assert_learned, assert_same, data, loss_of, network, optimizer_of
from lightning.fabric.plugins import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

LIBRARIES = ("lightning",)


class Module(lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.network, self.options = network(), options

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.network, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)]


def fit(folder: Path, epochs: int, *, resume: Any = None, module: Any = None, **options: Any) -> Any:
    warnings.simplefilter("ignore")
    module = module or Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=16), ckpt_path=resume)
    return trainer, module


def resumed(**options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, whole = fit(Path(folder, "a"), 8, **options)
        trainer, _ = fit(Path(folder, "b"), 4, **options)
        trainer.save_checkpoint(Path(folder, "half.ckpt"))
        _, other = fit(Path(folder, "c"), 8, resume=Path(folder, "half.ckpt"), **options)
        assert_same(whole, other)
        assert_learned(whole.network)


def check_trainer_resumes_to_the_bit() -> None:
    resumed()


def check_trainer_bf16_mixed_with_gradient_clip_val() -> None:
    resumed(precision="bf16-mixed", gradient_clip_val=0.5)


def check_trainer_16_mixed_with_gradient_clip_val() -> None:
    """The Trainer makes bf16 of "16-mixed" on a CPU, its plugin with a scaler does not."""
    with tempfile.TemporaryDirectory() as folder:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        _, module = fit(Path(folder), 8, plugins=[precision], gradient_clip_val=0.5)
        assert_learned(module.network)


def check_trainer_hooks_see_gradients_without_the_scale() -> None:
    seen = []

    class Watching(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(max(p.grad.abs().max().item() for p in self.network.parameters()))

    with tempfile.TemporaryDirectory() as folder:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))
        fit(Path(folder), 1, module=Watching(), plugins=[precision])
    assert max(seen) < 100, f"a gradient of {max(seen):.3g}"


def check_trainer_manual_optimization_and_accumulation() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, module = fit(Path(folder), 8, accumulate_grad_batches=2)
        assert_learned(module.network)


def check_trainer_with_two_optimizers() -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.automatic_optimization = network(), False

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.network), optimizer_of(self.second)

        def training_step(self, batch: Any, _: int) -> None:
            for optimizer, net in zip(self.optimizers(), (self.network, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(net(batch[0]), batch[1]))
                self.clip_gradients(optimizer, gradient_clip_val=0.5)
                optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        _, module = fit(Path(folder), 8, module=Two())
        assert_same(module.network, module.second)
        assert_learned(module.network)


def fabric_training(fabric: Any, model: Any, optimizer: Any, steps: int, *, clip: bool = True) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.cross_entropy(model(data()[0]), data()[1]))
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()


def fabric_resumed(**options: Any) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, **options)
    model, optimizer = fabric.setup(own := network(), optimizer_of(own))
    fabric_training(fabric, model, optimizer, 10)
    with tempfile.TemporaryDirectory() as folder:
        fabric.save(Path(folder, "x.ckpt"), {"model": model, "optimizer": optimizer})
        fabric_training(fabric, model, optimizer, 10)
        other, its = fabric.setup(own := network(), optimizer_of(own))
        fabric.load(Path(folder, "x.ckpt"), {"model": other, "optimizer": its})
    fabric_training(fabric, other, its, 10)
    assert_same(model, other)
    assert_learned(model.module)


def check_fabric_bf16_mixed_clips_and_resumes() -> None:
    fabric_resumed(precision="bf16-mixed")


def check_fabric_16_mixed_clips_and_resumes() -> None:
    fabric_resumed(plugins=FabricPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0)))


def check_fabric_16_mixed_skips_what_overflows() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=FabricPrecision("16-mixed", "cpu", scaler))
    model, optimizer = fabric.setup(own := network(), optimizer_of(own))
    fabric_training(fabric, model, optimizer, 2, clip=False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fabric.backward(loss_of(model.module) * float("inf"))
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert scaler.get_scale() == 128.0
