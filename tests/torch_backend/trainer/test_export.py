"""Complete models with averaged weights, which load where this library is not installed."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

from ema import ArgumentTypeError, EMACallback, ModelError, StateError
from tests.torch_helpers import assert_same


@pytest.fixture
def assert_averaged():
    """A loaded model is the live one, but for what is averaged."""

    def check(loaded, live, callback):
        expected = dict(live.state_dict())
        with callback.use_ema(live):
            expected = {name: value.clone() for name, value in live.state_dict().items()}
        assert_same(dict(loaded.state_dict()), expected)

    return check


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_whole_model(new_gpt2, train, tmp_path, assert_averaged, tied):
    """Tied and frozen weights included; a note says what the weights are."""
    gpt2 = new_gpt2(tie_word_embeddings=tied)
    gpt2.transformer.wpe.weight.requires_grad_(requires_grad=False)
    callback = EMACallback(0.6)
    train(gpt2, [callback])
    live = gpt2.lm_head.weight.detach().clone()
    callback.save_pretrained(gpt2, tmp_path / "averaged")
    assert torch.equal(gpt2.lm_head.weight, live)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")
    assert_averaged(loaded, gpt2, callback)
    assert not torch.equal(loaded.lm_head.weight, live)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied
    note = json.loads((tmp_path / "averaged" / "ema.json").read_text())
    assert note == {
        "weights": "ema",
        "decay": pytest.approx(0.6),
        "schedule": {"schedule": "ConstantDecay", "decay": 0.6},
        "step": 6,
        "count": 6,
    }


def test_in_shards(gpt2, train, tmp_path, assert_averaged):
    """Options go to the model's own save_pretrained."""
    callback = EMACallback(0.6)
    train(gpt2, [callback])
    callback.save_pretrained(gpt2, tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_averaged(AutoModelForCausalLM.from_pretrained(tmp_path), gpt2, callback)


def test_buffers_are_there(make_trainer, tmp_path, assert_averaged):
    """The statistics of a BatchNorm, as they are."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = ResNetForImageClassification(config)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    callback = EMACallback(0.6)
    trainer = make_trainer(model, [callback])
    trainer.train_dataset = rows
    trainer.train()
    callback.save_pretrained(model, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert any("running_mean" in name for name in loaded.state_dict())
    assert_averaged(loaded, model, callback)


def test_at_the_end_of_training(gpt2, train, folder, assert_averaged):
    """save_ema_model=True writes it into the output folder, under the name of the callback."""
    callbacks = (
        EMACallback(0.6, save_ema_model=True),
        EMACallback(0.5, save_ema_model=True, name="fast"),
    )
    train(gpt2, callbacks)
    for callback, name in zip(callbacks, ("ema", "ema-fast"), strict=True):
        assert_averaged(AutoModelForCausalLM.from_pretrained(folder / name), gpt2, callback)


def test_into_a_half_precision_model(new_gpt2, train, tmp_path, assert_averaged):
    """The file has the model's own dtype, the average was float32."""
    gpt2 = new_gpt2().to(torch.bfloat16)
    callback = EMACallback(0.6)
    train(gpt2, [callback])
    assert callback.get_ema_state()["averages"]["transformer.wte.weight"].dtype == torch.float32
    callback.save_pretrained(gpt2, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_averaged(loaded, gpt2, callback)


def test_bad_input(gpt2, new_gpt2, train, tmp_path):
    """No average, another model, or a model that cannot save itself: nothing is written."""
    callback = EMACallback(0.6)
    with pytest.raises(StateError, match="there is no average"):
        callback.save_pretrained(gpt2, tmp_path / "none")
    train(gpt2, [callback])
    with pytest.raises(ModelError, match="does not fit"):
        callback.save_pretrained(new_gpt2(n_embd=8), tmp_path / "none")
    with pytest.raises(ArgumentTypeError, match="must have save_pretrained, got Linear"):
        callback.save_pretrained(nn.Linear(2, 2), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def new_tokenizer():
    """A word-level tokenizer of two words."""
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def assert_tokenizer_in(folder):
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert loaded("hello", return_tensors=None)["input_ids"] == [1]


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_the_processing_class_of_the_trainer_is_written_too(
    gpt2, make_trainer, folder, tmp_path, attached
):
    """At the end of training and by hand, as into every checkpoint."""
    callback = EMACallback(0.6, save_ema_model=True)
    trainer = make_trainer(gpt2, [callback])
    trainer.processing_class = trainer.callback_handler.processing_class = new_tokenizer()
    if attached:
        callback.attach(trainer)
    trainer.train()
    callback.save_pretrained(gpt2, tmp_path / "by hand")
    for written in (folder / "ema", tmp_path / "by hand"):
        assert_tokenizer_in(written)
        AutoModelForCausalLM.from_pretrained(written)


@pytest.mark.parametrize("columns", [True, False], ids=["columns-removed", "columns-kept"])
def test_the_tokenizer_of_the_data_collator_is_written_where_there_is_no_other(
    gpt2, make_trainer, folder, columns
):
    """As the Trainer does."""
    trainer = make_trainer(
        gpt2, [EMACallback(0.6, save_ema_model=True)], remove_unused_columns=columns, max_steps=5
    )
    trainer.data_collator = DataCollatorForLanguageModeling(new_tokenizer(), mlm=False)
    trainer.train_dataset = [{"input_ids": [1, 2, 1]}] * 8
    trainer.train()
    trainer.save_model(str(folder / "live"))
    for written in ("ema", "live"):
        assert_tokenizer_in(folder / written)


class Unsaved:
    """A processing class that cannot save itself; the Trainer needs that only when it saves."""


def test_a_processing_class_by_hand(gpt2, new_gpt2, make_trainer, folder, tmp_path):
    """It comes before that of the Trainer; what cannot be saved is refused before anything is."""
    callback = EMACallback(0.6, save_ema_model=True)
    trainer = make_trainer(gpt2, [callback])
    trainer.processing_class = trainer.callback_handler.processing_class = Unsaved()
    trainer.train()
    assert (folder / "ema" / "config.json").exists()
    callback.save_pretrained(gpt2, tmp_path / "given", processing_class=new_tokenizer())
    assert_tokenizer_in(tmp_path / "given")
    with pytest.raises(ArgumentTypeError, match=r"`processing_class` .* got Unsaved"):
        callback.save_pretrained(gpt2, tmp_path / "none", processing_class=Unsaved())
    assert not (tmp_path / "none").exists()


def test_another_run_forgets_the_processing_class(gpt2, make_trainer, tmp_path):
    callback = EMACallback(0.6)
    for processing_class in (new_tokenizer(), None):
        trainer = make_trainer(gpt2, [callback])
        trainer.callback_handler.processing_class = processing_class
        trainer.train()
    callback.save_pretrained(gpt2, tmp_path / "averaged")
    assert not list((tmp_path / "averaged").glob("tokenizer*"))
