"""One process of a Trainer run under torchrun; for test_ddp.py."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ema import EMACallback, EMAModel


def at_an_index(storage, location):
    return storage if location.startswith("cpu:") else None


# Trainers up to that of transformers 5.17 resume distributed runs on CPUs with the location "cpu:0",
# of which torch.load knows nothing.
torch.serialization.register_package(100, lambda storage: None, at_an_index)


class Recorder(TrainerCallback):
    """The live weights after every step."""

    def __init__(self):
        self.history = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.history = [{n: p.detach().clone() for n, p in model.named_parameters()}]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.append({n: p.detach().clone() for n, p in model.named_parameters()})


class Killed(Trainer):
    """The second process ends in the middle of the second save, when the first one waits for it.

    If the first one did not wait, it would write its average first.
    """

    def _save_rng_state(self, folder):
        if os.environ["RANK"] == "1" and self.state.global_step == 4:
            waits, average = (Path(folder) / name for name in ("waits", "ema.safetensors"))
            while not (waits.exists() or average.exists()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(folder)


def announce_waits(folder):
    """The main process says in the folder of the second save that it waits for the other one."""
    wait = dist.barrier

    def announced(*args, **kwargs):
        if (folder / "trainer_state.json").exists() and os.environ["RANK"] == "0":
            (folder / "waits").touch()
        return wait(*args, **kwargs)

    dist.barrier = announced


def run(config, folder, seed, attached, resume, kind=Trainer):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**config))
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    record, callback = Recorder(), EMACallback(0.6, eval_with_ema=True, save_ema_model=True)
    trainer = kind(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[record, callback],
    )
    if attached:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    metrics = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    return model, record, callback, metrics, trainer.state.best_model_checkpoint


def main(config, home):
    rank = int(os.environ["RANK"])
    saves = []
    save = EMAModel.save

    def counted(self, path, **options):
        saves.append(str(path))
        return save(self, path, **options)

    EMAModel.save = counted
    model, record, callback, metrics, best = run(
        config, home / "run", 0, attached=False, resume=None
    )
    state = callback.get_ema_state()
    average = {name: value.clone() for name, value in record.history[0].items()}
    for live in record.history[1 : state["step"] + 1]:
        for name, value in live.items():
            average[name].lerp_(value, 1 - 0.6)
    checkpoint = str(home / "run" / "checkpoint-4")
    again, _, resumed, more, _ = run(
        config, home / "again", rank + 1, attached=True, resume=checkpoint
    )
    result = {
        "by_hand": all(torch.equal(state["averages"][name], average[name]) for name in average),
        "state": state,
        "weights": model.state_dict(),
        "resumed_state": resumed.get_ema_state(),
        "resumed_weights": again.state_dict(),
        "metrics": metrics,
        "resumed_metrics": more,
        "best": best,
        "saves": saves,
    }
    torch.save(result, home / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    config, home = json.loads(sys.argv[1]), Path(sys.argv[2])
    if "kill" in sys.argv:
        announce_waits(home / "run" / "checkpoint-4")
        run(config, home / "run", 0, attached=False, resume=None, kind=Killed)
    main(config, home)
