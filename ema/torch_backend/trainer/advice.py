"""Warnings about runs whose average is not what the user expects."""

from __future__ import annotations

from torch import nn
from transformers import TrainerState

from ema.errors import warn
from ema.info import describe_ema
from ema.torch_backend.model import EMAModel
from ema.torch_backend.settings import Settings
from ema.torch_backend.swap.swap import holds_averages
from ema.torch_backend.trainer.surroundings import surroundings

__all__ = ["on_live_evaluation", "on_no_update", "on_slow_decay", "on_step_beyond_the_last"]

_TOO_MUCH_LEFT = 0.2
"""The decay counts as slow if more than this share of the initial weights is left at the end."""


def on_slow_decay(settings: Settings, max_steps: int) -> None:
    """Warn at the beginning of a run if much of its initial weights will be left at the end."""
    steps = max_steps - settings.update_after_step
    if steps < 1:
        return
    try:
        about = describe_ema(settings.schedule, steps, update_every=settings.update_every)
    except Exception as error:  # training may end before the update that fails here
        warn(
            f"{settings.schedule} does not give a weight for every update of {max_steps} steps:"
            f" {error!r}"
        )
        return
    if about.initial_share > _TOO_MUCH_LEFT:
        warn(
            f"after {max_steps} steps {about.initial_share:.0%} of the average will still be"
            f" the initial weights: {settings.schedule} is slow for so short a run;"
            f" decay={about.recommended_decay:.4g} suits this run"
        )


def on_step_beyond_the_last(state: TrainerState) -> None:
    """Warn before a step past ``max_steps``: the Trainer checks ``max_steps`` only after a step."""
    if state.global_step >= state.max_steps:
        warn(
            f"training goes on from step {state.global_step}, and max_steps={state.max_steps}:"
            " the Trainer takes one step more, and the average follows it; attach(trainer)"
            " ends training instead"
        )


def on_live_evaluation(average: EMAModel[nn.Module]) -> None:
    """Warn if an evaluation of the run has seen the live weights."""
    if surroundings().training and average.count > 0 and not holds_averages(average.model):
        warn(
            "this evaluation saw live weights in spite of `eval_with_ema`: a callback ran it,"
            " or it did not call `model.eval()`; attach(trainer) gives the averaged weights to"
            " every evaluation"
        )


def on_no_update(average: EMAModel[nn.Module], settings: Settings) -> None:
    """Warn at the end of a run if the average was never updated."""
    if average.step > 0 and average.count == 0:
        warn(
            f"no update was made in {average.step} steps with update_after_step="
            f"{settings.update_after_step} and update_every={settings.update_every}:"
            " the average still equals weights of the run"
        )
