"""FedSA-LoRA: clients train both factors, share A only and keep their own B: a personalised model
each. Guo et al., ICLR 2025.
"""

KEPT = ("B",)


def phase(round: int, schedule: str) -> str:
    return "A"
