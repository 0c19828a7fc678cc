"""`rookery alerts`: tells people of a run, from a machine that has a network, and looks whether the run still lives."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from monitoring.alerting.alerts import AlertsConfig
    from monitoring.alerting.watch import Round

_ALARM = 1
_PREFIX = "monitor.alerts."


def alerts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings for here, as in monitor.alerts.email.to=[me@x.org]."),
    ] = None,
    every: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Look so often, until the run is finished.", min=1.0)
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test on every way that is set up.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a look.")] = False,
) -> None:
    """Send the alerts of a run that have not left yet, and see whether it lives; exit 1 if an alarm stands."""
    from monitoring.alerting.watch import AlertWatch
    from monitoring.reading.run_config import require_run

    require_run(run)
    name, config = _settings(run, overrides or [])
    if test and not config.channels:
        raise ValueError(
            "there is nobody to alert: set monitor.alerts.command, .email or .webhook, in the run's configuration or"
            " behind RUN on this command line"
        )
    watch = AlertWatch(run.absolute(), name, config)  # mails are read elsewhere
    while True:
        found = watch.test() if test else watch.look()
        _print(run, found, bool(config.channels), as_json=as_json)
        if every is None or test or found.pulse.state == "finished":
            break
        time.sleep(every)
    failed = found.problems if test else found.problems or found.pulse.alarm
    raise typer.Exit(_ALARM if failed else 0)


def _settings(run: Path, overrides: list[str]) -> tuple[str, AlertsConfig]:
    """Return the run's name, and its alerts as run.yaml has them, with what is set here."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from monitoring.alerting.alerts import AlertsConfig
    from pipeline.errors import ConfigError
    from pipeline.schema import read_yaml, to_dataclass

    path = run / "run.yaml"
    tree: dict[str, Any] = read_yaml(path) if path.is_file() else {}
    monitor = tree.get("monitor")
    own = monitor.get("alerts") if isinstance(monitor, dict) else None
    for override in overrides:
        if not override.startswith(_PREFIX) or "=" not in override:
            raise ConfigError(f"{override!r}: only {_PREFIX}NAME=VALUE can be set here")
    try:
        changes = OmegaConf.from_dotlist([override.removeprefix(_PREFIX) for override in overrides])
        merged = OmegaConf.merge(OmegaConf.create(own or {}), changes)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}, {' '.join(overrides)}: {error}") from None
    return str(tree.get("name", run.name)), to_dataclass(merged, AlertsConfig)  # type: ignore[arg-type]


def _print(run: Path, found: Round, anybody: bool, *, as_json: bool) -> None:
    if as_json:
        alarm = found.pulse.alarm
        print(json.dumps({"run": str(run), "time": time.time(), "alarm": alarm, **asdict(found)}), flush=True)
        return
    pulse = found.pulse
    step = "" if pulse.step is None else f", step {pulse.step:,}"
    print(f"{run}: {pulse.state}{step}: {pulse.reason}", flush=True)
    for sent in found.sent:
        print(f"  sent {sent}", flush=True)
    for channel, problem in found.problems.items():
        print(f"  not sent by {channel}: {problem}", flush=True)
    if not anybody:
        print("  nobody is told: monitor.alerts names no command, email or webhook", flush=True)
