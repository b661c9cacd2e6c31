"""A random state, and its factors in float64."""

import numpy as np
import torch

from rolora.federated.state import GlobalState
from tests.rolora.federated import toy


def random_state(seed=0, layout=None):
    layout = layout or toy.model()[1]
    rng = np.random.default_rng(seed)
    return layout, GlobalState.initial(
        {
            k: torch.from_numpy(rng.normal(size=n).astype(np.float32))
            for k, n in layout.sizes.items()
        }
    )


def factors(layout, held):
    A, B = layout.views(held, "A"), layout.views(held, "B")
    return {
        path: (A[path].numpy().astype(np.float64), B[path].numpy().astype(np.float64)) for path in A
    }
