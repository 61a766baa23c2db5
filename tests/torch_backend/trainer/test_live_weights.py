"""Training does not change by a bit: everybody but the evaluation sees live weights."""

import pytest

from ema import EMACallback
from tests.torch_backend.trainer.small_runs import (
    Net,
    Recording,
    Reference,
    Scaled,
    arguments,
    averaging_by_hand,
    equal,
    loss_of,
    rows,
    stored,
    weights,
)

DECAY = 0.7

TRAINING = {
    "adamw": (Recording, {"optim": "adamw_torch"}),
    "schedule-free": (Recording, {"optim": "schedule_free_adamw"}),
    "fp16": (Scaled, {"max_grad_norm": 0}),
}
EVALUATION = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "two-sets": {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
    },
}
OTHERS = ["alone", "in-front", "behind"]


def new_trainer(folder, training, evaluation, callbacks):
    """A run that has not begun."""
    kind, options = TRAINING[training]
    sets = {"one": rows(seed=2), "two": rows(seed=3)}
    return kind(
        model=Net(),
        args=arguments(folder, **options, **EVALUATION[evaluation]),
        train_dataset=rows(12),
        eval_dataset=sets if evaluation == "two-sets" else rows(seed=2),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def without_us(tmp_path_factory):
    """Runs without an average, each made once."""
    made = {}

    def get(training, evaluation, others):
        key = training, evaluation, others
        if key not in made:
            folder = tmp_path_factory.mktemp("plain")
            reference = Reference()
            callbacks = [] if others == "alone" else [reference]
            trainer = new_trainer(folder, training, evaluation, callbacks)
            trainer.train()
            made[key] = trainer, reference.seen, stored(folder)
        return made[key]

    return get


@pytest.mark.parametrize("attached", [False, True], ids=["events", "attached"])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("evaluation", EVALUATION)
@pytest.mark.parametrize("training", TRAINING)
def test_training_does_not_change_by_a_bit_and_metrics_are_of_the_average(
    training, evaluation, others, attached, without_us, tmp_path
):
    """Every forward pass, every look of another callback, every checkpoint is as without us."""
    plain, plain_seen, plain_stored = without_us(training, evaluation, others)
    reference, callback = Reference(), EMACallback(DECAY, eval_with_ema=True)
    order = {
        "alone": [callback],
        "in-front": [reference, callback],
        "behind": [callback, reference],
    }
    trainer = new_trainer(tmp_path, training, evaluation, order[others])
    listed = list(trainer.callback_handler.callbacks)
    if attached:
        callback.attach(trainer)
    with averaging_by_hand(trainer, DECAY):
        trainer.train()

    assert len(trainer.trained) == len(plain.trained) == 8
    assert all(map(equal, trainer.trained, plain.trained))
    assert equal(weights(trainer.model), weights(plain.model))
    assert len(reference.seen) == len(plain_seen)
    assert all(map(equal, reference.seen, plain_seen))
    ours = stored(tmp_path)
    assert ours.keys() == plain_stored.keys() != set()
    assert all(equal(ours[name], plain_stored[name]) for name in ours)

    assert len(trainer.evaluated) == {"steps": 4, "epochs": 2, "two-sets": 6}[evaluation]
    by_hand = [
        loss_of(average, data)
        for average, (_, data) in zip(trainer.averages, trainer.evaluated, strict=True)
    ]
    assert [loss for loss, _ in trainer.evaluated] == by_hand
    assert by_hand != [loss for loss, _ in plain.evaluated]
    assert (callback.ema_model.step < 8) == (training == "fp16")
    assert vars(trainer.model).keys() == vars(plain.model).keys()
    assert trainer.callback_handler.callbacks == listed
