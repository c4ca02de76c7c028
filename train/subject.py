"""What is evaluated: the tuned weights, a PEFT adapter of the base or whole weights of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from trimtab.axis.errors import UserError
from trimtab.axis.files import file_fingerprint, fingerprint
from trimtab.axis.models import EMBEDDED, Loaded
from trimtab.recipes.schema import ModelSection
from trimtab.train.prepare import load_section
from trimtab.train.run import Run, Variant

log = logging.getLogger("trimtab")

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Subject:
    """Tuned weights under evaluation.

    Attributes:
        name: folder or hub id.
        whole: whether these are whole weights, rather than a PEFT adapter of the base.
    """

    name: str
    whole: bool

    def fingerprint(self) -> str:
        """What tells these weights from others: an adapter's content; of whole weights in a folder the files' sizes and times."""
        folder = Path(self.name)
        if not folder.is_dir():
            return fingerprint([self.name])
        if not self.whole:
            return file_fingerprint(folder / ADAPTER_WEIGHTS)
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
        return fingerprint([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])

    def load_whole(self, section: ModelSection, base: Loaded) -> Any:
        """Whole weights, loaded as the base is.

        Raises:
            UserError: if they can't be loaded, or have other layers, another hidden size or another vocabulary than the base.
        """
        loaded = load_section(section.model_copy(update={"name": self.name, "revision": None}))
        own, its = (model.config.get_text_config() for model in (base.model, loaded.model))
        for key in ("num_hidden_layers", "hidden_size"):
            if getattr(its, key) != getattr(own, key):
                raise UserError(
                    f"its {key} is {getattr(its, key)}, the base's {getattr(own, key)}",
                    file=self.name,
                    key="eval.tuned",
                    remedy="name a model that was tuned from this base",
                )
        if base.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                "its vocabulary is not the base's, so that token by token nothing can be compared",
                file=self.name,
                key="eval.tuned",
                remedy="name a model that was tuned from this base, with its tokenizer unchanged",
            )
        if base.tokenizer.chat_template != loaded.tokenizer.chat_template:
            log.warning("%s has a chat template of its own; all arms are asked through the base's", self.name)
        return loaded.model


def find_subject(name: str) -> Subject:
    """Tell an adapter from whole weights.

    Raises:
        UserError: if a folder holds neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            if not (folder / ADAPTER_WEIGHTS).exists():
                raise UserError(f"the adapter has no {ADAPTER_WEIGHTS}", file=folder, remedy="save it once more")
            return Subject(str(folder.resolve()), whole=False)
        if (folder / "config.json").exists():
            return Subject(str(folder.resolve()), whole=True)
        raise UserError(
            "neither adapter_config.json nor config.json lies in this folder",
            file=folder,
            key="eval.tuned",
            remedy="name the folder of a PEFT adapter or of a model, as save_pretrained writes them",
        )
    if name in EMBEDDED:
        return Subject(name, whole=True)
    try:
        adapter = find_adapter_config_file(name) is not None
    except OSError:
        adapter = False  # loading says what is wrong with the name
    return Subject(name, whole=not adapter)


def tuned_subject(run: Run) -> Subject:
    """The tuned weights of a run: ``eval.tuned``, or the adapter that it has trained.

    Raises:
        UserError: if there are none.
    """
    if run.recipe.eval.tuned is not None:
        return find_subject(run.recipe.eval.tuned)
    return trained_subject(run.variant(control=False), "tuned adapter", "trimtab train RECIPE")


def trained_subject(variant: Variant, what: str, command: str) -> Subject:
    """An adapter that was trained here.

    Args:
        variant: where it lies.
        what: it is, for the error.
        command: that makes it.

    Raises:
        UserError: if it is not there.
    """
    if not (variant.adapter / ADAPTER_WEIGHTS).exists():
        raise UserError(f"there is no {what}", file=variant.adapter, remedy=f"make it first: {command}")
    return Subject(str(variant.adapter), whole=False)
