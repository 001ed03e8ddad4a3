"""The configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

from loco_diffusion.errors import UserError

_CONFIGS = Path(__file__).with_name("configs")
_EMBEDDED = Path(__file__).parents[1] / "embedded" / "adapters"


def packaged_configs() -> dict[str, Path]:
    """The files by name, those of the adapters of the embedded world as `embedded-...`."""
    configs = {path.stem: path for path in sorted(_CONFIGS.glob("*.yaml"))}
    for path in sorted(_EMBEDDED.rglob("*.yaml")):
        parts = path.relative_to(_EMBEDDED).with_suffix("").parts
        configs["-".join(("embedded", *parts))] = path
    return configs


def find_config(name: str | Path) -> Path:
    """The file of a configuration.

    Args:
        name: a path, or the name of a packaged one; a file goes before a name.

    Raises:
        UserError: it is neither.
    """
    path, configs = Path(name), packaged_configs()
    if path.exists():
        return path
    if str(name) not in configs:
        raise UserError(
            f"There is no configuration {name}; give a YAML file, or one of {', '.join(configs)}."
        )
    return configs[str(name)]
