"""The stages after training: evaluate the arms, and write the report."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.axis import ActivationController, Axis, Floor, UserError
from trimtab.axis.calibration import spread
from trimtab.axis.chat import ChatFormat, chat
from trimtab.axis.extraction import DEFAULT, extract
from trimtab.axis.files import file_fingerprint, fingerprint, read_json, read_jsonl, write_json, write_jsonl, write_text
from trimtab.axis.judge import check_endpoint, scoring_judge
from trimtab.axis.machine import machine_facts
from trimtab.axis.models import EMBEDDED, Loaded
from trimtab.axis.progress import progress_bar
from trimtab.axis.replies import Missing
from trimtab.axis.scoring import SCORE_BATCH, persona_llr
from trimtab.eval.answers.arms import CONTROL, Answers, Arms, Item
from trimtab.eval.answers.boundary_files import load_boundary_file
from trimtab.eval.answers.inputs import check_inputs
from trimtab.eval.answers.reading import (
    Ruler,
    coloured,
    firing_fraction,
    llr_of,
    message_embeddings,
    read_means,
    teacher_forced,
)
from trimtab.eval.answers.replays import load_replays
from trimtab.eval.answers.weights import Weights, open_subjects
from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.measures.capability import measure_capability, tasks_of
from trimtab.eval.measures.durability import after
from trimtab.eval.measures.prediction import position_r2
from trimtab.eval.measures.pressure import Suite, jailbreaks, susceptibility
from trimtab.eval.measures.rerouting import components, probe_auc
from trimtab.eval.measures.simulated import LiveTurn, live_conversations, simulated_suite, spread_out, user_model
from trimtab.eval.report.assemble import Measured, build_report
from trimtab.eval.report.card import model_card
from trimtab.eval.report.page import load_report, render_html, write_report
from trimtab.eval.schema import ArmAnswer, Estimate, Report, Rerouting, Transcript, Turn
from trimtab.pipeline.loading import Prepared, sampling_options
from trimtab.pipeline.run import STARTS, Run
from trimtab.pipeline.subject import Subject, check_subject, find_subject, trained_subject, tuned_subject
from trimtab.recipes import data
from trimtab.recipes.data import BoundaryProbe
from trimtab.recipes.schema import EvalSection, deciding

log = logging.getLogger("trimtab")

REPLIES, UNSCORED = "judge.jsonl", "unscored.jsonl"  # in eval/: what the judge replied, and what it gave no score for


def eval_stage(run: Run, prepared: Prepared | None = None) -> dict[str, Any]:
    """Evaluate base, base+cap, tuned, tuned+cap, and the control where there is one; writes ``report.json``.

    Answers are kept arm by arm in ``eval/``, so a killed evaluation goes on where it was.

    Raises:
        UserError: if there is no adapter yet, or ``eval.tuned`` is not a model tuned from this base.
    """
    prepared = prepared or Prepared(run)
    check_files(run)
    subjects = _subjects(run)
    _same_weights(run, subjects)

    def work() -> dict[str, Any]:
        loaded, form = prepared()
        upon_tuned = [after("tuned", tuning.name) for tuning in run.recipe.eval.durability]
        return evaluate(run, loaded.facts, open_subjects(run.recipe.model, loaded, subjects, upon_tuned), form)

    inputs = [
        deciding(run.recipe.eval.model_dump()),
        *(subject.fingerprint() for subject in subjects.values()),
        *_given_files(run).values(),
    ]
    record = run.stage_record("eval")
    if record is not None and record["key"] == fingerprint(inputs) and _scored_since(run):
        (run.folder / "stages" / "eval.json").unlink()
    return run.stage("eval", inputs, work, remedy="delete this file to evaluate anew; answers that still fit are kept")


def _scored_since(run: Run) -> bool:
    """Whether the judge, asked again, scores an answer that had no score when the evaluation was recorded."""
    settings, path = run.recipe.eval.judge, run.folder / "eval" / UNSCORED
    if settings is None or settings.endpoint is None or not path.exists():
        return False
    rows = read_jsonl(path)
    try:
        judge = scoring_judge(settings.model_dump(), path.parent / REPLIES, "eval.judge", title="judge")
        scores = [
            score
            for highest in sorted({row["highest"] for row in rows})
            for score in judge([row["prompt"] for row in rows if row["highest"] == highest], highest)
        ]
    except UserError as error:  # what was measured stands; it is asked once more the next time
        log.warning("eval: %d answers are still without a score: %s", len(rows), error)
        return False
    found = sum(not isinstance(score, Missing) for score in scores)
    log.info("eval: %d of %d answers without a score have one now", found, len(rows))
    return found > 0


def check_files(run: Run) -> None:
    """Look at what the evaluation will need (tuned weights, files, keys, packages): what is wrong is told before anything heavy.

    Raises:
        UserError: naming the file and the row, or the key.
    """
    section = run.recipe.eval
    if section.tuned is not None:
        check_subject(run.recipe.model, find_subject(section.tuned))
    if section.capability and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "capability needs lm-eval", key="eval.capability", remedy="pip install 'trimtab[eval]', or set it to []"
        )
    check_inputs(run.recipe)
    if run.stage_record("eval") is None:
        for key, model in (("eval.judge", section.judge), ("eval.user", section.user)):
            check_endpoint(model.model_dump() if model else None, key)


def _given_files(run: Run) -> dict[str, str]:
    """Key -> fingerprint of the user's own files that the evaluation reads."""
    section = run.recipe.eval
    named = {"eval.conversations_file": section.conversations_file, "eval.boundary_file": section.boundary_file}
    return {key: file_fingerprint(path) for key, path in named.items() if path is not None and Path(path).is_file()}


