"""One step of transformers' `Trainer`, with and without gradient accumulation."""

import copy

import pytest
import torch
import transformers


def check_accumulation(model, rows: list[dict], batches: int, folder) -> float:
    """Asserts that accumulation over `batches` batches does not change the step; returns the loss."""

    def train_once(accumulated: int):
        trained = copy.deepcopy(model)
        arguments = transformers.TrainingArguments(
            str(folder / str(accumulated)), max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
            per_device_train_batch_size=len(rows) // accumulated, gradient_accumulation_steps=accumulated,
            optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        )  # fmt: skip
        loss = transformers.Trainer(trained, arguments, train_dataset=rows).train().training_loss
        before, after = model.state_dict(), trained.state_dict()
        return loss, {name: before[name] - after[name] for name in before}

    loss, gradients = train_once(batches)
    expected_loss, expected = train_once(1)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0.01
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * largest, rtol=1e-4)
    return loss
