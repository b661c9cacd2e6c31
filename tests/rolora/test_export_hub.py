"""Uploads, to a hub that this test plays on 127.0.0.1: huggingface_hub's own client judges what is sent."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import transformers as hf
from huggingface_hub import metadata_load
from safetensors.torch import load_file

from rolora import export
from tests.rolora.commands import small

TOKEN = "hf_" + "s" * 34
ROOT = Path(__file__).parent.parent.parent


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; what arrives is kept in `server.got`."""

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.seen.append(("GET", self.path, self.headers["authorization"]))
        self.answer(200, {"id": "me/places", "private": self.server.private, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(("POST", self.path, self.headers["authorization"]))
        if self.server.refuse:
            self.answer(self.server.refuse, {"error": f"no {self.headers['authorization']}"})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer(200, {"url": f"{self.server.address}/me/places", "id": "me/places"})
        elif self.path.endswith("/preupload/main"):
            files = [
                f | {"uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.message = value["summary"]
                else:
                    self.server.got[value["path"]] = base64.b64decode(value["content"])
            self.answer(
                200,
                {
                    "commitUrl": f"{self.server.address}/me/places/commit/1",
                    "commitOid": "1",
                    "hookOutput": "",
                },
            )
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.got, server.refuse, server.private = [], {}, None, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def to_hub(address, *args, token=TOKEN, home="/nonexistent"):
    """(exit code, standard output, standard error) of an export that has its hub at `address`."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-m", "rolora.export", "--to", "hub", *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def adapter(files, tmp_path_factory):
    from rolora import train

    folder = tmp_path_factory.mktemp("hub") / "run"
    flags = small(files, rounds=2, **{"output-dir": folder})
    train.command.main([*map(str, flags), "--quiet"], standalone_mode=False)
    return folder / "adapter"


def test_what_is_listed_is_what_arrives_and_it_names_no_folder_of_this_machine(
    adapter, files, hub, tmp_path
):
    args = ("--adapter", adapter, "--repo-id", "me/places", "--model", "some/llama", "--private")
    code, dry, err = to_hub("http://127.0.0.1:9", *args, "--dry-run", home=tmp_path)
    assert (code, err) == (0, "") and TOKEN not in dry
    hub.private = True
    code, out, err = to_hub(hub.address, *args, home=tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{hub.address}/me/places/commit/1"
    assert out.splitlines()[:-1] == [
        line.replace("http://127.0.0.1:9", hub.address) for line in dry.splitlines()
    ]
    listed = {
        name: int(size.replace(",", ""))
        for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", dry, re.M)
    }
    assert listed == {name: len(data) for name, data in hub.got.items()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "rolora.json",
        "tokenizer.json",
    } <= set(listed)
    assert (
        "private" in (hub.created.get("visibility"), *hub.created)
        and hub.message == "Upload with RoLoRA"
    )
    assert json.loads(hub.got["adapter_config.json"])["base_model_name_or_path"] == "some/llama"
    for name, data in hub.got.items():
        assert (
            str(files["root"]).encode() not in data and str(adapter.parent).encode() not in data
        ), name
    got = tmp_path / "got"
    got.mkdir()
    for name, data in hub.got.items():
        (got / name).write_bytes(data)
    sent, own = (load_file(place / "adapter_model.safetensors") for place in (got, adapter))
    assert sent.keys() == own.keys() and all(sent[key].equal(own[key]) for key in own)
    said = metadata_load(got / "README.md")
    assert said["base_model"] == "some/llama" and said["library_name"] == "peft"
    assert {who for _, _, who in hub.seen if who} == {f"Bearer {TOKEN}"} and TOKEN not in out + err


def test_a_public_repository_does_not_take_what_is_private(adapter, hub, tmp_path):
    args = ("--adapter", adapter, "--repo-id", "me/places", "--model", "some/llama", "--private")
    code, _, err = to_hub(hub.address, *args, home=tmp_path)
    assert code == 2 and "is there already, and public" in err and hub.got == {}


@pytest.mark.parametrize(
    "status, expected", [(401, "hf auth login"), (403, "may not write"), (500, "try again")]
)
def test_a_hub_that_refuses_is_one_line_without_the_token(status, expected, adapter, hub, tmp_path):
    hub.refuse = status
    args = ("--adapter", adapter, "--repo-id", "me/places", "--model", "some/llama")
    code, out, err = to_hub(hub.address, *args, home=tmp_path)
    assert code == 2 and expected in err and err.count("\n") == 1 and TOKEN not in out + err


@pytest.mark.parametrize(
    "args, expected",
    [
        (("--repo-id", "me/places"), "names its base by a folder of this machine"),
        (
            ("--repo-id", "me/places", "--model", "./llama"),
            "names its base by a folder of this machine, ./llama",
        ),
        (("--repo-id", "a/b/c", "--model", "some/llama"), "--repo-id 'a/b/c': Repo id must be"),
        (("--model", "some/llama"), "--to hub needs --repo-id"),
        (("--repo-id", "me/places", "--output-dir", "x"), "--output-dir says nothing to --to hub"),
    ],
)
def test_bad_input(args, expected, adapter, call):
    code, _, err = call(
        "--adapter", adapter, "--to", "hub", *args, "--dry-run", command=export.command
    )
    assert code == 2 and expected in err and err.count("\n") == 1


def test_no_network_and_no_login_are_one_line(adapter, tmp_path):
    args = ("--adapter", adapter, "--repo-id", "me/places", "--model", "some/llama")
    code, out, err = to_hub("http://127.0.0.1:9", *args, home=tmp_path)
    assert code == 2 and "cannot be used" in err and err.count("\n") == 1
    code, out, err = to_hub("http://127.0.0.1:9", *args, home=tmp_path, token=None)
    assert code == 2 and "login" in err and err.count("\n") == 1 and "login: none" in out


def test_the_card_that_peft_wrote_names_the_base_by_its_id(files, hub, tmp_path):
    base = hf.AutoModelForCausalLM.from_pretrained(files["llama"])
    asked = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, asked).save_pretrained(tmp_path / "theirs")
    assert str(files["llama"]) in (tmp_path / "theirs" / "README.md").read_text()
    args = ("--adapter", tmp_path / "theirs", "--repo-id", "me/places", "--model", "some/llama")
    code, _, err = to_hub(hub.address, *args, home=tmp_path)
    assert code == 0, err
    for name, data in hub.got.items():
        assert str(files["llama"]).encode() not in data, name
    assert b"# Model Card for Model ID" in hub.got["README.md"]
    (tmp_path / "README.md").write_bytes(hub.got["README.md"])
    said = metadata_load(tmp_path / "README.md")
    assert said["base_model"] == "some/llama" and "base_model:adapter:some/llama" in said["tags"]


def test_a_merged_model_is_uploaded_as_it_is_and_nothing_beside_it(adapter, call, tmp_path):
    merged = tmp_path / "m"
    assert (
        call(
            "--adapter", adapter, "--to", "merged", "--output-dir", merged, command=export.command
        )[0]
        == 0
    )
    (merged / "secret.txt").write_text("mine")
    args = ("--adapter", merged, "--to", "hub", "--repo-id", "me/places", "--dry-run")
    code, out, err = call(*args, command=export.command)
    assert (code, err) == (0, "") and "model.safetensors" in out and "secret" not in out
    code, _, err = call(*args, "--bake", command=export.command)
    assert code == 2 and "--bake is for adapters" in err
    code, _, err = call("--adapter", tmp_path, *args[2:], command=export.command)
    assert code == 2 and "holds no adapter" in err
