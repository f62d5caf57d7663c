"""Kernels of posttrain, each beside its plain PyTorch twin."""

from posttrain_kernels.linear_logprob import (
    linear_kl,
    linear_kl_reference,
    linear_logprob,
    linear_logprob_reference,
)

__all__ = ["linear_kl", "linear_kl_reference", "linear_logprob", "linear_logprob_reference"]
