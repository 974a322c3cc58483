"""The rules for several updates in a step, and the settings that exclude them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from disttrain.config.annotations import PLAIN_KEY
from disttrain.config.wording import both, got

if TYPE_CHECKING:
    from disttrain.config.fields import Config


def update_problems(config: "Config") -> Iterator[str]:
    """Yield the problems of a config with updates, each a sentence without a full stop."""
    if not config.updates:
        return
    for name in config.updates:
        if not PLAIN_KEY.fullmatch(name) or "/" in name:
            yield f"updates: expected names without '.', '=', '/' and spaces, such as 'd', got {got(name)}"
    for field in ("optimizer", "schedule", "grad_clip_norm"):
        if (value := getattr(config, field)) is not None:
            yield (
                f"{field}: expected None with updates, each of which has its own, got {got(value)}; write "
                f"Update(NAME, ..., {field}=...)"
            )
    for field in ("loss", "forward"):
        if config.valid_data is None and (value := getattr(config, field)) is not None:
            yield (
                f"{field}: expected None with updates and without valid_data, got {got(value)}; each Update has a "
                "forward, and this one is for the validation data alone"
            )
    if (least := min(update.every for update in config.updates.values())) > 1:
        yield (
            f"updates: expected one that is due in every step, got every={least} or more for all; leave every out in "
            "one of them"
        )
    not_built: dict[str, tuple[Any, str]] = {
        "global_loss": (config.global_loss, "None"),
        "train_metrics": (config.train_metrics, "none"),
        "audit.every_steps": (config.audit.every_steps, "0"),
        "compile": (config.compile, "False"),
        "spmd": (config.spmd, "False"),
        "precision": ("" if config.precision != "apex" else "apex", '"fp32", "bf16" or "fp16"'),
        "fsdp_gather": ("" if config.fsdp_gather == "step" else config.fsdp_gather, '"step"'),
    }
    for field, (value, expected) in not_built.items():
        if value:
            shown = both(value) if isinstance(value, Mapping) else got(value)
            yield f"{field}: expected {expected} with updates, together with which it has not been built, got {shown}"
