"""A model of transformers, trained in blocks by the Trainer, and saved as a folder that from_pretrained loads.

Run: python examples/transformers_trainer.py  (needs scikit-learn for the data; pip install transformers accelerate)
"""

import torch
import transformers  # type: ignore[import-not-found]
from sklearn.datasets import load_digits
from torch import Tensor

import blocklocal as bll


class BlockLocalTrainer(transformers.Trainer):
    def __init__(self, learner: bll.Hooked, **settings) -> None:
        self.learner, optimizer = learner, torch.optim.AdamW(learner.parameters(), lr=settings["args"].learning_rate)
        super().__init__(learner.model, optimizers=(optimizer, None), callbacks=[Borders(learner)], **settings)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        inputs, share = self._prepare_inputs(inputs), 1 / self.args.gradient_accumulation_steps
        labels = inputs.pop("labels")
        with self.compute_loss_context_manager():
            losses = self.learner.train().backward(inputs, labels, scale=share)
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({f"loss_block{k}": loss for k, loss in enumerate(losses.tolist())})
        return losses[-1] * share  # the loss of the model's own prediction


class Borders(transformers.TrainerCallback):
    """The Trainer clears the gradients of the model and saves it; the same for the heads at the borders."""

    def __init__(self, learner: bll.Hooked) -> None:
        self.borders = learner.borders

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.borders.zero_grad()

    def on_save(self, args, state, control, **_) -> None:
        torch.save(self.borders.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/borders.pt")


def main(*, root: str = "runs/trainer", **settings) -> BlockLocalTrainer:
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    images = torch.tensor(digits, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic", "num_labels": 10}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_channels=1, **sizes))
    learner = bll.Hooked(model, blocks=3, classes=10, example=images[:4])
    given = {"num_train_epochs": 4, "learning_rate": 3e-3, "max_grad_norm": 0.0, "report_to": "none", "use_cpu": True}
    args = transformers.TrainingArguments(root, **(given | settings))
    trainer = BlockLocalTrainer(learner, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model(f"{root}/model")
    return trainer


if __name__ == "__main__":
    main()
