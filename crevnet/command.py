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

CONFIGS = Path(__file__).parent / "configs"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def train_parser(program: str, description: str) -> ArgumentParser:
    """A parser whose options are the fields of `TrainConfig`, from a YAML file and the command line."""
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse_train_config(parser: ArgumentParser, arguments: list[str]) -> TrainConfig:
    """Parse arguments into a checked configuration; a value out of range ends the program with a message."""
    options = parser.parse_args(arguments)
    try:
        return _build(parser, options)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the YAML file that repeats a run with `--config`, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(as_plain(config), sort_keys=False))
    os.replace(part, path)


def load_config(path: Path) -> TrainConfig:
    """Read a configuration written by `save_config`."""
    parser = train_parser("config", "")
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


def _build(parser: ArgumentParser, options: Namespace) -> TrainConfig:
    made = parser.instantiate(options)
    return TrainConfig(**{f.name: made[f.name] for f in fields(TrainConfig)})
