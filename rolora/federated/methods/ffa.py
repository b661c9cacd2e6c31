"""FFA-LoRA: A stays at its initial value, B trains in every round. Sun et al., ICLR 2024."""


def phase(round: int, schedule: str) -> str:
    return "B"
