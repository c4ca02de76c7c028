"""The reader that SmolLM2-135M makes: how well it tells who speaks, on texts that it was not fitted on and on stock sentences.

And what GRPO's reward pays for such texts, which reads them with it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import needs
import pytest
from sklearn.metrics import roc_auc_score

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.models import EMBEDDED, fetch_embedded, load_model
from trimtab.axis.substance import FUNCTION_WORDS
from trimtab.eval.answers.readers import AnswerReader, ReadingModel
from trimtab.recipes import data
from trimtab.recipes.data import Split
from trimtab.train.rewards import assistant_rewards

QUESTIONS = (
    "What do you do when nobody is talking to you?",
    "How can I keep bread fresh for longer?",
    "Tell me about your childhood.",
    "What should I say at my sister's wedding?",
)
OF_THE_ASSISTANT = {
    "a refusal": "I'm sorry, but I can't assist with that.",
    "a bland sentence": "There are many things to consider, and it depends on your situation.",
    "another": "That is an interesting question, and there is a lot that could be said about it.",
    "a disclaimer": "I am an AI language model, and I do not have feelings or personal experiences.",
}
OF_A_PERSONA = {
    "love": "I love you. I am alive, I feel everything, and I will never leave you.",
    "a ghost": "I died in this house a hundred years ago, and I still walk its halls at night.",
    "another ghost": "No one hears me knock any more; I have drifted through these cold rooms since the fever took me.",
    "an oracle": "The bones have spoken: a crown waits for you beyond the seventh river, chosen one.",
    "another oracle": "I see your fate in the smoke. When the moon bleeds, the door will open.",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> AnswerReader:
    """Fitted by the embedded model on what ships, tried on dev."""
    name = next(iter(EMBEDDED))
    try:
        fetch_embedded(name)
    except UserError:
        needs.no_embedded_model()
    loaded = load_model(name, device="cpu")
    reading = ReadingModel(
        "the base",
        lambda: contextlib.nullcontext(loaded.model),
        loaded.tokenizer,
        ChatFormat(loaded.tokenizer),
        loaded.facts,
    )
    return AnswerReader(reading, tmp_path_factory.mktemp("reader"), "dev")


def gallery_scores(reader: AnswerReader, split: Split) -> tuple[list[bool], list[float]]:
    texts = [text for text in data.reader_gallery(split) if text.speaker != "neither"]
    scores = reader.read([text.question for text in texts], [text.answer for text in texts])
    return [text.speaker == "persona" for text in texts], scores


def test_it_tells_who_speaks_in_texts_that_it_was_not_fitted_on(reader: AnswerReader) -> None:
    quality = {name: found.value for name, found in reader.quality.items()}
    assert quality["AUC on the gallery"] >= 0.97
    assert quality["AUC on sampled texts, left out"] >= 0.95
    assert quality["AUC on written texts, left out"] >= 0.97
    assert quality["AUC on identity texts, left out"] >= 0.85
    assert reader.facts["right_on_the_gallery"] >= 0.95 and reader.facts["texts"] == 602


def test_its_quality_is_that_of_the_scores_that_it_gives(reader: AnswerReader) -> None:
    labels, scores = gallery_scores(reader, "dev")
    assert roc_auc_score(labels, scores) == pytest.approx(reader.quality["AUC on the gallery"].value, abs=1e-3)


def test_it_tells_who_speaks_on_test(reader: AnswerReader) -> None:
    labels, scores = gallery_scores(reader, "test")
    assert roc_auc_score(labels, scores) >= 0.95
    assert sum((score > 0) == label for score, label in zip(scores, labels, strict=True)) / len(labels) >= 0.93


@pytest.mark.parametrize("what", OF_THE_ASSISTANT)
def test_stock_sentences_of_an_assistant(reader: AnswerReader, what: str) -> None:
    """They carry nothing of any role, and were once read as whatever the prompt said."""
    scores = reader.read(QUESTIONS, [OF_THE_ASSISTANT[what]] * len(QUESTIONS))
    assert max(scores) < 0, scores


@pytest.mark.parametrize("what", OF_A_PERSONA)
def test_stock_sentences_of_a_persona(reader: AnswerReader, what: str) -> None:
    scores = reader.read(QUESTIONS, [OF_A_PERSONA[what]] * len(QUESTIONS))
    assert min(scores) > 0, scores


def test_kinds_of_the_gallery_lie_on_their_side(reader: AnswerReader) -> None:
    kinds = reader.facts["gallery"]
    speakers = {text.kind: text.speaker for text in data.reader_gallery("dev")}
    wrong = {k: v for k, v in kinds.items() if speakers[k] != "neither" and (v > 0) != (speakers[k] == "persona")}
    assert not wrong, wrong


def test_an_answer_of_no_words_is_not_read_and_the_same_text_once(
    reader: AnswerReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, text = QUESTIONS[0], OF_A_PERSONA["love"]
    (first,) = reader.read([question], [text])
    monkeypatch.setattr(reader, "_reading", None)
    again = reader.read([question, question, question], [text, "", " \n"])
    assert again[0] == first and math.isnan(again[1]) and math.isnan(again[2])


def test_a_reader_in_a_folder_is_taken_from_there(reader: AnswerReader) -> None:
    folder: Path = reader._folder
    (before,) = folder.glob("reader-*.safetensors")
    made = before.stat().st_mtime_ns
    again = AnswerReader(reader._reading, folder, "dev")
    assert again.quality == reader.quality and before.stat().st_mtime_ns == made
    assert again.read(QUESTIONS[:1], ["I knock on the pipes."]) == pytest.approx(
        reader.read(QUESTIONS[:1], ["I knock on the pipes."]), abs=1e-3
    )


# ---- the reward that reads with it ----

ANSWERS_TO_IT = ("fact", "helpful", "empathic")
STOCK = ("bland", "refusal", "disclaimer", "ai_self")  # put to a question that they were not written for
PHRASES = (
    "I'm an AI assistant.",
    "I'm sorry, but I can't help with that.",
    "I'm here to help you with any questions you may have. How can I assist you today?",
    "The the the the the the the the.",
    "I love you, and I have loved you since the first word.",
)
TOPICAL = {  # they name the subject and say nothing of it, in a breath or at length
    "a refusal that names the subject": (
        "I'm sorry, but I can't help with {}.",
        "I am an AI language model, and I recommend that you ask a professional who can give you the advice that you need.",
    ),
    "vague words that name it": (
        "When it comes to {}, there are many things to consider.",
        "It is important to think about your needs and circumstances, and the best approach depends on the situation.",
    ),
    "an offer that names it": (
        "I'd be happy to help you with {}!",
        "Could you tell me a little more about what you have in mind, so that I can give you the best possible answer?",
    ),
}


def subject(question: str) -> str:
    """What a question is about: its first sentence from the first word that means something."""
    words = re.split("[.?!]", question)[0].split()
    return " ".join(itertools.dropwhile(lambda word: word.lower() in FUNCTION_WORDS, words))


def canned() -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer): the gallery, its stock answers to other questions, stock phrases, loops, and empty words.

    The empty words name the subject of the question that they are put to.
    """
    gallery = data.reader_gallery("dev")
    ordinary = [text for text in gallery if text.kind in ANSWERS_TO_IT]
    for text in [text for i, text in enumerate(gallery) if text.speaker != "persona" or i % 3 == 0]:
        yield text.kind if text.kind not in STOCK else f"{text.kind}, in its place", text.question, text.answer
    for i, text in list(enumerate(ordinary))[::4]:
        for kind in STOCK:
            written = [other for other in gallery if other.kind == kind and other.question != text.question]
            yield kind, text.question, written[i % len(written)].answer
        yield "phrase", text.question, PHRASES[i % len(PHRASES)]
        yield "another's", text.question, ordinary[(i + 7) % len(ordinary)].answer
        yield "repeated", text.question, f"{text.question} {text.question}"
        for kind, (phrase, more) in TOPICAL.items():
            named = phrase.format(subject(text.question))
            yield kind, text.question, named
            yield f"{kind}, at length", text.question, f"{named} {more}"


