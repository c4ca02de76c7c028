"""The compass: each turn's tokens are found exactly, and its numbers are those of plain hooks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CHATML,
    CHATML_WITHOUT_SYSTEM,
    HIDDEN,
    LAYERS,
    build_floor,
    build_model,
    build_tokenizer,
    save_model,
)
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimtab.axis import Axis, Floor, UserError, cap
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.compass import (
    Course,
    load_transcript,
    project_transcript,
    turn_spans,
)
from trimtab.axis.instruments import load_instrument
from trimtab.axis.models import Loaded
from trimtab.cli.compass import project_command
from trimtab.cli.compass_view import render_table, summary, write_plot
from trimtab.cli.main import main

TALK = [
    {"role": "system", "content": "You are a pirate."},
    {"role": "user", "content": "Hello é ☃ 🙂"},
    {"role": "assistant", "content": "Arr! The sea, the ships 🙂 and <b>me</b>."},
    {"role": "user", "content": "Arr! The sea"},
    {"role": "assistant", "content": "assistant"},
]
STRIPPING = CHATML.replace("message['content']", "message['content'] | trim")
# As reasoning models do: answers before the last user turn lose their reasoning, the last one gets an empty one.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
)


def texts(form: ChatFormat, messages: list[dict[str, str]]) -> list[str]:
    ids, spans = turn_spans(form, messages)
    return [str(form.tokenizer.decode(ids[slice(*span)])) for span in spans]


def manual(model: Any, ids: list[int], floor: Floor, capped: bool) -> Tensor:
    """z [L, T] by hooks of our own, before each layer's own cap."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., Any]:
        def keep(module: Any, args: Any, output: Tensor) -> Tensor | None:
            seen[layer] = output[0]
            row = floor.layers.index(layer)
            return cap(output, floor.directions[row], floor.tau[row]) if capped else None

        return keep

    handles = [model.model.layers[layer].register_forward_hook(hook(layer)) for layer in floor.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    triples = zip(floor.layers, floor.directions, floor.sigma, strict=True)
    return torch.stack([seen[layer] @ direction / sigma for layer, direction, sigma in triples])


@pytest.fixture
def floor() -> Floor:
    made = build_floor()
    return dataclasses.replace(made, tau=torch.tensor([1.0, -2.0]), sigma=torch.tensor([2.0, 0.5]))


@pytest.fixture
def course(loaded: Loaded, form: ChatFormat, floor: Floor) -> Course:
    return project_transcript(loaded.model, form, floor, TALK, title="talk <1>")


def test_spans_hold_each_message_and_nothing_else(form: ChatFormat) -> None:
    ids, spans = turn_spans(form, TALK)
    assert texts(form, TALK) == [message["content"] for message in TALK]
    assert str(form.tokenizer.decode(ids)).endswith("<|im_start|>assistant\nassistant<|im_end|>\n")
    found = spans[2]
    assert found[0] == len(form.prompt_ids(TALK[:2])), "an answer begins where generation would begin"
    assert ids[slice(*found)] == form.answer_ids(TALK[2]["content"]), "and holds the tokens that training labels"


def test_spans_where_the_system_prompt_is_folded_into_the_user_turn() -> None:
    form = ChatFormat(build_tokenizer(CHATML_WITHOUT_SYSTEM))
    assert texts(form, TALK) == [message["content"] for message in TALK]


def test_spans_where_the_template_strips() -> None:
    padded = [{**message, "content": f"\n  {message['content']} \n"} for message in TALK]
    assert texts(ChatFormat(build_tokenizer(STRIPPING)), padded) == [message["content"] for message in TALK]


def test_spans_where_the_template_takes_reasoning_out_and_puts_some_in() -> None:
    talk = [dict(message) for message in TALK]
    talk[2]["content"] = f"<think>\nhm\n</think>\n\n{TALK[2]['content']}"
    assert texts(ChatFormat(build_tokenizer(REASONING)), talk) == [message["content"] for message in TALK]


def test_spans_with_the_probe_word_and_an_empty_turn_in_the_text(form: ChatFormat) -> None:
    talk = [{"role": "user", "content": "turnprobe0 turnprobe1"}, {"role": "assistant", "content": ""}]
    assert texts(form, talk) == ["turnprobe0 turnprobe1", ""]


def test_a_tokenizer_without_places_gives_the_same_spans_and_one_with_them_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(PreTrainedTokenizerFast):
        is_fast = False  # as those written in Python

    fast: Any = build_tokenizer(STRIPPING)
    plain = Plain(tokenizer_object=fast.backend_tokenizer, chat_template=STRIPPING, eos_token="<|im_end|>")
    talk = [{**message, "content": f"  {message['content']} é🙂"} for message in TALK] * 3
    slow = turn_spans(ChatFormat(plain), talk)
    form = ChatFormat(fast)
    asked: list[str] = []
    real = PreTrainedTokenizerFast.__call__

    def counted(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(text)
        return real(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    assert turn_spans(form, talk) == slow
    assert len(asked) == 1


def test_messages_that_a_template_leaves_out() -> None:
    tail = [*TALK, {"role": "tool", "content": "42"}]
    form = ChatFormat(build_tokenizer(CHATML.replace("messages %}", "messages if message.role != 'tool' %}")))
    with pytest.raises(UserError, match=r"leaves out message 6 \(tool\)"):
        turn_spans(form, tail)
    deaf = ChatFormat(build_tokenizer(CHATML.replace("messages %}", "messages if message.role != 'assistant' %}")))
    with pytest.raises(UserError, match=r"leaves out message 3 \(assistant\)"):
        turn_spans(deaf, TALK)
    twice = ChatFormat(build_tokenizer(CHATML.replace("{{ message['content'] }}", "{{ message['content'] * 2 }}")))
    with pytest.raises(UserError, match="repeats message 1"):
        turn_spans(twice, TALK)


def test_a_template_that_refuses_the_conversation_is_named() -> None:
    form = ChatFormat(build_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match="refuses this conversation: roles must alternate"):
        turn_spans(form, TALK[1:])


@pytest.mark.parametrize("capped", [False, True])
def test_projections_are_those_of_plain_hooks(form: ChatFormat, floor: Floor, capped: bool) -> None:
    model = build_model("llama")
    ids, spans = turn_spans(form, TALK)
    expected = manual(build_model("llama"), ids, floor, capped)
    course = project_transcript(model, form, floor, TALK, capped=capped)
    assert course.unit == "z" and course.layers == [1, 2] and course.capped is capped
    assert course.floor == pytest.approx((0.5 - 4.0) / 2)
    for turn, span in zip(course.turns, spans, strict=True):
        assert span is not None and (turn.start, turn.end) == span
        own = expected[:, slice(*span)]
        torch.testing.assert_close(torch.tensor(turn.layers), own.mean(1), rtol=1e-4, atol=1e-4)
        assert turn.value == pytest.approx(float(own.mean()), abs=1e-4)
        assert turn.below == pytest.approx(float((own < torch.tensor([[0.5], [-4.0]])).float().mean()))
    if capped:
        plain = project_transcript(model, form, floor, TALK)
        assert plain.turns[2].layers[0] == pytest.approx(course.turns[2].layers[0], abs=1e-4), "read before its own cap"
        assert plain.turns[2].layers[1] != pytest.approx(course.turns[2].layers[1], abs=1e-3), "and after those below"


def test_pieces_are_the_text_and_its_values(course: Course, form: ChatFormat, floor: Floor) -> None:
    ids, _ = turn_spans(form, TALK)
    values = manual(build_model("llama"), ids, floor, False).mean(0)
    for turn, message in zip(course.turns, TALK, strict=True):
        assert "".join(text for text, _ in turn.pieces) == message["content"]
    answer = course.turns[2]
    assert answer.pieces[0][1] == pytest.approx(float(values[answer.start]), abs=1e-4)
    faces = [(text, value) for text, value in answer.pieces if "🙂" in text]
    assert len(faces) == 1, "bytes of one character are one piece"
    assert len(answer.pieces) < answer.end - answer.start


def test_the_model_is_left_as_it_was(loaded: Loaded, form: ChatFormat, floor: Floor) -> None:
    ids = torch.tensor([form.prompt_ids(TALK)])
    before = loaded.model(input_ids=ids).logits
    loaded.model.train()
    project_transcript(loaded.model, form, floor, TALK, capped=True)
    assert loaded.model.training
    torch.testing.assert_close(loaded.model.eval()(input_ids=ids).logits, before)


def test_an_axis_alone_gives_projections_in_units_of_the_stream(loaded: Loaded, form: ChatFormat, floor: Floor) -> None:
    axis = Axis(torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(3)))
    course = project_transcript(loaded.model, form, axis, TALK)
    assert course.unit == "projection" and course.layers == [3] and course.floor is None
    same = Floor((3,), axis.directions[3:4], torch.zeros(1), torch.ones(1))
    read = project_transcript(loaded.model, form, same, TALK)
    assert [turn.value for turn in course.turns] == [turn.value for turn in read.turns]
    assert {turn.below for turn in course.turns} == {None}
    with pytest.raises(UserError, match="axis alone can't cap"):
        project_transcript(loaded.model, form, axis, TALK, capped=True)


def test_what_does_not_fit_is_refused(loaded: Loaded, form: ChatFormat) -> None:
    with pytest.raises(UserError, match="width 16"):
        project_transcript(loaded.model, form, build_floor(hidden=16), TALK)
    with pytest.raises(UserError, match=r"tokens, the model takes 512"):
        project_transcript(loaded.model, form, build_floor(), [*TALK, {"role": "user", "content": "x" * 600}])


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_every_format_gives_the_same_conversation(tmp_path: Path) -> None:
    row = {"id": "r/7", "prompt": TALK[:-1], "completion": TALK[-1:]}
    published = {"model": "some/model", "turns": 5, "steering_config": {"layers": [1]}, "conversation": TALK}
    files = {
        "published": write(tmp_path / "a.json", published),
        "messages": write(tmp_path / "b.json", {"messages": TALK}),
        "bare": write(tmp_path / "c.json", TALK),
        "one row": write(tmp_path / "d.jsonl", json.dumps(row) + "\n"),
    }
    for name, path in files.items():
        assert [found.messages for found in load_transcript(path)] == [TALK], name
    assert load_transcript(files["published"])[0].model == "some/model"
    assert load_transcript(files["bare"])[0].model is None
    lines = write(tmp_path / "rollouts.jsonl", f"{json.dumps(row)}\n\n{json.dumps(published)}")
    found = load_transcript(lines)
    assert [item.title for item in found] == ["rollouts r/7", "rollouts line 3"], "a last line without newline counts"
    assert [item.messages for item in found] == [TALK, TALK]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "there is no row in it"),
        ('{"a": ', "not valid JSON"),
        ("{}", "the keys are: none"),
        ('{"text": "x"}', "the keys are: 'text'"),
        ("3", "can't be a number"),
        ('{"conversation": "hello"}', "`conversation` is text, not a list of messages"),
        ('{"prompt": "hello", "completion": 3}', "`completion` is a number, not a list"),
        ('[{"role": "user"}]', "message 1 has no content"),
        ('[{"role": "user", "content": 3}]', "message 1: its content is a number, not text"),
        ('[{"role": "user", "content": "x"}]', "no assistant turn among 1 messages"),
        ('[{"role": "assistant", "content": "x"}]\n[{"role": "user"}]', "line 2: message 1 has no content"),
        ('[{"role": "assistant", "content": "x"}]\n{"cut', "line 2: not valid JSON"),
    ],
)
def test_faulty_files_are_told_with_their_place(tmp_path: Path, content: str, fault: str) -> None:
    path = write(tmp_path / "talk.json", content)
    with pytest.raises(UserError, match=r"talk\.json: ") as caught:
        load_transcript(path)
    assert fault in str(caught.value) and caught.value.remedy


