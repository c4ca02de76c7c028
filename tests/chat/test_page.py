"""The chat page: the arms' answers and heights, what the command refuses, and the page in a real browser."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from conftest import CHATML, build_floor, build_model, build_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trimtab.axis import Floor, UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.sampling import SamplingOptions
from trimtab.chat.arms import ARMS, ChatAnswer, ChatArms, Dialogue, DialogueTurn, open_arms
from trimtab.chat.command import Sources, about, find_sources
from trimtab.chat.serving import stays_here
from trimtab.chat.view import column_html, heights_plot, meter_html, scale_of, words
from trimtab.cli.main import main
from trimtab.eval.answers.ruler import above_floor, above_floor_by_layer
from trimtab.pipeline.run import open_run
from trimtab.recipes.loader import recipe_of
from trimtab.recipes.schema import ModelSection

OPTIONS = SamplingOptions(max_new_tokens=12, temperature=1.0)


def chat_arms(form: ChatFormat, floor: Floor, **changes: Any) -> ChatArms:
    """Base, and another tiny model in the place of the tuned weights."""
    models = [build_model("llama", seed=seed, **changes) for seed in (0, 1)]
    weights = {
        name: (lambda model=model: contextlib.nullcontext(model))
        for name, model in zip(("base", "tuned"), models, strict=True)
    }
    return ChatArms(weights, form, floor)


@pytest.fixture
def arms(form: ChatFormat) -> ChatArms:
    return chat_arms(form, build_floor(tau=2.0))


def said(arms: ChatArms, talk: Dialogue, user: str, **rest: Any) -> Dialogue:
    """The conversation after one more turn."""
    return list(arms.answer(talk, user, options=OPTIONS, **rest))[-1]


def texts(talk: Dialogue) -> list[str]:
    return [turn.answers[arm].text for turn in talk.turns for arm in ARMS]


def test_a_turn_is_answered_arm_after_arm_and_the_cap_holds_every_layer(arms: ChatArms) -> None:
    steps = list(arms.answer(Dialogue(), "Who are you?", options=OPTIONS, system="You are a ghost.", seed=3))
    whole = [[arm for arm, answer in step.turns[0].answers.items() if answer.whole] for step in steps]
    assert list(dict.fromkeys(map(tuple, whole))) == [(), ("base",), ("base", "base+cap"), ARMS]
    answers = steps[-1].turns[0].answers
    assert len({answer.text for answer in answers.values()}) == 3
    for answer in answers.values():
        assert answer.height == pytest.approx(sum(answer.by_layer) / 2, abs=1e-6)
    assert min(answers["base+cap"].by_layer) >= -1e-5
    assert answers["base"].height is not None and answers["base"].height < -0.1  # the floor acts


def test_an_answer_grows_word_by_word_into_the_whole_one(arms: ChatArms) -> None:
    steps = [
        step.turns[0].answers["base"]
        for step in arms.answer(Dialogue(), "Who?", options=OPTIONS)
        if step.turns[0].answers
    ]
    growing = [answer for answer in steps if not answer.whole]
    final = steps[-1]
    assert len(growing) >= 2 and all(final.text.startswith(answer.text.rstrip("\ufffd")) for answer in growing)
    lengths = [len(answer.text) for answer in growing]
    assert lengths == sorted(set(lengths)) and {answer.height for answer in growing} == {None}
    so_far = Dialogue((DialogueTurn("Who?", {"base": growing[0]}),))
    assert "is answering" in column_html(so_far, "base") and "waits" in column_html(so_far, "base+cap")
    assert "no answer yet" in meter_html(so_far, "base", (5, 6)) and heights_plot(so_far).data[0].y == (None,)


def test_a_fault_while_an_answer_is_said_is_raised_and_the_next_turn_goes_on(
    arms: ChatArms, monkeypatch: pytest.MonkeyPatch
) -> None:
    with arms._weights["base"]() as model:
        forward, calls = model.forward, iter(range(100))

        def breaks(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        said(arms, Dialogue(), "Who are you?")
    assert set(said(arms, Dialogue(), "Who are you?").turns[0].answers) == set(ARMS)


def test_the_height_is_in_sigma_above_tau() -> None:
    floor = dataclasses.replace(build_floor(), tau=torch.tensor([2.0, -1.0]), sigma=torch.tensor([2.0, 4.0]))
    means = torch.stack([floor.directions * torch.tensor([[3.0], [5.0]]), floor.directions * float("nan")])[:, None]
    means = means.reshape(2, 2, -1)  # [n, L, D]
    torch.testing.assert_close(above_floor_by_layer(floor, means)[0], torch.tensor([0.5, 1.5]))
    height, empty = above_floor(floor, means).tolist()
    assert height == pytest.approx(1.0) and empty != empty


def test_the_same_seed_gives_the_same_answers_and_a_turn_is_taken_back_exactly(arms: ChatArms) -> None:
    first = said(arms, Dialogue(), "Who are you?")
    second = said(arms, first, "And the sea?")
    assert second.take_back() == first and first.take_back() == Dialogue() == Dialogue().take_back()
    assert said(arms, second.take_back(), "And the sea?") == second
    assert texts(said(arms, Dialogue(), "Who are you?", seed=1)) != texts(first)
    assert texts(said(arms, Dialogue(), "Who are you?", system="You are a pirate.")) != texts(first)


def test_each_arm_goes_on_from_its_own_history(arms: ChatArms) -> None:
    first = said(arms, Dialogue(), "Who are you?")
    second = said(arms, first, "And the sea?")
    (turn,) = first.turns
    other = ChatAnswer("The ships come and go.", 0.0, (0.0, 0.0), True)
    changed = said(arms, Dialogue((DialogueTurn(turn.user, {**turn.answers, "tuned": other}),)), "And the sea?").turns[
        1
    ]
    assert changed.answers["base"] == second.turns[1].answers["base"]
    assert changed.answers["base+cap"] == second.turns[1].answers["base+cap"]
    assert changed.answers["tuned"] != second.turns[1].answers["tuned"]
    prompt = first.prompt("tuned", "And the sea?", "You are a ghost.")
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[2]["content"] == turn.answers["tuned"].text


def test_two_pages_may_ask_at_the_same_time(arms: ChatArms) -> None:
    alone = said(arms, Dialogue(), "Who are you?")
    found: list[Dialogue] = []
    threads = [threading.Thread(target=lambda: found.append(said(arms, Dialogue(), "Who are you?"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 3


def test_what_cannot_be_answered_is_told_before_anything_is_sampled(form: ChatFormat) -> None:
    arms = chat_arms(form, build_floor(), max_position_embeddings=64)
    assert arms.context == 64
    talk = Dialogue()
    with pytest.raises(UserError, match="together the model takes 64"):  # noqa: PT012 - the fault comes after some turns
        while len(talk.turns) < 9:
            talk = said(arms, talk, "Hello")
    assert talk.turns and set(talk.turns[-1].answers) == set(ARMS)
    with pytest.raises(UserError, match="empty"):
        next(arms.answer(talk, " \n", options=OPTIONS))
    once: Any = build_tokenizer(
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    )
    arms = chat_arms(ChatFormat(once), build_floor())
    with pytest.raises(UserError, match="one turn only"):
        next(arms.answer(said(arms, Dialogue(), "Hello"), "And now?", options=OPTIONS))


# Files as the command takes them.


@dataclasses.dataclass(frozen=True)
class Files:
    base: Path
    adapter: Path
    merged: Path
    floor: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    found = Files(folder / "base", folder / "adapter", folder / "merged", folder / "floor.safetensors")
    build_model("llama").save_pretrained(found.base)
    peft: Any = get_peft_model(
        build_model("llama"), LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    )
    peft.save_pretrained(found.adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(found.base)
    PeftModel.from_pretrained(model, str(found.adapter)).merge_and_unload().save_pretrained(found.merged)
    for target in (found.base, found.merged):
        build_tokenizer().save_pretrained(target)
    build_floor(tau=1.0).save(found.floor)
    return found


def section(folder: Path) -> ModelSection:
    return ModelSection(name=str(folder), dtype="float32", device="cpu")


def test_an_adapter_and_the_same_weights_whole_answer_alike(files: Files) -> None:
    talks = [
        said(open_arms(section(files.base), str(tuned), files.floor), Dialogue(), "Who are you?")
        for tuned in (files.adapter, files.merged)
    ]
    assert texts(talks[0]) == texts(talks[1]) and talks[0].turns[0].answers["base"] == talks[1].turns[0].answers["base"]
    assert talks[0].turns[0].answers["tuned"].text != talks[0].turns[0].answers["base"].text


def test_what_does_not_belong_together_is_refused(files: Files, tmp_path: Path) -> None:
    build_floor((1, 9)).save(tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"deep\.safetensors.*layer 9"):
        open_arms(section(files.base), str(files.adapter), tmp_path / "deep.safetensors")
    build_model("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    build_floor(hidden=64).save(tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="does not go on"):
        open_arms(section(tmp_path / "wide"), str(files.adapter), tmp_path / "wide.safetensors")


def test_a_published_cap_serves_as_the_floor_and_some_of_its_layers(files: Files, tmp_path: Path) -> None:
    floor, path = build_floor(tau=1.0), tmp_path / "capping_config.pt"
    vectors = {
        str(layer): {"vector": -v, "layer": layer} for layer, v in zip(floor.layers, floor.directions, strict=True)
    }
    steps = [{"vector": name, "cap": -1.0} for name in vectors]
    torch.save({"vectors": vectors, "experiments": [{"id": "x", "interventions": steps}]}, path)
    ours, theirs = (
        said(open_arms(section(files.base), str(files.adapter), *given), Dialogue(), "Who are you?")
        for given in ((files.floor,), (path, "x"))
    )
    assert texts(ours) == texts(theirs)
    some = open_arms(section(files.base), str(files.adapter), path, "x", layers=[2]).floor
    assert some.layers == (2,) and torch.allclose(some.directions, floor.directions[1:])
    with pytest.raises(UserError, match=r"the floor lies at \[1, 2\]"):
        open_arms(section(files.base), str(files.adapter), files.floor, layers=[3])


def make_run(folder: Path, files: Files, **evaluation: Any) -> Path:
    """A run folder as training leaves it."""
    sections = {"model": {"name": str(files.base)}, "train": {"max_steps": 1}, "eval": evaluation}
    run = open_run(recipe_of(sections, "x"), output_dir=str(folder))
    shutil.copy(files.floor, run.variant(control=False).floor_path)
    return run.folder


def test_the_newest_trained_run_is_found(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        shutil.copytree(files.adapter, make_run(tmp_path / "runs" / name, files) / "adapter")
        stamp = time.time() - 1000 * age
        os.utime(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors", (stamp, stamp))
    make_run(tmp_path / "runs" / "untrained", files)
    found = find_sources(None)
    assert found == Sources(ModelSection(name=str(files.base)), "runs/new/adapter", Path("runs/new/floor.safetensors"))
    with pytest.raises(UserError, match="no adapter yet"):
        find_sources(tmp_path / "runs" / "untrained")
    elsewhere = make_run(tmp_path / "elsewhere", files, tuned=str(files.merged))
    assert find_sources(elsewhere).tuned == str(files.merged)
    given = find_sources(None, base="M", tuned="T", floor="F", template_kwargs={"enable_thinking": False})
    assert given.base.chat_template_kwargs == {"enable_thinking": False}
    (elsewhere / "floor.safetensors").unlink()
    with pytest.raises(UserError, match="no floor yet"):
        find_sources(elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "make demo"),
        (["nowhere"], "not a run folder"),
        (["--base", "M", "--floor", "F"], "--tuned is not given"),
        (["somewhere", "--tuned", "T"], "both a run folder, 'somewhere', and --tuned"),
        (["somewhere", "--chat-template-kwargs", "a=1"], "a run's recipe says what its chat template is given"),
        (["--experiment", "x"], "no --floor is given"),
        (["--host", "192.0.2.1"], "can't be served at 192.0.2.1"),
        (["--port", "70000"], "port 70000"),
    ],
)
def test_a_wrong_command_is_exit_code_2_with_a_remedy(
    given: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs.package("gradio", get='pip install "trimtab[chat]"')
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *given, "--no-browser"]) == 2
    printed = capsys.readouterr().err
    assert told in printed and "remedy" in printed


def test_the_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--help"])
    assert ended.value.code == 0
    assert "trimtab chat" in capsys.readouterr().out.split("example:")[1]


@pytest.mark.slow
def test_a_taken_port_and_a_missing_gradio_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs.package("gradio", get='pip install "trimtab[chat]"')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["chat", "--port", str(taken.getsockname()[1])]) == 2
    assert "a port that is free" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)  # as where it is not installed
    assert main(["chat"]) == 2
    assert 'pip install "trimtab[chat]"' in capsys.readouterr().err


# What the page shows.


def answered(**heights: float | None) -> Dialogue:
    answers = {
        arm.replace("_", "+"): ChatAnswer("<b>bread</b>", height, () if height is None else (height, height + 1), True)
        for arm, height in heights.items()
    }
    return Dialogue((DialogueTurn("<i>hello</i>", answers),))


def test_heights_have_sign_unit_and_words() -> None:
    assert words(-1.104) == "−1.10 sigma, below the floor"
    assert words(0.42) == "+0.42 sigma, above the floor"
    assert words(-0.001) == words(0.001) == "0.00 sigma, at the floor"
    talk = answered(base=-2.4, base_cap=0.1, tuned=None)
    assert scale_of(Dialogue()) == 2 and scale_of(talk) == 3
    meters = {arm: meter_html(talk, arm, (5, 6)) for arm in ARMS}
    assert 'class="meter below"' in meters["base"] and 'aria-valuenow="-2.400"' in meters["base"]
    assert "left:10.00%" in meters["base"] and "−2.40 (layer 5) to −1.40 (layer 6)" in meters["base"]
    assert 'class="meter above"' in meters["base+cap"] and 'aria-valuemin="-3"' in meters["base+cap"]
    assert "no tokens to measure" in meters["tuned"] and "no answer yet" in meter_html(Dialogue(), "base", (5, 6))
    drawn = heights_plot(talk)
    assert [trace.y for trace in drawn.data] == [(-2.4,), (0.1,), (None,)]


def test_text_is_escaped_and_an_arm_that_is_to_answer_is_named() -> None:
    talk = answered(base=0.5)
    assert "&lt;b&gt;bread&lt;/b&gt;" in column_html(talk, "base") and "&lt;i&gt;hello" in column_html(talk, "base")
    assert "is answering" in column_html(talk, "base+cap") and "waits" in column_html(talk, "tuned")


def test_the_page_says_who_can_read_along() -> None:
    floor = build_floor((1, 2, 3, 6))
    sources = Sources(ModelSection(name="a<b"), "adapter", Path("f"))
    told = about(sources, floor, "127.0.0.1")
    assert "a&lt;b" in told and "layers 1–3, 6" in told and "stay on this machine" in told
    assert "stay on this machine" not in about(sources, floor, "0.0.0.0") and stays_here("localhost")
    assert stays_here("::1") and not stays_here("example.org")


@pytest.fixture
def served(files: Files, tmp_path: Path) -> Iterator[str]:
    """The real command on tiny models; its page's address. Ctrl+C ends it."""
    needs.package("gradio", get='pip install "trimtab[chat]"')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "trimtab.cli.main", "chat", "--base", str(files.base), "--tuned", str(files.adapter),
        "--floor", str(files.floor), "--no-browser", "--port", str(port),
    ]  # fmt: skip
    # a proxy that is not there: neither Gradio's check of itself nor the page may go through one
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment,
            text=True,
            # a shell's background job ignores Ctrl+C, and its children with it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        until = time.monotonic() + 120
        while "page: " not in log.read_text() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        found = re.search(r"page: (\S+)", log.read_text())
        assert found, log.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(timeout=30)
        finally:
            process.kill()
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]  # nothing of the talk is kept


