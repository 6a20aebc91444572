"""The config of a checkpoint as transformers takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qembed.checkpoint.description import Checkpoint


def transformers_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of `checkpoint`, of its family and with its attention; code of the checkpoint is not run.

    Raises whatever transformers raises for a config.json that it cannot read.
    """
    import transformers

    trunk = checkpoint.trunk
    if checkpoint.config["model_type"] == trunk.family:
        config: Any = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    else:
        values = {name: value for name, value in checkpoint.config.items() if name not in ("model_type", "auto_map")}
        config = transformers.AutoConfig.for_model(trunk.family, **values)
    config.is_causal = trunk.is_causal
    return config