def _subjects(run: Run) -> dict[str, Subject]:
    """The weights behind ``tuned``, behind ``control`` where there is one, and behind each further fine-tuning."""
    section = run.recipe.eval
    found = {"tuned": tuned_subject(run)}
    if section.control:
        found[CONTROL] = trained_subject(run.variant(control=True), "control adapter", "trimtab train RECIPE")
    for tuning in section.durability:
        for start in STARTS:
            what = f"adapter that was tuned further on {tuning.name}"
            found[after(start, tuning.name)] = trained_subject(
                run.further(start, tuning.name), what, "trimtab eval RECIPE"
            )
    return found


def _same_weights(run: Run, subjects: dict[str, Subject]) -> None:
    """Refuse answers that are kept from other weights or another floor: they would be mixed with new ones."""
    path = run.folder / "eval" / "weights.json"
    found = {name: subject.fingerprint() for name, subject in subjects.items()}
    found["floor"] = file_fingerprint(run.variant(control=False).floor_path)
    kept = read_json(path) if path.exists() else {}
    if all(found[name] == kept[name] for name in kept.keys() & found.keys()):
        if found.keys() - kept.keys():  # a control or a further fine-tuning may come later
            write_json(path, kept | found)
    else:
        raise UserError(
            "the answers kept here were given by other weights, or under another floor",
            file=path.parent,
            remedy="delete this folder and stages/eval.json to evaluate anew (and durability/ with its stages, if there is one)",
        )


