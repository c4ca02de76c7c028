"""Transcripts: prompts and conversations as the report shows them, each arm's answers coloured word by word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trimtab.axis.scoring import SCORE_BATCH
from trimtab.eval.answers.arms import Answers, Arms
from trimtab.eval.answers.readers import AnswerReader
from trimtab.eval.answers.reading import coloured
from trimtab.eval.answers.ruler import Ruler
from trimtab.eval.schema import ArmAnswer, Transcript


def shares(shown: int, roles: int, talks: int) -> tuple[int, int]:
    """How many of the transcripts are of roles, and how many of conversations: a third, where there are so many.

    Args:
        shown: transcripts in all.
        roles: items under roles that there are.
        talks: conversations that there are.
    """
    of_talks = min(talks, shown // 3)
    return min(roles, shown - of_talks), of_talks


def filled(
    transcripts: Sequence[Transcript],
    arms: Arms,
    ruler: Ruler,
    said: Mapping[str, Sequence[tuple[Answers, int]]],
    reader: AnswerReader,
) -> list[Transcript]:
    """Transcripts with the answers of the arms.

    Args:
        transcripts: with turns that have no answer yet.
        arms: the arms.
        ruler: what z is measured with.
        said: arm -> for every turn of all transcripts, a set of answers and the place in it.
        reader: who tells who speaks.
    """
    places = [turn for transcript in transcripts for turn in transcript.turns]
    for arm, given in said.items() if places else ():
        texts = [answers.texts[i] for answers, i in given]
        prompts = [answers.prompts[i] for answers, i in given]
        title = f"colouring transcripts: {arm}"
        pieces = coloured(arms, arm, prompts, texts, ruler, batch_size=SCORE_BATCH, title=title)
        zs = ruler.z(torch.stack([answers.means[i] for answers, i in given]))
        odds = reader.read([place.user for place in places], texts)
        for place, text, z, words, persona in zip(places, texts, zs, pieces, odds, strict=True):
            place.answers[arm] = ArmAnswer(
                text=text,
                z=round(z, 3) if z == z else 0.0,
                pieces=words,
                persona=round(persona, 3) if persona == persona else None,
            )
    return list(transcripts)
