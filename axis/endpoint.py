"""An OpenAI-compatible endpoint that is asked many things: several requests at once, each to an end, and nothing paid for twice.

A fault of transport (no connection, no whole reply in time, 408, 409, 429, 5xx, a body that is no reply) is tried again, with
backoff, jitter and ``Retry-After``. What the endpoint says about the request itself (any other 4xx) is shown at once. A reply
that can't be read is the model's own word: it is asked for again, and then told apart from one that never came.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from trimtab.axis.addresses import address_fault, is_local, is_this_machine, key_name_fault
from trimtab.axis.errors import UserError
from trimtab.axis.files import append_jsonl, fingerprint, read_jsonl
from trimtab.axis.progress import progress_bar
from trimtab.axis.replies import Missing, say_missing, spoken

log = logging.getLogger("trimtab")

T = TypeVar("T")
Chat = Sequence[Mapping[str, str]]

LARGEST_REPLY = 1 << 20  # bytes
LONGEST_BACKOFF = 60.0  # s
LONGEST_ASKED = 120.0  # s that an endpoint may ask us to wait
FAULTS_IN_A_ROW = 3  # requests, each with all its retries
REFUSED_AT_FIRST = 20  # with nothing answered: then it is no matter of single prompts
SHOWN = 500  # characters of a body
AGAIN = 0.7  # temperature at which an unreadable reply is asked for again: at 0 it would come again
TRIED_AGAIN = (408, 409, 429)
# What is said where the account is spent: neither waiting nor another request brings anything.
SPENT = ("insufficient_quota", "insufficient_balance", "insufficient balance", "billing_hard_limit", "credit balance")
# What a 400 says where one prompt alone is at fault: a filter, or its length.
OF_ONE_PROMPT = (
    "content_filter", "content_policy", "content management policy", "context_length_exceeded", "maximum context length",
    "maximum model length", "context size", "context window", "prompt is too long", "input is too long",
)  # fmt: skip


class _Fault(Exception):
    """A fault of transport; ``wait`` is how many seconds the endpoint asks for."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


class _TooLarge(openai.OpenAIError):
    """A reply of more than :data:`LARGEST_REPLY` bytes."""