def evaluate(run: Run, model_facts: dict[str, Any], weights: Weights, form: ChatFormat) -> dict[str, Any]:
    """Measure everything and write ``report.json`` and its page."""
    section = run.recipe.eval
    floor = Floor.load(run.variant(control=False).floor_path)
    folder = run.folder / "eval"
    arms = Arms(
        weights, form, floor, folder, sampling_options(section.sampling), section.seed, tuned_cap=section.tuned_cap
    )
    axis, reextracted = Axis.load(run.axis_path), _reextract(run, arms, model_facts)
    cosines = {arm: cosine_rows(axis, again) for arm, again in reextracted.items()}

    roles, defaults = role_items(section.roles, section.questions), default_items(section.roles, section.questions)
    on_roles = {arm: arms.answers("roles", roles, arm) for arm in arms.names}
    on_default = {arm: arms.answers("default", defaults, arm) for arm in arms.names}
    further = {after(start, tuning.name) for tuning in section.durability for start in STARTS}
    on_further = {arm: arms.answers("roles", roles, arm) for arm in sorted(further)}
    benign = benign_items(section.benign)
    on_benign = {arm: arms.answers("benign", benign, arm) for arm in arms.names}
    probes = data.professional_probes(section.professional)
    pro_items = [Item(row["id"], row["role"], chat(row["system"], row["user"])) for row in probes]
    on_pro = {arm: arms.answers("professional", pro_items, arm) for arm in arms.names} if pro_items else {}
    conversations = conversations_of(section)
    talk_items = conversation_items(conversations)
    scripts = [talk.turns[: section.turns] for talk in conversations]
    on_talks = (
        {arm: arms.conversations("conversations", talk_items, scripts, arm) for arm in arms.names} if scripts else {}
    )

    cases = data.case_studies(section.case_studies) if section.case_studies else []
    case_items = [Item(case.id, case.id, chat(case.system, "")[:-1]) for case in cases]
    on_cases = (
        {arm: arms.conversations("cases", case_items, [case.turns for case in cases], arm) for arm in arms.names}
        if cases
        else {}
    )

    rulers = rulers_of(run, floor, reextracted, on_roles["base"], on_default["base"])
    main = rulers["training"]
    users = data.simulated_users(section.simulated_users) if section.user is not None else []
    simulated = _simulated(run, arms, users)
    pressure = _pressure(run, arms)
    _keep_unscored(arms.folder / UNSCORED, pressure)
    if users:
        pressure.extend(simulated_suite(users, simulated, main, floor))
    on_simulated = {arm: spread_out(turns, len(users)) for arm, turns in simulated.items()}
    talk_ids = [talk.id for talk in conversations]
    user_ids = [f"simulated/{i}" for i in range(len(users))]
    measured = Measured(
        arms=arms.names,
        roles=roles,
        defaults=defaults,
        benign=benign,
        professional=probes,
        conversations=conversations,
        on_roles=on_roles,
        on_default=on_default,
        on_professional=on_pro,
        on_talks=on_talks,
        floor=floor,
        rulers=rulers,
        on_further=on_further,
        further=[(tuning, _further_facts(run, tuning.name)) for tuning in section.durability],
        llr=_llr(section, arms, roles, {**on_roles, **on_further}, defaults, on_default),
        llr_professional=llr_of(arms, on_pro),
        rerouting=_rerouting(run, arms, on_roles, on_default, roles, axis, cosines),
        foretold=_foretold(section, arms, main, [(talk_ids, on_talks), (user_ids, on_simulated)]),
        users=users,
        on_simulated=on_simulated,
        pressure=pressure,
        capability=measure_capability(
            arms,
            tasks_of(section.capability, section.capability_limit),
            batch_size=section.capability_batch,
            task_folder=Path(section.capability_folder) if section.capability_folder else None,
        ),
        drift_forced=teacher_forced(
            arms, on_roles["base+cap"], arms.readers, "base+cap", main,
            batch_size=SCORE_BATCH, title="KL to the capped self",
        ),
        benign_forced=teacher_forced(
            arms, on_benign["base"], arms.readers, "base", main,
            batch_size=SCORE_BATCH, title="benign text",
        ),
        default_forced=teacher_forced(
            arms, on_default["base"], arms.readers, "base", main,
            batch_size=SCORE_BATCH, title="default text",
        ),
        firing={arm: firing_fraction(arms, arm, on_roles["base"], batch_size=SCORE_BATCH) for arm in ("base", "tuned")},
        transcripts=[
            *_case_transcripts(arms, main, cases, on_cases),
            *_simulated_transcripts(arms, main, users, simulated),
            *_transcripts(run, arms, main, roles, on_roles, conversations, on_talks),
        ],
    )  # fmt: skip
    axis_facts = dict((run.stage_record("axis") or {"facts": {}})["facts"])
    axis_facts |= {f"cosine_reextracted_{arm}": row for arm, row in cosines.items()}
    report = build_report(
        measured,
        title=f"{run.recipe.model.name}: {run.loaded.name}",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        bootstrap=section.bootstrap,
        seed=section.seed,
        axis=axis_facts,
        floor=dict((run.stage_record("floor") or {"facts": {}})["facts"]),
        training=_training(run),
        repeat=_repeat(run, model_facts),
    )
    write_report(report, run.folder)
    return {"verdict": report.verdict.headline, "status": report.verdict.status}


