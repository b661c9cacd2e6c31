"""Metrics of a saved adapter, and of clients that keep factors of their own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rolora.config import Config
from rolora.errors import BadInput
from rolora.federated.local import ClientState
from rolora.federated.methods import Method
from rolora.recipes import choosing
from rolora.run import base_model, rows
from rolora.run import examples as encoding
from rolora.run.job import Job
from rolora_kernels import BackendUnavailable, use_backend

_JUDGED = 10  # clients whose own models are evaluated, where they have any


def evaluate_adapter(
    config: Config, adapter: str | None, labels: list[str] | None
) -> dict[str, float]:
    """Metrics of a saved adapter (or of the bare model) on the evaluation file or data set;
    `labels` are those it was trained on, those of the file where they are not known. Rows with
    nothing to be judged by are counted as `dropped`.
    """
    found, config = rows.read_evaluation(config)
    hf_config = base_model.read_config(config)
    config = base_model.settle(config, hf_config)
    base_model.require_positions(config, hf_config)
    tokenizer = base_model.load_tokenizer(config, hf_config)
    recipe = choosing.build(config, tokenizer, found, torch.device(config.system.device), labels)
    held, _, tally = encoding.encode(
        recipe, found, config.task.unlearnable, rows.evaluation_name(config)
    )
    dropped = {"dropped": float(tally.lost)} if tally.lost else {}
    model = base_model.load_adapted(config, hf_config, tokenizer, adapter, recipe.labels)
    backend = config.system.backend
    try:
        with use_backend(backend) if backend != "auto" else nullcontext():
            return recipe.evaluate(model, held, config.data.eval_batch_size) | dropped
    except BackendUnavailable as error:
        raise BadInput(f"--backend: {error}") from None


class OwnFactors(Mapping[int, ClientState]):
    """What clients keep of the model, by client: no moments. One is read when it is asked for."""

    def __init__(self, method: Method, client_states: Mapping[int, ClientState]):
        self._kept, self._states = method.kept, client_states

    def __getitem__(self, client: int) -> ClientState:
        state = self._states[client]
        return {kind: state[kind] for kind in self._kept if kind in state}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._states))

    def __len__(self) -> int:
        return len(self._states)


def personal(
    job: Job,
    published: dict[str, Tensor],
    client_states: Mapping[int, ClientState],
    examples: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Metrics where clients keep factors of their own: the mean over the first clients that do, and
    the spread of the headline.
    """
    found = (client_states[client] for client in sorted(client_states))
    own = list(islice(filter(None, found), _JUDGED))
    if not own:
        return job.evaluate(published, examples)
    each = [job.evaluate(published | state, examples) for state in own]
    headline = job.headline
    spread = statistics.pstdev(metrics[headline] for metrics in each)
    means = {name: statistics.fmean(metrics[name] for metrics in each) for name in each[0]}
    return means | {f"{headline}_spread_over_clients": spread}
