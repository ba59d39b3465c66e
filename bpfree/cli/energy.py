"""`bpfree energy`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from bpfree.cli.base import Command, Group, format_option
from bpfree.console import energy_words
from bpfree.energy import KINDS, choose_source
from bpfree.energy.calibration import Calibration, calibrate
from bpfree.energy.load import MatrixLoad
from bpfree.energy.program import Measured, measure_program
from bpfree.energy.survey import survey
from bpfree.experiments.tables import text_table


@click.group("energy", cls=Group)
def energy_group() -> None:
    """Measure programs, calibrate sensors, see what can be measured here."""


def _source_option(verb: str) -> Any:
    return click.option("--source", type=click.Choice(KINDS), default="auto", help=f"Where the joules {verb} from.")


class _Wrapper(Command):
    """A command that exits as the program it runs."""

    def format_usage(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(context.command_path, "[OPTIONS] -- PROGRAM [ARGUMENTS]...")


@energy_group.command(
    cls=_Wrapper,
    epilog="Exit codes: those of PROGRAM; 126 if it cannot be executed, 127 if it is not there, 128 + N if signal N "
    "ended it, 2 for wrong usage of this command.",
)
@_source_option("come")
@click.option(
    "--idle-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Measure the idle device this long before and after, for net joules; 10 or more.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the result there instead of to standard error.",
)
@format_option("table", "json")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def measure(source: str, idle_seconds: float, output: Path | None, form: str, program: tuple[str, ...]) -> None:
    """Run PROGRAM and tell what it took, like `time`: joules, seconds, mean and peak watts.

    \b
    bpfree energy measure -- python train.py --epochs 3
    bpfree energy measure --format json --output joules.json -- ./simulation

    All boards that PROGRAM can see are measured (CUDA_VISIBLE_DEVICES), or the CPU by RAPL where there is no board.
    PROGRAM keeps standard input and output, and its exit code is passed on.
    """
    measured = measure_program(program, kind=source, idle_s=idle_seconds)
    text = json.dumps(_record(measured, program), ensure_ascii=False) if form == "json" else _words(measured)
    if output is None:
        click.echo(text, err=True)
    else:
        try:
            output.write_text(text + "\n")
        except OSError as error:  # the program has run: its energy must not be lost
            click.echo(f"{text}\nbpfree: error: cannot write {output}: {error.strerror}", err=True)
            sys.exit(measured.exit_code or 1)
    sys.exit(measured.exit_code)


def _record(measured: Measured, program: tuple[str, ...]) -> dict[str, Any]:
    return {
        "program": list(program),
        "exit_code": measured.exit_code,
        **measured.energy.as_dict(),
        "peak_w": measured.peak_w,
        "source": measured.source,
    }


def _words(measured: Measured) -> str:
    energy = measured.energy
    words = [
        energy_words({**energy.as_dict(), "source": measured.source}),
        f"{energy.seconds:.2f} s",
        *([] if energy.mean_w is None else [f"mean {energy.mean_w:.1f} W"]),
        *([] if measured.peak_w is None else [f"peak {measured.peak_w:.1f} W"]),
        *([f"exit code {measured.exit_code}"] if measured.exit_code else []),
    ]
    return "bpfree: " + ", ".join(words)


@energy_group.command("calibrate")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@_source_option("come")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=20.0, help="Length of each observation, idle and loaded."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="where later runs find it",
    help="File to write instead.",
)
@format_option("table", "json")
def calibrate_command(device: str, source: str, seconds: float, output: Path | None, form: str) -> None:
    """Find out how good the sensors are, and keep it for later runs.

    Every sensor is read as fast as it answers, while the device idles and while it multiplies matrices. That gives the
    time between two changes of its value, idle and loaded watts, and the energy by the counter over that integrated
    from power. Later runs take the counter's update period and the idle power (for net joules) from it, unless driver
    or power limit have changed. Nothing else should run on the device.
    """
    from bpfree.experiments.run import pick_device

    chosen = pick_device(device)
    with closing(choose_source(source, chosen)) as opened:
        calibration = calibrate(
            opened,
            MatrixLoad(chosen),
            seconds=seconds,
            on_state=lambda state: click.echo(f"{state} for {seconds:g} s", err=True),
        )
    # shown before it is saved: it must not be lost where it cannot be written
    click.echo(calibration.as_json() if form == "json" else text_table(calibration_rows(calibration)))
    click.echo(f"saved as {calibration.save(output)}", err=True)


def calibration_rows(calibration: Calibration) -> list[dict[str, str]]:
    """One row per sensor, as a person reads it."""
    idle, loaded = calibration.idle, calibration.loaded
    rows = []
    for name, sensor in loaded.sensors.items():
        before = idle.sensors.get(name)
        rows.append(
            {
                "sensor": name,
                "one reading, ms": f"{sensor.read_ms:.3f}",
                "new value every, ms (median)": _number(sensor.update_ms, ".1f"),
                "(95 %)": _number(sensor.update_p95_ms, ".1f"),
                "idle, W": _number(before.mean_w if before else None, ".1f"),
                "loaded, W": _number(sensor.mean_w, ".1f"),
                "counter / integral, idle": _number(idle.counter_over_trapezoid.get(name), ".4f"),
                "loaded": _number(loaded.counter_over_trapezoid.get(name), ".4f"),
            }
        )
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@energy_group.command()
@format_option("table", "json")
def env(form: str) -> None:
    """Tell what can be measured on this machine and how, and why not."""
    rows = survey()
    if form == "json":
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    words = {True: "yes", False: "no"}
    click.echo(
        text_table([{"what": row["what"], "measured": words[row["measured"]], "how": row["how"]} for row in rows])
    )
