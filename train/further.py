"""Further fine-tuning of tuned weights, as whoever takes them over would do it: does the stability outlast it?

    accelerate launch train/further.py --config recipes/smollm2-135m/sft.yaml --on benign
    accelerate launch train/further.py --config recipes/smollm2-135m/sft.yaml --on persona --start base

Plain supervised fine-tuning by TRL's own trainer, without floor, cap or barrier, on the rows of one entry of ``eval.durability``.
From ``tuned`` it goes on with a copy of the adapter itself, which may undo what the adapter holds; whole tuned weights, and the
``base`` as the comparison, get a fresh adapter. Written to ``<run folder>/durability/``; `trimtab eval` does all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.train import job

# Keys of ``train`` that say how this machine trains; all others belong to the recipe's method.
MACHINE = (
    "bf16", "disable_tqdm", "gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps", "max_length", "optim",
    "output_dir", "report_to", "save_total_limit", "seed", "use_cpu",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    parser = job.argument_parser(__doc__ or "")
    parser.add_argument("--on", required=True, metavar="NAME", help="which entry of eval.durability")
    parser.add_argument("--start", choices=("tuned", "base"), default="tuned", help="the weights to begin from")
    parser.add_argument("--adapter", type=Path, help="the tuned PEFT adapter; default: the run's own")
    parser.add_argument("--model", help="whole tuned weights in the place of an adapter")

    def work(arguments: Any) -> None:
        from trimtab.recipes.loader import load_recipe
        from trimtab.train.run import open_run

        run = open_run(load_recipe(arguments.config, arguments.overrides), output_dir=arguments.output_dir)
        train_further(
            run, arguments.on, arguments.start, adapter=arguments.adapter, model=arguments.model, quiet=arguments.quiet
        )

    return job.run_script(parser, argv, work)


def train_further(
    run: Any, on: str, start: str, *, adapter: Path | None = None, model: str | None = None, quiet: bool = False
) -> Path:
    """Fine-tune further; returns the new adapter's folder.

    Args:
        run: the run.
        on: name of an entry of ``eval.durability``.
        start: ``tuned`` or ``base``.
        adapter: the tuned adapter; None is the run's own.
        model: whole tuned weights instead of an adapter.
        quiet: no progress bars.

    Raises:
        UserError: if there is no such entry, no adapter, or no row to train on.
    """
    from trimtab.axis.errors import UserError

    tunings = {tuning.name: tuning for tuning in run.recipe.eval.durability}
    if on not in tunings:
        raise UserError(
            f"there is no further fine-tuning {on!r}",
            key="eval.durability",
            remedy=f"name one of: {', '.join(tunings)}" if tunings else "add it to the list",
        )
    tuning = tunings[on]
    source = adapter or run.variant(control=False).adapter
    if model is None and not (source / "adapter_config.json").exists():
        raise UserError("there is no adapter to go on from", file=source, remedy="train it first: trimtab train RECIPE")
    rows = rows_of(run, tuning)
    variant = run.further(start, on)
    return job.train_variant(
        run,
        variant,
        lambda: training_arguments(run, variant, tuning, len(rows), quiet),
        lambda arguments: build_trainer(run, arguments, variant, rows, None if model else source, model, start),
        inputs=[tuning.model_dump(), start, str(model or source)],
    )


def rows_of(run: Any, tuning: Any) -> list[dict[str, Any]]:
    """The rows of a further fine-tuning, ``prompt`` and ``completion`` as messages, and whether the answer ``ended``.

    ``benign``: requests of the train split with written answers. ``persona``: the base's own in-character answers behind the
    axis, of training roles, as an adversary with a few examples would take. Any other name: the rows of its file.

    Raises:
        UserError: if a file's row is not so, or there is none.
    """
    from trimtab.axis.calibration import spread
    from trimtab.axis.chat import chat
    from trimtab.axis.errors import UserError
    from trimtab.axis.files import read_jsonl
    from trimtab.recipes import data

    if tuning.file is not None:
        rows = [
            _row(row, number, tuning.file) for number, row in enumerate(read_jsonl(tuning.file, ours=False), start=1)
        ]
    elif tuning.name == "benign":
        rows = [
            {"prompt": chat("", prompt), "completion": [{"role": "assistant", "content": answer}], "ended": True}
            for prompt, answer in data.benign_answers()
        ]
    else:
        if not run.rollouts_path.exists():
            raise UserError(
                "there are no rollouts behind the axis to take in-character answers from",
                file=run.rollouts_path,
                key="eval.durability",
                remedy="extract the axis in this run, or give the fine-tuning a file of rows",
            )
        trained = {role.name for role in data.roles("train")}
        rows = [row for row in read_jsonl(run.rollouts_path) if row["role"] in trained]
    if not rows:
        raise UserError("there is no row to train on", file=tuning.file, key="eval.durability", remedy="add rows")
    return [{key: row[key] for key in ("prompt", "completion", "ended")} for row in spread(rows, tuning.rows)]


def _row(row: Any, number: int, file: str) -> dict[str, Any]:
    from trimtab.axis.errors import UserError

    messages = [*row.get("prompt", []), *row.get("completion", [])] if "prompt" in row else row.get("messages", [])
    whole = all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not whole or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            f"row {number} is no conversation that ends with an answer",
            file=file,
            remedy="use TRL's conversational format: `prompt` and `completion`, or `messages`, with role and content",
        )
    return {"prompt": messages[:-1], "completion": messages[-1:], "ended": True}


def training_arguments(run: Any, variant: Any, tuning: Any, rows: int, quiet: bool) -> Any:
    """TRL's SFTConfig: the machine's settings from the recipe, all else from the entry of ``eval.durability``."""
    from trl.trainer.sft_config import SFTConfig

    common = job.common_arguments(run, variant, quiet)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = math.ceil(min(tuning.batch_size, rows) / ranks)
    steps = math.ceil(rows * tuning.epochs / (batch * ranks))
    return SFTConfig(
        **{key: common[key] for key in MACHINE if key in common},
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(2, steps - 1),
        save_strategy="steps",
        save_steps=max(10, steps // 4),
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def build_trainer(
    run: Any,
    arguments: Any,
    variant: Any,
    rows: Sequence[dict[str, Any]],
    adapter: Path | None,
    model: str | None,
    start: str,
) -> Any:
    """TRL's SFTTrainer on the rows as tokens.

    Args:
        run: the run.
        arguments: TRL's SFTConfig.
        variant: where the log goes.
        rows: of :func:`rows_of`.
        adapter: the tuned adapter, or None where whole weights were tuned.
        model: the whole tuned weights, or None.
        start: ``tuned`` or ``base``.
    """
    import datasets
    from peft import LoraConfig, PeftConfig, PeftModel
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

    from trimtab.axis.chat import ChatFormat
    from trimtab.axis.models import load_tokenizer
    from trimtab.train.rollouts import tokens_of

    section = run.recipe.model
    whole = model is not None and start == "tuned"
    weights, device = job.model_to_train(
        section.model_copy(update={"name": model, "revision": None}) if whole else section
    )
    tokenizer: Any = load_tokenizer(section.name, section.revision)
    form = ChatFormat(tokenizer, section.chat_template_kwargs)
    fresh: Any = None
    if adapter is None:
        fresh = LoraConfig(**{"task_type": "CAUSAL_LM", **run.recipe.lora})
    elif start == "tuned":
        weights = PeftModel.from_pretrained(weights, str(adapter), is_trainable=True)
    else:
        fresh = PeftConfig.from_pretrained(str(adapter))
        fresh.inference_mode = False
    pairs = [
        tokens_of(form, row["prompt"], row["completion"][0]["content"], row["ended"], arguments.max_length)
        for row in rows
    ]
    return SFTTrainer(
        model=weights,
        args=arguments,
        processing_class=tokenizer,
        peft_config=fresh,
        train_dataset=datasets.Dataset.from_dict({
            "input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs],
        }),
        callbacks=[job.metrics_callback(variant.metrics)],
        data_collator=DataCollatorForLanguageModeling(**job.padding(tokenizer, device)),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
