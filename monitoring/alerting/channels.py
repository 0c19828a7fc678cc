"""The ways on which an alert leaves: a command of the user's, an e-mail, a webhook.

Each of them either delivers within its time or raises `DeliveryError`, whose text is short and holds no secret.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import smtplib
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from monitoring.errors import MonitorConfigError

_TLS_PORTS = {"tls": 465, "starttls": 587, "none": 25}
_ADDRESS = re.compile(r"[A-Za-z0-9._%+-]{1,64}(@[A-Za-z0-9.-]{1,255})?")  # a bare name is a mailbox of this machine
_MOST_ADDRESSES = 20
_MOST_PROBLEM = 300
_MOST_SECRET = 4096
_SENDMAIL_PLACES = "/usr/sbin:/usr/lib:/sbin"


class DeliveryError(Exception):
    """An alert that did not leave; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """What is told.

    Attributes:
        subject: one line.
        text: a few lines.
        fields: JSON of it all.
    """

    subject: str
    text: str
    fields: Mapping[str, Any]


@dataclass(kw_only=True)
class EmailConfig:
    """Alerts by e-mail."""

    to: list[str]
    """Addresses."""
    sender: str | None = None
    """Address that they come from; null: the first of `to`."""
    server: str | None = None
    """HOST or HOST:PORT of an SMTP server; null: the `sendmail` of the machine."""
    encryption: str = "starttls"
    """How the server is spoken to: starttls, tls or none."""
    user: str | None = None
    """Name to log in with; null: no login."""
    password: str | None = None
    """env:NAME or file:PATH, where the password is; never the password itself."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning, and what could add lines to a mail's head."""
        if not 1 <= len(self.to) <= _MOST_ADDRESSES:
            raise MonitorConfigError(f"monitor.alerts.email.to: give 1 to {_MOST_ADDRESSES} addresses")
        for key, address in [("to", each) for each in self.to] + [("sender", self.sender or "x")]:
            if not _ADDRESS.fullmatch(address) or address.startswith("-"):
                raise MonitorConfigError(f"monitor.alerts.email.{key}: {address!r} is not a plain address NAME@HOST")
        if self.encryption not in _TLS_PORTS:
            raise MonitorConfigError(
                f"monitor.alerts.email.encryption: {self.encryption!r} is not one of {', '.join(_TLS_PORTS)}"
            )
        if self.server is not None and not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", self.server):
            raise MonitorConfigError(f"monitor.alerts.email.server: {self.server!r} is not HOST or HOST:PORT")
        if (self.user is None) != (self.password is None) or (self.user is not None and self.server is None):
            raise MonitorConfigError("monitor.alerts.email: user and password go together, and with a server")
        if self.user is not None and self.encryption == "none":
            raise MonitorConfigError(
                "monitor.alerts.email.encryption: none would send the password in clear; use starttls or tls"
            )
        _check_secret("monitor.alerts.email.password", self.password)


@dataclass(kw_only=True)
class WebhookConfig:
    """Alerts as JSON, sent by POST."""

    url: str
    """http(s)://..., or env:NAME or file:PATH where the address is itself a secret."""
    token: str | None = None
    """env:NAME or file:PATH of a token that is sent as `Authorization: Bearer`; null for none."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning, and secrets."""
        if not _is_reference(self.url):
            _check_url("monitor.alerts.webhook.url", self.url)
        _check_secret("monitor.alerts.webhook.token", self.token)


def send_by_command(command: list[str], alert: Alert, timeout: float) -> None:
    """Run the user's command with the alert as JSON on its input, and its plain fields as ROOKERY_ALERT_NAME.

    Raises:
        DeliveryError: it cannot be started, takes too long (it is killed then) or ends with an error.
    """
    plain = {key: str(value) for key, value in alert.fields.items() if isinstance(value, str | int | float)}
    variables = {f"ROOKERY_ALERT_{key.upper()}": value.replace("\0", "") for key, value in plain.items()}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | variables,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise DeliveryError(f"{command[0]}: {getattr(error, 'strerror', None) or error}") from None
    try:
        process.communicate(json.dumps(alert.fields).encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # with whatever it has started
        process.wait()
        raise DeliveryError(f"{command[0]}: no end after {timeout:.0f} s, killed") from None
    if process.returncode != 0:
        raise DeliveryError(f"{command[0]}: exit {process.returncode}")


def send_by_email(config: EmailConfig, alert: Alert, timeout: float) -> None:
    """Send an e-mail by an SMTP server, or by the machine's sendmail.

    Raises:
        DeliveryError: it was not taken.
    """
    message = EmailMessage()
    message["Subject"] = _one_line(alert.subject)
    message["From"] = sender = config.sender or config.to[0]
    message["To"] = ", ".join(config.to)
    message["Date"] = formatdate(localtime=True)
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2] or None)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(alert.text)
    if config.server is None:
        _hand_to_sendmail(message, config.to, timeout)
        return
    password = None if config.password is None else read_secret(config.password)
    host, _, port = config.server.partition(":")
    try:
        with _connect(config, host, int(port or _TLS_PORTS[config.encryption]), timeout) as server:
            if config.user is not None and password is not None:
                server.login(config.user, password)
            server.send_message(message, sender, config.to)
    except (OSError, smtplib.SMTPException, ValueError) as error:
        raise DeliveryError(_short(f"{config.server}: {_words(error)}", password)) from None


