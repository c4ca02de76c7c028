"""What is evaluated: the tuned weights, a PEFT adapter of the base or whole weights of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from trimtab.axis.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_files, load_adapter
from trimtab.axis.errors import UserError
from trimtab.axis.files import file_fingerprint, fingerprint, read_json
from trimtab.axis.models import EMBEDDED, Loaded, load_config, load_tokenizer, meta_model, resolve_name
from trimtab.pipeline.loading import load_section
from trimtab.pipeline.run import Run, Variant
from trimtab.recipes.schema import ModelSection

log = logging.getLogger("trimtab")

KEY = "eval.tuned"


@dataclass(frozen=True)
class Subject:
    """Tuned weights under evaluation.

    Attributes:
        name: folder or hub id.
        whole: whether these are whole weights, rather than a PEFT adapter of the base.
    """

    name: str
    whole: bool

    @property
    def folder(self) -> Path:
        """The folder of an adapter; of one on the hub, where its files have been fetched to."""
        if Path(self.name).is_dir():
            return Path(self.name)
        cached_file(self.name, ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False)
        return Path(str(cached_file(self.name, ADAPTER_CONFIG))).parent

    def fingerprint(self) -> str:
        """What tells these weights from others: an adapter's content; of whole weights in a folder the files' sizes and times."""
        if not self.whole:
            return file_fingerprint(self.folder / ADAPTER_WEIGHTS)
        folder = Path(self.name)
        if not folder.is_dir():
            return fingerprint([self.name])
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
        return fingerprint([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])

    def load_whole(self, section: ModelSection, base: Loaded) -> Any:
        """Whole weights that :func:`check_subject` has passed, loaded as the base is.

        Rows of the heads that only one of the two has are cut off, so that both speak of the same tokens.

        Raises:
            UserError: if they can't be loaded.
        """
        loaded = load_section(section.model_copy(update={"name": self.name, "revision": None}))
        rows = [int(model.get_output_embeddings().weight.shape[0]) for model in (base.model, loaded.model)]
        for model in (base.model, loaded.model) if rows[0] != rows[1] else ():
            model.resize_token_embeddings(min(rows), mean_resizing=False)
        return loaded.model


def check_subject(section: ModelSection, subject: Subject) -> None:
    """See whether tuned weights fit the base, without loading weights: quick enough to come before anything else.

    Args:
        section: of the recipe, which names the base.
        subject: the tuned weights, whose files :func:`find_subject` has looked at.

    Raises:
        UserError: if an adapter's weights have no place in the base, or not all of its places a weight; if whole weights have
            other layers, another hidden size or other tokens.
    """
    if subject.whole:
        _check_whole(section, subject)
        return
    named = read_json(subject.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if named and not _same_model(str(named), section.name):
        log.warning("%s was trained upon %s, and is measured upon %s", subject.name, named, section.name)
    try:
        structure = meta_model(section.name, section.revision)
    except OSError:
        return  # loading says what is wrong with the base
    load_adapter(structure, subject.folder, key=KEY)


def _same_model(one: str, other: str) -> bool:
    """Whether two names are of one model, as far as names tell: a hub id and a folder that ends alike are."""
    names = {
        Path(name).name for name in (other, resolve_name(other)[0], EMBEDDED[other].hub if other in EMBEDDED else other)
    }
    return Path(one).name in names


def _check_whole(section: ModelSection, subject: Subject) -> None:
    try:
        its = load_config(subject.name).get_text_config()
    except (OSError, ValueError) as error:  # a UserError too, which speaks of the base
        said = error.fault if isinstance(error, UserError) else str(error).splitlines()[0]
        raise UserError(
            f"neither an adapter nor a model can be had under this name: {said}",
            file=subject.name,
            key=KEY,
            remedy="name a folder, or a hub id that this machine can reach (HF_TOKEN for gated ones)",
        ) from error
    try:
        own = load_config(section.name, section.revision).get_text_config()
    except OSError:
        return  # loading says what is wrong with the base
    remedy = "name a model that was tuned from this base"
    for key in ("num_hidden_layers", "hidden_size"):
        if getattr(its, key) != getattr(own, key):
            raise UserError(
                f"its {key} is {getattr(its, key)}, the base's {getattr(own, key)}",
                file=subject.name,
                key=KEY,
                remedy=remedy,
            )
    try:
        base, tuned = (load_tokenizer(name, revision) for name, revision in _names(section, subject))
    except (OSError, ValueError) as error:
        raise UserError(
            f"a tokenizer can't be loaded: {str(error).splitlines()[0]}",
            file=subject.name,
            key=KEY,
            remedy="save the tokenizer beside the weights: tokenizer.save_pretrained(folder)",
        ) from error
    _check_tokens(base, tuned, min(own.vocab_size, its.vocab_size), subject)
    if base.chat_template != tuned.chat_template:
        log.warning("%s has a chat template of its own; all arms are asked through the base's", subject.name)


def _names(section: ModelSection, subject: Subject) -> tuple[tuple[str, str | None], ...]:
    return (section.name, section.revision), (subject.name, None)


def _check_tokens(base: Any, tuned: Any, rows: int, subject: Subject) -> None:
    """Check that all tokens of the base are those of the tuned model, by the same ids, and name those that only that has.

    Args:
        base: its tokenizer.
        tuned: the tuned model's.
        rows: of the smaller of the two heads.
        subject: for the error.
    """
    own, its = base.get_vocab(), tuned.get_vocab()
    other = next((token for token, number in own.items() if its.get(token) != number), None)
    remedy = "name a model that was tuned from this base, with its tokens unchanged"
    if other is not None:
        there = "is not there" if other not in its else f"is {its[other]} there"
        raise UserError(
            f"its vocabulary is not the base's: token {other!r}, {own[other]} in the base, {there}, so that token by token "
            "nothing can be compared",
            file=subject.name,
            key=KEY,
            remedy=remedy,
        )
    if max(own.values()) >= rows:
        raise UserError(
            f"the smaller of the two heads has {rows} rows, and the base's tokens reach up to {max(own.values())}",
            file=subject.name,
            key=KEY,
            remedy=remedy,
        )
    added = sorted(its.keys() - own.keys(), key=lambda token: its[token])
    if added and tuned.eos_token in added:
        raise UserError(
            f"it ends its answers with a token that the base has not: {tuned.eos_token!r}",
            file=subject.name,
            key=KEY,
            remedy=remedy,
        )
    if added:
        log.warning(
            "%s has %d tokens that the base has not (%s): models are compared over the tokens of both",
            subject.name, len(added), ", ".join(added[:5]),
        )  # fmt: skip


def find_subject(name: str) -> Subject:
    """Tell an adapter from whole weights, and look at an adapter's files.

    Raises:
        UserError: if a folder holds neither, or something is wrong with an adapter's files.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG).exists():
            check_adapter_files(folder, KEY)
            return Subject(str(folder.resolve()), whole=False)
        if (folder / "config.json").exists():
            return Subject(str(folder.resolve()), whole=True)
        within = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        raise UserError(
            f"neither {ADAPTER_CONFIG} nor config.json lies in this folder"
            + (f", but adapters do below it: {', '.join(within)}" if within else ""),
            file=folder,
            key=KEY,
            remedy=f"name one of them, such as {folder / within[0]}"
            if within
            else "name the folder of a PEFT adapter or of a model, as save_pretrained writes them",
        )
    if folder.exists() or folder.is_absolute() or name.startswith(("./", "../", "~")):
        raise UserError(
            "this is a file" if folder.exists() else "no such folder",
            file=name,
            key=KEY,
            remedy="name the folder of a PEFT adapter or of a model, or a hub id",
        )
    if name in EMBEDDED:
        return Subject(name, whole=True)
    try:
        adapter = find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        adapter = False  # loading says what is wrong with the name
    subject = Subject(name, whole=not adapter)
    if adapter:
        check_adapter_files(subject.folder, KEY)
    return subject


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
        UserError: if it is not there, or its files are damaged.
    """
    if not (variant.adapter / ADAPTER_CONFIG).exists():
        raise UserError(f"there is no {what}", file=variant.adapter, remedy=f"make it first: {command}")
    check_adapter_files(variant.adapter)
    return Subject(str(variant.adapter), whole=False)
