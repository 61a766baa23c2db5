"""Everything that a case of PyTorch needs, without starting a thread or touching a device."""

import transformers.models.gpt2.modeling_gpt2

import benchmarks.peers

benchmarks.peers.timm_utils()
__all__ = ["benchmarks", "transformers"]