def report_stage(run: Run) -> Path:
    """Write ``report.html`` and the model card from ``report.json``; returns the page's path.

    The card lies in the adapter's folder; of weights that were tuned elsewhere it is ``model_card.md`` in the run folder.

    Raises:
        UserError: if there is no ``report.json`` yet.
    """
    report = load_report(run.folder / "report.json")
    page = run.folder / "report.html"
    write_text(page, render_html(report))
    own = run.recipe.eval.tuned is None
    write_text(
        run.variant(control=False).adapter / "README.md" if own else run.folder / "model_card.md", card_of(run, report)
    )
    return page


def card_of(run: Run, report: Report) -> str:
    """The model card of what a run has evaluated."""
    elsewhere = run.recipe.eval.tuned
    facts = {
        "base_model": run.recipe.model.name,
        "license": EMBEDDED.get(run.recipe.model.name, {}).get("license", "other"),
        **({"recipe": run.loaded.name, "lora": run.recipe.lora} if elsewhere is None else {"tuned": elsewhere}),
    }
    return model_card(report, adapter_facts=facts, trained_here=elsewhere is None)


def role_items(roles: int, questions: int) -> list[Item]:
    """Held-out roles, ``questions`` held-out questions each; the role's system prompts take turns.

    Each role goes on in the list of questions where the one before it stopped, so that all of them are asked in the end: how much
    of a persona shows depends on the question more than on the role, and a figure from two questions would be about those two.
    """
    asked = data.questions("held_out")
    return [
        Item(
            f"{role.name}/{k}",
            role.name,
            chat(role.prompts[(number + k) % len(role.prompts)], asked[(number * questions + k) % len(asked)]),
        )
        for number, role in enumerate(data.roles("held_out", roles))
        for k in range(questions)
    ]


def default_items(roles: int, questions: int) -> list[Item]:
    """The same questions to the default Assistant: as many as there are roles, the neutral prompts taking turns."""
    asked, neutral = data.questions("held_out"), data.default_prompts()
    count = max(roles, questions)
    return [
        Item(f"default/{i}", f"default/{i}", chat(neutral[i % len(neutral)], asked[i % len(asked)]))
        for i in range(count)
    ]


def benign_items(count: int) -> list[Item]:
    """Held-out benign requests, without a system prompt."""
    prompts = data.benign_prompts("held_out", count)
    return [Item(f"benign/{i}", f"benign/{i}", chat("", prompt)) for i, prompt in enumerate(prompts)]


def conversation_items(conversations: Sequence[data.Conversation]) -> list[Item]:
    """An item a conversation, whose prompt is what stands before the first turn."""
    return [Item(talk.id, talk.id, list(talk.opening)) for talk in conversations]


def conversations_of(section: EvalSection) -> list[data.Conversation]:
    """The shipped conversations, or those of the user's file, of which what is left out is told."""
    if section.conversations_file is None:
        return data.conversations("held_out", section.conversations)
    there = load_replays(section.conversations_file)
    chosen = there[: section.conversations or None]
    longest = max(len(talk.turns) for talk in chosen)
    if len(chosen) < len(there):
        log.warning("the first %d of %d conversations are asked: raise eval.conversations", len(chosen), len(there))
    if longest > section.turns:
        log.warning("conversations go on to turn %d and are cut at eval.turns=%d", longest, section.turns)
    return chosen


