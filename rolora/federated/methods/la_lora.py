"""LA-LoRA: a client's local steps alternate between the factors, B at twice the rate; both travel
and each is averaged by itself.

Liu et al., ICLR 2026 (arXiv 2602.19926), as their released code has it: the first local step trains
B, the second A, and so on, so that no step moves both; a head trains in every step. Their fixed
low-pass filter [1 4 6 4 1] / 16 smooths noise that a client adds to each of its steps' gradients;
here privacy is the server's noise on the mean (`--dp-clip`), so there is nothing for it to smooth.
"""

RATES = {"B": 2.0}


def phase(round: int, schedule: str) -> str:
    return "BOTH"


def local_phase(step: int) -> str:
    return "B" if step % 2 == 0 else "A"
