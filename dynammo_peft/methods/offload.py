"""Adapters of old tasks in a folder instead of in the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ..folders import replaced_folder
from ..merging import adapter_slots, set_adapter_tensors
from ..tuner import HeadConfig
from ..tuner.head_config import BACKBONE_TRAINED


# How PEFT names the tensors of a `PeftModel`'s base model.
PREFIX = "base_model.model."


class AdapterFolder:
    """
    Adapters that a method has trained and takes out of its model, each in a subfolder as PEFT saves it.

    `PeftModel.load_adapter` and [`~dynammo_peft.hub.load_adapter`] read them. An adapter is there whole or not at all.

    Args:
        path (`Union[str, Path]`): The folder; made when something is written.

    Attributes:
        configs (`dict[str, HeadConfig]`): The configurations of the adapters that are known to be there.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self.configs: dict[str, HeadConfig] = {}

    def check_free(self, tasks: Mapping[str, list[str]]) -> None:
        """Refuses a folder with adapters of other tasks; those of the same tasks will be replaced.

        Args:
            tasks (`Mapping[str, list[str]]`): Names of the adapters to be written, and the class names of each.

        Raises:
            ValueError: If there is an adapter of such a name with other classes.
        """
        for name, group in tasks.items():
            config = self._read_config(name)
            if config is not None and config.class_names != group:
                raise ValueError(
                    f"offload_adapters={str(self.path)!r} holds an adapter {name!r} of the classes "
                    f"{config.class_names}, not {group}; choose another folder."
                )

    def find(self, name: str) -> bool:
        """Whether an adapter is there; it is known from then on."""
        config = self.configs.get(name) or self._read_config(name)
        if config is not None:
            self.configs[name] = config
        return config is not None

    def keep(self, model: PeftModel, name: str, accelerator: Accelerator) -> None:
        """Writes an adapter of a model, unless it was written before; all processes have to call it.

        Args:
            model (`PeftModel`): The model.
            name (`str`): Name of an adapter that is trained no more; one of its name in the folder is replaced.
            accelerator (`Accelerator`): Its main process writes.
        """
        if name not in self.configs:
            if accelerator.is_main_process:
                self._save(model, name)
            accelerator.wait_for_everyone()
            self.configs[name] = model.peft_config[name]

    def take_out(self, model: PeftModel, name: str, accelerator: Accelerator) -> None:
        """Takes an adapter out of a model, if it is there; arguments as of `keep`."""
        if name in model.peft_config:
            self.keep(model, name, accelerator)
            model.delete_adapter(name)

    def _save(self, model: PeftModel, name: str) -> None:
        with replaced_folder(self.path / name) as partial:
            with warnings.catch_warnings():
                # The backbone stays where it is, in the model.
                warnings.filterwarnings("ignore", message=BACKBONE_TRAINED)
                model.save_pretrained(partial, selected_adapters=[name], save_embedding_layers=False)
            for file in (partial / name).iterdir():
                file.rename(partial / file.name)
            (partial / name).rmdir()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter, by the names that PEFT saves them by."""
        return load_file(self.path / name / SAFETENSORS_WEIGHTS_NAME)

    def copy_to(self, model: PeftModel, source: str, target: str) -> None:
        """Copies the backbone's part of an adapter to one in a model; heads are not copied."""
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in self.tensors(source).items()}
        set_adapter_tensors(model, target, {key: tensors[key] for key in adapter_slots(model, target)})

    def _read_config(self, name: str) -> Optional[HeadConfig]:
        folder = self.path / name
        return PeftConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
