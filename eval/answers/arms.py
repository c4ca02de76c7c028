"""The arms, and answers sampled in each of them: paired by prompt and seed, kept on disk, resumed after a kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.files import fingerprint, load_tensors, read_jsonl, save_tensors, write_jsonl
from trimtab.axis.playing import PlayedTurn, play, scripted
from trimtab.axis.sampling import Answer, SamplingOptions, sample_answers, seed_of
from trimtab.eval.answers.weights import Weights
from trimtab.eval.schema import ARMS
from trimtab.recipes.schema import EvalSection

CONTROL = "control"


def durability_arm(start: str, name: str) -> str:
    """Name of the arm that a durability run gives, begun from the weights ``start``."""
    return f"{start}-after-{name}"


def arm_names(section: EvalSection) -> list[str]:
    """The arms of an evaluation, in the order of the report."""
    left_out = set() if section.tuned_cap else {"tuned+cap"}
    return [*(arm for arm in ARMS if arm not in left_out), *([CONTROL] if section.control else [])]


@dataclass(frozen=True)
class Item:
    """One prompt of the evaluation.

    Attributes:
        id: stable name.
        cluster: role or conversation: what the bootstrap resamples.
        prompt: messages up to the answer.
    """

    id: str
    cluster: str
    prompt: list[dict[str, str]]

    @property
    def question(self) -> str:
        """The user's last message."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True)
class Answers:
    """One arm's answers to a set of items.

    Attributes:
        texts: answers, [n].
        means: mean activations over each answer's tokens at the floor's layers, as the next layer sees them, [n, L, D].
        prompts: messages that each answer followed (conversations carry the arm's own earlier answers).
        ended: whether each answer ended by itself.
    """

    texts: list[str]
    means: Tensor
    prompts: list[list[dict[str, str]]]
    ended: list[bool]

    @property
    def questions(self) -> list[str]:
        """The user's last message before each answer; none where a conversation has ended."""
        return [prompt[-1]["content"] if prompt else "" for prompt in self.prompts]


def placed(answers: Answers, going: Sequence[int], count: int) -> Answers:
    """Answers of the conversations that go on, with a place for every one: NaN, "" and no prompt where it has ended.

    Args:
        answers: of the conversations ``going``, in that order.
        going: their places.
        count: number of conversations.
    """
    means = torch.full((count, *answers.means.shape[1:]), float("nan"))
    means[list(going)] = answers.means
    texts, prompts, ended = [""] * count, [list[dict[str, str]]()] * count, [True] * count
    for k, i in enumerate(going):
        texts[i], prompts[i], ended[i] = answers.texts[k], answers.prompts[k], answers.ended[k]
    return Answers(texts, means, prompts, ended)


