"""TRL's DPO with a reference model that follows the policy: our callback changes neither."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from ema import EMACallback
from tests.torch_helpers import assert_same

# TRL asks the model about activation checkpointing under its old name
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)

WORDS = ["the", "a", "sky", "sea", "is", "blue", "green", "wide", "deep", "calm", "yes", "no"]


@pytest.fixture
def tokenizer():
    """A word-level tokenizer of a few words."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def new_llama(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def preferences(count):
    """Pairs of answers, the first of which is preferred."""
    return Dataset.from_list(
        [
            {
                "prompt": f"the {WORDS[2 + row % 2]} is",
                "chosen": f" {WORDS[5 + row % 3]} yes",
                "rejected": f" {WORDS[7 + row % 3]} no",
            }
            for row in range(count)
        ]
    )


@pytest.fixture
def train(tokenizer, tmp_path):
    """Six steps; the reference follows after every second one, and each of them is evaluated."""

    def run(callbacks, attach=None):
        trainer = DPOTrainer(
            model=new_llama(tokenizer),
            ref_model=new_llama(tokenizer),
            args=DPOConfig(
                str(tmp_path / "run"),
                max_steps=6,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                sync_ref_model=True,
                ref_model_sync_steps=2,
                ref_model_mixup_alpha=0.6,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=preferences(8),
            eval_dataset=preferences(4),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        if attach is not None:
            attach.attach(trainer)
        trainer.train()
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        return trainer.model.state_dict(), trainer.ref_model.state_dict(), losses

    return run


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_policy_and_reference_are_those_of_a_run_without_us(train, attached):
    """Bit for bit, with averages evaluated in the steps in which the reference follows."""
    policy, reference, losses = train([])
    assert any(not torch.equal(reference[name], policy[name]) for name in policy)
    callback = EMACallback(0.5, eval_with_ema=True)
    averaged = train([callback], attach=callback if attached else None)
    assert_same(averaged[0], policy)
    assert_same(averaged[1], reference)
    assert len(averaged[2]) == len(losses) == 6
    assert averaged[2] != losses
