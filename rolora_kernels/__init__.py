"""Kernels for LoRA linears of which one factor trains: `lora_linear`, its grouped form, and what
says which path ran.
"""

from rolora_kernels.dispatch import BackendUnavailable, Choice, explain, use_backend
from rolora_kernels.expert_rows import ExpertRows
from rolora_kernels.experts import expert_lora_linear
from rolora_kernels.linear import grouped_lora_linear, lora_linear
from rolora_kernels.multi import multi_lora_linear
from rolora_kernels.plan import Plan
from rolora_kernels.rows import AdapterRows
from rolora_kernels.weights import Dense, FrozenWeight

__all__ = [
    "AdapterRows",
    "BackendUnavailable",
    "Choice",
    "Dense",
    "ExpertRows",
    "FrozenWeight",
    "Plan",
    "expert_lora_linear",
    "explain",
    "grouped_lora_linear",
    "lora_linear",
    "multi_lora_linear",
    "use_backend",
]
