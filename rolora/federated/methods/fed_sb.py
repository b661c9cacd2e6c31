"""Fed-SB: both factors stay, and an r × r matrix R between them trains: the product is `B R A`.

Singhal et al. 2025 (arXiv 2502.15436). B and A are the left and right singular vectors of the first
gradient of the whole weight, the mean over the clients' (see `rolora.run.spans`), so the mean of R
is exact and r² values travel. Theirs starts R at the singular values of that first step; here it is
zero, so that a run begins at the base model, as every other method's does.
"""

NARROWS = True


def phase(round: int, schedule: str) -> str:
    return "B"