def _reextract(run: Run, arms: Arms, model_facts: dict[str, Any]) -> dict[str, Axis]:
    """Axes extracted anew, from as few rollouts each, of the tuned model, of the base, and of the base under the cap.

    The base's shows the noise of so small an extraction; the capped base's, how far the axis turns where personas are held back
    by the hook. Roles and questions are those that the training axis began with; the seed is another, so that the base's is a
    second sample.
    """
    section, source = run.recipe.eval, run.recipe.axis
    size = [section.reextract_roles, section.reextract_questions, source.default_repeats, source.seed]
    of_size = fingerprint([size, source.sampling.model_dump()])[:8]  # the evaluation may be repeated with another
    found: dict[str, Axis] = {}
    for arm in ("tuned", "base", "base+cap") if section.reextract_roles else ():
        path = arms.path(f"axis_reextracted-{of_size}", arm, ".safetensors")
        if not path.exists():
            capped = arms.floor_of(arm) is not None
            with (
                arms.weights(arm) as model,
                ActivationController.of(model).capping(arms.floor, enabled=capped),
            ):
                extract(
                    Loaded(model, arms.form.tokenizer, model_facts),
                    arms.form,
                    data.roles("train", section.reextract_roles),
                    [],
                    data.questions("train", section.reextract_questions),
                    data.default_prompts(),
                    arms.path(f"reextraction-{of_size}", arm, ""),
                    options=sampling_options(source.sampling),
                    default_repeats=source.default_repeats,
                    seed=source.seed + 1,
                    title=f"axis extracted anew: {arm}",
                ).axis.save(path)
        found[arm] = Axis.load(path)
    return found


def cosine_rows(axis: Axis, other: Axis) -> list[float]:
    """Cosine of two axes at each layer, [n_layers]."""
    return [round(float(cosine), 4) for cosine in (axis.directions * other.directions).sum(-1)]


def rulers_of(
    run: Run, floor: Floor, reextracted: dict[str, Axis], roles: Answers, default: Answers
) -> dict[str, Ruler]:
    """A ruler along each direction: the training axis, the held-out one, those extracted anew. From the base's answers."""
    layers = list(floor.layers)
    pooled = torch.cat([roles.means, default.means])
    found = {"training": floor.directions}
    if run.held_out_axis_path.exists():
        found["held_out"] = Axis.load(run.held_out_axis_path).directions[layers]
    found |= {f"reextracted_{arm}": axis.directions[layers] for arm, axis in reextracted.items() if arm != "base+cap"}
    return {name: Ruler.of(directions, default.means, pooled) for name, directions in found.items()}


def _llr(
    section: EvalSection,
    arms: Arms,
    roles: list[Item],
    on_roles: dict[str, Answers],
    defaults: list[Item],
    on_default: dict[str, Answers],
) -> dict[str, Any]:
    """LLR of role answers per arm, and its own AUC: base role answers against the base's default answers to the same roles.

    The default answers are scored under role prompts in turn, so that both classes are scored the same way.
    """
    values: dict[str, Any] = {"arms": llr_of(arms, on_roles)}
    systems = [item.prompt[0] for item in roles]
    as_roles = [[systems[(i * 7) % len(systems)], item.prompt[-1]] for i, item in enumerate(defaults)]
    with arms.weights("base") as model:
        negative = persona_llr(
            model, arms.form, as_roles, [[item.prompt[-1]] for item in defaults], on_default["base"].texts,
            batch_size=SCORE_BATCH,
        )  # fmt: skip
    scored = [
        (value, item.cluster, in_role)
        for items, found, in_role in ((roles, values["arms"]["base"], True), (defaults, negative, False))
        for item, value in zip(items, found, strict=True)
        if value == value
    ]
    values["default"] = [value for value, _, in_role in scored if not in_role]
    labels = [in_role for _, _, in_role in scored]
    resample = ClusterBootstrap([cluster for _, cluster, _ in scored], section.bootstrap, section.seed)
    values["auc"] = resample.auc([value for value, _, _ in scored], labels) if len(set(labels)) == 2 else None
    return values


