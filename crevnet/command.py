"""Command lines over typed signatures: what the entry points share."""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, auto_cli, set_parsing_settings

from crevnet.checkpoint import DamagedCheckpoint
from crevnet.config import TrainConfig
from crevnet.models import MODELS

CONFIGS = Path(__file__).parent / "configs"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def train_parser(program: str, description: str, model: str = "crevnet") -> ArgumentParser:
    """A parser whose options are the fields of `TrainConfig`, from a YAML file and the command line.

    Args:
        program: What the user calls.
        description: What it does.
        model: Whose options `--model.*` are: a name in `MODELS`.
    """
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it.")
    parser.add_class_arguments(MODELS[model], "model")
    parser.add_class_arguments(TrainConfig, skip={"model"})
    return parser


def parse_train_config(program: str, description: str, arguments: list[str]) -> TrainConfig:
    """Parse arguments into a checked configuration; a value out of range ends the program with a message.

    `--model NAME` chooses among the models; of a YAML file for another model only what all models share is used.
    """
    try:
        name, arguments = choose_model(arguments)
    except (ValueError, OSError) as error:
        train_parser(program, description).error(str(error))
    parser = train_parser(program, description, name)
    options = parser.parse_args(arguments)
    try:
        return _build(parser, options)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def choose_model(arguments: list[str]) -> tuple[str, list[str]]:
    """The model that a command line names, and the arguments for the parser of that model.

    The last `--model` says it, else the last YAML file with a section on the model, which without a name is CrevNet's.

    Raises:
        ValueError: No such model, or a file is not YAML.
        OSError: A file cannot be read.
    """
    rest: list[str] = []
    name = ""
    files: list[tuple[int, dict[str, Any]]] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--model", "--model.name", "--config"):
            rest.append(word)
            continue
        given = value if equals else next(words, None)
        if given is None:
            rest.append(word)  # the parser says what is missing
        elif option == "--config":
            files.append((len(rest), _read_yaml(given)))
            rest.append("")
        else:
            name = _known_model(given)
    if not name:
        name = _known_model((["crevnet"] + [_named(content) for _, content in files if content.get("model")])[-1])
    for place, content in files:
        if _named(content) != name:
            shared = content.get("model") or {}
            content["model"] = {k: shared[k] for k in ("channels", "image_size") if k in shared}
        content["model"] = {**(content.get("model") or {}), "name": name}
        rest[place] = f"--config={yaml.safe_dump(content)}"
    return name, [*rest, f"--model.name={name}"]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the YAML file that repeats a run with `--config`, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))
    os.replace(part, path)


def load_config(path: Path) -> TrainConfig:
    """Read a configuration written by `save_config`."""
    parser = train_parser("config", "", _known_model(_named(_read_yaml(path))))
    return _build(parser, parser.parse_path(path))


def run_command(function: Callable[..., Any]) -> None:
    """Run a function as a command line; what the user can mend ends with a message instead of a traceback."""
    try:
        auto_cli(function, as_positional=True)
    except (ValueError, OSError, DamagedCheckpoint) as error:
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
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict | None):
        raise ValueError(f"{path} is not the configuration of a training run: it must hold sections such as model:")
    return content


def _named(content: dict[str, Any]) -> str:
    return str((content.get("model") or {}).get("name", "crevnet"))


def _known_model(name: str) -> str:
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return name


def _build(parser: ArgumentParser, options: Namespace) -> TrainConfig:
    made = parser.instantiate(options)
    return TrainConfig(**{f.name: made[f.name] for f in fields(TrainConfig)})
