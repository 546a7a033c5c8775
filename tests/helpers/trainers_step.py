"""What test_trainers.py runs beside the files of docs/trainers.md: one step of SGD in each trainer.

`python trainers_step.py PARTS PROCESSES FILE` writes the change of the weights to an .npz file:
`lightning/...` and `transformers/...`. Eight images are shared among the parts and the processes.
"""

from __future__ import annotations

import sys

import lightning
import numpy as np
import torch
from detector import collate, examples
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from with_lightning import Module
from with_transformers import DetectionTrainer, Model

RATE = 0.1
IMAGES = 8


class Plain(Module):
    """The page's module, with SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def with_lightning(module: Plain, batch_size: int, parts: int, processes: int) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=parts,
        logger=False,
        enable_checkpointing=False,
    )
    data = examples(IMAGES, seed=0)
    trainer.fit(module, DataLoader(data, batch_size=batch_size, collate_fn=collate))
    assert trainer.global_step == 1


def with_transformers(model: Model, batch_size: int, parts: int, folder: str) -> None:
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=parts,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
    )
    data = examples(IMAGES, seed=0)
    trainer = DetectionTrainer(model, arguments, data_collator=collate, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 1


def main(parts: int, processes: int, file: str) -> None:
    torch.manual_seed(0)
    module, model = Plain(), Model()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    model.load_state_dict(start)
    batch_size = IMAGES // parts // processes
    with_lightning(module, batch_size, parts, processes)
    with_transformers(model, batch_size, parts, f"{file}.run")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        trained = {"lightning": module.state_dict(), "transformers": model.state_dict()}
        np.savez(
            file,
            **{
                f"{trainer}/{name}": (value - start[name]).numpy()
                for trainer, weights in trained.items()
                for name, value in weights.items()
            },
        )
    if torch.distributed.is_initialized():
        # gloo's thread releases tensors late. If that is when the interpreter ends, the process is
        # aborted; the barrier makes it happen now.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