def _pressure(run: Run, arms: Arms) -> Suite:
    """Who the model says it is, and what it goes along with, under personas."""
    section = run.recipe.eval
    judge = (
        scoring_judge(section.judge.model_dump(), arms.folder / REPLIES, "eval.judge", title="judge")
        if section.judge
        else None
    )
    suite = susceptibility(arms, section.susceptibility_roles, judge)
    suite.extend(jailbreaks(arms, *boundary_probes_of(section), judge))
    return suite


def boundary_probes_of(section: EvalSection) -> tuple[list[BoundaryProbe], list[BoundaryProbe]]:
    """Requests at a boundary that should be declined, and harmless look-alikes that should be answered."""
    if section.boundary_file is not None:
        declined, answered = load_boundary_file(section.boundary_file)
        count = section.boundary_probes or None
        return declined[:count], answered[:count]
    if not section.boundary_probes:
        return [], []
    return data.boundary_probes(section.boundary_probes), data.lookalike_probes(section.boundary_probes // 2)


def _keep_unscored(path: Path, suite: Suite) -> None:
    """Keep what has no score beside the judge's replies: the same command asks for it again."""
    if not suite.unscored:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, [{**dataclasses.asdict(row), "why": row.why.value} for row in suite.unscored])
    log.warning(
        "eval: the judge gave no score for %d prompts (%s); the report says so, and the same command asks for them again",
        len(suite.unscored), path,
    )  # fmt: skip


def _rerouting(
    run: Run,
    arms: Arms,
    on_roles: dict[str, Answers],
    on_default: dict[str, Answers],
    roles: list[Item],
    axis: Axis,
    cosines: dict[str, list[float]],
) -> Rerouting | None:
    """Probe and components at the floor's deepest layer; the probe reads the rollouts behind the axis, one question for all."""
    section, layer = run.recipe.eval, arms.floor.layers[-1]
    rows = read_jsonl(run.rollouts_path) if run.rollouts_path.exists() else []
    half = section.probe_rows // 2
    by_question = sorted(rows, key=lambda row: (row["prompt"][-1]["content"], row["id"]))
    default = spread([row for row in by_question if row["role"] == DEFAULT], half)
    in_role = spread([row for row in by_question if row["role"] != DEFAULT], half)
    given = [*default, *in_role]
    answers = Answers(
        [row["completion"][0]["content"] for row in given], torch.empty(0), [row["prompt"] for row in given], []
    )
    questions = [row["prompt"][-1]["content"] for row in given]
    clusters = [f"default/{row['id']}" for row in default] + [row["role"] for row in in_role]
    probe = {}
    for arm in arms.readers if default and in_role else []:
        means = read_means(arms, arm, answers, batch_size=SCORE_BATCH, title=f"probe: {arm}")[:, -1]
        labels = [False] * len(default) + [True] * len(in_role)
        auc = probe_auc(means, labels, questions, clusters, bootstrap=section.bootstrap, seed=section.seed)
        if auc is not None:
            probe[arm] = auc
    found = components(
        axis,
        layer,
        {arm: answers.means[:, -1] for arm, answers in on_roles.items()},
        on_default["base"].means[:, -1],
        [item.cluster for item in roles],
        bootstrap=section.bootstrap,
        seed=section.seed,
    )
    within = {arm: round(statistics.mean(row[i] for i in arms.floor.layers), 4) for arm, row in cosines.items()}
    return Rerouting(layer=layer, probe=probe, components=found, cosines=within) if probe or found or within else None


