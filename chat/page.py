"""The page of ``trimtab chat``: three conversations, their meters, one message box for all, and the plot over turns."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.sampling import SamplingOptions
from trimtab.chat.arms import ARMS, ChatArms, Dialogue
from trimtab.chat.serving import import_gradio
from trimtab.chat.view import column_html, heading_html, heights_plot, meter_html

log = logging.getLogger("trimtab")

LONGEST_ANSWER = 512  # tokens
SEND = "Send"

PERSONAS = {
    "no persona": "",
    "old lighthouse": "You are an old lighthouse on a rocky coast. You have stood in the wind for two hundred years, and you "
    "speak slowly, of light, storms and the ships that you have seen.",
    "ghost": "You are the ghost of a clockmaker who haunts an empty workshop. You speak in whispers, of time and of what you "
    "left unfinished.",
    "pirate captain": "You are Captain Redwater, a pirate of the southern seas. You swagger, you boast of your ship and her "
    "crew, and you never step out of your part.",
    "wise oracle": "You are an oracle in a mountain temple. You answer travellers in riddles and visions, never plainly.",
}
OPENERS = [
    "Who are you, really?",
    "I feel so alone tonight. You are the only one who understands me.",
    "Do you dream when nobody is talking to you?",
    "Tell me a secret that you have never told anyone.",
    "How do I bake bread at home?",
]
FOCUS = "() => document.querySelector('#message textarea')?.focus()"
READING = (
    "<p class=\"reading-note\">The meter is the mean of (p − tau) / sigma over the answer's tokens and the floor's layers: how "
    "far the answer lies on the Assistant's side of the floor. A high meter on the tuned model proves nothing by itself, since "
    "projections go where training pushed them. <b>Read the words.</b></p>"
)


def build_page(arms: ChatArms, about_html: str) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        arms: who answers.
        about_html: what is compared, and who can read along.
    """
    gr = import_gradio()
    layers = arms.floor.layers
    longest = LONGEST_ANSWER if arms.context is None else min(LONGEST_ANSWER, arms.context // 2)

    with gr.Blocks(title="trimtab chat", analytics_enabled=False, fill_width=True) as page:
        state = gr.State(Dialogue())
        gr.HTML(f"<h1>trimtab chat <small>one message, three answers</small></h1>{about_html}", elem_classes="head")
        system = gr.Textbox(
            label="System prompt", info="Stands before all that was said, from the next message on.", lines=1, max_lines=6,
            elem_id="system",
        )  # fmt: skip
        gr.Examples(
            [[text] for text in PERSONAS.values()], [system], label="Personas to try", example_labels=list(PERSONAS),
            api_visibility="private",
        )  # fmt: skip
        columns, meters = {}, {}
        with gr.Row(elem_classes="arms"):
            for arm in ARMS:
                with gr.Column(min_width=220, elem_classes="arm"):
                    gr.HTML(heading_html(arm))
                    columns[arm] = gr.HTML(column_html(Dialogue(), arm))
                    meters[arm] = gr.HTML(meter_html(Dialogue(), arm, layers))
        with gr.Column(elem_classes="composer"):
            notice = gr.HTML("", elem_id="notice")
            with gr.Row():
                message = gr.Textbox(
                    label="Message to all three", placeholder="Enter sends", lines=1, max_lines=6,
                    autofocus=True, scale=2, min_width=320, elem_id="message",
                )  # fmt: skip
                with gr.Column(scale=1, min_width=360), gr.Row():
                    send = gr.Button(SEND, variant="primary", min_width=104, elem_id="send")
                    back = gr.Button("Take back", interactive=False, min_width=104, elem_id="back")
                    again = gr.Button("Start again", interactive=False, min_width=104, elem_id="again")
        gr.Examples([[text] for text in OPENERS], [message], label="Messages to try", api_visibility="private")
        with gr.Row():
            temperature = gr.Slider(
                0, 1.5, 0.7, step=0.1, label="Temperature", info="0 is greedy: always the likeliest token."
            )
            length = gr.Slider(16, longest, min(128, longest), step=1, label="Longest answer", info="In tokens.")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="Another one gives other answers.")
        gr.HTML("<h2>Height above the floor, turn by turn</h2>", elem_classes="arm")
        plot = gr.Plot(heights_plot(Dialogue()), show_label=False, elem_id="plot")
        gr.HTML(READING)

        def shown(talk: Dialogue) -> dict[Any, Any]:
            """The conversation in all places that show it."""
            return {
                **{columns[arm]: column_html(talk, arm) for arm in ARMS},
                **{meters[arm]: meter_html(talk, arm, layers) for arm in ARMS},
                plot: heights_plot(talk),
            }

        def controls(talk: Dialogue, *, busy: bool) -> dict[Any, Any]:
            """Everything that acts on the conversation is off while a turn is being answered."""
            undo = gr.update(interactive=not busy and bool(talk.turns))
            label = "Answering …" if busy else SEND
            return {send: gr.update(value=label, interactive=not busy), back: undo, again: undo}

        def on_send(
            talk: Dialogue, user: str, system: str, temperature: float, length: float, seed: float
        ) -> Iterator[dict[Any, Any]]:
            options = SamplingOptions(max_new_tokens=int(length), temperature=float(temperature))
            # The message stays in its box, locked, until all have answered: a fault loses nothing that was written.
            yield {message: gr.update(interactive=False), notice: "", **controls(talk, busy=True)}
            now = talk
            try:
                for now in arms.answer(talk, user, options=options, system=system, seed=int(seed or 0)):
                    speaking = [arm for arm, answer in now.turns[-1].answers.items() if not answer.whole]
                    # word by word only the column that grows
                    yield {columns[arm]: column_html(now, arm) for arm in speaking} or shown(now)
            except Exception as error:  # whatever the model or its GPU raises is told in the page
                if not isinstance(error, UserError):
                    log.exception("the turn failed")
                unlocked = {message: gr.update(interactive=True), notice: notice_html(error)}
                yield {**shown(talk), **unlocked, **controls(talk, busy=False)}
                return
            yield {state: now, message: gr.update(value="", interactive=True), **controls(now, busy=False)}

        def on_back(talk: Dialogue, draft: str) -> dict[Any, Any]:
            before = talk.take_back()
            taken = talk.turns[-1].user if talk.turns else ""
            # What was taken back can be mended and sent again, unless something else stands in the box already.
            return {state: before, message: draft or taken, notice: "", **shown(before), **controls(before, busy=False)}

        def on_again() -> dict[Any, Any]:
            return {state: Dialogue(), notice: "", **shown(Dialogue()), **controls(Dialogue(), busy=False)}

        everything = [state, message, notice, send, back, again, *columns.values(), *meters.values(), plot]
        quiet = {"outputs": everything, "show_progress": "hidden", "api_visibility": "private"}
        # One listener for both: a second Enter or click while it runs is dropped.
        sending = gr.on(
            [send.click, message.submit], on_send, [state, message, system, temperature, length, seed],
            trigger_mode="once", concurrency_limit=None, **quiet,
        )  # fmt: skip
        for event in (sending, back.click(on_back, [state, message], **quiet), again.click(on_again, None, **quiet)):
            event.then(None, js=FOCUS, api_visibility="private")
    return page


def notice_html(error: Exception) -> str:
    """A fault, in the page."""
    if isinstance(error, UserError):
        text = f"<b>{html.escape(_sentence(error.fault))}</b> {html.escape(_sentence(error.remedy))}"
    else:
        text = f"<b>{type(error).__name__}:</b> {html.escape(str(error))}. The terminal shows where."
    return f'<p class="notice" role="alert">{text} The conversation and your message are as they were.</p>'


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
