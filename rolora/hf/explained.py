"""What Hugging Face raises, in one line that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rolora.errors import BadInput


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns whatever Hugging Face raises about the model `name` into BadInput."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(explain(name, error)) from None


def explain(name: str, error: BaseException) -> str:
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain[-1] is not None and id(chain[-1]) not in seen:
        seen.add(id(chain[-1]))
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    kinds = {c.__name__ for e in chain if e is not None for c in type(e).__mro__}
    text = " ".join((str(error).strip() or type(error).__name__).split())
    local = "; for local files give --model FOLDER, --train-file and --eval-file"
    if "GatedRepoError" in kinds:
        return (
            f"--model {name} is gated (401/403): accept its licence on the hub and log in with `hf "
            "auth login`" + local
        )
    if (
        kinds
        & {
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "ConnectionError",
            "ConnectTimeout",
            "ProxyError",
        }
        or "couldn't connect" in text.lower()
        or "offline mode" in text.lower()
    ):
        return (
            f"--model {name} could not be fetched: no network, or the hub cannot be reached" + local
        )
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return (
            f"--model {name} was not found on the hub, or it is private and you are not logged in "
            "(`hf auth login`)" + local
        )
    if "trust_remote_code" in text or "custom code" in text:
        return (
            f"--model {name} needs code of its own, which is never run here: choose a model that "
            "transformers itself supports"
        )
    return f"--model {name} cannot be loaded: {text[:300]}"
