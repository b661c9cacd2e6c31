"""The HTML report: read by a parser and shown by a browser; it needs nothing else, what a run wrote is never markup,
and the live page follows a run.
"""

import base64
import http.client
import json
import shutil
import socket
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from threading import Thread

import pytest

from rolora import report
from rolora.reporting import live, pages
from tests.rolora.run_folders import made

pyplot = pytest.importorskip("matplotlib.pyplot")

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
HOSTILE = '</pre><script>document.title="owned"</script><img src="http://127.0.0.1:9/x">'


class Page(HTMLParser):
    """Every element with its attributes, the text of cells by row, and all text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.lines, self.words, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.lines.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.words.append(data)
        if self.inside:
            self.lines[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def samples(run, text):
    line = {"round": 3, "prompt": "p", "written": text, "reference": "r"}
    (run / "samples.jsonl").write_text(
        json.dumps(line | {"round": 0}) + "\n" + json.dumps(line) + "\n"
    )


@pytest.fixture
def run(tmp_path):
    path = made(tmp_path, "run", method="rolora", summary={"rounds": 3, "headline": "accuracy"})
    samples(path, HOSTILE)
    return path


def static(call, tmp_path, *runs):
    file = tmp_path / "r.html"
    code, out, err = call(*runs, "--output", file, command=report.command)
    assert (code, err) == (0, "") and out.endswith(f"{tmp_path / 'r.csv'}, {file}\n"), err
    return file


def test_the_page_holds_what_the_runs_hold_and_nothing_of_elsewhere(run, call, tmp_path):
    other = made(tmp_path, HOSTILE.replace("/", "∕"), method="fedavg", lr=0.5)
    page = Page(static(call, tmp_path, run, other).read_text())
    assert page.lines[0][:4] == ["method", "runs", "rounds", "accuracy"]
    assert [line[0] for line in page.lines[1:3]] == ["rolora", "fedavg"]
    rounds = [line for line in page.lines if line[:2] in (["3", "–"], ["0", "–"])]
    assert len(rounds) == 4 and rounds[0][-2:] == ["0.3000", "0.5000"]
    text = "".join(page.words)
    assert "finished after round 3" in text and "round 3 of 20" in text
    assert text.count(HOSTILE) == 1 and "p" in page.words
    assert not page.all("script") and not page.all("link")
    (picture,) = page.all("img")
    kind, data = picture["src"].split(",", 1)
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert picture["alt"]
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) == 7


def test_a_page_is_not_overwritten_unasked(run, call, tmp_path):
    file = static(call, tmp_path, run)
    code, _, err = call(run, "--output", file, command=report.command)
    assert code == 2 and f"{file} exists" in err
    assert call(run, "--output", file, "--overwrite", command=report.command)[0] == 0


def test_a_long_run_shows_its_newest_rounds(call, tmp_path):
    page = Page(static(call, tmp_path, made(tmp_path, "long", rounds=700)).read_text())
    assert "The newest 500 of 701; metrics.jsonl has all." in page.words
    assert page.lines[3][0] == "700"


@pytest.fixture
def server():
    servers = []

    def start(page):
        servers.append(live.Server(0, page))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_address[1]

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def get(port, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers.get("ETag")


def cut(run, rounds):
    """The run as it was after so many rounds; puts the rest back where that is None."""
    kept = run / "all.jsonl"
    if not kept.is_file():
        shutil.copy(run / "metrics.jsonl", kept)
        (run / "summary.json").unlink(missing_ok=True)
    lines = kept.read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: None if rounds is None else rounds + 1]))


def test_the_live_page_follows_a_run_from_before_its_first_round(run, server):
    cut(run, -1)
    port = server(pages.Live([run]).page)
    status, text, _ = get(port)
    assert status == 200 and "has no evaluated round yet" in text and "<table>" not in text
    cut(run, 0)
    assert "round 0 of 20" in get(port)[1]
    cut(run, 2)
    _, text, mark = get(port)
    assert "round 2 of 20" in text and Page(text).lines[1][0] == "rolora" and Page(text).all("img")
    assert get(port)[2] == mark
    cut(run, None)
    assert "round 3 of 20" in get(port)[1] and get(port)[2] != mark


def test_runs_that_no_table_holds_together_are_shown_all_the_same(run, server, tmp_path):
    damaged = made(tmp_path, "damaged")
    (damaged / "metrics.jsonl").write_text("{\n")
    other = made(tmp_path, "other", summary={"rounds": 3, "headline": "loss"})
    diverged = made(tmp_path, "gone", summary={"diverged": "nan", "headline": "accuracy"})
    text = get(server(pages.Live([run, damaged, other, diverged]).page))[1]
    assert "damaged is damaged" in text and "these runs have different metrics" in text
    assert text.count("<section") == 3 and "diverged after round 3" in text


def test_the_server_answers_its_page_and_no_other_machine(run, server):
    port = server(pages.Live([run]).page)
    assert get(port, "/live.js")[0] == 200
    for path in ("/metrics.jsonl", "/../run/config.toml", "/?x"):
        assert get(port, path)[0] == 404
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"):
        assert get(port, host=host)[0] == 403
    assert get(port, host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "args, expected",
    [
        (("--serve", "--output", "x.html"), "--serve writes no file"),
        (("--port", 1), "--port is for --serve"),
        (("--serve", "--port", 99999), "99999"),
        (("--output", "x.htm"), "expected a .png, .pdf, .svg or .html file"),
    ],
)
def test_bad_input(args, expected, run, call):
    code, _, err = call(run, *args, command=report.command)
    assert code == 2 and expected in err and err.count("\n") == 1


def test_a_port_that_is_taken_and_a_folder_that_is_none_are_one_line(run, call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = call(run, "--serve", "--port", port, command=report.command)
    assert code == 2 and f"--port {port} cannot be used" in err and err.count("\n") == 1
    code, _, err = call(run / "no", "--serve", command=report.command)
    assert code == 2 and "is no folder" in err and err.count("\n") == 1


def browse(address, *more):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *more, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_browser
def test_chromium_shows_the_page_and_runs_nothing_of_it(run, call, tmp_path):
    address = static(call, tmp_path, run).as_uri()
    page = Page(browse(address, "--dump-dom"))
    assert "RoLoRA report" in page.words and "owned" not in page.words
    assert not page.all("script") and len(page.all("img")) == 1 and len(page.all("table")) == 3
    shot = tmp_path / "shot.png"
    browse(address, f"--screenshot={shot}", "--window-size=1300,1200")
    pixels = (pyplot.imread(shot)[..., :3] * 255).astype(int)
    blue = (abs(pixels - [31, 119, 180]) < 8).all(-1)  # the first colour of the picture's lines
    assert blue.sum() > 200


@in_browser
def test_chromium_follows_a_live_page_and_leaves_open_what_was_opened(run, server):
    cut(run, 1)
    asked = []
    shown = pages.Live([run])

    def page():
        asked.append(1)
        if len(asked) == 3:
            cut(run, None)
        return shown.page()

    port = server(page)
    dom = browse(f"http://127.0.0.1:{port}/", "--dump-dom", "--virtual-time-budget=15000")
    assert len(asked) > 3 and "round 3 of 20" in dom and "owned" not in Page(dom).words