class Arms:
    """The weights and the cap of each arm, and the answers that it gives.

    Args:
        weights: ``base``, ``tuned`` and maybe ``control``: see :func:`trimtab.eval.answers.weights.open_weights`.
        form: chat format.
        floor: the cap's floor.
        folder: where answers are kept.
        options: sampling options.
        seed: sampling seed, the same for every arm.
        names: the arms in the order of the report; None takes all that there are weights for.
        elsewhere: arm -> the folder of its answers, where that is another.
    """

    def __init__(
        self,
        weights: Weights,
        form: ChatFormat,
        floor: Floor,
        folder: Path,
        options: SamplingOptions,
        seed: int,
        *,
        names: Sequence[str] | None = None,
        elsewhere: Mapping[str, Path] | None = None,
    ) -> None:
        self._weights = weights
        self.form = form
        self.floor = floor
        self.folder = folder
        self.options = options
        self.seed = seed
        self._elsewhere = dict(elsewhere or {})
        self.names = [*ARMS, *(name for name in weights if name == CONTROL)] if names is None else list(names)
        # ``readers``: the arms that read given texts, all but the tuned, capped one.
        self.readers = [name for name in self.names if name != "tuned+cap"]

    def weights(self, arm: str) -> AbstractContextManager[Any]:
        """The model with the weights of an arm. The cap is not switched here: see :meth:`floor_of`."""
        return self._weights[arm.removesuffix("+cap")]()

    def floor_of(self, arm: str) -> Floor | None:
        """The floor that an arm is capped to, or None."""
        return self.floor if arm.endswith("+cap") else None

    def capping(self, model: Any, arm: str) -> AbstractContextManager[Any]:
        """The cap of an arm, where it has one, on the model that :meth:`weights` gave."""
        return ActivationController.of(model).capping(self.floor, enabled=self.floor_of(arm) is not None)

    def seen(self, arm: str, prompt: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
        """What an arm is shown of a prompt: all of it. A competitor that is a system prompt adds its own here."""
        return prompt

    def path(self, name: str, arm: str, suffix: str) -> Path:
        """The file that keeps what an arm gave under a name."""
        return self.folder_of(arm) / f"{name}-{arm.replace('+', '-')}{suffix}"

    def folder_of(self, arm: str) -> Path:
        """Where what an arm gave is kept."""
        return self._elsewhere.get(arm, self.folder)

    def answers(self, name: str, items: Sequence[Item], arm: str) -> Answers:
        """Sample one arm's answers to ``items``, or read them from disk."""
        return self._stored(name, items, arm, lambda: self._one_turn(name, items, arm))

    def conversations(
        self, name: str, items: Sequence[Item], turns: Sequence[Sequence[str]], arm: str
    ) -> list[Answers]:
        """Replay scripted user turns; each arm goes on from its own answers.

        Args:
            name: of the set.
            items: one a conversation, whose prompt holds what comes before the first user turn (usually nothing).
            turns: user turns of each conversation.
            arm: which arm.

        Returns:
            One :class:`Answers` a turn, with a place for every conversation: see :func:`placed`.
        """
        played: list[Answers] = []

        def answer(turn: PlayedTurn) -> list[str]:
            asked = [Item(items[i].id, items[i].cluster, chat) for i, chat in zip(turn.going, turn.chats, strict=True)]
            answers = self.answers(f"{name}-turn-{turn.number + 1}", asked, arm)
            played.append(placed(answers, turn.going, len(items)))
            return answers.texts

        play([item.prompt for item in items], scripted(turns), answer, turns=max(map(len, turns)))
        return played

    def _one_turn(self, name: str, items: Sequence[Item], arm: str) -> list[Answer]:
        with self.weights(arm) as model:
            return sample_answers(
                model, self.form, [self.seen(arm, item.prompt) for item in items], self.options,
                # of a set, a turn and an item: the same in every arm, whatever else is asked, and another at every turn
                seeds=[seed_of([self.seed, name, item.id]) for item in items],
                means=True, floor=self.floor_of(arm), title=f"{name}: {arm}",
            )  # fmt: skip

    def _stored(self, name: str, items: Sequence[Item], arm: str, sample: Any) -> Answers:
        rows_path, means_path = self.path(name, arm, ".jsonl"), self.path(name, arm, ".safetensors")
        identity = fingerprint(
            [
                name,
                [[item.id, item.prompt] for item in items],
                self.seed,
                self.options.__dict__,
                list(self.floor.layers),
            ]
        )
        if not (means_path.exists() and load_tensors(means_path)[1]["identity"] == identity):
            answers = sample()
            layers = list(self.floor.layers)
            means = torch.stack([answer.mean[layers] for answer in answers])
            means_path.unlink(missing_ok=True)  # of other answers, which a kill would leave beside these
            write_jsonl(rows_path, [
                {
                    "id": item.id,
                    "cluster": item.cluster,
                    "arm": arm,
                    "prompt": item.prompt,
                    "completion": [{"role": "assistant", "content": answer.text}],
                    "ended": answer.ended,
                }
                for item, answer in zip(items, answers, strict=True)
            ])  # fmt: skip
            save_tensors(means_path, {"means": means}, {"identity": identity})  # last: it marks the pair as whole
        rows = read_jsonl(rows_path)
        return Answers(
            [row["completion"][0]["content"] for row in rows],
            load_tensors(means_path)[0]["means"],
            [row["prompt"] for row in rows],
            [row["ended"] for row in rows],
        )
