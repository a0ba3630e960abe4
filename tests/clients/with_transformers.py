"""transformers: Trainer with LARS as its optimizer, on a small Llama."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import OPTIONS, assert_same
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lars_torch import LARS, param_groups

LIBRARIES = ("transformers",)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def sentences() -> list[dict[str, Any]]:
    rows = torch.arange(64)[:, None] + torch.arange(12)
    return [{"input_ids": row % 64, "labels": row % 64} for row in rows]


def trainer_of(folder: Any, model: Any, **options: Any) -> Any:
    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=20, per_device_train_batch_size=8, max_grad_norm=0.5, save_steps=10,
        lr_scheduler_type="cosine", report_to=[], disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    optimizer = LARS(param_groups(model, weight_decay=1e-4), **OPTIONS)
    return Trainer(model, arguments, train_dataset=sentences(), optimizers=(optimizer, None))


def loss_of(model: Any) -> float:
    batch = {key: torch.stack([x[key] for x in sentences()]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        return float(model(**batch).loss)


class Stop(TrainerCallback):
    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 10


def resumed(**options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = llama()
        trainer_of(Path(folder, "a"), whole, **options).train()
        first = trainer_of(Path(folder, "b"), llama(), **options)
        first.add_callback(Stop())
        first.train()
        other = llama()
        trainer_of(Path(folder, "c"), other, **options).train(
            resume_from_checkpoint=str(Path(folder, "b/checkpoint-10"))
        )
        assert_same(whole, other)
        assert loss_of(whole) < 0.95 * loss_of(llama()), f"the loss was {loss_of(llama())} and is {loss_of(whole)}"


def check_trainer_resumes_to_the_bit() -> None:
    resumed()


def check_trainer_bf16_accumulates_and_resumes() -> None:
    resumed(bf16=True, gradient_accumulation_steps=2)


def check_trainer_makes_it_by_class_and_arguments() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = llama()
        arguments = TrainingArguments(
            folder, use_cpu=True, max_steps=5, report_to=[], disable_tqdm=True, weight_decay=0.1
        )
        trainer = Trainer(model, arguments, train_dataset=sentences(), optimizer_cls_and_kwargs=(LARS, OPTIONS))
        trainer.train()
        assert loss_of(model) < loss_of(llama())


def check_norm_weights_of_llama_are_not_decayed() -> None:
    model = llama()
    names = {p: name for name, p in model.named_parameters()}
    decayed = [p for group in param_groups(model, 0.1) if group["weight_decay"] for p in group["params"]]
    norms = [names[p] for p in decayed if "norm" in names[p]]
    assert not norms, f"decayed: {', '.join(norms[:3])}"
