"""FFA-LoRA: A stays at its initial value, B trains in every round. Sun et al., ICLR 2024."""

from rolora.federated.methods.mean import collect

__all__ = ["collect", "phase"]


def phase(round: int, schedule: str) -> str:
    return "B"
