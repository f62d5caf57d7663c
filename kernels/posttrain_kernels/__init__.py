"""Kernels of posttrain, each beside its plain PyTorch twin."""

from posttrain_kernels.linear_argmax import linear_argmax, linear_argmax_reference
from posttrain_kernels.linear_collision import linear_collision, linear_collision_reference
from posttrain_kernels.linear_divergence import linear_jsd, linear_jsd_reference
from posttrain_kernels.linear_logprob import (
    linear_kl,
    linear_kl_reference,
    linear_logprob,
    linear_logprob_reference,
)
from posttrain_kernels.linear_stored import linear_stored_kl, linear_stored_kl_reference

__all__ = [
    "linear_argmax",
    "linear_argmax_reference",
    "linear_collision",
    "linear_collision_reference",
    "linear_jsd",
    "linear_jsd_reference",
    "linear_kl",
    "linear_kl_reference",
    "linear_logprob",
    "linear_logprob_reference",
    "linear_stored_kl",
    "linear_stored_kl_reference",
]
