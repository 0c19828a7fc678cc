"""The live page's server without a browser: who gets what, what it sends again, and what it makes of a broken run."""

from __future__ import annotations

import gzip
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from monitoring.runlog import RunLog, RunLogError
from monitoring.watch import WatchError, WatchServer
from tests.monitoring.sample_run import build_run, step_record


@contextmanager
def serving(run_dir: Path, port: int = 0, token: str | None = None) -> Iterator[WatchServer]:
    with WatchServer(run_dir, port) as server:
        server.token = token or server.token
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchServer]:
    with serving(build_run(tmp_path_factory.mktemp("watch") / "night-run")) as server:
        until(server, lambda answer: answer["standing"]["step"] == 100 and answer["parts"])
        yield server


def write_steps(run: Path, count: int) -> Path:
    """Write a run of that many small records, tokens as many as steps; return its directory."""
    lines = [
        json.dumps({"step": step, "tokens": step, "loss": float(step % 7), "num_steps": [0, 1 + step % 4]})
        for step in range(1, count + 1)
    ]
    (run / "metrics").mkdir(parents=True)
    (run / "attempts" / "0001").mkdir(parents=True)
    (run / "metrics" / "0001.jsonl").write_text("\n".join([*lines, ""]))
    return run


def ask(
    server: WatchServer, path: str, method: str = "GET", token: str | None = "right", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    if token is not None:
        path += ("&" if "?" in path else "?") + f"token={server.token if token == 'right' else token}"
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": f"127.0.0.1:{server.port}", **headers}.items():
        if value:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def changes(server: WatchServer, have: str = "") -> dict[str, Any]:
    response, body = ask(server, f"/changes?have={have}")
    assert response.status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def until(server: WatchServer, wanted: Callable[[dict[str, Any]], Any], have: str = "") -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while not wanted(answer := changes(server, have)):
        assert time.monotonic() < deadline, answer["standing"] | {"problem": answer["problem"]}
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("path", ["/", "/changes", "/zoomed?key=loss&low=0&high=9", "/plotly.js", "/nothing"])
@pytest.mark.parametrize("token", [None, "", "wrong", "\u00e9".encode().hex(), "%00"])
def test_without_the_token_nothing_is_told(sample: WatchServer, path: str, token: str | None) -> None:
    response, body = ask(sample, path, token=token)
    assert response.status == 403
    assert b"night-run" not in body
    assert sample.token.encode() not in body


def test_every_answer_forbids_what_a_page_could_leak_by(sample: WatchServer) -> None:
    for path, token in (("/", "right"), ("/changes", "right"), ("/plotly.js", "right"), ("/", "wrong")):
        response, _ = ask(sample, path, token=token)
        headers = {name.lower(): value for name, value in response.getheaders()}
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert "script-src 'unsafe-inline'" not in headers["content-security-policy"]
        assert "python" not in headers["server"].lower()
    policy = ask(sample, "/")[0].getheader("Content-Security-Policy") or ""
    assert "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_it_can_only_be_read(sample: WatchServer, method: str) -> None:
    response, _ = ask(sample, "/changes", method)
    assert (response.status, response.getheader("Allow")) == (405, "GET, HEAD")


def test_head_gives_the_headers_of_get_alone(sample: WatchServer) -> None:
    response, body = ask(sample, "/", "HEAD")
    assert (response.status, body) == (200, b"")
    assert int(response.getheader("Content-Length") or 0) > 1000


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "0.0.0.0", ":80"])
def test_a_name_that_was_made_to_point_here_is_refused(sample: WatchServer, host: str) -> None:
    assert ask(sample, "/changes", Host=host)[0].status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1", "localhost:65000", "[::1]:80"])
def test_a_tunnel_may_begin_at_any_port(sample: WatchServer, host: str) -> None:
    assert ask(sample, "/changes", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "path", ["/run.yaml", "/../run.yaml", "/%2e%2e/run.yaml", "//etc/passwd", "/assets/watch.js", "/?/../x", "/zoomed"]
)
def test_no_file_is_served(sample: WatchServer, path: str) -> None:
    response, body = ask(sample, path)
    assert response.status == 404 or b"<!doctype html>" in body
    assert b"schema_version" not in body or b"<!doctype html>" in body


def test_it_listens_on_the_loopback_only(sample: WatchServer) -> None:
    assert sample.socket.getsockname()[0] == "127.0.0.1"


def test_what_is_large_travels_packed(sample: WatchServer) -> None:
    response, body = ask(sample, "/changes", Accept_Encoding="gzip")
    assert response.getheader("Content-Encoding") == "gzip"
    assert json.loads(gzip.decompress(body))["parts"]


