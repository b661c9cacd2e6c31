"""FedAvg-LoRA (FedIT): both factors train and each is averaged by itself, so the product's mean has
cross terms.

Zhang et al., ICASSP 2024.
"""


def phase(round: int, schedule: str) -> str:
    return "BOTH"
