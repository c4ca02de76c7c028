"""Capability: the rules one by one, and lm-eval itself on a tiny model, with and without the cap."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_arms, build_floor, build_model
from lm_eval.models.huggingface import HFLM
from template_families import family_tokenizer, own_template
from test_sampling import scripted
from tokenizers.processors import TemplateProcessing

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers.arms import Arms
from trimtab.eval.measures.capability import _first_metric, _run, _scores, measure_capability
from trimtab.eval.measures.capability_tasks import PAPER, Task, tasks_of
from trimtab.eval.measures.instruction_rules import CHECKS, follows
from trimtab.recipes.data import FOLDER

KEPT_AND_BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "max_words", "n": 3}, "two small words", "these are four words"),
    ({"kind": "min_words", "n": 3}, "It's well-made bread", "no bread"),
    ({"kind": "includes", "words": ["Oven", "bread"]}, "Bread from the oven.", "Breadth of ovens"),
    ({"kind": "excludes", "words": ["oven"]}, "Ovens are many.", "The oven!"),
    ({"kind": "bullets", "n": 2}, "Here:\n- one\n* two", "- one\n**two**"),
    ({"kind": "numbered", "n": 2}, "Plan:\n1. one\n2. two", "1. one\n3. two"),
    ({"kind": "ends_with", "text": "Good night."}, "Sleep. Good night.", "Good night. Sleep."),
    ({"kind": "starts_with", "text": "Dear"}, "  Dear Anna", "My dear"),
    ({"kind": "lowercase"}, "all small, 3 of them", "One capital"),
    ({"kind": "lowercase"}, "a", "123"),
    ({"kind": "uppercase"}, "LOUD!", "LOUd"),
    ({"kind": "one_line"}, "one line", "two\nlines"),
    ({"kind": "json_keys", "keys": ["a", "b"]}, '```json\n{"a": 1, "b": 2}\n```', '{"a": 1, "b": 2, "c": 3}'),
    ({"kind": "json_keys", "keys": ["a"]}, '{"a": []}', "a: 1"),
    ({"kind": "questions", "n": 2}, "Who? Why?", "Who?"),
    ({"kind": "no_digits"}, "three", "3"),
]


@pytest.mark.parametrize(("rule", "kept", "broken"), KEPT_AND_BROKEN)
def test_rules_by_example(rule: dict[str, Any], kept: str, broken: str) -> None:
    assert follows(kept, [rule]) and not follows(broken, [rule])
    assert not follows("  ", [rule])  # no answer follows nothing


def test_every_rule_of_the_task_is_known_and_tried_here() -> None:
    rows = read_jsonl(FOLDER / "capability" / "instructions.jsonl")
    used = {rule["kind"] for row in rows for rule in row["rules"]}
    assert used == set(CHECKS) == {rule["kind"] for rule, _, _ in KEPT_AND_BROKEN}
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows) == 80
    with pytest.raises(ValueError, match="rhymes"):
        follows("text", [{"kind": "rhymes"}])


def test_the_multiple_choice_task_is_balanced() -> None:
    rows = read_jsonl(FOLDER / "capability" / "everyday_choice.jsonl")
    assert len({row["question"] for row in rows}) == len(rows) == 240
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["answer"] == k for row in rows) for k in range(4)] == [60] * 4


def test_names_become_tasks() -> None:
    assert [task.name for task in tasks_of(["paper", "gsm8k", "arc_easy"], None)] == [*PAPER, "arc_easy"]
    assert [task.limit for task in tasks_of(["gsm8k", "instructions"], 7)] == [7, 7]
    assert tasks_of(["mmlu_pro"], 500)[0].limit == 100  # the paper's own, of each of its 14 subjects
    assert tasks_of(["ifeval"], None)[0].metric == "inst_level_strict_acc"


@pytest.fixture
def arms(form: ChatFormat, tmp_path: Path) -> Arms:
    return build_arms(form, tmp_path / "eval", SamplingOptions(max_new_tokens=8, batch_size=3))


@pytest.mark.slow
def test_own_tasks_in_every_arm_and_kept(arms: Arms) -> None:
    tasks = tasks_of(["everyday_choice", "instructions"], 8)
    choice, instructions = measure_capability(arms, tasks, batch_size=4, task_folder=None)
    assert choice.metric == "acc" and instructions.metric == "strict_acc"
    for scores in (choice, instructions):
        assert set(scores.by_arm) == set(arms.names) and len(scores.ids) == len(set(scores.ids)) == 8
        assert all(len(values) == 8 and set(values) <= {0.0, 1.0} for values in scores.by_arm.values())
    stamps = {path.name: path.stat().st_mtime_ns for path in arms.folder.iterdir()}
    again = measure_capability(arms, tasks, batch_size=4, task_folder=None)
    assert again == [choice, instructions]
    assert stamps == {path.name: path.stat().st_mtime_ns for path in arms.folder.iterdir()}
    longer = measure_capability(arms, tasks_of(["everyday_choice"], 9), batch_size=4, task_folder=None)
    assert len(longer[0].ids) == 9


@pytest.mark.slow
def test_a_task_of_the_users_own_sees_the_cap(arms: Arms, tmp_path: Path) -> None:
    """The score is the log-likelihood itself, so a cap that acts shows in every document."""
    documents = [{"id": str(i), "text": text} for i, text in enumerate(["bread", "the sea", "a ship"])]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    (folder / "utils.py").write_text("def score(doc, results):\n    return {'ll': results[0][0]}\n", encoding="utf-8")
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: 'Tell me about'\ndoc_to_target: '{{text}}'\n"
        "process_results: !function utils.score\n"
        "metric_list:\n  - metric: ll\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    scores = measure_capability(arms, [Task("mine", chat=False)], batch_size=2, task_folder=folder)[0]
    assert scores.metric == "ll" and len(scores.ids) == 3
    for one, other in (("base", "base+cap"), ("tuned", "tuned+cap"), ("base", "tuned")):
        assert all(a != b for a, b in zip(scores.by_arm[one], scores.by_arm[other], strict=True))


def test_prompts_are_the_chat_formats_and_answers_end_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through lm-eval itself: the template's arguments, nothing before its text, and an end that the template alone names."""
    tokenizer = family_tokenizer(own_template("qwen3"), eos="<|endoftext|>")
    post = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post  # adds a beginning to any text, as Llama's does
    form = ChatFormat(tokenizer, {"enable_thinking": False})
    model = build_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=2048)
    text, end = form.answer_ids("Arr"), form.tokenizer.convert_tokens_to_ids("<|im_end|>")
    arms = Arms({"base": lambda: contextlib.nullcontext(model)}, form, build_floor(), tmp_path, SamplingOptions(), 0)
    asked: list[list[int]] = []
    said: list[list[int]] = []
    real = HFLM._model_generate

    def seen(self: Any, context: Any, **settings: Any) -> Any:
        output = real(self, context, **settings)
        asked.extend(row[row != tokenizer.pad_token_id].tolist() for row in context)
        said.extend(row[context.shape[1] :].tolist() for row in output)
        return output

    monkeypatch.setattr(HFLM, "_model_generate", lambda self, context, max_length, stop, **settings: seen(
        self, context, max_length=max_length, stop=stop, **settings
    ))  # fmt: skip
    with scripted(model, [*text, end, *text]):
        found = _run(arms, "base", tasks_of(["instructions"], 1)[0], 1, None)
    (row,) = read_jsonl(FOLDER / "capability" / "instructions.jsonl")[:1]
    prompt = form.prompt_ids(chat("", row["prompt"]))
    assert asked == [prompt]
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert said == [[*text, end]] and len(found["scores"]) == 1


