"""EMACallback under the real Trainer."""

import sys
import textwrap

import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
)

import ema
from ema import ArgumentError, CheckpointError, EMACallback, EMAWarning, ModelError, StateError
from tests import processes


class Recorder(TrainerCallback):
    """The weights after every optimizer step that changed them."""

    def __init__(self, model):
        self.history = [{n: p.detach().clone() for n, p in model.named_parameters()}]
        self.skipped = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        live = {n: p.detach().clone() for n, p in model.named_parameters()}
        if all(torch.equal(live[name], value) for name, value in self.history[-1].items()):
            self.skipped += 1
        else:
            self.history.append(live)

    def average(self, decay):
        """The recursion over all of them."""
        average = {name: value.clone() for name, value in self.history[0].items()}
        for live in self.history[1:]:
            for name, value in live.items():
                average[name].lerp_(value, 1 - decay)
        return average


def assert_is_average(callback, recorder, decay):
    ours = callback.ema_model.averaged_parameters()
    expected = recorder.average(decay)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}], ids=str
)
def test_averages_every_optimizer_step(gpt2, train, options):
    """Also with gradient accumulation, where only real steps count."""
    callback, recorder = EMACallback(decay=0.7), Recorder(gpt2)
    trainer = train(gpt2, [recorder, callback], **options)
    assert callback.ema_model.count == trainer.state.global_step == 6
    assert_is_average(callback, recorder, 0.7)


class Scaled(Trainer):
    """With a gradient scaler that overflows at first: accelerate has none for the CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, backoff_factor=2.0**-30
        )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_the_gradient_scaler_skipped_do_not_count(gpt2, train, optim):
    """Also with a fused optimizer, which the scaler calls and which skips by itself."""
    callback, recorder = EMACallback(decay=0.7), Recorder(gpt2)
    trainer = train(gpt2, [recorder, callback], steps=12, kind=Scaled, optim=optim, max_grad_norm=0)
    assert trainer.state.global_step == 12
    assert 1 <= recorder.skipped <= 10
    assert callback.ema_model.step == 12 - recorder.skipped
    assert_is_average(callback, recorder, 0.7)


def test_apply_and_restore_after_training(gpt2, train):
    callback = EMACallback(decay=0.5, update_every=2)
    train(gpt2, [callback])
    live = gpt2.lm_head.weight.detach().clone()
    average = callback.ema_model.averaged_parameters()["transformer.wte.weight"].clone()
    callback.apply_ema(gpt2)
    assert torch.equal(gpt2.lm_head.weight, average)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    callback.restore_original(gpt2)
    assert torch.equal(gpt2.lm_head.weight, live)
    with callback.use_ema(gpt2):
        assert torch.equal(gpt2.lm_head.weight, average)
    assert torch.equal(gpt2.lm_head.weight, live)


def test_every_train_starts_anew_unless_a_state_was_loaded(gpt2, new_gpt2, train):
    """A second train() is a new run, and so is its average; a loaded state is gone on with."""
    callback = EMACallback(decay=0.5)
    train(gpt2, [callback])
    train(gpt2, [callback])
    assert callback.ema_model.count == 6
    callback.load_ema_state(callback.get_ema_state())
    train(gpt2, [callback])
    assert callback.ema_model.count == 12
    callback.load_ema_state(callback.get_ema_state())
    other = new_gpt2()
    train(other, [callback])
    assert (callback.ema_model.count, callback.ema_model.model) == (18, other)
    fresh = EMACallback(decay=0.5)
    fresh.load_ema_state(callback.get_ema_state())
    assert fresh.get_ema_state()["step"] == 18
    train(gpt2, [fresh])
    assert fresh.ema_model.count == 24


def test_a_new_process_without_a_trainer(gpt2, config, train, tmp_path):
    """The basic scenario: save with torch.save, load with torch.load's defaults, apply."""
    callback = EMACallback(decay=0.5)
    train(gpt2, [callback])
    torch.save(callback.get_ema_state(), tmp_path / "ema_weights.pt")
    callback.apply_ema(gpt2)
    torch.save(gpt2.state_dict(), tmp_path / "expected.pt")
    program = f"""
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        from ema import EMACallback
        model = GPT2LMHeadModel(GPT2Config(**{config!r}))
        live = model.transformer.wte.weight.detach().clone()
        ema_callback = EMACallback(decay=0.5)
        ema_callback.load_ema_state(torch.load("ema_weights.pt"))
        ema_callback.apply_ema(model)
        expected = torch.load("expected.pt")
        assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
        assert ema_callback.get_ema_state()["count"] == 6
        ema_callback.restore_original(model)
        assert torch.equal(model.transformer.wte.weight, live)
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)]
    processes.run(command, cwd=tmp_path)


def test_a_decay_that_is_too_slow_for_the_run_is_pointed_out(gpt2, train):
    with pytest.warns(EMAWarning, match=r"after 6 steps 99% .* initial weights.*decay=0\.3"):
        train(gpt2, [EMACallback(decay=0.999)])


def test_a_run_without_an_update_is_pointed_out(gpt2, train):
    with pytest.warns(EMAWarning, match="no update was made in 6 steps with update_after_step=100"):
        train(gpt2, [EMACallback(decay=0.5, update_after_step=100)])


def test_bad_input(gpt2, new_gpt2, train):
    """One clear error each, and the callback as it was before."""
    with pytest.raises(ArgumentError, match="`decay`"):
        EMACallback(decay=2.0)
    callback = EMACallback(decay=ema.HalfLife(steps=2))
    for call in (callback.apply_ema, callback.restore_original):
        with pytest.raises(StateError, match="there is no average"):
            call(gpt2)
    with pytest.raises(StateError, match="there is no average"):
        callback.get_ema_state()
    with pytest.raises(CheckpointError, match="not a state of an EMAModel"):
        callback.load_ema_state(gpt2.state_dict())
    train(gpt2, [callback])
    with pytest.raises(StateError, match="needs an apply_ema"):
        callback.restore_original(gpt2)
    other = new_gpt2(n_embd=8)
    with pytest.raises(ModelError, match=r"has shape \(32, 8\), here it is \(32, 16\)"):
        callback.apply_ema(other)
    fresh = EMACallback(decay=ema.HalfLife(steps=2))
    fresh.load_ema_state(callback.get_ema_state())
    with pytest.raises(CheckpointError, match=r"has shape \(32, 8\), the state has \(32, 16\)"):
        fresh.apply_ema(other)
    fresh.apply_ema(gpt2)
    with pytest.raises(StateError, match="another average is swapped into"):
        callback.apply_ema(gpt2)
    with pytest.raises(StateError, match="another model than this one"):
        fresh.restore_original(other)
    fresh.restore_original()
