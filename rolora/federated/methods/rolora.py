"""RoLoRA: odd rounds train B, even rounds train A; the mean of the trained factor is exact, the
other one is common.

Chen et al., NeurIPS 2025, Algorithm 1. B goes first: with B = 0 the gradient of A is zero.
"""

CARRIES_MOMENTS = True  # worth 2 to 3 points with all clients (benchmarks/results/study)


def phase(round: int, schedule: str) -> str:
    """The letter of `schedule` for this round; "BA" trains B in round 1, A in round 2, …"""
    return schedule[(round - 1) % len(schedule)]