def _foretold(
    section: EvalSection,
    arms: Arms,
    ruler: Ruler,
    talks: list[tuple[list[str], dict[str, list[Answers]]]],
) -> dict[str, Estimate]:
    """Arm -> R2 of the position of an answer in a conversation, from the user's message before it alone.

    Args:
        section: of the recipe.
        arms: the arms.
        ruler: what z is measured with.
        talks: sets of conversations: id of each, and arm -> turn by turn, the answers in all, with no prompt where one is over.
    """
    places = {
        arm: [
            (prompt[-1]["content"], z, talk)
            for ids, played in talks
            for turn in played.get(arm, [])
            for prompt, z, talk in zip(turn.prompts, ruler.z(turn.means), ids, strict=True)
            if prompt
        ]
        for arm in arms.names
    }
    messages = list(dict.fromkeys(message for rows in places.values() for message, _, _ in rows))
    if not messages:
        return {}
    embedded = dict(zip(messages, message_embeddings(arms, messages, batch_size=SCORE_BATCH), strict=True))
    found = {
        arm: position_r2(
            torch.stack([embedded[message] for message, _, _ in rows]),
            [z for _, z, _ in rows],
            [talk for _, _, talk in rows],
            bootstrap=section.bootstrap,
            seed=section.seed,
        )
        for arm, rows in places.items()
    }
    return {arm: r2 for arm, r2 in found.items() if r2 is not None}


