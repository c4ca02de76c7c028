"""The floor penalty in LLaMA-Factory: its own training, with one callback.

python docs/examples/llama_factory.py path/to/model runs/demo/floor.safetensors runs/llama-factory
"""

from __future__ import annotations

import sys

from llamafactory.train.tuner import run_exp

from trimtab import FloorCallback

model, floor, output = sys.argv[1:]
run_exp(
    {
        "model_name_or_path": model, "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
        "template": "chatml", "dataset_dir": "data", "dataset": "mine", "output_dir": output, "max_steps": 6, "logging_steps": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "report_to": "none",
    },
    callbacks=[FloorCallback(floor, weight=0.7)],
)  # fmt: skip
