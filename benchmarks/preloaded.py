"""What every case of PyTorch needs, without starting a thread or touching a device."""

import transformers.models.gpt2.modeling_gpt2

import benchmarks.peers
from benchmarks.timm_alone import timm_utils

timm_utils()
__all__ = ["benchmarks", "transformers"]