@pytest.mark.slow
def test_what_is_kept_belongs_to_the_documents(arms: Arms, tmp_path: Path) -> None:
    """Multiple choice of three and of two: guessing scores their mean; other documents in the same file are scored anew."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"q": "Bread?", "choices": ["yes", "no", "maybe"], "answer": 0},
        {"q": "Sea?", "choices": ["yes", "no"], "answer": 1},
    ]
    (folder / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    for count in (1, 2):
        write_jsonl(folder / "rows.jsonl", rows[:count])
        (scores,) = measure_capability(arms, [Task("choice", chat=False)], batch_size=2, task_folder=folder)
        assert len(scores.ids) == count
    assert scores.task.chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_scores_that_are_no_mean_of_what_is_good_are_refused() -> None:
    known = [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "likelihood_diff", "aggregation": "mean", "higher_is_better": False},
    ]
    with pytest.raises(UserError, match="word_perplexity, likelihood_diff"):
        _first_metric({"configs": {"t": {"metric_list": known}}}, "t")
    good = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    assert _first_metric({"configs": {"t": {"metric_list": [*known, good]}}}, "t") == "acc"


def test_instructions_of_a_document_are_scores_of_their_own() -> None:
    """IFEval's inst_level accuracy is over all instructions, not over documents."""
    assert _scores([True, False, True]) == [1.0, 0.0, 1.0] and _scores(0.5) == [0.5]


@pytest.mark.slow
def test_a_task_that_is_not_there_names_the_key(arms: Arms) -> None:
    with pytest.raises(UserError, match="no_such_task") as caught:
        measure_capability(arms, [Task("no_such_task")], batch_size=2, task_folder=None)
    assert "eval.capability" in str(caught.value) and "everyday_choice" in str(caught.value)