def test_only_what_changed_is_sent_again(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run")
    for step in range(1, 30):
        log.step(step_record(step))
    with serving(tmp_path / "run") as server:
        first = until(server, lambda answer: answer["standing"]["step"] == 29 and len(answer["parts"]) > 5)
        assert {part["key"] for part in first["parts"] if part.get("traces")} >= {"loss", "learning-rate"}
        assert changes(server, first["version"])["parts"] == []
        log.step(step_record(30))
        second = until(server, lambda answer: answer["standing"]["step"] == 30 and answer["parts"], first["version"])
        keys = {part["key"] for part in second["parts"]}
        assert "loss" in keys
        assert "loss-depth" not in keys  # no evaluation came
        assert len(keys) < len(first["parts"])
        whole = changes(server, "another-7")  # as the page asks whose server was another one
        assert len(whole["parts"]) == len(first["parts"])
    log.close()


def test_a_panel_is_sent_again_as_finely_as_was_zoomed_into(tmp_path: Path) -> None:
    with serving(write_steps(tmp_path / "run", 30_000)) as server:
        answer = until(server, lambda answer: answer["standing"]["step"] == 30_000 and answer["parts"])
        coarse = next(part for part in answer["parts"] if part["key"] == "loss")

        def shown(part: dict[str, Any]) -> int:
            return max(sum(500.0 <= float(x) <= 1500.0 for x in trace["x"]) for trace in part["traces"])

        response, body = ask(server, "/zoomed?key=loss&low=500&high=1500")
        assert response.status == 200
        assert shown(json.loads(body)) > 900 > 2 * shown(coarse)
        for bad in ("key=loss&low=1", "key=loss&low=x&high=2", "key=nothing&low=1&high=2", "key=summary&low=1&high=2"):
            assert ask(server, f"/zoomed?{bad}")[0].status == 404
        for odd in ("low=9&high=1", "low=nan&high=1", "low=-inf&high=inf", "low=1e300&high=2e300"):
            assert ask(server, f"/zoomed?key=loss&{odd}")[0].status == 200


def _torn(run: Path) -> None:
    with (run / "metrics" / "0002.jsonl").open("ab") as file:
        file.write(b'{"step":101,"lo')


def _nonsense(run: Path) -> None:
    with (run / "metrics" / "0002.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n{"step":"x"}\n[1]\n' + b'{"step":102,"time":{},"loss":[],"tokens":"many"}\n')
    (run / "events.jsonl").write_bytes(b'{"kind":7}\n{"kind":"checkpoint","step":"x","time":"y"}\n\xff\n')
    (run / "attempts" / "0002" / "heartbeat.json").write_bytes(b"[")
    (run / "attempts" / "0002" / "outcome.json").write_bytes(b'{"exit_code":"?","reason":[1]}')
    (run / "run.yaml").write_bytes(b"train: [\xff")


def _missing_attempt(run: Path) -> None:
    shutil.rmtree(run / "attempts" / "0001")
    (run / "metrics" / "0001.jsonl").unlink()


def _two_writers(run: Path) -> None:
    lines = (run / "metrics" / "0002.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics" / "0002.jsonl").write_bytes(b"".join(line + line for line in lines) + lines[3])


def _clock_back(run: Path) -> None:
    record = step_record(101) | {"time": 5.0, "attempt": 2}
    with (run / "metrics" / "0002.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n" + json.dumps(record | {"step": 102, "time": 9e18}) + "\n")


def _empty(run: Path) -> None:
    shutil.rmtree(run)
    (run / "attempts").mkdir(parents=True)


@pytest.mark.parametrize("damage", [_torn, _nonsense, _missing_attempt, _two_writers, _clock_back, _empty])
def test_a_broken_run_is_shown_as_far_as_it_goes(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = build_run(tmp_path / "run")
    damage(run)
    with serving(run) as server:
        answer = until(server, lambda answer: answer["parts"] and answer["reading"] is None)
        assert answer["problem"] is None
        assert ask(server, "/")[0].status == 200
        if damage is not _empty:
            assert next(part for part in answer["parts"] if part["key"] == "loss")["traces"]


def test_a_run_directory_that_goes_away_is_said_and_the_page_lives_on(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    with serving(run) as server:
        until(server, lambda answer: answer["parts"])
        run.rename(tmp_path / "elsewhere")
        assert str(run) in until(server, lambda answer: answer["problem"])["problem"]
        assert next(part for part in changes(server)["parts"] if part["key"] == "loss")["traces"]
        (tmp_path / "elsewhere").rename(run)
        until(server, lambda answer: answer["problem"] is None)


def test_a_missing_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no run directory"):
        WatchServer(tmp_path / "nowhere")


def test_a_port_that_is_taken_is_said_together_with_a_free_one(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(WatchError, match=rf"port {port}: .*--port (?!{port})\d+"):
            WatchServer(build_run(tmp_path / "run"), port)