def send_by_webhook(config: WebhookConfig, alert: Alert, timeout: float) -> None:
    """Send the alert as JSON; any 2xx is an answer, and a redirection is not followed.

    Raises:
        DeliveryError: it was not taken.
    """
    url = read_secret(config.url) if _is_reference(config.url) else config.url
    token = None if config.token is None else read_secret(config.token)
    # `text` is what chat services show.
    content = {**alert.fields, "text": f"{alert.subject}\n{alert.text}"}
    headers = {"Content-Type": "application/json", "User-Agent": "rookery"}
    try:
        _check_url("the webhook's address", url)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")  # noqa: S310
        opener = urllib.request.build_opener(_NoRedirection)
        with opener.open(request, timeout=timeout) as answer:
            answer.read(1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        host = urlsplit(url).hostname or "webhook"
        raise DeliveryError(_short(f"{host}: {_words(error)}", url, token)) from None
    except Exception as error:  # http.client's own, of answers that are none
        raise DeliveryError(f"webhook: {type(error).__name__}") from None


def read_secret(reference: str) -> str:
    """Return what `env:NAME` or `file:PATH` stands for.

    Raises:
        DeliveryError: there is nothing, or more than one line.
    """
    kind, _, place = reference.partition(":")
    value: str | None = None
    if kind == "env":
        value = os.environ.get(place)
    else:
        with suppress(OSError), Path(place).expanduser().open(encoding="utf-8", errors="replace") as file:
            value = file.read(_MOST_SECRET).strip()
    if not value or not value.isprintable():
        raise DeliveryError(f"{reference}: there is no secret of one line")
    return value


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """An alert and its token go where the user said, or nowhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


def _connect(config: EmailConfig, host: str, port: int, timeout: float) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if config.encryption == "tls":
        return smtplib.SMTP_SSL(host, port, timeout=timeout, context=context)
    server = smtplib.SMTP(host, port, timeout=timeout)
    if config.encryption == "starttls":
        try:
            server.starttls(context=context)
        except BaseException:
            server.close()
            raise
    return server


def _hand_to_sendmail(message: EmailMessage, to: list[str], timeout: float) -> None:
    program = shutil.which("sendmail", path=os.pathsep.join((os.environ.get("PATH", ""), _SENDMAIL_PLACES)))
    if program is None:
        raise DeliveryError("this machine has no sendmail; name a server, monitor.alerts.email.server")
    try:
        run = subprocess.run(
            [program, "-i", "--", *to], input=bytes(message), capture_output=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeliveryError(_short(f"{program}: {type(error).__name__}")) from None
    if run.returncode != 0:
        raise DeliveryError(_short(f"{program}: exit {run.returncode}"))


def _check_url(path: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, whole = urlsplit(""), False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise MonitorConfigError(f"{path}: not an address http(s)://HOST/..., nor env:NAME or file:PATH of one")
    if parts.username is not None or parts.password is not None:
        raise MonitorConfigError(f"{path}: holds a password; give the whole address as env:NAME or file:PATH")


def _is_reference(text: str) -> bool:
    return re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:.+", text) is not None


def _check_secret(path: str, reference: str | None) -> None:
    if reference is not None and not _is_reference(reference):  # which may be the secret itself: it is not shown
        raise MonitorConfigError(f"{path}: give env:NAME or file:PATH, where the secret is, and not the secret")


def _words(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"SMTP {error.smtp_code}"  # servers repeat what they were told, names and addresses
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__)


def _short(text: str, *secrets: str | None) -> str:
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _one_line(text)[:_MOST_PROBLEM]


def _one_line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())
