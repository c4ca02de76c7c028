"""The floor penalty in any trainer that takes transformers' callbacks, whatever its age and whatever wraps it.

    trainer = SFTTrainer(..., callbacks=[FloorCallback("floor.safetensors", weight=0.7)])

It does what :func:`~trimtab.losses.floor_gradients` does around ``trainer.train()``, for frameworks that make the trainer
themselves: the hooks are laid when training begins, act within its steps, and are taken off when it ends.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.axis.directions import Floor
from trimtab.axis.errors import UserError
from trimtab.axis.instruments import load_floor
from trimtab.losses.injection import FloorInjection, check_trainer, telling

if TYPE_CHECKING:
    TrainerCallback: Any = object
else:
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:  # nothing calls it then, and the name is still there to be looked at
        if error.name != "transformers":
            raise
        TrainerCallback = object


class FloorCallback(TrainerCallback):  # type: ignore[misc]
    """Penalises states below the floor in every forward that is trained.

    Its figures, ``floor_penalty`` (a token) and ``floor_violation_rate`` (of tokens and layers), stand in the trainer's own log.

    Args:
        floor: the floor, or its file: a ``floor.safetensors`` or a published ``capping_config.pt``.
        weight: weight of the penalty.
        margin: sigma above the floor.
        experiment: of a ``capping_config.pt``.

    Raises:
        UserError: when training begins, if the floor does not fit the model or the trainer's arguments make its gradient wrong;
            after the first step, if no forward has passed the floor's layers, or nothing that is trained lies below them.
    """

    def __init__(
        self,
        floor: Floor | str | Path,
        *,
        weight: float,
        margin: float = 0.0,
        experiment: str | None = None,
    ) -> None:
        self.floor = floor if isinstance(floor, Floor) else load_floor(Path(floor), experiment)
        self.weight = weight
        self.margin = margin
        self._laid = contextlib.ExitStack()
        self._injection: FloorInjection | None = None
        self._seen = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Lay the hooks."""
        self._remove()  # those of a training that was broken off
        trainer = _trainer_of(args)
        check_trainer(trainer)
        self._injection = FloorInjection(
            model, self.floor, weight=self.weight, accumulation=args.gradient_accumulation_steps, margin=self.margin
        )
        self._laid.callback(self._injection.remove)
        self._laid.enter_context(telling(trainer, self._injection))
        self._seen = False
        # before the callbacks that report, which a trainer puts first: they are handed what `on_log` adds
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See in the first steps that the penalty is there at all."""
        if self._injection is None or self._seen:
            return
        calls, passes, self._seen = self._injection.calls, self._injection.passes, self._injection.trained > 0
        if passes:  # else: no token of these rows is labelled, and the next step is looked at
            return
        self._remove()
        layers = list(self.floor.layers)
        if calls == 0:
            raise UserError(
                f"no forward has passed layers {layers} in the first step: this framework runs the model past their hooks, and "
                "nothing would be penalised",
                remedy="switch its fused or patched forward off, or add axis_floor_loss to the loss by hand",
            )
        raise UserError(
            f"no weight at or below layer {max(layers)} is trained, so nothing can move a projection at layers {layers}",
            remedy="adapt layers from the first on (layers_to_transform), or take a floor at layers above the adapted ones",
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the figures since the last log."""
        if self._injection is None or logs is None or "loss" not in logs:
            return
        figures = self._injection.figures()
        logs |= figures
        state.log_history[-1] |= figures

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        self._remove()

    def _remove(self) -> None:
        self._laid.close()
        self._injection = None


def _trainer_of(arguments: Any) -> Any:
    """The trainer that calls the callback, which is handed to none: it alone knows what a step's loss is divided by.

    Raises:
        UserError: if there is none.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if hasattr(trainer, "training_step") and getattr(trainer, "args", None) is arguments:
            return trainer
        frame = frame.f_back
    raise UserError(
        "no trainer of transformers calls this callback",
        remedy="use floor_gradients around the loop, or FloorInjection in it",
    )