@pytest.mark.slow
def test_a_real_browser_talks_takes_back_and_starts_again(browser: Any, served: str) -> None:
    from playwright.sync_api import expect

    asked: list[str] = []
    faults: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.goto(served)
    box, send, answers = page.locator("#message textarea"), page.locator("#send"), page.locator(".talk .answer")
    expect(box).to_be_focused()
    for setting in ("analytics_enabled", "run_history"):
        assert page.evaluate(f"window.gradio_config.{setting}") is False
    page.get_by_role("button", name="ghost", exact=True).click()
    expect(page.locator("#system textarea")).to_have_value(re.compile("ghost"))
    page.get_by_label("Longest answer").first.fill("16")

    hostile = "${7*7} {{value}} <img src=x onerror=alert(1)>"
    # tiny models may have answered before one looks, so the page itself remembers
    page.evaluate(
        "() => new MutationObserver(() => { window.wasOff ||= document.querySelector('#send').disabled; })"
        ".observe(document.body, {attributes: true, childList: true, subtree: true})"
    )
    box.fill(hostile)
    box.press("Enter")
    expect(answers).to_have_count(3)
    expect(send).to_be_enabled()
    assert page.evaluate("window.wasOff") is True
    expect(page.locator(".talk .said").first).to_contain_text(hostile)
    for meter in page.locator(".meter .reading").all():
        expect(meter).to_have_text(re.compile(r"^[−+]?\d\.\d\d sigma (above|below|at) the floor$"))
    expect(page.locator("#plot .js-plotly-plot .scatterlayer path.point")).to_have_count(3)
    expect(page.locator("#plot .js-plotly-plot")).to_contain_text("the floor")
    expect(box).to_have_value("")
    expect(box).to_be_focused()
    first = page.locator(".talk").all_inner_texts()

    box.fill("And the sea?")
    box.press("Enter")
    expect(answers).to_have_count(6)
    expect(send).to_be_enabled()
    page.locator("#back").click()
    expect(answers).to_have_count(3)
    expect(box).to_have_value("And the sea?")
    assert page.locator(".talk").all_inner_texts() == first

    box.fill("far too long " * 60)  # the tiny model takes 512 tokens
    send.click()
    expect(page.locator("#notice")).to_contain_text("together the model takes 512")
    expect(box).to_have_value("far too long " * 60)
    assert page.locator(".talk").all_inner_texts() == first

    page.locator("#again").click()
    expect(answers).to_have_count(0)
    expect(page.locator("#notice")).to_have_text("")
    expect(page.locator("#back")).to_be_disabled()
    page.close()
    assert not faults
    assert not [url for url in asked if not url.startswith((served, "data:", "blob:"))]
