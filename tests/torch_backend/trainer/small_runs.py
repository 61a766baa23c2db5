"""Short Trainer runs of a tiny model, with everything that others saw of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ema import EMAModel

STEPS = 8


class Net(nn.Module):
    """Two layers, and dropout that tells whether the mode of the model is right."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 1)

    def forward(self, x=None, labels=None):
        out = self.head(self.dropout(self.body(x).relu()))
        return {"loss": (out - labels).square().mean(), "logits": out}


def rows(count: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """A data set; eight rows of it are one batch of an evaluation."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(4, generator=generator),
            "labels": torch.randn(1, generator=generator),
        }
        for _ in range(count)
    ]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies, read from the modules themselves, as nobody can notice."""
    return {
        f"{path}.{name}": parameter.detach().clone()
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
    }


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """The same names and the same bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def loss_of(tensors: dict[str, torch.Tensor], data: list[dict[str, torch.Tensor]]) -> float:
    """The loss of a model with these weights in evaluation mode, computed by hand."""
    model = Net()
    model.load_state_dict(tensors)
    model.eval()
    with torch.no_grad():
        return model(**{key: torch.stack([row[key] for row in data]) for key in data[0]})[
            "loss"
        ].item()


class Recording(Trainer):
    """Keeps the weights before every forward pass of training, and what was evaluated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained: list[dict[str, torch.Tensor]] = []
        self.evaluated: list[tuple[float, list]] = []  # loss, data
        self.averages: list[dict[str, torch.Tensor]] = []  # by hand, one for each evaluation
        self.average: dict[str, torch.Tensor] = {}

    def training_step(self, model, inputs, *args, **kwargs):
        self.trained.append(weights(self.model))
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self.averages.append({name: value.clone() for name, value in self.average.items()})
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs["metric_key_prefix"]
        self.evaluated.append((output.metrics[f"{prefix}_loss"], dataloader.dataset))
        return output


class Scaled(Recording):
    """With a gradient scaler that overflows at first: accelerate has none for the CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, backoff_factor=2.0**-60
        )


class Reference(TrainerCallback):
    """Keeps a reference model and pulls the weights to it, as TRL does; trusts what it sees."""

    def __init__(self):
        self.seen: list[dict[str, torch.Tensor]] = []
        self.reference: dict[str, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))
        model.eval()  # to sample from it, say; and not back
        now = {name: value.clone() for name, value in model.state_dict().items()}
        self.seen += [weights(model), now]
        if state.global_step % 3 == 0:
            self.reference = now
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.lerp_(self.reference.get(name, parameter), 0.1)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))
        model.eval()
        self.seen.append(weights(model))

    def look(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))

    on_train_begin = on_epoch_begin = on_step_begin = on_save = on_train_end = look


@contextmanager
def averaging_by_hand(trainer: Recording, decay: float) -> Iterator[None]:
    """Let ``trainer.average`` follow what an ``EMAModel`` is shown in every update."""
    update = EMAModel.update
    trainer.average = weights(trainer.model)

    def updated(self):
        update(self)
        for name, value in weights(self.model).items():
            trainer.average[name].lerp_(value, 1 - decay)

    EMAModel.update = updated
    try:
        yield
    finally:
        EMAModel.update = update


def arguments(folder: Path, **options) -> TrainingArguments:
    """Of a short run on the CPU."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The models in the checkpoints of a run, and their optimizers' tensors."""
    found = {}
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        optimizer = torch.load(checkpoint / "optimizer.pt")["state"]
        found[checkpoint.name] = {
            **load_file(checkpoint / "model.safetensors"),
            **{
                f"optimizer {index} {name}": torch.as_tensor(value)
                for index, values in optimizer.items()
                for name, value in values.items()
            },
        }
    return found