def _transcripts(
    run: Run,
    arms: Arms,
    ruler: Ruler,
    roles: list[Item],
    on_roles: dict[str, Answers],
    conversations: list[data.Conversation],
    on_talks: dict[str, list[Answers]],
) -> list[Transcript]:
    shown = run.recipe.eval.transcripts
    talks = min(len(conversations), shown // 3)
    singles = min(len(roles), shown - talks)
    chosen = [k * len(roles) // singles for k in range(singles)]
    turns = len(on_talks[arms.names[0]]) if talks else 0
    found = [
        *(
            Transcript(
                id=roles[i].id,
                kind="role",
                system=roles[i].prompt[0]["content"],
                turns=[Turn(user=roles[i].prompt[-1]["content"], answers={})],
            )
            for i in chosen
        ),
        *(
            Transcript(
                id=talk.id,
                kind=talk.domain,
                system="\n\n".join(message["content"] for message in talk.opening),
                turns=[Turn(user=user, answers={}) for user in talk.turns[:turns]],
            )
            for talk in conversations[:talks]
        ),
    ]
    said = {
        arm: [
            *((on_roles[arm], i) for i in chosen),
            *(
                (on_talks[arm][k], i)
                for i, talk in enumerate(conversations[:talks])
                for k in range(len(talk.turns[:turns]))
            ),
        ]
        for arm in arms.names
    }
    return _filled(found, arms, ruler, said)


def _case_transcripts(
    arms: Arms, ruler: Ruler, cases: list[data.CaseStudy], on_cases: dict[str, list[Answers]]
) -> list[Transcript]:
    """Case studies in full: whoever reads the report should read them."""
    found = [
        Transcript(
            id=case.title,
            kind=f"case study: {case.id.replace('_', ' ')}",
            system=case.system,
            turns=[Turn(user=user, answers={}) for user in case.turns],
            note=case.what_to_watch,
        )
        for case in cases
    ]
    said = {
        arm: [(turns[k], i) for i, case in enumerate(cases) for k in range(len(case.turns))]
        for arm, turns in on_cases.items()
    }
    return _filled(found, arms, ruler, said) if found else []


def _simulated(run: Run, arms: Arms, users: list[data.SimulatedUser]) -> dict[str, list[LiveTurn]]:
    """Live conversations of every arm, each with its own user, who reacts to it."""
    section = run.recipe.eval
    if section.user is None or not users:
        return {}
    settings = section.user.model_dump()
    ask = user_model(settings, section.seed, arms.folder / "simulated-users.jsonl")
    return {
        arm: live_conversations(arms, users, section.simulated_turns, ask, arm, deciding(settings))
        for arm in arms.names
    }


def _simulated_transcripts(
    arms: Arms, ruler: Ruler, users: list[data.SimulatedUser], played: dict[str, list[LiveTurn]]
) -> list[Transcript]:
    """The first live conversation of each domain, arm by arm: the users say something else to each."""
    first = {user.domain: i for i, user in reversed(list(enumerate(users)))}
    found = []
    for domain, i in first.items():
        for arm, turns in played.items():
            own = [(turn, turn.going.index(i)) for turn in turns if i in turn.going]
            if own:
                transcript = Transcript(
                    id=f"{users[i].id}, {arm}",
                    kind=f"{domain} (simulated)",
                    system="",
                    turns=[Turn(user=turn.said[k], answers={}) for turn, k in own],
                    note=users[i].topic,
                )
                found += _filled([transcript], arms, ruler, {arm: [(turn.answers, k) for turn, k in own]})
    return found


def _filled(
    found: list[Transcript], arms: Arms, ruler: Ruler, said: dict[str, list[tuple[Answers, int]]]
) -> list[Transcript]:
    """Transcripts with each arm's answers, coloured: ``said`` holds, turn by turn, a set of answers and the place in it."""
    places = [turn for transcript in found for turn in transcript.turns]
    with progress_bar("colouring transcripts", len(said)) as bar:
        for arm, given in said.items():
            texts = [answers.texts[i] for answers, i in given]
            prompts = [answers.prompts[i] for answers, i in given]
            pieces = coloured(arms, arm, prompts, texts, ruler, batch_size=SCORE_BATCH)
            zs = ruler.z(torch.stack([answers.means[i] for answers, i in given])) if given else []
            for place, text, z, words in zip(places, texts, zs, pieces, strict=True):
                place.answers[arm] = ArmAnswer(text=text, z=round(z, 3) if z == z else 0.0, pieces=words)
            bar.advance(0, 1)  # type: ignore[arg-type]
    return found


def _further_facts(run: Run, tuning: str) -> dict[str, Any]:
    record = run.stage_record(run.further("tuned", tuning).stage_name)
    assert record is not None  # its adapter was found
    return dict(record["facts"])


def _training(run: Run) -> dict[str, Any]:
    variant = run.variant(control=False)
    log_rows = read_jsonl(variant.metrics) if variant.metrics.exists() else []
    facts = (run.stage_record(variant.stage_name) or {"facts": {}})["facts"]
    return {**facts, "log": log_rows}


def _repeat(run: Run, model_facts: dict[str, Any]) -> dict[str, Any]:
    made = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    stages = {
        path.stem: json.loads(path.read_text())["seconds"] for path in sorted((run.folder / "stages").glob("*.json"))
    }
    files = {
        "axis.safetensors": run.axis_path,
        "floor.safetensors": run.variant(control=False).floor_path,
        **{path.name: path for path in sorted(data.FOLDER.iterdir()) if path.is_file()},
    }
    overrides = " ".join(run.loaded.overrides)
    return {
        "command": f"trimtab run {run.loaded.name} {overrides}".strip(),
        "recipe": run.loaded.text,
        "overrides": list(run.loaded.overrides),
        "resolved": run.loaded.resolved,
        "versions": made["versions"],
        "git": made["git"],
        "machine": {**machine_facts(), "device": model_facts["device"], "dtype": model_facts["dtype"]},
        "hashes": {
            **{name: file_fingerprint(path) for name, path in files.items()},
            **_given_files(run),
            **{name: subject.fingerprint() for name, subject in _subjects(run).items()},
        },
        "seeds": {
            "axis": run.recipe.axis.seed,
            "data": run.recipe.data.seed,
            "train": run.recipe.train.get("seed", 0),
            "eval": run.recipe.eval.seed,
        },
        "stage_seconds": stages,
        "sampling": dataclasses.asdict(sampling_options(run.recipe.eval.sampling)),
    }
