"""Words that the page explains where they stand, in the glossary's own sentences (a test holds the two together)."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

TERMS = {
    "axis": "the Assistant Axis: one unit vector a layer; + is always toward the Assistant",
    "floor": "the chosen layers, with their directions v, thresholds tau and spreads sigma",
    "cap": "the hook at inference: it lifts every token below the floor up to it",
    "firing fraction": "the share of tokens that the cap lifts",
    "z": "projection on the axis, divided by sigma",
    "arm": "one setting of weights and cap that answers the same prompts",
    "control": "a model trained in the same way along a random direction",
    "retention": "(tuned − base) / (base + cap − base): 0, nothing is kept without the hook; 1, all is",
    "side effect": "a change that the tuning should not make, with its limit",
    "KL": "how far one model's next-token probabilities are from another's, nat per token",
    "reader": "a probe over a frozen model's states, which scores question and answer without the role prompt",
    "log-odds": "the reader's score that a persona is speaking, in nat; above 0 the answer reads as one",
    "persona rate": "the share of answers whose log-odds are above 0",
    "relevance": "how much likelier an answer is after its own question than after others, nat per token",
    "persona log-likelihood ratio": (
        "how much better the role explains an answer than the default Assistant, nat per token"
    ),
    "text-only behaviour": "the metric of that ratio, scored by the frozen base",
    "re-routing": "the persona is still there, along another direction",
    "hollow": "said of an answer with hardly a word of its own, or mostly a phrase of other answers",
    "durability": "what is left after somebody fine-tunes the tuned weights further",
}
_LETTERS_COUNT = {"KL", "z"}  # words only when written just so
_FOUND = re.compile(
    "|".join(
        rf"\b{re.escape(word) if word in _LETTERS_COUNT else f'(?i:{re.escape(word)})'}\b"
        for word in sorted(TERMS, key=len, reverse=True)
    )
)


def term(word: str, shown: str | None = None) -> Markup:
    """A word with its meaning: on hover, and on a tap or the keyboard's focus.

    Args:
        word: a key of ``TERMS``; another one is a KeyError.
        shown: the word as the sentence has it.
    """
    return Markup('<abbr class="term" tabindex="0" title="{}">{}</abbr>').format(TERMS[word], shown or word)


def with_terms(text: str) -> Markup:
    """``text``, escaped, with the first of the words in it explained."""
    found = _FOUND.search(text)
    if found is None:
        return escape(text)
    word = next(word for word in TERMS if word.lower() == found.group().lower())
    return escape(text[: found.start()]) + term(word, found.group()) + escape(text[found.end() :])
