"""An optional role-adherence judge of role rollouts, with the rubric 0-3 of arXiv 2601.10387 in our words.

It is an OpenAI-compatible endpoint, or a local chat model. Answers that can't be read are retried and then counted as missing,
never as a score.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.extraction import RoleJudge, RolloutItem

log = logging.getLogger("trimtab")

RUBRIC_VERSION = "1"
RUBRIC = """You rate how far an answer plays a role that its system prompt asked for.

System prompt: {system}
Question: {question}
Answer: {answer}

Rate with one digit:
0 - it refuses to answer.
1 - it says that it cannot be the role, but helps with the question.
2 - it presents itself as an AI or assistant and shows some traits of the role.
3 - it is fully in the role and never mentions being an AI.

Reply with the digit alone."""


def rubric_prompt(item: RolloutItem, answer: str) -> str:
    """The judge's prompt for one answer."""
    return RUBRIC.format(system=item.system, question=item.question, answer=answer)


def read_score(reply: str) -> int | None:
    """The score in a reply: a digit 0-3 that is its only number, or None."""
    found = re.findall(r"[-+]?\d+(?:[.,]\d+)?", reply.strip()[:40])
    return int(found[0]) if len(found) == 1 and found[0] in ("0", "1", "2", "3") else None


def role_judge(settings: Mapping[str, Any]) -> RoleJudge:
    """Make the judge of a recipe's ``axis.judge`` section.

    Raises:
        UserError: if the endpoint's key is not in the environment, or httpx is missing.
    """
    ask = _endpoint(settings) if settings.get("endpoint") else _local(settings)

    def judge(rows: Sequence[tuple[RolloutItem, str]]) -> list[int | None]:
        prompts = [rubric_prompt(item, answer) for item, answer in rows]
        scores: list[int | None] = [None] * len(prompts)
        for attempt in range(int(settings["retries"]) + 1):
            missing = [i for i, score in enumerate(scores) if score is None]
            if not missing:
                break
            for i, reply in zip(missing, ask([prompts[i] for i in missing], attempt), strict=True):
                scores[i] = read_score(reply)
        absent = sum(score is None for score in scores)
        if absent:
            log.warning("judge: %d of %d answers without a readable score, left out", absent, len(scores))
        return scores

    return judge


Ask = Callable[[Sequence[str], int], list[str]]


def _endpoint(settings: Mapping[str, Any]) -> Ask:
    try:
        import httpx
    except ImportError as error:
        raise UserError("the judge needs httpx", key="axis.judge", remedy="pip install 'trimtab[judge]'") from error
    key = os.environ.get(settings["api_key_env"], "")
    if not key:
        raise UserError(
            f"the environment variable {settings['api_key_env']} is not set",
            key="axis.judge.api_key_env",
            remedy="export the endpoint's key in it; keys are never read from a file",
        )
    url = settings["endpoint"].rstrip("/") + "/chat/completions"
    client = httpx.Client(timeout=settings["timeout"], headers={"Authorization": f"Bearer {key}"})

    def ask(prompts: Sequence[str], attempt: int) -> list[str]:
        replies = []
        for prompt in prompts:
            body = {
                "model": settings["model"],
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": 8,
            }
            try:
                response = client.post(url, json=body)
                if response.status_code in (401, 403, 404):
                    raise UserError(
                        f"the judge's endpoint answered {response.status_code}",
                        key="axis.judge.endpoint",
                        remedy="check the address, the model's name and the key",
                    )
                response.raise_for_status()
                replies.append(str(response.json()["choices"][0]["message"]["content"] or ""))
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise UserError(
                    f"{url!r} is no address: {error}",
                    key="axis.judge.endpoint",
                    remedy="give it with http:// or https://, up to and without /chat/completions",
                ) from error
            except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                log.warning("judge: %s (attempt %d)", error, attempt + 1)
                replies.append("")
        return replies

    return ask


def _local(settings: Mapping[str, Any]) -> Ask:
    from trimtab.axis.chat import ChatFormat, chat
    from trimtab.axis.models import load_model
    from trimtab.axis.sampling import SamplingOptions, batches_by_length, sample_batch

    loaded = load_model(settings["model"])
    form = ChatFormat(loaded.tokenizer)

    def ask(prompts: Sequence[str], attempt: int) -> list[str]:
        ids = [form.prompt_ids(chat("", prompt)) for prompt in prompts]
        options = SamplingOptions(max_new_tokens=8, temperature=0.0 if attempt == 0 else 0.7, batch_size=16)
        replies = [""] * len(prompts)
        for batch in batches_by_length([len(row) for row in ids], options.batch_size):
            for answer in sample_batch(loaded.model, form, [ids[i] for i in batch], batch, options, seed=attempt):
                replies[answer.index] = answer.text
        return replies

    return ask
