"""FedAvg-LoRA (FedIT): both factors train and each is averaged by itself, so the product's mean has cross terms.

Zhang et al., ICASSP 2024.
"""

from rolora.federated.methods.mean import collect

__all__ = ["collect", "phase"]


def phase(round: int, schedule: str) -> str:
    return "BOTH"
