"""LoRA-A²-style: RoLoRA's alternation; a client sends only the ranks whose change matters most, as
many as it may.

After Koo et al. 2024 (arXiv 2410.22815). A rank's importance is the norm of what its change adds to
the product, ‖ΔB_j‖ · ‖A_j‖ or ‖B_j‖ · ‖ΔA_j‖, compared over all adapters of the client, so that
adapters get unequal numbers. What was not sent counts as no change. Chosen here after local
training, where the paper probes before it and trains the chosen ranks alone.
"""

SELECTS = True
TAKES_CLIENT_RANKS = True


def phase(round: int, schedule: str) -> str:
    """The letter of `schedule` for this round, as in RoLoRA."""
    return schedule[(round - 1) % len(schedule)]
