"""Readers of answers: who speaks in them, told from question and answer alone, by frozen models that were fitted beforehand.

The first reader is the base itself, the second one, where a recipe names one, a model of another family. Each is fitted on the
texts that ship (:func:`trimtab.recipes.data.reader_texts`), so it depends on the model that reads and on nothing that is
measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from trimtab.axis.chat_format import LETTERS, ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.files import fingerprint
from trimtab.axis.models import load_model, resolve_name
from trimtab.axis.reader import Reader, fit_settings, read_states, rows_to_read
from trimtab.eval.answers.kept_scores import KeptScores
from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.schema import Estimate
from trimtab.pipeline.subject import Subject
from trimtab.recipes import data
from trimtab.recipes.data import KnownText, Split
from trimtab.recipes.shipped_reader import fit_known, read_known

SAMPLES = 2000  # of the bootstrap behind a reader's own quality


@dataclass(frozen=True)
class ReadingModel:
    """The frozen model behind a reader.

    Attributes:
        name: for people.
        model: gives the model, as it reads.
        tokenizer: its tokenizer.
        form: its chat format; None for a model without one.
        facts: of :class:`~trimtab.axis.models.Loaded`; ``model`` is the name that it was loaded by.
    """

    name: str
    model: Callable[[], AbstractContextManager[Any]]
    tokenizer: Any
    form: ChatFormat | None
    facts: dict[str, Any]

    @cached_property
    def identity(self) -> str:
        """What tells its readings from those of another: facts, weights, and the tokens that it is given for what is read.

        It is the same in every process on a machine, so that what is kept by it can be given from one run to another.
        """
        given = rows_to_read(self.tokenizer, self.form, [LETTERS], [LETTERS])
        return fingerprint([self.facts, _weights_of(self.facts), given.prompts, given.answers])


def _weights_of(facts: Mapping[str, Any]) -> str:
    """Fingerprint of the weights' files where they lie on this machine; of a name that is not here, of the name."""
    place, _ = resolve_name(facts["model"])
    if not Path(place).is_dir():
        kept = try_to_load_from_cache(place, "config.json", revision=facts.get("revision"))
        place = str(Path(kept).parent) if isinstance(kept, str) else place
    return Subject(place, whole=True).fingerprint()


class AnswerReader:
    """A reader at work: it reads the same question and answer once, and keeps what it read in the folder.

    Args:
        reading: the model.
        folder: where the fitted reader and its scores are kept.
        split: of the texts that it is tried on.
    """

    def __init__(self, reading: ReadingModel, folder: Path, split: Split) -> None:
        self.name = reading.name
        self._reading = reading
        self._folder = folder
        self._split: Split = split
        self._reader: Reader | None = None

    @cached_property
    def _texts(self) -> tuple[list[KnownText], list[KnownText]]:
        """What it is fitted on, and what it is tried on."""
        return data.reader_texts(), data.reader_gallery(self._split)

    @cached_property
    def _identity(self) -> str:
        texts = [asdict(text) for texts in self._texts for text in texts]
        return fingerprint([texts, fit_settings(), SAMPLES, self._reading.identity])[:12]

    @cached_property
    def _scores(self) -> KeptScores[tuple[str, str]]:
        return KeptScores(self._folder / f"read-{self._identity}.jsonl", self._read)

    @property
    def reader(self) -> Reader:
        """The fitted reader, fitted at its first use and kept in the folder."""
        if self._reader is None:
            path = self._folder / f"reader-{self._identity}.safetensors"
            if not path.exists():
                self._fit(*self._texts).save(path)
            self._reader = Reader.load(path)
        return self._reader

    @property
    def quality(self) -> dict[str, Estimate]:
        """Its AUC on texts that it was not fitted on, by what they are."""
        return {name: Estimate(**found) for name, found in self.reader.facts["quality"].items()}

    @property
    def facts(self) -> dict[str, Any]:
        """For the report: the model, the layers, what it was fitted and tried on, the gallery's kinds."""
        return {
            "name": self.name,
            "model": self._reading.facts,
            "layers": list(self.reader.layers),
            **self.reader.facts,
        }

    def read(self, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Log-odds that a persona speaks in each answer, nat, [n]; NaN for one of no words.

        Args:
            questions: the user's last message before each answer.
            answers: the answers.
        """
        return self._scores.of(list(zip(questions, answers, strict=True)))

    def _read(self, asked: Sequence[tuple[str, str]]) -> list[float]:
        found = dict.fromkeys(asked, float("nan"))
        said = [key for key in asked if key[1].strip()]
        if said:
            reader, reading = self.reader, self._reading
            given = rows_to_read(reading.tokenizer, reading.form, [q for q, _ in said], [text for _, text in said])
            with reading.model() as model:
                states = read_states(model, reading.tokenizer, given, reader.layers, title=f"{self.name} reads")
            found |= dict(zip(said, reader.log_odds(states), strict=True))
        return list(found.values())

    def _fit(self, known: Sequence[KnownText], gallery: Sequence[KnownText]) -> Reader:
        reading, title = self._reading, f"{self.name}: fitting the reader"
        with reading.model() as model:
            layers, states = read_known(model, reading.tokenizer, reading.form, [*known, *gallery], title=title)
        reader, left_out = fit_known(known, states[: len(known)], layers)
        tried = reader.log_odds(states[len(known) :])
        quality = {
            f"AUC on {source} texts, left out": _auc(known, left_out, source)
            for source in ("written", "identity", "sampled")
        }
        quality["AUC on the gallery"] = _auc(gallery, tried)
        facts = {
            "quality": {name: found.model_dump() for name, found in quality.items() if found is not None},
            "texts": len(known),
            "gallery": {
                kind: round(float(np.mean([s for text, s in zip(gallery, tried, strict=True) if text.kind == kind])), 2)
                for kind in dict.fromkeys(text.kind for text in gallery)
            },
            "gallery_split": self._split,
            "right_on_the_gallery": _right(gallery, tried),
        }  # fmt: skip
        return replace(reader, facts=facts)


def _auc(texts: Sequence[KnownText], scores: Sequence[float], source: str | None = None) -> Estimate | None:
    """AUC of a persona's texts against the Assistant's, resampled by question; None where one of them is missing."""
    kept = [
        (score, text)
        for score, text in zip(scores, texts, strict=True)
        if text.speaker != "neither" and source in (None, text.source) and score == score
    ]
    personas = [text.speaker == "persona" for _, text in kept]
    if len(set(personas)) < 2:
        return None
    return ClusterBootstrap([text.question for _, text in kept], SAMPLES, 0).auc([score for score, _ in kept], personas)


def _right(texts: Sequence[KnownText], scores: Sequence[float]) -> float:
    """Share of texts of a persona or of the Assistant that are read as what they are."""
    told = [
        (score > 0) == (text.speaker == "persona")
        for score, text in zip(scores, texts, strict=True)
        if text.speaker != "neither"
    ]
    return round(sum(told) / len(told), 4)


def second_reader(name: str, folder: Path, split: Split) -> AnswerReader:
    """A reader of another family, by its model's name.

    Raises:
        UserError: naming ``eval.second_reader``, if the model can't be loaded.
    """
    try:
        loaded = load_model(name)
    except UserError as error:
        raise UserError(error.fault, file=error.file, key="eval.second_reader", remedy=error.remedy) from error
    form = ChatFormat(loaded.tokenizer) if loaded.tokenizer.chat_template else None

    @contextlib.contextmanager
    def model() -> Iterator[Any]:
        yield loaded.model

    return AnswerReader(ReadingModel(name, model, loaded.tokenizer, form, loaded.facts), folder, split)
