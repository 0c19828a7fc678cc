"""What a person can do wrong with the section `monitor` of a configuration."""

from __future__ import annotations


class MonitorConfigError(ValueError):
    """A setting that cannot be used; the message names the dotted path, the value and what to do."""
