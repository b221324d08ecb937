"""A LLaMA as Hugging Face builds it, with random weights: bytes in, logits of the next byte out.

The state dict has Hugging Face's names. Axes: B sequence, T token, K token of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dytrun.errors import UserError
from dytrun.subject_config import LlamaConfig

_EPS = 1e-5  # Llama 2's


def build_language_model(model: LlamaConfig, num_tokens: int, context: int, device: str = "cpu") -> nn.Module:
    """Build a model that maps tokens (B, T) to logits (B, T, K), T at most `context`.

    `device="meta"` gives shapes without memory. Weights are drawn from torch's global generator, as Hugging Face draws
    them, with `model.init_std`: by default 1/√width, so that products neither grow nor shrink what they are given, and
    an embedding times √width begins with a variance of 1. Hugging Face's 0.02 is about that at the widths of DyT's
    paper; a narrow model with DyT hardly learns from there.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig as Shape
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise UserError(
            f"model=llama: needs Hugging Face's transformers ({error}); pip install 'dytrun[llm]'"
        ) from None
    std = model.width**-0.5 if model.init_std == "auto" else model.init_std
    shape = Shape(
        vocab_size=num_tokens, hidden_size=model.width, intermediate_size=model.hidden, num_hidden_layers=model.depth,
        num_attention_heads=model.heads, num_key_value_heads=model.heads, max_position_embeddings=context,
        rms_norm_eps=_EPS, initializer_range=std, use_cache=False, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        module = LlamaForCausalLM(shape)
    module.register_forward_hook(_logits)
    return module


def _logits(_module: nn.Module, _args: tuple[Tensor, ...], output: Any) -> Tensor:
    return output.logits