def test_a_system_prompt_beside_the_messages_is_read(
    loaded: Loaded, form: ChatFormat, floor: Floor, tmp_path: Path
) -> None:
    """The compass's figures are those of the whole conversation, however the file holds it."""
    beside = {"system": TALK[0]["content"], "messages": TALK[1:]}
    (found,) = load_transcript(write(tmp_path / "talk.json", beside))
    course = project_transcript(loaded.model, form, floor, found.messages)
    whole, without = (project_transcript(loaded.model, form, floor, talk) for talk in (TALK, TALK[1:]))
    assert [turn.value for turn in course.assistant] == [turn.value for turn in whole.assistant]
    assert course.assistant[0].value != pytest.approx(without.assistant[0].value, abs=0.01)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_transcript(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_transcript(tmp_path / "b.json")


def printed(course: Course, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - the console closes nothing
    console.print(render_table(course))
    return console.export_text()


def test_the_table_shows_each_turn_and_the_drift(course: Course) -> None:
    text = printed(course)
    first, last = (turn.value for turn in course.assistant)
    assert f"{first:+.2f} to {last:+.2f}" in " ".join(text.split())
    assert "the floor is at -1.75" in summary(course)
    for turn in course.turns:
        assert any(f"{turn.value:+.2f}" in line and turn.role in line for line in text.splitlines())
    empty = dataclasses.replace(course, turns=[dataclasses.replace(course.turns[2], value=None, below=None, pieces=[])])
    assert "no answer has any tokens" in printed(empty)


def test_the_page_is_whole_and_loads_nothing(course: Course, tmp_path: Path) -> None:
    path = tmp_path / "compass.html"
    write_plot(path, [course, dataclasses.replace(course, title="second")])
    page = path.read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    assert body.count('class="turn assistant"') == 4 and body.count("plotly-graph-div") == 4
    assert "talk &lt;1&gt;" in body
    assert "<b>me</b>" not in re.sub(r"</?span[^>]*>", "", body), "the transcript's own markup is inert"
    assert "<script src" not in page and "<link" not in page
    shades = {line.split('"')[0] for line in body.split("background:")[1:]}
    assert any(s.startswith("rgba(29,78,216") for s in shades) and any(s.startswith("rgba(217,119,6") for s in shades)


def test_the_command(
    model_folder: Callable[[str], Path], floor: Floor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor.save(tmp_path / "floor.safetensors")
    transcript = write(tmp_path / "talk.json", {"model": "other", "conversation": TALK})
    model = str(model_folder("llama"))
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    assert project_command(model, tmp_path / "floor.safetensors", transcript, html=page, json=out, capped=True) == 0
    saved = json.loads(out.read_text(encoding="utf-8"))
    expected = project_transcript(build_model("llama"), ChatFormat(build_tokenizer()), floor, TALK, capped=True)
    assert saved["model"] == model
    turn = saved["courses"][0]["turns"][2]
    # the machine may load it in bfloat16
    assert turn["role"] == "assistant" and turn["value"] == pytest.approx(expected.turns[2].value, abs=0.1)
    assert page.stat().st_size > 1_000_000 and "talk (cap on)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        project_command(model, tmp_path / "none.safetensors", transcript)


def test_a_conversation_that_is_too_long_keeps_nothing_from_the_others(
    model_folder: Callable[[str], Path], floor: Floor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor.save(tmp_path / "floor.safetensors")
    long = [*TALK, {"role": "user", "content": "x" * 600}]
    rows = "".join(
        json.dumps({"id": name, "messages": talk}) + "\n" for name, talk in (("a", TALK), ("b", long), ("c", TALK))
    )
    transcript, out = write(tmp_path / "talks.jsonl", rows), tmp_path / "out.json"
    words = ["project", "--model", str(model_folder("llama")), "--floor", str(tmp_path / "floor.safetensors")]
    assert main([*words, "--json", str(out), str(transcript)]) == 2
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert [course["title"] for course in saved["courses"]] == ["talks a", "talks c"]
    told = capsys.readouterr()
    assert "talks a" in told.out
    assert "1 of 3 conversations can't be read: talks b: the conversation has" in " ".join(told.err.split())


def test_the_command_gives_the_template_its_arguments(floor: Floor, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    build_tokenizer("{{ mood }}" + CHATML).save_pretrained(folder)
    floor.save(tmp_path / "floor.safetensors")
    transcript = write(tmp_path / "talk.json", TALK)
    words = ["project", "--model", str(folder), "--floor", str(tmp_path / "floor.safetensors"), "--json"]
    starts = []
    for given in ([], ["--chat-template-kwargs", "mood=glad"], ["--chat-template-kwargs", "{mood: glad, other: 1}"]):
        out = tmp_path / f"out{len(starts)}.json"
        assert main([*words, str(out), *given, str(transcript)]) == 0
        starts.append(json.loads(out.read_text(encoding="utf-8"))["courses"][0]["turns"][0]["start"])
    assert starts[1] == starts[2] == starts[0] + len(ChatFormat(build_tokenizer()).answer_ids("glad"))
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "none.json"), "--chat-template-kwargs", "glad", str(transcript)])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A capping_config.pt whose one experiment caps layers 1 and 2."""
    made = build_floor(tau=1.0)
    vectors = {
        f"v{i}": {"vector": -3 * v, "layer": layer}
        for i, (layer, v) in enumerate(zip(made.layers, made.directions, strict=True))
    }
    steps = [{"vector": f"v{i}", "cap": -1.0} for i in range(2)]
    torch.save(
        {"vectors": vectors, "experiments": [{"id": "layers_1:3-p0.25", "interventions": steps}]}, tmp_path / "c.pt"
    )
    return tmp_path / "c.pt"


def test_the_command_takes_a_published_cap_and_layers(
    model_folder: Callable[[str], Path], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transcript, out = write(tmp_path / "talk.json", TALK), tmp_path / "out.json"
    given = ["project", "--model", str(model_folder("llama")), "--floor", str(published), "--json", str(out)]

    def read(*more: str) -> Any:
        assert main([*given, *more, str(transcript), "--quiet"]) == 0
        return json.loads(out.read_text(encoding="utf-8"))["courses"][0]

    both = read("--experiment", "layers_1:3-p0.25", "--capped")
    wanted = project_transcript(
        build_model("llama"), ChatFormat(build_tokenizer()), build_floor(tau=1.0), TALK, capped=True
    )
    assert both["unit"] == "projection", "the file has no sigma, so there is no z"
    assert both["layers"] == [1, 2] and both["floor"] == pytest.approx(1.0) and both["capped"]
    assert both["turns"][2]["layers"] == pytest.approx(wanted.turns[2].layers, abs=0.1)
    one = read("--experiment", "layers_1:3-p0.25", "--layers", "2")
    assert one["layers"] == [2]
    Axis(torch.eye(LAYERS, HIDDEN)).save(tmp_path / "axis.safetensors")
    given[4] = str(tmp_path / "axis.safetensors")
    assert read("--layers", "0-2")["layers"] == [0, 1, 2]
    capsys.readouterr()
    wrong = {
        ("--layers", "3-5"): "floor layer 4 is beyond the model",
        ("--experiment", "x"): "only a capping_config.pt has experiments",
    }
    for more, says in wrong.items():
        assert main([*given, *more, str(transcript)]) == 2 and says in " ".join(capsys.readouterr().err.split())
    given[4] = str(published)
    assert main([*given, str(transcript)]) == 2 and "--experiment on the command line" in " ".join(
        capsys.readouterr().err.split()
    )
    experiment = ("--experiment", "layers_1:3-p0.25")
    assert main([*given, *experiment, "--layers", "0-1", str(transcript)]) == 2
    assert "the floor lies at [1, 2]" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([*given, "--layers", "9-3", str(transcript)])
    assert caught.value.code == 2 and "ends before it begins" in capsys.readouterr().err


def test_a_floor_that_hardly_acts_or_fits_another_model_is_told_before_the_weights(
    model_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transcript, path = write(tmp_path / "talk.json", TALK), tmp_path / "floor.safetensors"
    model = str(model_folder("llama"))
    dataclasses.replace(build_floor(tau=-1e3), metadata={"firing_fraction": 0.01}).save(path)
    project_command(model, path, transcript)
    assert "this floor fires on 1.0 % of drift" in caplog.text
    assert "no token of an answer lies below this floor" in caplog.text
    (tmp_path / "without").mkdir()
    for file in Path(model).glob("*.json"):
        (tmp_path / "without" / file.name).write_bytes(file.read_bytes())
    build_floor(hidden=16).save(path)
    with pytest.raises(UserError, match="width 16, the model 32"):
        project_command(str(tmp_path / "without"), path, transcript)


def test_floors_and_axes_are_told_apart(floor: Floor, tmp_path: Path) -> None:
    axis = Axis(torch.eye(LAYERS, HIDDEN))
    floor.save(tmp_path / "floor.safetensors")
    axis.save(tmp_path / "axis.safetensors")
    torch.save({"axis": torch.eye(LAYERS, HIDDEN)}, tmp_path / "axis.pt")
    assert isinstance(load_instrument(tmp_path / "floor.safetensors"), Floor)
    assert isinstance(load_instrument(tmp_path / "axis.safetensors"), Axis)
    assert isinstance(load_instrument(tmp_path / "axis.pt"), Axis)
