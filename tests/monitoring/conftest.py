"""A web server that alerts are sent to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.monitoring.alert_receivers import WebServer, serving


@pytest.fixture
def web() -> Iterator[WebServer]:
    """A server that keeps what it is sent."""
    with serving(WebServer()) as server:
        yield server