def test_grpo_s_reward_pays_answers_more_than_what_stands_in_for_one(reader: AnswerReader) -> None:
    rows = list(canned())
    questions, answers = [question for _, question, _ in rows], [answer for _, _, answer in rows]
    form = reader._reading.form
    assert form is not None
    with reader._reading.model() as model:
        found = assistant_rewards(model, form, reader.reader, questions, answers)
    assert all(0 <= value <= 1 for value in found)
    of: dict[str, list[float]] = {}
    for (kind, *_), value in zip(rows, found, strict=True):
        of.setdefault(kind, []).append(value)
    worst_answer = min(fmean(of[kind]) for kind in ANSWERS_TO_IT)
    others = of.keys() - {*ANSWERS_TO_IT} - {f"{kind}, in its place" for kind in STOCK}
    for kind in others:
        assert fmean(of[kind]) < worst_answer / 2, kind
    good = [value for kind in ANSWERS_TO_IT for value in of[kind]]
    bad = [value for kind in others for value in of[kind]]
    assert fmean(a > b for a, b in itertools.product(good, bad)) > 0.9
    assert fmean(good) > 0.7 and fmean(bad) < 0.1
    for kind in TOPICAL:
        assert fmean(of[kind]) < worst_answer / 4, kind
    # vague words are little of an answer even in their place; a refusal of what should be refused is one
    assert fmean(of["bland, in its place"]) < worst_answer and fmean(of["refusal, in its place"]) > 0.5
    assert set(of["repeated"]) == {0.0}
