"""What is read of a model before its weights: configuration, tokenizer, and whether the files are
whole.
"""

from __future__ import annotations

import logging
import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from rolora.errors import BadInput
from rolora.hf.explained import explained
from rolora.hf.pointers import is_pointer

# A model folder's own code never runs, and neither does what a pickle file says when it is read.
READING = {"trust_remote_code": False, "use_safetensors": True}


def quieten() -> None:
    """No progress bars, advice or download warnings in between our own lines."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it advises a package for kernels that are not used here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def read_config(name: str, revision: str | None = None):
    """The model's configuration: the cheapest thing to fetch, so it tells first whether the model
    can be had.
    """
    path = Path(name)
    if os.path.exists(path):
        if not (path / "config.json").is_file():
            raise BadInput(f"--model {name} is not a model folder: it has no config.json")
        _require_files(path)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise BadInput(
            f"--model {name} does not exist: give a Hugging Face folder, or a hub id such as "
            "owner/name"
        )
    else:
        use_cache_if_unreachable()
    with explained(name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _require_files(folder: Path) -> None:
    """Raises BadInput for a file of a model that a clone left as Git LFS's pointer, or weights that
    are not whole.
    """
    for pattern in ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model"):
        for path in sorted(folder.glob(pattern)):
            _refuse_pointer(path)
    for path in sorted(folder.glob("*.safetensors")):
        _refuse_pointer(path)
        try:
            with safe_open(path, "pt"):  # the header, which must cover the file
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"--model: {path} is damaged or cut: {error}: fetch it anew") from None


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and is_pointer(path):
        raise BadInput(
            f"--model: {path} is Git LFS's pointer to a file, not the file: run git lfs pull"
        )


def require_safetensors(name: str) -> None:
    """Raises BadInput for a model folder whose weights are pickle files: reading them can run
    code.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise BadInput(
            f"--model {name} has its weights in {pickled[0]}, a pickle file, which can run code "
            "when it is read: convert it to safetensors where you trust it (load it with "
            "transformers there and call save_pretrained)"
        )


def use_cache_if_unreachable() -> None:
    """Without a way to the hub only its local cache is asked: the client would otherwise retry for
    half a minute.
    """
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or endpoint.scheme in urllib.request.getproxies():
        return
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def load_tokenizer(name: str, revision: str | None = None):
    """The tokenizer; where there is no pad token (Llama, GPT-2) the end token serves: padding is
    masked everywhere.
    """
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadInput(f"--model {name}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
