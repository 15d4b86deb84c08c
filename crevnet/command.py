"""Command lines over typed signatures: what the entry points share."""

import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace, auto_cli, set_parsing_settings

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.config import TrainConfig
from crevnet.datasets import DATASETS
from crevnet.files import written_whole
from crevnet.models import MODELS
from revgrad import ReversibilityError

CONFIGS = Path(__file__).parent / "configs"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Choice(NamedTuple):
    """A section of the configuration that has a name."""

    known: Mapping[str, Any]
    """What may be chosen, by name."""
    default: str
    """What is chosen where nothing is said."""
    shared: tuple[str, ...]
    """Options that are taken from a YAML file for another one."""


CHOICES = {
    "model": Choice(MODELS, "crevnet", ("channels", "image_size")),
    "data": Choice(DATASETS, "moving-mnist", ("image_size", "frames", "test_sequences", "seed")),
}


def train_parser(program: str, description: str, names: Mapping[str, str] | None = None) -> ArgumentParser:
    """A parser whose options are the fields of `TrainConfig`, from a YAML file and the command line.

    Args:
        program: What the user calls.
        description: What it does.
        names: What is chosen for each section in `CHOICES`.
    """
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it.")
    for section, choice in CHOICES.items():
        parser.add_class_arguments(choice.known[(names or {}).get(section, choice.default)], section)
    parser.add_class_arguments(TrainConfig, skip=set(CHOICES))
    return parser


def parse_train_config(program: str, description: str, arguments: list[str]) -> TrainConfig:
    """Parse arguments into a checked configuration; a value out of range ends the program with a message.

    `--model NAME` chooses among the models, `--data NAME` among the data sets; of a YAML file for another one only what
    all share is used.
    """
    try:
        names, arguments = choose(arguments)
    except (ValueError, OSError) as error:
        train_parser(program, description).error(str(error))
    parser = train_parser(program, description, names)
    options = parser.parse_args(arguments)
    try:
        return _build(parser, options)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def choose(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """What a command line names for each section in `CHOICES`, and the arguments for the parser of that.

    The last `--section` says it, else the last YAML file with that section, which without a name is the default's.

    Raises:
        ValueError: No such name, or a file is not YAML.
        OSError: A file cannot be read.
    """
    named_by = {f"--{section}{suffix}": section for section in CHOICES for suffix in ("", ".name")}
    rest: list[str] = []
    names: dict[str, str] = {}
    files: list[tuple[int, dict[str, Any]]] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in (*named_by, "--config"):
            rest.append(word)
            continue
        given = value if equals else next(words, None)
        if given is None:
            rest.append(word)  # the parser says what is missing
        elif option == "--config":
            files.append((len(rest), _read_yaml(given)))
            rest.append("")
        else:
            names[named_by[option]] = given
    for section, choice in CHOICES.items():
        named = [choice.default, *(_named(section, content) for _, content in files if content.get(section))]
        names[section] = _known(section, names.get(section, named[-1]))
    for place, content in files:
        rest[place] = f"--config={yaml.safe_dump(_for_choices(content, names))}"
    return names, [*rest, *(f"--{section}.name={name}" for section, name in names.items())]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the YAML file that repeats a run with `--config`, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))


def load_config(path: Path) -> TrainConfig:
    """Read a configuration written by `save_config`.

    Raises:
        ValueError: Names the file, and the option that is not known or has another value than it may.
        OSError: The file cannot be read.
    """
    content = _read_yaml(path)
    try:
        parser = train_parser("config", "", {section: _known(section, _named(section, content)) for section in CHOICES})
        parser.exit_on_error = False  # it would print how a command is used
        return _build(parser, parser.parse_path(path))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def run_command(function: Callable[..., Any]) -> None:
    """Run a function as a command line; what the user can mend ends with a message instead of a traceback."""
    try:
        auto_cli(function, as_positional=True)
    except (ValueError, OSError, DamagedCheckpoint, ReversibilityError) as error:
        sys.exit(f"error: {error}")


def as_plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what YAML knows."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: as_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [as_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _read_yaml(path: Path | str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(s, {}), dict | None) for s in CHOICES):
        raise ValueError(f"{path} is not the configuration of a training run: it must hold sections such as model:")
    return content


def _named(section: str, content: dict[str, Any]) -> str:
    return str((content.get(section) or {}).get("name", CHOICES[section].default))


def _known(section: str, name: str) -> str:
    known = CHOICES[section].known
    if name not in known:
        raise ValueError(f"{section} must be one of {', '.join(known)}, got {name!r}")
    return name


def _for_choices(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A YAML file's content with what it says of another model or data set left out."""
    chosen = dict(content)
    for section, choice in CHOICES.items():
        options = content.get(section) or {}
        if _named(section, content) != names[section]:
            options = {k: options[k] for k in choice.shared if k in options}
        chosen[section] = {**options, "name": names[section]}
    return chosen


def _build(parser: ArgumentParser, options: Namespace) -> TrainConfig:
    made = parser.instantiate(options)
    return TrainConfig(**{f.name: made[f.name] for f in fields(TrainConfig)})
