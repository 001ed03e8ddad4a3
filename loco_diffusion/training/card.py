"""The model card of a trained adapter: what it is, how to load it, how well it does, how it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import RepoCard

from loco_diffusion.bases import is_packaged
from loco_diffusion.control.adapter_folder import BaseDescription, portable_name
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.journal import Record
from loco_diffusion.training.output import OutputFolder
from loco_diffusion.training.report import score_table
from loco_diffusion.training.validation import grid_path

_TEXT = """\
# {title}

Makes {base_name} follow {condition} maps: an adapter of the method {method} ({route} route), trained with
loco_diffusion. The base model's weights are unchanged, and without a condition it draws what it draws without the
adapter.

{pictures}
## How to use it

With the package loco-diffusion installed:

```python
{snippet}
```

`strength` (0 to 1 and above) turns the control up and down; several adapters work together. peft's own
`PeftModel.from_pretrained` reads the layers' adapter, too, but knows nothing of the condition.

{scores}## How it was trained

{training}

Everything else is in [training_config.yaml](training_config.yaml); `control_config.json` tells the versions of all
packages, and a sample of the base's weights, by which a wrong base is refused.
"""

_STOCK = """\
import torch
from diffusers import DiffusionPipeline

from loco_diffusion import Controller
from loco_diffusion.images import fit, load_image

pipe = DiffusionPipeline.from_pretrained("{base}"{revision}, dtype=torch.bfloat16)
controller = Controller(pipe)
name = controller.load_adapter("{adapter}")
extract = controller.adapters[name].make_condition().extract
condition = extract(fit(load_image("photo.png"), {size}, {size}))
with controller({condition}=condition, strength=1.0):
    image = pipe(prompt="what the picture shows", height={size}, width={size}).images[0]
image.save("drawn.png")"""

_PACKAGED = """\
from loco_diffusion.generation import open_session
from loco_diffusion.images import fit, load_image

session = open_session("{base}")  # a stock pipeline, session.pipe, and its Controller
session.load_adapters({{"{condition}": "{adapter}"}})
extract = session.controller.adapters["{condition}"].make_condition().extract
condition = extract(fit(load_image("photo.png"), {size}, {size}))
image = session.generate(["what the picture shows"], [0], maps={{"{condition}": condition}})[0]
image.save("drawn.png")"""


def documents(
    config: TrainingConfig,
    output: OutputFolder,
    records: Sequence[Record],
    base: BaseDescription,
    parameters: int,
    hub_id: str | None,
) -> dict[str, bytes]:
    """The files for people in an adapter's folder: model card, training configuration, pictures.

    Args:
        config: of the run.
        output: of the run, with the last step's pictures if it drew some.
        records: of the log.
        base: what was trained on.
        parameters: how many were trained.
        hub_id: where the adapter will be, if that is known.
    """
    found = {"training_config.yaml": yaml.safe_dump(_portable(config), sort_keys=False).encode()}
    grid = grid_path(output.samples, config.steps)
    if grid.exists():
        found["samples.png"] = grid.read_bytes()
    card = model_card(config, records, base, parameters, hub_id, has_pictures=grid.exists())
    return {"README.md": str(card).encode(), **found}


def model_card(
    config: TrainingConfig,
    records: Sequence[Record],
    base: BaseDescription,
    parameters: int,
    hub_id: str | None,
    has_pictures: bool,
) -> RepoCard:
    """The card, with metadata as the Hugging Face Hub reads it; see `documents`."""
    method = config.adapter.method
    on_hub = base.name_or_path if base.name_or_path and "/" in base.name_or_path else None
    data = ModelCardData(
        base_model=on_hub,
        library_name="peft",
        pipeline_tag="image-to-image",
        tags=[
            "loco-diffusion",
            "diffusers",
            "text-to-image",
            "control",
            config.condition,
            method,
            base.denoiser,
        ],
    )
    text = _TEXT.format(
        title=f"{config.condition}: {method} for {_name(config, base)}",
        base_name=_name(config, base),
        condition=config.condition,
        method=method,
        route="tokens" if config.tokens else "encoder",
        pictures="![Validation pictures: original, condition, with control, without control](samples.png)\n"
        if has_pictures
        else "",
        snippet=snippet(config, base, hub_id),
        scores=_scores(config, records),
        training=_training(config, base, parameters),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def snippet(config: TrainingConfig, base: BaseDescription, hub_id: str | None) -> str:
    """A program that draws with the adapter."""
    values = {
        "condition": config.condition,
        "size": config.data.size,
        "base": config.base if is_packaged(config.base) else base.name_or_path,
        "revision": f', revision="{base.revision}"' if base.revision else "",
        "adapter": hub_id or "path/to/this/folder",
    }
    return (_PACKAGED if is_packaged(config.base) else _STOCK).format(**values)


def _name(config: TrainingConfig, base: BaseDescription) -> str:
    if is_packaged(config.base):
        return "the base model that comes with loco_diffusion"
    return base.name_or_path or base.denoiser


def _scores(config: TrainingConfig, records: Sequence[Record]) -> str:
    table = score_table(config.condition, records)
    if not table:
        return ""
    lines = ["| | better | with control | without control | VAE round trip |", "|---|---|---|---|---|"]
    for score, values in table:
        cells = ["–" if value is None else f"{value:.4g}" for value in values]
        better = "higher" if score.higher_is_better else "lower"
        lines.append(f"| {score.title} | {better} | {' | '.join(cells)} |")
    where = "pictures of a folder of its own" if config.validation.path else "validation pictures"
    last = next(record for record in reversed(records) if record.get("event") == "validation")
    count = last.get("pictures", config.validation.pictures)  # earlier versions did not log it
    about = (
        f"After the last step, on the {count} {where} that watched the run: too few to compare "
        "methods by, enough to see that it works. The VAE's round trip is the best that any control could do."
    )
    return "\n".join(["## Scores", "", *lines, "", about, "", ""])


def _training(config: TrainingConfig, base: BaseDescription, parameters: int) -> str:
    rows = {
        "base": " ".join(filter(None, (base.denoiser, base.name_or_path, base.revision))),
        "trained parameters": f"{parameters:,}",
        "steps": f"{config.steps:,}, {config.batch_size * config.accumulation} pictures each on a device",
        "peak learning rates": f"{config.lr:g}, condition encoder {config.encoder_lr:g}",
        "pictures": f"{config.data.source}, {config.data.size} px",
        "precision": f"base in {config.dtype}, mixed precision {config.mixed_precision}, adapter in float32",
        "seed": str(config.seed),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _portable(config: TrainingConfig) -> dict[str, object]:
    """The configuration without the places of this machine."""
    fields = config.model_dump(mode="json")
    fields["output"] = Path(config.output).name
    fields["base"] = portable_name(config.base)
    for section, name in (("data", "path"), ("data", "name"), ("validation", "path")):
        if fields[section].get(name):
            fields[section][name] = portable_name(fields[section][name])
    fields["cache_folder"] = None
    if isinstance(model := fields["condition_options"].get("model"), str):
        fields["condition_options"]["model"] = portable_name(model)
    return fields
