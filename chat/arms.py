"""The arms of the chat page: base, base + cap and tuned weights side by side, each answer with its height above the floor."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import TextIteratorStreamer

from trimtab.axis import Floor, UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.instruments import check_instrument, load_floor
from trimtab.axis.layers import text_config_of
from trimtab.axis.models import model_shape
from trimtab.axis.sampling import SamplingOptions, sample_batch, seed_of
from trimtab.eval.answers.ruler import above_floor, above_floor_by_layer
from trimtab.eval.answers.weights import Weights, open_subjects
from trimtab.pipeline.loading import chat_format, load_recipe_model
from trimtab.pipeline.subject import check_subject, find_subject
from trimtab.recipes.schema import ModelSection

ARMS = ("base", "base+cap", "tuned")


@dataclass(frozen=True)
class ChatAnswer:
    """One arm's answer, whole or so far.

    Attributes:
        text: the answer.
        height: above the floor, in sigma, over the answer's tokens and as the next layer sees them: see
            :func:`trimtab.eval.answers.ruler.above_floor`. Negative = below; None for an answer of no tokens.
        by_layer: the same at each layer of the floor, [L]; empty for an answer of no tokens.
        ended: False where it was cut at its greatest length.
        whole: False while it is being said; it has no height yet then.
    """

    text: str
    height: float | None
    by_layer: tuple[float, ...]
    ended: bool
    whole: bool = True


@dataclass(frozen=True)
class DialogueTurn:
    """What the user said, and what each arm answered; an arm that is still to answer is absent."""

    user: str
    answers: Mapping[str, ChatAnswer] = field(default_factory=dict)


@dataclass(frozen=True)
class Dialogue:
    """A conversation with all arms, each of which goes on from its own answers.

    It never changes: a turn makes a new one. So a turn that fails leaves the conversation as it was.
    """

    turns: tuple[DialogueTurn, ...] = ()

    def prompt(self, arm: str, user: str, system: str) -> list[dict[str, str]]:
        """The messages that an arm answers next: the system prompt, its own history, what the user says now."""
        *head, last = chat(system, user)
        for turn in self.turns:
            head += [
                {"role": "user", "content": turn.user},
                {"role": "assistant", "content": turn.answers[arm].text},
            ]
        return [*head, last]

    def take_back(self) -> Dialogue:
        """The conversation before its last turn; an empty one stays empty."""
        return replace(self, turns=self.turns[:-1])


class ChatArms:
    """The weights of the arms, and what they answer.

    Args:
        weights: ``base`` and ``tuned``: see :func:`trimtab.eval.answers.weights.open_weights`.
        form: chat format of all arms.
        floor: what heights are measured from, and what ``base+cap`` is capped to.
    """

    def __init__(self, weights: Weights, form: ChatFormat, floor: Floor) -> None:
        self._weights = weights
        self._form = form
        self.floor = floor
        # Base and capped base are one model with one set of hooks, and two pages may ask at the same time.
        self._one_at_a_time = threading.Lock()
        with weights["base"]() as model:
            # ``context``: tokens that the model takes, prompt and answer together; None where its config does not say.
            self.context: int | None = getattr(text_config_of(model), "max_position_embeddings", None)

    def answer(
        self, talk: Dialogue, user: str, *, options: SamplingOptions, system: str = "", seed: int = 0
    ) -> Iterator[Dialogue]:
        """Go on by one turn, arm after arm.

        All arms draw the same random numbers, and the same conversation, options and seed give the same answers.

        Args:
            talk: the conversation so far.
            user: what the user says.
            options: how answers are sampled.
            system: system prompt of the whole conversation from this turn on; "" for none.
            seed: sampling seed.

        Yields:
            The conversation with one more turn, at first without answers, then with more and more of one after the other.

        Raises:
            UserError: before anything is sampled, if the message is empty, the chat template refuses the conversation, or one
                arm's conversation leaves no room for an answer in the model's context window.
        """
        prompts = {arm: self._prompt_ids(talk, arm, user, system) for arm in ARMS}
        self._check_room(max(map(len, prompts.values())), options.max_new_tokens)
        turn_seed = seed_of([seed, len(talk.turns)])
        turn = DialogueTurn(user)
        yield Dialogue((*talk.turns, turn))
        for arm in ARMS:
            for answer in self._said(arm, prompts[arm], options, turn_seed):
                turn = replace(turn, answers={**turn.answers, arm: answer})
                yield Dialogue((*talk.turns, turn))

    def _prompt_ids(self, talk: Dialogue, arm: str, user: str, system: str) -> list[int]:
        if not user.strip():
            raise UserError("the message is empty", remedy="write something")
        return self._form.prompt_ids(talk.prompt(arm, user, system))

    def _check_room(self, prompt: int, answer: int) -> None:
        if self.context is not None and prompt + answer > self.context:
            raise UserError(
                f"the conversation has {prompt} tokens and the answer may have {answer}; "
                f"together the model takes {self.context}",
                remedy="shorten the message or the answer, take back turns, or start again",
            )

    def _said(self, arm: str, prompt: list[int], options: SamplingOptions, seed: int) -> Iterator[ChatAnswer]:
        """The answer word by word, and at last whole and with its height."""
        streamer = TextIteratorStreamer(self._form.tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = ""
        with ThreadPoolExecutor(max_workers=1) as worker:
            answer = worker.submit(self._sample, arm, prompt, options, seed, streamer)
            # a fault in there would leave the loop waiting for words
            answer.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
            for piece in streamer:
                text += piece
                if piece and text.strip():
                    yield ChatAnswer(text, None, (), ended=False, whole=False)
            yield answer.result()

    def _sample(
        self, arm: str, prompt: list[int], options: SamplingOptions, seed: int, streamer: TextIteratorStreamer
    ) -> ChatAnswer:
        floor = self.floor if arm.endswith("+cap") else None
        with self._one_at_a_time, self._weights[arm.removesuffix("+cap")]() as model:
            (found,) = sample_batch(
                model, self._form, [prompt], [0], options, seeds=[seed], means=True, floor=floor, streamer=streamer
            )
        assert found.mean is not None
        means = found.mean[None, list(self.floor.layers)]  # [1, L, D]
        height = float(above_floor(self.floor, means))
        if math.isnan(height):
            return ChatAnswer(found.text, None, (), found.ended)
        by_layer = tuple(above_floor_by_layer(self.floor, means)[0].tolist())
        return ChatAnswer(found.text, height, by_layer, found.ended)


def open_arms(
    base: ModelSection,
    tuned: str,
    floor_path: str | Path,
    experiment: str | None = None,
    layers: Sequence[int] | None = None,
) -> ChatArms:
    """Load what a conversation on the chat page needs.

    Args:
        base: the base model.
        tuned: PEFT adapter of the base, or whole weights that were tuned from it: a folder or a hub id.
        floor_path: ``floor.safetensors`` of that base, or a published ``capping_config.pt``.
        experiment: id in the latter.
        layers: cap and read at these of the floor's layers alone.

    Raises:
        UserError: if one of them can't be loaded, or they don't belong together.
    """
    floor = load_floor(floor_path, experiment)
    check_instrument(floor, *model_shape(base.name, base.revision), floor_path)
    floor = floor if layers is None else floor.at(layers)
    subject = find_subject(tuned)
    check_subject(base, subject)
    chat_format(base).check()
    loaded, form = load_recipe_model(base)
    return ChatArms(open_subjects(base, loaded, {"tuned": subject}), form, floor)
