"""The ways of alerts, into a real command, a real mail server and a real web server on this machine."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitoring.alerting.alerts import AlertsConfig, Notice, compose
from monitoring.alerting.channels import (
    DeliveryError,
    EmailConfig,
    WebhookConfig,
    send_by_command,
    send_by_email,
    send_by_webhook,
)
from pipeline.errors import ConfigError
from pipeline.schema import to_dataclass
from tests.monitoring.alert_receivers import FINDING, SECRET, MailServer, WebServer, serving, telling
from tests.monitoring.alert_receivers import told as read_told


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with serving(MailServer()) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def _alert(**fields: Any) -> Any:
    return compose(Notice(id="i", key="k", fields={**FINDING, **fields}), "a run", Path("/runs/a"))


def test_a_command_gets_the_alert_on_its_input_and_in_its_environment(tmp_path: Path) -> None:
    send_by_command(telling(tmp_path), _alert(evidence={"ratio": 3.5}), 20.0)
    (told,) = read_told(tmp_path)
    assert told["stdin"]["detector"] == told["env"]["ROOKERY_ALERT_DETECTOR"] == "collapse"
    assert told["stdin"]["evidence"] == {"ratio": 3.5}
    assert told["stdin"]["run_dir"] == "/runs/a"
    assert told["args"] == ["; exit 3"], "no shell"


def test_a_command_that_fails_or_hangs_or_is_not_there_is_a_problem_in_words(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="exit 3"):
        send_by_command([sys.executable, "-c", "raise SystemExit(3)"], _alert(), 20.0)
    with pytest.raises(DeliveryError, match="No such file"):
        send_by_command(["/no/such/program"], _alert(), 20.0)
    started = time.monotonic()
    pid = tmp_path / "pid"
    with pytest.raises(DeliveryError, match="killed"):
        send_by_command(["bash", "-c", f"sleep 600 & echo $! > {pid}; wait"], _alert(), 0.5)
    assert time.monotonic() - started < 5.0
    status = Path("/proc", pid.read_text().strip(), "status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_mail_arrives_with_a_head_of_one_line_each(mail: MailServer) -> None:
    config = EmailConfig(to=["me@example.org", "you@example.org"], server=mail.address, encryption="none")
    send_by_email(config, _alert(reason="x\r\nBcc: all@example.org\r\n\r\nbody", rule="\u00e4" * 5000), 5.0)
    ((recipients, message),) = mail.mails
    assert recipients == ["me@example.org", "you@example.org"]
    assert message["To"] == "me@example.org, you@example.org"
    assert message["From"] == "me@example.org"
    assert message["Bcc"] is None
    assert message["Subject"].strip().startswith("[rookery] a run: finding collapse at step 7")
    assert len(message["Subject"]) <= 200
    text = message.get_content()
    assert "look: rookery status /runs/a" in text
    assert len(text) < 5000


def test_a_password_goes_only_where_the_line_is_encrypted(mail: MailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PASSWORD", SECRET)
    config = EmailConfig(to=["me@example.org"], server=mail.address, user="me", password="env:MAIL_PASSWORD")
    with pytest.raises(DeliveryError) as problem:
        send_by_email(config, _alert(), 5.0)
    assert SECRET not in str(problem.value)
    assert not mail.mails


def test_what_a_mail_server_answers_is_not_repeated(mail: MailServer) -> None:
    mail.refuses = True
    with pytest.raises(DeliveryError, match=r"127\.0\.0\.1:\d+: SMTP 550$"):
        send_by_email(EmailConfig(to=["me@example.org"], server=mail.address, encryption="none"), _alert(), 5.0)


def test_without_a_server_the_machine_s_sendmail_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\ncat > {tmp_path}/mail\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    send_by_email(EmailConfig(to=["me"], sender="rookery@example.org"), _alert(), 5.0)
    assert (tmp_path / "args").read_text() == "-i -- me\n"
    assert b"From: rookery@example.org\n" in (tmp_path / "mail").read_bytes()


def test_a_webhook_gets_json_and_the_token(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    monkeypatch.setenv("HOOK", web.url)
    send_by_webhook(WebhookConfig(url="env:HOOK", token=f"file:{tmp_path}/token"), _alert(), 5.0)
    ((path, headers, content),) = web.posts
    assert (path, headers["Content-Type"], headers["Authorization"]) == (
        "/hook",
        "application/json",
        f"Bearer {SECRET}",
    )
    assert content["detector"] == "collapse"
    assert content["text"].startswith("[rookery] a run: finding collapse")


def test_a_webhook_that_refuses_redirects_or_is_slow_is_a_problem_without_the_secret(web: WebServer) -> None:
    config = WebhookConfig(url=f"{web.url}/{SECRET}")
    for answer, words in ((403, "HTTP 403"), (302, "HTTP 302"), (500, "HTTP 500")):
        web.answer = answer
        with pytest.raises(DeliveryError, match=words) as problem:
            send_by_webhook(config, _alert(), 5.0)
        assert SECRET not in str(problem.value)
    assert {path for path, *_ in web.posts} == {f"/hook/{SECRET}"}, "a redirection is not followed"
    web.wait = 1.0
    with pytest.raises(DeliveryError, match="timed out"):
        send_by_webhook(config, _alert(), 0.2)


@pytest.mark.parametrize("reference", ["env:NOT_SET_ANYWHERE", "file:/no/such/file", "env:TWO_LINES"])
def test_a_secret_that_is_not_there_is_a_problem(
    reference: str, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_LINES", "a\r\nX-Header: b")
    with pytest.raises(DeliveryError, match="no secret"):
        send_by_webhook(WebhookConfig(url=web.url, token=reference), _alert(), 5.0)
    assert not web.posts


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"command": []}, "monitor.alerts.command"),
        ({"kinds": ["findings"]}, "monitor.alerts.kinds"),
        ({"cool_down_minutes": -1.0}, "monitor.alerts.cool_down_minutes"),
        ({"timeout_seconds": 0.0}, "monitor.alerts.timeout_seconds"),
        ({"email": {"to": []}}, "monitor.alerts.email.to"),
        ({"email": {"to": ["a@b.org\r\nBcc: c@d.org"]}}, "monitor.alerts.email.to"),
        ({"email": {"to": ["-oQ/tmp"]}}, "monitor.alerts.email.to"),
        ({"email": {"to": ["a@b.org"], "sender": "Me <a@b.org>"}}, "monitor.alerts.email.sender"),
        ({"email": {"to": ["a@b.org"], "server": "host:port"}}, "monitor.alerts.email.server"),
        ({"email": {"to": ["a@b.org"], "encryption": "ssl"}}, "monitor.alerts.email.encryption"),
        ({"email": {"to": ["a@b.org"], "server": "h", "user": "u"}}, "monitor.alerts.email"),
        (
            {"email": {"to": ["a@b.org"], "server": "h", "user": "u", "password": "env:X", "encryption": "none"}},
            "monitor.alerts.email.encryption",
        ),
        (
            {"email": {"to": ["a@b.org"], "server": "h", "user": "u", "password": SECRET}},
            "monitor.alerts.email.password",
        ),
        ({"webhook": {"url": "ftp://host/x"}}, "monitor.alerts.webhook.url"),
        ({"webhook": {"url": "file.txt"}}, "monitor.alerts.webhook.url"),
        ({"webhook": {"url": f"https://me:{SECRET}@host/x"}}, "monitor.alerts.webhook.url"),
        ({"webhook": {"url": "https://host/x", "token": SECRET}}, "monitor.alerts.webhook.token"),
    ],
)
def test_settings_without_a_meaning_are_refused_and_secrets_not_repeated(tree: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as problem:
        to_dataclass(tree, AlertsConfig)
    assert str(problem.value).startswith(path)
    assert SECRET not in str(problem.value)
