"""What all commands share: one-line errors, variables of the environment, common options."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from bpfree.algorithms.learner import TASKS
from bpfree.errors import EXIT_STOPPED, BpfreeError, TrainingError, UsageError
from bpfree.parallel.ranks import is_leader

ENVIRONMENT_NOTE = (
    "Every option can also be given as an environment variable BPFREE_COMMAND_OPTION, such as "
    "BPFREE_RUN_EPOCHS=10; BPFREE_DATA names the folder of the data sets."
)
NO_MEMORY = "can't allocate memory"  # how PyTorch's allocator for the CPU says so, in a plain RuntimeError

NO_ARGUMENTS: tuple[type[click.UsageError], ...] = (
    (click.exceptions.NoArgsIsHelpError,) if hasattr(click.exceptions, "NoArgsIsHelpError") else ()
)
"""How newer versions of click end a command that was given nothing and shows its help."""

EXIT_NOTE = "Exit codes: 0 done, 1 failure, 2 usage, 3 target accuracy missed, 130 stopped by Ctrl-C or a signal."


def fail(error: BpfreeError) -> NoReturn:
    if is_leader():  # of processes that all say the same
        click.echo(f"bpfree: error: {error}", err=True)
    sys.exit(error.exit_code)


def warn(text: str) -> None:
    """Say something that a person should know and that does not stop the command."""
    click.echo(f"bpfree: warning: {text}", err=True)


@contextmanager
def usage_in_one_line() -> Iterator[None]:
    """Say what is wrong with arguments as all errors are said, without the usage that click prints around it."""
    try:
        yield
    except NO_ARGUMENTS:  # which is answered with help
        raise
    except click.UsageError as error:
        more = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
        fail(UsageError(error.format_message().rstrip(".") + more))


def refuse_nan(context: click.Context) -> None:
    """Refuse numbers that are none: they are in no range, and click lets them pass all.

    Raises:
        UsageError: of click.
    """
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if any(isinstance(one, float) and math.isnan(one) for one in (value if isinstance(value, tuple) else [value])):
            raise click.BadParameter("nan is not a number.", context, parameter)


def told(error: Exception) -> BpfreeError | None:
    """What to say of an error in one line; None for a defect, and for what click deals with."""
    if isinstance(error, BpfreeError):
        return error
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return TrainingError("this machine has not that much memory; use a smaller network, batch or data set")
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:  # who reads no more needs no word
        return None
    with suppress(OSError, ValueError):  # a full disk behind standard output fails again when Python writes the rest
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    where = f" ({error.filename})" if error.filename else ""
    return BpfreeError(f"{error.strerror or error}{where}; --debug shows what it was for")


class Command(click.Command):
    """A command whose errors are one line; `--debug` shows where they came from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the stack trace of an error."))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if parent is not None and parent.auto_envvar_prefix and info_name:
            for option in self.params:  # click would take the variable's name from the function's argument
                if isinstance(option, click.Option) and option.envvar is None:
                    words = (parent.auto_envvar_prefix, info_name, max(option.opts, key=len).lstrip("-"))
                    option.envvar = "_".join(words).upper().replace("-", "_")
        with usage_in_one_line():
            context = super().make_context(info_name, args, parent, **extra)
            refuse_nan(context)
            return context

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug")
        try:
            with usage_in_one_line():
                return super().invoke(context)
        except Exception as error:
            said = None if debug else told(error)
            if said is None:
                raise
            fail(said)
        except KeyboardInterrupt:
            if is_leader():
                click.echo("bpfree: stopped", err=True)
            sys.exit(EXIT_STOPPED)


class Group(click.Group):
    command_class = Command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with usage_in_one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, context: click.Context) -> Any:
        with usage_in_one_line():
            return super().invoke(context)


def format_option(*choices: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--format", "form", type=click.Choice(choices), default=choices[0], help="How to print the result."
    )


def data_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data",
        "data_root",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="BPFREE_DATA",
        show_envvar=True,
        show_default="a folder in the user's cache",
        help="Folder of the data sets.",
    )(function)


def task_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--task",
        type=click.Choice(TASKS),
        help="Tell classes apart (or links of graphs), or reconstruct images.  [default: the preset's, or classify]",
    )(function)


def subject_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options on what a rule is to learn, of commands that take what `bpfree run` takes."""
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the rule (repeatable)."
        ),
        click.option(
            "--preset",
            help="Start from this preset, by name or as a .toml file; 'none' for the rule's defaults.  "
            "[default: the one that fits]",
        ),
        task_option,
        click.option("--network", "-n", help="Network, such as mlp:2x1000 or cnn:mf.  [default: the preset's]"),
        click.option(
            "--dataset",
            "-d",
            help="Data set, or folder:PATH[@SIZE] for image files of your own.  [default: digits, which is packaged]",
        ),
    ):
        function = option(function)
    return function


mixed_hardware_option = click.option(
    "--mixed-hardware", is_flag=True, help="Allow runs of several kinds of hardware, and label them."
)
baseline_option = click.option(
    "--baseline", metavar="ARM", help="The arm to pair with.  [default: what the comparison fixed]"
)


def is_default(parameter: str) -> bool:
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.DEFAULT


def is_given(parameter: str) -> bool:
    """Whether an option was written on the command line; variables of the environment may stay set for all."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def refuse_idle_measurement(energy: str, seconds: float) -> None:
    """Refuse to measure the idle device for joules that nobody measures.

    Raises:
        UsageError: that was asked for.
    """
    if energy == "none" and seconds and is_given("idle_seconds"):
        raise UsageError("--idle-seconds would have no effect with --energy none; leave one of them out")


def refuse_others(
    option: str, *, allowed: AbstractSet[str] = frozenset(), refused: AbstractSet[str] = frozenset()
) -> None:
    """Refuse options that `option` would have to ignore: those in `refused`, or else all but those in `allowed`.

    Variables of the environment may stay set.
    """
    for parameter in click.get_current_context().command.params:
        name = parameter.name or ""
        ignored = name in refused if refused else name not in allowed
        if ignored and is_given(name):
            raise UsageError(f"{option} takes the run as it was recorded; leave out {max(parameter.opts, key=len)}")
