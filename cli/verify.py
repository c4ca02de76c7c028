"""Everything about a recipe that can be known to be wrong before anything heavy, told at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from trimtab.cli.launch import check_machine, check_pair, default_accelerate, processes_of, resolve_accelerate_config
from trimtab.eval.measures.capability_tasks import check_tasks
from trimtab.eval.stages import check_files
from trimtab.pipeline.run import Run
from trimtab.recipes.faults import Findings
from trimtab.recipes.loader import LoadedRecipe
from trimtab.train.rehearsal import judge_faults, rehearse, section_faults


def find_faults(
    loaded: LoadedRecipe,
    *,
    accelerate: str | None = None,
    num_processes: int | None = None,
    here: bool = True,
    training: bool = True,
) -> Findings:
    """Look at all that a recipe needs; what is wrong lies in the findings.

    Args:
        loaded: the recipe.
        accelerate: accelerate config, by name or file; None chooses as training would.
        num_processes: replaces the file's own number.
        here: whether this machine runs the recipe, so that it must have what the recipe asks for.
        training: whether there is something left to train.
    """
    recipe, findings, processes = loaded.recipe, Findings(), 1
    training = training and recipe.eval.tuned is None
    if training or recipe.eval.durability:
        with findings.of_a_check(), tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            config = resolve_accelerate_config(
                accelerate or default_accelerate(recipe.model.device)[0], into=Path(folder)
            )
            processes = processes_of(config, num_processes)
            check_pair(config, recipe.train)
            if here:
                check_machine(config, num_processes)
    if training:
        with findings.of_a_check():
            rehearse(loaded, processes=processes, here=here)
    else:
        with findings.of_a_check():
            findings.add(section_faults(recipe, here=here))
    with findings.of_a_check():
        check_files(Run(Path(), recipe, loaded))
    with findings.of_a_check():
        of_the_user = recipe.eval.capability_folder
        check_tasks(recipe.eval.capability, None if of_the_user is None else Path(of_the_user))
    if here:
        findings.add(judge_faults({"eval.judge": recipe.eval.judge, "eval.user": recipe.eval.user}))
    findings.faults = [loaded.placed(fault) for fault in findings.faults]
    return findings
