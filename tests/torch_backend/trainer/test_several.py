"""Several callbacks of one Trainer, of which one evaluates."""

import pytest

from ema import EMACallback
from tests.torch_helpers import assert_same


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("evaluates", [0, 1])
def test_one_evaluates_and_each_averages_the_live_weights(
    evaluates, attached, gpt2, train, tokens, recorder
):
    """In any order: evaluation is announced to the first of them before the other is updated."""
    record = recorder()
    callbacks = [
        EMACallback(decay, name=name, eval_with_ema=index == evaluates)
        for index, (decay, name) in enumerate(((0.5, "fast"), (0.7, "slow")))
    ]
    trainer = train(
        gpt2,
        [record, *callbacks],
        attach=callbacks[evaluates] if attached else None,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=tokens(4),
    )
    for callback, decay in zip(callbacks, (0.5, 0.7), strict=True):
        assert_same(callback.get_ema_state()["averages"], record.average(decay))
    loss = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][-1]
    with callbacks[evaluates].use_ema(gpt2):
        assert trainer.evaluate()["eval_loss"] == loss


def test_an_evaluation_before_the_first_step_is_of_one_of_them(
    gpt2, new_gpt2, train, tokens, folder
):
    """The other begins from live weights, though the average of a resumed run is in the model."""
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_dataset": tokens(4)}
    train(gpt2, [EMACallback(0.5, name="fast")], steps=4, **saving)
    fast = EMACallback(0.5, name="fast", eval_with_ema=True)
    slow = EMACallback(0.6, name="slow")
    live = {name: value.detach().clone() for name, value in gpt2.named_parameters()}
    with pytest.warns(match="there is no average in"):
        train(
            new_gpt2(seed=1),
            [fast, slow],
            resume=str(folder / "checkpoint-4"),
            attach=slow,
            steps=4,
            eval_on_start=True,
            eval_strategy="steps",
            **saving,
        )
    assert_same(slow.get_ema_state()["averages"], live)
