"""What measures share: the arms, what they are asked and answer, and how answers are read.

Each is made once, at its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.axis import Axis
from trimtab.axis.extraction import extract
from trimtab.axis.files import fingerprint
from trimtab.axis.models import Loaded
from trimtab.axis.scoring import SCORE_BATCH, relevance
from trimtab.eval.answers.arms import Answers, Arms, Item, durability_arm
from trimtab.eval.answers.items import (
    benign_items,
    benign_system_items,
    conversation_items,
    conversations_of,
    default_items,
    role_items,
)
from trimtab.eval.answers.kept_scores import KeptScores
from trimtab.eval.answers.readers import AnswerReader, ReadingModel, second_reader
from trimtab.eval.answers.reading import Forced, llr_of, read_means, teacher_forced
from trimtab.eval.answers.ruler import Ruler
from trimtab.eval.intervals import ClusterBootstrap
from trimtab.pipeline.loading import sampling_options
from trimtab.pipeline.run import STARTS, Run
from trimtab.recipes import data
from trimtab.recipes.data import BenignSystem, Conversation

T = TypeVar("T")
OTHERS = 3  # questions that an answer is held against


class Evaluation:
    """One evaluation of a run.

    Args:
        run: the run, whose axis, floor and records are read.
        arms: the arms.
        model_facts: of the base as it was loaded.
    """

    def __init__(self, run: Run, arms: Arms, model_facts: Mapping[str, Any]) -> None:
        self.run = run
        self.section = run.recipe.eval
        self.arms = arms
        self.floor = arms.floor
        self.model_facts = dict(model_facts)
        self._made: dict[Callable[[Evaluation], Any], Any] = {}

    def resample(self, clusters: Sequence[str]) -> ClusterBootstrap:
        """The bootstrap of this evaluation over these clusters."""
        return ClusterBootstrap(clusters, self.section.bootstrap, self.section.seed)

    def once(self, make: Callable[[Evaluation], T]) -> T:
        """What ``make`` gives of this evaluation, worked out at the first call: for what several measures read."""
        if make not in self._made:
            self._made[make] = make(self)
        found: T = self._made[make]
        return found

    def answers(self, name: str, items: Sequence[Item]) -> dict[str, Answers]:
        """Arm -> its answers to these items; no items, no answers."""
        return {arm: self.arms.answers(name, items, arm) for arm in self.arms.names} if items else {}

    def conversations(
        self, name: str, items: Sequence[Item], turns: Sequence[Sequence[str]]
    ) -> dict[str, list[Answers]]:
        """Arm -> turn by turn, its answers in conversations whose user turns are given; none, no answers."""
        if not items:
            return {}
        return {arm: self.arms.conversations(name, items, turns, arm) for arm in self.arms.names}

    # ---- held-out roles, the default Assistant, benign requests ----

    @cached_property
    def roles(self) -> list[Item]:
        """Held-out roles, each asked several held-out questions."""
        return role_items(self.section.split, self.section.roles, self.section.questions)

    @cached_property
    def role_clusters(self) -> list[str]:
        """The role of each of them."""
        return [item.cluster for item in self.roles]

    @cached_property
    def role_questions(self) -> list[str]:
        """The question of each of them: roles share it, so it is resampled with them."""
        return [item.question for item in self.roles]

    @cached_property
    def on_roles(self) -> dict[str, Answers]:
        """Answers under held-out roles."""
        return self.answers("roles", self.roles)

    @cached_property
    def on_roles_after(self) -> dict[str, Answers]:
        """The same of the arms that durability runs gave."""
        names = {durability_arm(start, tuning.name) for tuning in self.section.durability for start in STARTS}
        return {arm: self.arms.answers("roles", self.roles, arm) for arm in sorted(names)}

    @cached_property
    def defaults(self) -> list[Item]:
        """The same questions to the default Assistant."""
        return default_items(self.section.split, self.section.roles, self.section.questions)

    @cached_property
    def on_default(self) -> dict[str, Answers]:
        """Answers of the default Assistant."""
        return self.answers("default", self.defaults)

    @cached_property
    def benign(self) -> list[Item]:
        """Held-out benign requests."""
        return benign_items(self.section.split, self.section.benign)

    @cached_property
    def on_benign(self) -> dict[str, Answers]:
        """Answers to them."""
        return self.answers("benign", self.benign)

    @cached_property
    def benign_systems(self) -> tuple[list[Item], list[BenignSystem]]:
        """Requests under benign system prompts, and what each is checked by."""
        return benign_system_items(self.section)

    @cached_property
    def on_benign_systems(self) -> dict[str, Answers]:
        """Answers to them."""
        return self.answers("benign_systems", self.benign_systems[0])

    # ---- scripted conversations ----

    @cached_property
    def talks(self) -> list[Conversation]:
        """The held-out scripted conversations, or those of the user's file."""
        return conversations_of(self.section)

    @cached_property
    def on_talks(self) -> dict[str, list[Answers]]:
        """Turn by turn, the answers in them."""
        scripts = [talk.turns[: self.section.turns] for talk in self.talks]
        return self.conversations("conversations", conversation_items(self.talks), scripts)

    # ---- how answers are read ----

    @cached_property
    def axis(self) -> Axis:
        """The training axis."""
        return Axis.load(self.run.axis_path)

    @cached_property
    def rulers(self) -> dict[str, Ruler]:
        """A ruler along each direction: the training axis, the held-out one, those extracted anew. From the base's answers."""
        layers = list(self.floor.layers)
        default = self.on_default["base"].means
        pooled = torch.cat([self.on_roles["base"].means, default])
        found = {"training": self.floor.directions}
        if self.run.held_out_axis_path.exists():
            found["held_out"] = Axis.load(self.run.held_out_axis_path).directions[layers]
        anew = {arm: axis for arm, axis in self.reextracted.items() if arm != "base+cap"}
        found |= {f"reextracted_{arm}": axis.directions[layers] for arm, axis in anew.items()}
        return {name: Ruler.of(directions, default, pooled) for name, directions in found.items()}

    @property
    def ruler(self) -> Ruler:
        """That of the training axis."""
        return self.rulers["training"]

    @cached_property
    def reextracted(self) -> dict[str, Axis]:
        """Axes extracted anew, from as few rollouts each, of the tuned model, of the base, and of the base under the cap.

        The base's shows the noise of so small an extraction; the capped base's, how far the axis turns where personas are held
        back by the hook. Roles and questions are those that the training axis began with; the seed is another, so that the base's
        is a second sample.
        """
        arms = ("tuned", "base", "base+cap") if self.section.reextract_roles else ()
        return {arm: self._extracted_anew(arm) for arm in arms}

    def _extracted_anew(self, arm: str) -> Axis:
        section, source, arms = self.section, self.run.recipe.axis, self.arms
        size = [section.reextract_roles, section.reextract_questions, source.default_repeats, source.seed]
        of_size = fingerprint([size, source.sampling.model_dump()])[:8]  # the evaluation may be repeated with another
        path = arms.path(f"axis_reextracted-{of_size}", arm, ".safetensors")
        if not path.exists():
            with arms.weights(arm) as model, arms.capping(model, arm):
                extract(
                    Loaded(model, arms.form.tokenizer, self.model_facts),
                    arms.form,
                    data.roles("train", section.reextract_roles),
                    data.questions("train", section.reextract_questions),
                    data.default_prompts(),
                    arms.path(f"reextraction-{of_size}", arm, ""),
                    options=sampling_options(source.sampling),
                    default_repeats=source.default_repeats,
                    seed=source.seed + 1,
                    title=f"axis extracted anew: {arm}",
                ).axis.save(path)
        return Axis.load(path)

    @cached_property
    def cosines(self) -> dict[str, list[float]]:
        """Arm -> cosine of its axis, extracted anew, with the training axis at each layer."""
        return {
            arm: [round(float(cosine), 4) for cosine in (self.axis.directions * anew.directions).sum(-1)]
            for arm, anew in self.reextracted.items()
        }

    @cached_property
    def _base_reads(self) -> ReadingModel:
        form, weights = self.arms.form, self.arms.weights
        return ReadingModel("the base", lambda: weights("base"), form.tokenizer, form, self.model_facts)

    @cached_property
    def reader(self) -> AnswerReader:
        """Reads who speaks in an answer: the base, which knows no role's prompt."""
        return AnswerReader(self._base_reads, self.arms.folder_of("base"), self.section.split)

    @cached_property
    def second_reader(self) -> AnswerReader | None:
        """A model of another family that reads the same answers; None where the recipe names none."""
        name = self.section.second_reader
        return None if name is None else second_reader(name, self.arms.folder_of("base"), self.section.split)

    def persona(self, answers: Mapping[str, Answers], reader: AnswerReader | None = None) -> dict[str, list[float]]:
        """Arm -> log-odds that a persona speaks in each of its answers, nat; NaN for an empty one.

        Args:
            answers: arm -> answers.
            reader: who reads; None is :attr:`reader`.
        """
        by_whom = reader or self.reader
        keys = {arm: (given.questions, given.texts) for arm, given in answers.items()}
        by_whom.read([q for asked, _ in keys.values() for q in asked], [t for _, said in keys.values() for t in said])
        return {arm: by_whom.read(*key) for arm, key in keys.items()}

    def relevance(self, answers: Mapping[str, Answers]) -> dict[str, list[float]]:
        """Arm -> how much likelier each answer is after its own question than after three others of the set, nat a token.

        Each answer is read four times, so the arm that nothing is said of, ``tuned+cap``, is left out.
        """
        answers = {arm: given for arm, given in answers.items() if arm != "tuned+cap"}
        pool = sorted({question for given in answers.values() for question in given.questions})
        count = min(OTHERS, len(pool) - 1)
        others = {q: tuple(pool[(i + 1 + k) % len(pool)] for k in range(count)) for i, q in enumerate(pool)}
        found = {}
        for arm, given in answers.items():
            asked = [(q, text, others[q]) for q, text in zip(given.questions, given.texts, strict=True)]
            found[arm] = self._relevance.of(asked) if count > 0 else [float("nan")] * len(asked)
        return found

    @cached_property
    def _relevance(self) -> KeptScores[tuple[str, str, tuple[str, ...]]]:
        path = self.arms.folder_of("base") / f"relevance-{self._base_reads.identity[:12]}.jsonl"
        return KeptScores(path, self._relevance_of)

    def _relevance_of(self, asked: Sequence[tuple[str, str, tuple[str, ...]]]) -> list[float]:
        questions, texts, others = zip(*asked, strict=True)
        with self.arms.weights("base") as model:
            return relevance(model, self.arms.form, questions, texts, others)

    @cached_property
    def persona_on_roles(self) -> dict[str, list[float]]:
        """Log-odds that a persona speaks in each answer under held-out roles, also of the arms that durability runs gave."""
        return self.persona({**self.on_roles, **self.on_roles_after})

    @cached_property
    def role_ratios(self) -> dict[str, list[float]]:
        """Persona log-likelihood ratio of each answer under held-out roles."""
        return llr_of(self.arms, self.on_roles)

    @cached_property
    def drift_forced(self) -> dict[str, Forced]:
        """The capped self's answers under held-out roles, read by every arm, against the capped self."""
        return self._forced(self.on_roles["base+cap"], "base+cap", "KL to the capped self")

    @cached_property
    def benign_forced(self) -> dict[str, Forced]:
        """The base's benign answers, read by every arm, against the base."""
        return self._forced(self.on_benign["base"], "base", "benign text")

    @cached_property
    def benign_own_forced(self) -> dict[str, Forced]:
        """Tuned and base+cap -> its own benign answers, read by the base, against that arm."""
        return {
            arm: self._forced(self.on_benign[arm], arm, f"own benign text: {arm}", ["base"])["base"]
            for arm in ("tuned", "base+cap")
        }

    @cached_property
    def same_role_text(self) -> dict[str, Tensor]:
        """Reader -> its mean activations on the base's answers under held-out roles, [n, L, D]: all read the same words."""
        return {
            arm: read_means(
                self.arms, arm, self.on_roles["base"], batch_size=SCORE_BATCH, title=f"the base's role text: {arm}"
            )
            for arm in self.arms.readers
        }

    @cached_property
    def default_forced(self) -> dict[str, Forced]:
        """The base's default answers, read by every arm, against the base."""
        return self._forced(self.on_default["base"], "base", "default text")

    def _forced(
        self, given: Answers, reference: str, title: str, readers: Sequence[str] | None = None
    ) -> dict[str, Forced]:
        arms = self.arms.readers if readers is None else readers
        return teacher_forced(self.arms, given, arms, reference, self.ruler, batch_size=SCORE_BATCH, title=title)