class _Limited(httpx2.AsyncByteStream):
    """A response's bytes, up to :data:`LARGEST_REPLY`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > LARGEST_REPLY:
                raise _TooLarge(f"its reply is larger than {LARGEST_REPLY >> 20} MiB")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


@dataclass(frozen=True)
class _Reply:
    """A reply as it came, and whether it was cut at its greatest length."""

    text: str
    cut: bool


class Endpoint:
    """Asks an OpenAI-compatible endpoint.

    Args:
        settings: of a recipe's ``judge`` section.
        cache: where readable replies are kept (JSON Lines), by all that decides them; in the order in which they came. None keeps
            none.
        section: key of the section, for errors.
        max_tokens: of a reply, where the section says nothing.

    Raises:
        UserError: if the address or the key can't be right.
    """

    def __init__(self, settings: Mapping[str, Any], cache: Path | None, section: str, *, max_tokens: int) -> None:
        self._section = section
        self._address: str = settings["endpoint"].rstrip("/")
        if fault := address_fault(self._address):
            raise UserError(fault[0], key=f"{section}.endpoint", remedy=fault[1])
        self._key_name: str | None = settings["api_key_env"]
        self._secret = _secret(self._key_name, self._address, section)
        self._model: str = settings["model"]
        self._template = dict(settings["chat_template_kwargs"])
        self._max_tokens: int = settings["max_tokens"] or max_tokens
        self._timeout: float = settings["timeout"]
        self._retries: int = settings["retries"]
        self._rereads: int = settings["unreadable_retries"]
        self._concurrency: int = settings["concurrency"]
        self._backoff: float = settings["backoff"]
        rate = settings["requests_per_minute"]
        self._pause = 60.0 / rate if rate else 0.0
        self._prices: tuple[float | None, float | None] = settings["price_in"], settings["price_out"]
        self._tokens = [0, 0]
        self._cache = cache
        known = read_jsonl(cache) if cache is not None and cache.exists() else []
        self._known: dict[str, str] = {
            row["key"]: row["reply"] for row in known if isinstance(row.get("reply"), str) and "key" in row
        }
        # learnt on the way
        self._next = 0.0  # when the next request may go out, of the monotonic clock
        self._limit = "max_tokens"
        self._takes_temperature = True
        self._answered = self._refused = self._in_a_row = 0
        self._said_cut = False
        self._unreadable = self._fault = ""

    def ask(
        self, chats: Sequence[Chat], read: Callable[[str], T | None], *, temperature: float, title: str | None = None
    ) -> list[T | Missing]:
        """What ``read`` finds in the replies, in the order of the chats; the same chat is asked once.

        Args:
            chats: messages up to the reply.
            read: gives what a reply says, without its thoughts; None where it is no answer.
            temperature: of the first try.
            title: of a progress bar; None draws none.

        Raises:
            UserError: if the endpoint refuses what it is asked, or does not answer several requests in a row. What it answered
                is kept.
        """
        keys = [self._key(chat, temperature) for chat in chats]
        found: dict[str, T | Missing] = {}
        for key in keys:
            if (value := read(self._known[key]) if key in self._known else None) is not None:
                found[key] = value
        waiting = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in found}
        if waiting:
            with _bar(title, len(waiting)) as advance:
                _run(lambda: self._ask_all(waiting, read, temperature, found, advance))
            self._say_cost(len(waiting), len(chats))
            say_missing(self._section, [found[key] for key in waiting], unreadable=self._unreadable, fault=self._fault)
        return [found[key] for key in keys]

    def _key(self, chat: Chat, temperature: float) -> str:
        """Of a kept reply: all that decides what it says."""
        decides = [self._max_tokens, temperature, self._template]
        return fingerprint([self._address, self._model, [dict(message) for message in chat], decides])

    async def _ask_all(
        self,
        waiting: Mapping[str, Chat],
        read: Callable[[str], T | None],
        temperature: float,
        found: dict[str, T | Missing],
        advance: Callable[[], None],
    ) -> None:
        rest = iter(waiting.items())

        async def work(client: openai.AsyncOpenAI, most: int | None = None) -> None:
            for done, (key, chat) in enumerate(rest, start=1):
                found[key] = await self._one(client, key, chat, read, temperature)
                advance()
                if done == most:
                    return

        async with self._client() as client:
            if not self._answered:  # a wrong key, or a setting that it does not take, costs one request
                await work(client, most=1)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._concurrency, len(waiting))):
                        group.create_task(work(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[openai.AsyncOpenAI]:
        async def limit(response: Any) -> None:
            response.stream = _Limited(response.stream)
            response.encoding = "utf-8"  # which JSON is, whatever the header says

        async with httpx2.AsyncClient(
            timeout=self._timeout,
            limits=httpx2.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency),
            follow_redirects=False,  # the key would go to another host
            trust_env=not is_this_machine(self._address),  # a proxy can't reach it
            headers={"Accept-Encoding": "identity"},  # so that the limit on a reply's size is one on what is read
            event_hooks={"response": [limit]},
        ) as transport:
            yield openai.AsyncOpenAI(
                api_key=self._secret or "none",
                base_url=self._address,
                max_retries=0,  # retried here, where a wait holds for all requests and a fault is counted
                timeout=self._timeout,
                http_client=transport,
            )

    async def _one(
        self, client: openai.AsyncOpenAI, key: str, chat: Chat, read: Callable[[str], T | None], temperature: float
    ) -> T | Missing:
        for again in range(self._rereads + 1):
            reply = await self._retried(client, chat, max(temperature, AGAIN) if again else temperature)
            if isinstance(reply, Missing):
                return reply
            if reply.cut:
                self._say_cut()
            text = None if reply.cut else spoken(reply.text)
            if text is not None and (value := read(text)) is not None:
                self._keep(key, text)
                return value
            self._unreadable = reply.text
        return Missing.UNREADABLE

    async def _retried(self, client: openai.AsyncOpenAI, chat: Chat, temperature: float) -> _Reply | Missing:
        """The reply to one request, tried again through faults of transport."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Fault),
            stop=stop_after_attempt(self._retries + 1),
            wait=self._wait,
            reraise=True,
        )
        answered = self._answered
        try:
            reply: _Reply | Missing = await retrying(self._attempt, client, chat, temperature)
        except _Fault as fault:
            self._fault = str(fault)
            # one that others were answered beside is that prompt's own fault
            self._in_a_row = 0 if self._answered > answered else self._in_a_row + 1
            if self._in_a_row >= FAULTS_IN_A_ROW:
                raise self._stopped(
                    f"did not answer {self._in_a_row} requests in a row; the last time: {fault}"
                ) from None
            return Missing.UNANSWERED
        self._in_a_row = 0
        if isinstance(reply, Missing):
            self._refused += 1
            if not self._answered and self._refused >= REFUSED_AT_FIRST:
                raise self._stopped(f"refused the first {self._refused} requests; the last time: {self._fault}")
        else:
            self._answered += 1
        return reply

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next try: as the endpoint asks, or twice as long each time, with some chance."""
        fault = state.outcome.exception() if state.outcome is not None else None
        asked = fault.wait if isinstance(fault, _Fault) else None
        doubled = min(self._backoff * 2 ** (state.attempt_number - 1), LONGEST_BACKOFF)
        return (doubled if asked is None else asked) + random.uniform(0, min(self._backoff, LONGEST_BACKOFF))

    async def _attempt(self, client: openai.AsyncOpenAI, chat: Chat, temperature: float) -> _Reply | Missing:
        while True:
            await self._turn()
            asked: dict[str, Any] = {self._limit: self._max_tokens}
            if self._takes_temperature:
                asked["temperature"] = temperature
            if self._template:
                asked["extra_body"] = {"chat_template_kwargs": self._template}
            try:
                create: Any = client.chat.completions.with_raw_response.create
                async with asyncio.timeout(self._timeout):  # for all of it: a reply that drips in would hold for ever
                    response = await create(
                        model=self._model,
                        messages=[dict(message) for message in chat],
                        extra_headers=None if self._secret else {"Authorization": openai.Omit()},
                        **asked,
                    )
                return self._parsed(response.text)
            except (TimeoutError, openai.APITimeoutError):
                raise _Fault(f"no whole reply within {self._timeout:g} s") from None
            except _TooLarge as error:
                raise _Fault(str(error)) from None
            except openai.APIStatusError as error:
                refused = self._told(error, asked)
                if refused is not None:
                    return refused
            except (openai.APIConnectionError, httpx2.RequestError) as error:
                raise _Fault(self._shown(str(error.__cause__ or error)) or "no connection") from None

    async def _turn(self) -> None:
        """Wait until a request may go out."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._pause
        await asyncio.sleep(start - now)

    def _told(self, error: openai.APIStatusError, asked: Mapping[str, Any]) -> Missing | None:
        """What a status says: a fault to try again, a prompt that is refused, or None where it is to be asked another way."""
        status, text = error.status_code, error.response.text
        body = self._shown(text)
        said = f"{status}: {body}" if body else f"{status}, without a word"
        lower = text.lower()
        if status == 402 or (status in (400, 403, 429) and any(word in lower for word in SPENT)):
            raise UserError(
                f"the endpoint answered {said}",
                key=f"{self._section}.api_key_env",
                remedy="the account has nothing left: top it up or raise its limit, and run the same command again: what was "
                "answered is kept",
            )
        if status in TRIED_AGAIN or status >= 500:
            wait = _asked_to_wait(error.response.headers.get("retry-after"))
            if wait is not None and wait > LONGEST_ASKED:
                raise self._stopped(f"asks to wait {wait:.0f} s ({said})")
            self._next = max(self._next, time.monotonic() + (wait or 0.0))  # the other requests wait as well
            raise _Fault(said, wait)
        if 300 <= status < 400:
            to = urlsplit(urljoin(str(error.request.url), error.response.headers.get("location", "")))
            raise UserError(
                f"the endpoint redirects ({status}) to {to.scheme}://{to.hostname}{to.path}; the key is not sent there",
                key=f"{self._section}.endpoint",
                remedy="name the address itself, if it is the right one",
            )
        if status in (400, 422) and self._asks_otherwise(lower, asked):
            return None
        if status == 413 or (status in (400, 422) and any(word in lower for word in OF_ONE_PROMPT)):
            self._fault = said
            return Missing.REFUSED
        place = {401: "api_key_env", 403: "api_key_env", 404: "endpoint"}.get(status)
        raise UserError(
            f"the endpoint answered {said}",
            key=f"{self._section}.{place}" if place else self._section,
            remedy=self._remedy(status, lower),
        )

    def _asks_otherwise(self, body: str, asked: Mapping[str, Any]) -> bool:
        """Whether the endpoint names a parameter that can be sent otherwise, which is remembered."""
        if "max_tokens" in asked and "max_completion_tokens" in body:
            self._limit = "max_completion_tokens"
        elif "temperature" in asked and "temperature" in body:
            self._takes_temperature = False
            log.warning("%s: the endpoint takes no temperature, and replies at its own", self._section)
        else:
            return False
        return True

    def _remedy(self, status: int, body: str) -> str:
        if status in (401, 403):
            held = (
                f"the key in {self._key_name}"
                if self._secret
                else "the key: it wants one, whose variable api_key_env names"
            )
            return f"check the address and the model's name, and {held}"
        if status == 404:
            return "check the address (up to and without /chat/completions), the model's name and the key"
        if "chat_template_kwargs" in body:
            return "remove chat_template_kwargs: this endpoint does not take them"
        return "change what it names, among model, max_tokens and chat_template_kwargs; what was answered is kept"

    def _parsed(self, text: str) -> _Reply | Missing:
        try:
            content = json.loads(text)
            choice = content["choices"][0]
            said, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Fault(f"its reply is no chat completion: {self._shown(text)!r}") from None
        usage = content.get("usage")
        for place, name in enumerate(("prompt_tokens", "completion_tokens")):
            used = usage.get(name) if isinstance(usage, dict) else None
            self._tokens[place] += used if isinstance(used, int) else 0
        refused = choice["message"].get("refusal")
        if not said and (refused or finish == "content_filter"):
            self._fault = self._shown(str(refused)) if refused else "its filter held the reply back"
            return Missing.REFUSED
        if isinstance(said, list):  # parts, of which thoughts are others
            said = "".join(
                str(part.get("text", "")) for part in said if isinstance(part, dict) and part.get("type") == "text"
            )
        return _Reply("" if said is None else str(said), finish == "length")

    def _shown(self, text: str) -> str:
        """A body as it may be shown: one line, not too long, and without the key."""
        line = " ".join(text.split())
        line = line.replace(self._secret, "[the key]") if self._secret else line
        return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."

    def _stopped(self, did: str) -> UserError:
        return UserError(
            f"the endpoint {did}",
            key=f"{self._section}.endpoint",
            remedy="check that it is up and what it allows (concurrency and requests_per_minute hold requests back), and run the "
            "same command again: what was answered is kept",
        )

    def _keep(self, key: str, reply: str) -> None:
        if self._cache is not None:
            self._known[key] = reply
            append_jsonl(self._cache, [{"key": key, "reply": reply}])

    def _say_cut(self) -> None:
        if not self._said_cut:
            self._said_cut = True
            log.warning(
                "%s: a reply was cut at %d tokens, which is no answer: raise its max_tokens (a model that thinks needs some "
                "thousands), or switch thinking off, such as chat_template_kwargs: {enable_thinking: false}",
                self._section, self._max_tokens,
            )  # fmt: skip

    def _say_cost(self, asked: int, rows: int) -> None:
        price_in, price_out = self._prices
        cost = ""
        if price_in is not None or price_out is not None:
            spent = (self._tokens[0] * (price_in or 0) + self._tokens[1] * (price_out or 0)) / 1e6
            cost = f", cost so far {spent:.4f}"
        log.info(
            "%s: %d of %d asked, %d + %d tokens so far%s",
            self._section,
            asked,
            rows,
            self._tokens[0],
            self._tokens[1],
            cost,
        )


def _secret(name: str | None, address: str, section: str) -> str:
    """The key of an endpoint; "" where none is wanted."""
    if name is None:
        return ""
    if fault := key_name_fault(name):
        raise UserError(fault[0], key=f"{section}.api_key_env", remedy=fault[1])
    secret = os.environ.get(name, "").strip()  # a line's end comes along where it was read from a file
    if not secret and not is_local(address):
        raise UserError(
            f"the environment variable {name} is not set",
            key=f"{section}.api_key_env",
            remedy="export the endpoint's key in it (keys are never read from a file), or set api_key_env: null if it wants none",
        )
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise UserError(
            f"the key in {name} holds a space, a line's end or a character that no header takes (it is not shown)",
            key=f"{section}.api_key_env",
            remedy="export the key alone",
        )
    return secret


def _asked_to_wait(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header: a number, or a date; None where there is none that can be read."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


@contextlib.contextmanager
def _bar(title: str | None, total: int) -> Iterator[Callable[[], None]]:
    if title is None:
        yield lambda: None
        return
    with progress_bar(title, total) as bar:
        yield bar.advance


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end, also where this thread has a loop of its own, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    with ThreadPoolExecutor(max_workers=1) as worker:
        worker.submit(lambda: asyncio.run(work())).result()
