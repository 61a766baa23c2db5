"""One process of Trainer and Accelerate runs under torchrun with FSDP2; for test_trainer.py.

Accelerate takes FSDP on accelerators only, and on a CPU falls back to DDP. What is behind that
check runs on a CPU too, so the check is lifted here.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ema import EMACallback, EMAModel
from ema.torch_backend.model import EMAModel as Model

CONFIG = {
    "n_layer": 2,
    "n_embd": 18,
    "n_head": 2,
    "vocab_size": 33,
    "n_positions": 15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

_begin = AcceleratorState.__init__


def allow_cpu(self, *args, fsdp_plugin=None, **kwargs):
    """Begin the state of Accelerate as on an accelerator."""
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def new_model(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**CONFIG))


def data():
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    labels = rows.clone()
    labels[:, 0] = -100  # nothing predicts the first token: the Trainer would count it as a target
    return [{"input_ids": r, "labels": ls} for r, ls in zip(rows, labels, strict=True)]


def whole(tensors):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def new_adapter(seed):
    """A LoRA model and a layer that trains with it; the base is always the same."""
    model = new_model(0)
    torch.manual_seed(seed)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["c_attn"],
        modules_to_save=["ln_f"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    return get_peft_model(model, settings)


def train(folder, seed, resume=None, make=new_model, kind="FULL_STATE_DICT"):
    """A run of the Trainer, and what its callback holds at the end."""
    callback = EMACallback(0.9, eval_with_ema=True, save_ema_model=True)
    seen = []
    update = Model.update

    def trained(model):
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    def recorded(self):
        update(self)
        seen.append(whole(trained(self.model)))

    model = make(seed)
    initial = {name: value.detach().clone() for name, value in trained(model).items()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            fsdp=True,
            fsdp_config={
                "version": 2,
                "transformer_layer_cls_to_wrap": ["GPT2Block"],
                "state_dict_type": kind,
            },
        ),
        train_dataset=data(),
        eval_dataset=data()[:8],
        callbacks=[callback],
    )
    callback.attach(trainer)
    Model.update = recorded
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        Model.update = update
    average = {name: value.clone() for name, value in initial.items()}
    for live in seen:
        for name, value in live.items():
            average[name].lerp_(value.detach(), 1 - 0.9)
    log = trainer.state.log_history
    averages = whole(callback.get_ema_state()["averages"])
    return {
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "averages": averages,
        "by hand": average,
        "metrics": {e["step"]: e["eval_loss"] for e in log if "eval_loss" in e},
        "distances": [e["ema_distance"] for e in log if "ema_distance" in e],
        "step": callback.ema_model.step,
    }


def accelerated(home):
    """A loop with Accelerate: an average from before ``prepare`` and one from after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = new_model(3)
    before = EMAModel(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    after = EMAModel(model, 0.9)
    tokens = torch.stack([row["input_ids"] for row in data()[:4]])
    for _ in range(4):
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        before.update()
        after.update()
    with torch.no_grad(), after.use_ema():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    after.export(home / "accelerated.safetensors")
    return {
        "before": whole(before.averaged_parameters()),
        "after": whole(after.averaged_parameters()),
        "loss": loss,
        "tokens": tokens,
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    }


def main(home):
    AcceleratorState.__init__ = allow_cpu
    rank = int(os.environ["RANK"])
    first = train(home / "run", 0)
    dist.barrier()
    resumed = train(home / "again", 1, resume=str(home / "run" / "checkpoint-3"))
    shards = {"make": new_adapter, "kind": "SHARDED_STATE_DICT"}
    adapter = train(home / "adapter", 0, **shards)
    dist.barrier()
    checkpoint = str(home / "adapter" / "checkpoint-3")
    result = {
        "first": first,
        "resumed": resumed,
        "adapter": adapter,
        "adapter resumed": train(home / "adapter again", 1, resume=checkpoint, **shards),
        "accelerate": accelerated(home),
    }
    torch.save(result, home / f"rank{rank}.pt")
    (home / "config.json").write_text(json.dumps(CONFIG))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
