"""How every job reads its configuration and ends.

A job is a frozen dataclass. `--config` takes a file or the name of a shipped YAML, `--section.key VALUE` changes one value,
`--print_config` shows the result; unknown keys and wrong types end with status 2, as do all mistakes of a user.
"""

import argparse
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from msclip.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

CONFIGS = Path(__file__).parent / "configs"
Job = TypeVar("Job")


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config_path(value: str) -> str:
    """A path as it is; a shipped name becomes the path of its YAML."""
    if Path(value).is_file():
        try:
            content = yaml.safe_load(Path(value).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            what = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
            raise UserError(f"--config {value} is not valid YAML: {what}") from None
        if content is not None and not isinstance(content, dict):
            raise UserError(f"--config {value} must hold settings by name, got a {type(content).__name__}")
        return value
    shipped = CONFIGS / f"{value}.yaml"
    if shipped.is_file():
        return str(shipped)
    raise UserError(f"--config must be a YAML file or one of {', '.join(shipped_configs())}, got {value!r}")


def parse(job: type[Job], argv: Sequence[str] | None = None, *, prog: str | None = None, defaults: str | None = None) -> Job:
    """The job that the command line describes.

    Args:
        job: the dataclass to fill.
        argv: arguments without the program's name; null for the process's own.
        prog: the program's name in help and errors.
        defaults: YAML text that takes the place of the class's own defaults, for continuing a run.

    Raises:
        UserError: an unknown key, a value of the wrong type, or `--config` names neither a file nor a shipped configuration.
    """
    with _settings(job, sys.argv[1:] if argv is None else argv, prog, defaults) as (parser, namespace):
        return job(**parser.instantiate(namespace).as_dict())


def written(job: type, argv: Sequence[str], *, prog: str | None = None, files: bool = True) -> dict[str, Any]:
    """The settings that a user writes, by dotted name: no defaults.

    Args:
        files: whether those of the files that `--config` names count, or the command line's own alone.

    Raises:
        UserError: as `parse`.
    """
    arguments = [argument for argument in argv if not argument.startswith("--print_config")]  # which would end here
    while not files and take_option(arguments, "--config") is not None:
        pass
    with _settings(job, arguments, prog, None, with_defaults=False) as (_, namespace):
        return vars(namespace.as_flat())


@contextmanager
def _settings(
    job: type, argv: Sequence[str], prog: str | None, defaults: str | None, with_defaults: bool = True
) -> Iterator[tuple[jsonargparse.ArgumentParser, jsonargparse.Namespace]]:
    """The parser and what it read; what goes wrong with that, also inside, becomes a `UserError`."""
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = config_path(arguments[i + 1])
        elif argument.startswith("--config="):
            arguments[i] = "--config=" + config_path(argument.removeprefix("--config="))
    parser = jsonargparse.ArgumentParser(prog=prog, description=(job.__doc__ or "").strip(), exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a shipped one")
    parser.add_class_arguments(job, as_group=False)
    try:
        if defaults is not None:
            parser.set_defaults(yaml.safe_load(defaults))
        namespace = parser.parse_args(arguments, defaults=with_defaults)
        namespace.pop("config", None)
        yield parser, namespace
    except (jsonargparse.ArgumentError, argparse.ArgumentError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())}{suggestion(parser, str(error))}") from None


def suggestion(parser: jsonargparse.ArgumentParser, error: str) -> str:
    """The known settings that look most like a word of the message, for a typo."""
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    error = re.sub(r"<class '\w+'>", "", error)  # `int` looks like `init`
    words = [word for word in re.findall(r"[A-Za-z_][\w.]*", error) if word not in known]
    words += [".".join(pair) for pair in itertools.pairwise(re.findall(r"'([\w.]+)'", error))]
    close = {match for word in words for match in difflib.get_close_matches(word, known, n=1, cutoff=0.8)}
    return f"; did you mean {' or '.join(sorted(close))}?" if close else "; --help lists all settings"


def take_option(arguments: list[str], name: str) -> str | None:
    """Removes `name VALUE` or `name=VALUE` from `arguments` and returns the value.

    Raises:
        UserError: the option stands last, without its value.
    """
    for i, argument in enumerate(arguments):
        if argument == name:
            if i + 1 == len(arguments):
                raise UserError(f"{name} needs a value")
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith(name + "="):
            del arguments[i]
            return argument.removeprefix(name + "=")
    return None


def gather(argv: Sequence[str], name: str) -> list[str]:
    """Turns `name A B` into the one list that the parser takes."""
    arguments: list[str] = []
    given: list[str] | None = None
    for argument in argv:
        if argument == name:
            given = []
        elif given is not None and not argument.startswith("--"):
            given.append(argument)
        else:
            arguments += [name, json.dumps(given)] if given is not None else []
            given = None
            arguments.append(argument)
    return arguments + ([name, json.dumps(given)] if given is not None else [])


def guard(main: Callable[[], int | None]) -> int:
    """Runs a job's body; a `UserError` becomes one paragraph on stderr and its exit status."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'storage'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
