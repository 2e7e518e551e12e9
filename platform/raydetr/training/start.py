"""The command line of a training run: --recipe and --config set the defaults of all other flags."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import tyro

from raydetr import command
from raydetr.errors import ConfigError
from raydetr.flat_keys import flatten, nest, override
from raydetr.training.config import RENAMED, TrainConfig
from raydetr.training.recipes import DEFAULT, load_recipe

S = TypeVar("S", bound=TrainConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefaultsConfig:
    """Where the defaults of all other flags come from."""

    recipe: str = DEFAULT
    """multi-scale, scenes, detr-small, detr-r50, fine-tune, panoptic, panoptic-boxes, masks, or package.module:function
    of a function that returns a `TrainConfig`."""
    config: str = ""
    """YAML file with settings that replace those of the recipe: the output of --print-config, or run.json of a run."""
    print_config: bool = False
    """Print the configuration as YAML and exit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(Generic[S]):
    """Flags of a job that takes the settings of a training run."""

    defaults: DefaultsConfig
    settings: Annotated[S, tyro.conf.arg(name="")]

    @property
    def json(self) -> str:
        """Return the file for the summary; empty: none."""
        return self.settings.json


def run(
    main: Callable[[S], Mapping[str, Any]],
    config_class: type[S],
    args: Sequence[str] | None = None,
) -> None:
    """Run a job with the flags of `config_class`, whose defaults come from a recipe and a file.

    Args:
        main: takes the settings and returns the summary.
        config_class: `TrainConfig`, or a subclass with more groups.
        args: the flags; None: those of the command line.
    """
    with command.reported_errors():
        given, _ = tyro.cli(
            DefaultsConfig,
            args=args,
            add_help=False,
            return_unknown_args=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        recipe = read_defaults(given)
        groups = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(TrainConfig)}
        default = TrainFlags(defaults=DefaultsConfig(), settings=config_class(**groups))
        command_class = TrainFlags[config_class]  # type: ignore[valid-type]
        if given.print_config:
            print_yaml(command.parse(command_class, default=default, args=args).settings)
            return

    def checked(flags: TrainFlags[S]) -> Mapping[str, Any]:
        require_own_architecture(flags.settings, recipe, given.recipe)
        return main(flags.settings)

    command.run(checked, command_class, default=default, args=args)


def require_own_architecture(config: TrainConfig, default: TrainConfig, recipe: str) -> None:
    """Check that the flags fit the recipe and the model.

    Args:
        config: the settings of the run.
        default: those of the recipe and of the file, without flags.
        recipe: name of the recipe.

    Raises:
        ConfigError: fine-tune without a model, or architecture flags together with a model, which has its own.
    """
    if recipe == "fine-tune" and not config.model.model:
        raise ConfigError("--recipe fine-tune starts from an existing model: give it as --model.")
    before = flatten(default.model.architecture)
    given = [name for name, value in flatten(config.model.architecture).items() if value != before[name]]
    if config.model.model and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: the architecture is that of --model {config.model.model}; remove "
            f"{'it' if len(given) == 1 else 'them'}, or train a new model without --model."
        )


def read_defaults(given: DefaultsConfig) -> TrainConfig:
    """Return the configuration of the recipe, with the settings of the file.

    Raises:
        ConfigError: there is no such recipe, or the file has settings that do not exist or are out of range.
        StorageError: the file cannot be read.
    """
    recipe = load_recipe(given.recipe)
    if not given.config:
        return recipe
    return override(recipe, f"--config {given.config}", **read_settings(given.config))


def read_settings(file: str) -> dict[str, Any]:
    """Return the settings in a YAML file or in the run.json of a run, by flat name.

    Raises:
        ConfigError: the file is not YAML, or has no settings.
        StorageError: it cannot be read.
    """
    import yaml

    from raydetr import storage

    try:
        content = yaml.safe_load(storage.read_bytes(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: this is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected settings, as --print-config prints them.")
    if "identity" in content:  # run.json; runs of version 0.1 have no config
        identity = {
            name: value for name, value in content["identity"].items() if not name.endswith("_digest")
        }
        content = content.get("config", identity)
    return {RENAMED.get(name, name): value for name, value in _flat_items(content)}


def _flat_items(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in content.items():
        items += _flat_items(value) if isinstance(value, dict) else [(str(name), value)]
    return items


def print_yaml(config: TrainConfig) -> None:
    """Print a configuration as YAML, in groups."""
    import yaml

    print(yaml.safe_dump(nest(config), sort_keys=False, default_flow_style=None, allow_unicode=True), end="")
