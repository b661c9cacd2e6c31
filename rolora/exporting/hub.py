"""An adapter, or a model that it was merged into, on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from rolora import atomic
from rolora.adapter.files import CONFIG_FILE, write_adapter
from rolora.errors import BadInput
from rolora.exporting import source
from rolora.exporting.plain import baked
from rolora.hf.license import license_of
from rolora.hf.precision import DTYPES
from rolora.run import adapter_folder, card

_MESSAGE = "Upload with RoLoRA"
_LOGIN = "--to hub needs a login: run hf auth login, or set HF_TOKEN"
# What a merged model's folder holds, or llama.cpp's file; nothing else goes along.
_WHOLE = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.gguf", "*.model",
          "README.md", "vocab.*", "merges.txt")  # fmt: skip


def upload(
    folder: Path,
    repo_id: str,
    private: bool = False,
    commit_message: str = _MESSAGE,
    dry_run: bool = False,
    bake: bool = False,
    model: str | None = None,
    dtype: str = "fp32",
) -> None:
    """Uploads what `--to peft` would write of an adapter, with its base named by `model`, or a
    folder that another export wrote as it is; into a new repository, or as a commit on top.

    With `dry_run` it only says what would go where, and needs no network. Raises BadInput for
    whatever the hub refuses, and where a repository that is public already should be private.
    """
    _check_id(repo_id)
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place)
        if (folder / CONFIG_FILE).is_file():
            _stage(folder, staged, bake, model, DTYPES[dtype])
        else:
            _require_model(folder, {"--bake": bake, "--model": model is not None})
            staged = folder
        files = _files(staged)
        _say(staged, files, repo_id, private, commit_message)
        if dry_run:
            return
        with _one_line(repo_id):
            url = _send(staged, files, repo_id, private, commit_message)
    print(url)


def _check_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BadInput(f"--repo-id {repo_id!r}: {' '.join(str(error).split())[:300]}") from None


def _stage(folder: Path, staged: Path, bake: bool, model: str | None, dtype: Any) -> None:
    """The adapter's files with no path of this machine in them."""
    adapter = source.read(folder)
    base = card.require_named(model or adapter.stored.get("base_model_name_or_path"))
    if bake:
        adapter = baked(adapter)
    stored = adapter.stored | {"base_model_name_or_path": base}
    write_adapter(staged, stored, adapter.tensors, dtype)
    adapter_folder.copy(folder, staged)
    _stage_card(folder, staged, str(adapter.stored.get("base_model_name_or_path") or ""), base)


def _stage_card(folder: Path, staged: Path, before: str, base: str) -> None:
    """The card, with `base` where it named `before`: made anew, but where somebody else wrote it,
    or a person went over it. And `rolora.json`, without the folder of a recipe of one's own.
    """
    own, kept = folder / adapter_folder.CARD, adapter_folder.read(folder)
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else None
    made = [card.text(base, None, license=license_of(base))]
    if kept is not None:
        task = kept.options.get("task_type")
        if isinstance(task, str) and task.endswith(".py"):
            options = kept.options | {"task_type": Path(task).name}
            kept = dataclasses.replace(kept, options=options)
        adapter_folder.write(staged, kept, base)
        made = [card.text(name, kept.labels, kept.facts) for name in (base, before)]
    if text is None or text in made:
        text = made[0]
    elif before and not card.is_hub_id(before, bare=True):  # PEFT's own card names the folder
        text = text.replace(before, base)
    atomic.write_text(staged / adapter_folder.CARD, text)


def _require_model(folder: Path, idle: dict[str, bool]) -> None:
    """Raises BadInput for a folder that holds neither an adapter nor a model."""
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise BadInput(
            f"--adapter {folder} holds no adapter ({CONFIG_FILE}), no merged model (config.json) "
            "and no .gguf: give a folder that train or export wrote"
        )
    for flag, given in idle.items():
        if given:
            raise BadInput(f"{flag} is for adapters: {folder} is uploaded as it is")


def _files(folder: Path) -> list[str]:
    """The paths in the repository, in order."""
    if (folder / CONFIG_FILE).is_file():
        found = [path for path in folder.rglob("*") if path.is_file()]
    else:
        found = [path for pattern in _WHOLE for path in folder.glob(pattern) if path.is_file()]
    return sorted({path.relative_to(folder).as_posix() for path in found})


def _say(folder: Path, files: list[str], repo_id: str, private: bool, message: str) -> None:
    total = 0
    for name in files:
        size = (folder / name).stat().st_size
        total += size
        print(f"{size:>14,}  {name}")
    seen = "private if it is new, and refused if it is public" if private else "public if new"
    print(f"{total:>14,}  bytes in {len(files)} files to {_endpoint()}/{repo_id} ({seen})")
    print(f"commit: {message}")
    known = "found" if huggingface_hub.get_token() else "none: run hf auth login, or set HF_TOKEN"
    print(f"login: {known}")


def _endpoint() -> str:
    return huggingface_hub.constants.ENDPOINT


def _send(folder: Path, files: list[str], repo_id: str, private: bool, message: str) -> str:
    """The address of the commit."""
    if not huggingface_hub.get_token():
        raise BadInput(_LOGIN)
    api = huggingface_hub.HfApi()
    made = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(made.repo_id).private:
        raise BadInput(
            f"--private: {made.repo_id} is there already, and public: give another --repo-id, or "
            "make it private in its settings"
        )
    done = api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message=message,
        allow_patterns=[_literal(name) for name in files],
    )
    return str(done.commit_url)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return name.replace("[", "[[]")


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """What goes wrong on the way to the hub, as BadInput; a token stands in no line."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise BadInput(_LOGIN) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hints = {
            401: "log in: run hf auth login, or set HF_TOKEN",
            403: f"the token may not write to {repo_id}: make one that may",
            404: f"there is no {repo_id}, or the token may not see it",
        }
        mend = hints.get(status or 0, "try again later")
        said = " ".join(str(error.server_message or error).split())[:200]
        raise BadInput(f"the hub refused {repo_id} ({status}: {_hidden(said)}): {mend}") from None
    except BadInput:
        raise
    except Exception as error:  # of the client, of the network below it, of either's libraries
        said = _hidden(" ".join(str(error).split())[:200])
        raise BadInput(
            f"{_endpoint()} cannot be used ({type(error).__name__}: {said}): check the network"
        ) from None


def _hidden(text: str) -> str:
    token = huggingface_hub.get_token()
    return text.replace(token, "***") if token else text
