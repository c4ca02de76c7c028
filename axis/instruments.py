"""Load an axis or a floor from any kind of file, told apart by what is in it, and check it against a model's shape.

Everything that takes such a file from a user takes it through here: the stages, ``trimtab check``, ``trimtab project`` and
``trimtab chat``. So it is refused for the same reasons wherever it is given, and before anything is sampled.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trimtab.axis.directions import MIN_FIRING, Axis, Floor, check_fits
from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, load_torch
from trimtab.axis.published import axis_of, axis_of_roles, check_sign, floor_of, is_capping_config

log = logging.getLogger("trimtab")


def load_axis(path: str | Path) -> Axis:
    """Read an ``axis.safetensors``, a published ``assistant_axis.pt``, or a published folder of role vectors.

    Raises:
        UserError: if there is no such file, it is none of these, it is damaged, or its sign is wrong by the means in it.
    """
    try:
        found = load_instrument(path)
    except UserError as error:
        if error.key != "floor.experiment":
            raise
        raise UserError(
            "this is a capping_config.pt: it holds floors, and no axis",
            file=path,
            remedy="give it as the floor (floor.path), and here assistant_axis.pt",
        ) from error
    if isinstance(found, Floor):
        raise UserError("this is a floor, not an axis", file=path, remedy="give the axis.safetensors of a run")
    return found


def load_floor(path: str | Path, experiment: str | None = None) -> Floor:
    """Read a ``floor.safetensors``, or one experiment of a published ``capping_config.pt``.

    Args:
        path: the file.
        experiment: id in a ``capping_config.pt``.

    Raises:
        UserError: if there is no such file, it is neither, it is damaged, or the experiment is not named, or not there.
    """
    found = load_instrument(path, experiment)
    if isinstance(found, Axis):
        raise UserError(
            "this is an axis, not a floor: it has directions and no heights",
            file=path,
            remedy="give a floor.safetensors or a capping_config.pt, or calibrate a floor: trimtab floor RECIPE axis.path=...",
        )
    return found


def load_instrument(path: str | Path, experiment: str | None = None) -> Floor | Axis:
    """Read an axis or a floor, whichever it is: see :func:`load_axis` and :func:`load_floor`.

    Raises:
        UserError: if the file is missing or is none of these, or an experiment is named for a file that has none.
    """
    path = Path(path).expanduser()
    found = axis_of_roles(path) if path.is_dir() else _of_torch(path, experiment) if _is_torch(path) else _ours(path)
    if experiment is not None and not (isinstance(found, Floor) and "experiment" in found.metadata):
        raise UserError(
            f"experiment {experiment!r} is named, and only a capping_config.pt has experiments",
            file=path,
            key="floor.experiment",
            remedy="leave the experiment out, or give the capping_config.pt",
        )
    return found


def _is_torch(path: Path) -> bool:
    """Whether a file begins as torch writes them, a zip archive or a pickle, whatever its name ends in."""
    if path.suffix == ".pt" or not path.is_file():
        return path.suffix == ".pt"
    with path.open("rb") as file:
        head = file.read(9)
    # safetensors begins with a length, which may be any bytes, and then JSON
    return head[:2] in (b"PK", b"\x80\x02") and head[8:] != b"{"


def _of_torch(path: Path, experiment: str | None) -> Floor | Axis:
    content = load_torch(path)
    return floor_of(content, path, experiment) if is_capping_config(content) else axis_of(content, path)


def _ours(path: Path) -> Floor | Axis:
    kind = load_tensors(path)[1].get("format")
    if kind == "trimtab floor 1":
        return Floor.load(path)
    if kind != "trimtab axis 1":
        raise UserError(
            "this is neither an axis nor a floor of trimtab",
            file=path,
            remedy="give the axis.safetensors or the floor.safetensors of a run, or a file that the authors published",
        )
    axis = Axis.load(path)
    if axis.default_mean is not None and axis.role_vectors is not None:
        check_sign(axis, axis.default_mean - axis.role_vectors.mean(0), path)
    return axis


def check_instrument(found: Floor | Axis, n_layers: int, hidden_size: int, path: str | Path) -> None:
    """Check what was loaded for those who look through it: that it fits the model; and say so where it hardly acts.

    The stages measure how often a floor fires (:func:`trimtab.axis.calibration.gate`); here only what its file tells is known.

    Raises:
        UserError: if it does not fit the model.
    """
    if isinstance(found, Axis):
        check_fits(n_layers, hidden_size, axis=found, file=path)
        return
    check_fits(n_layers, hidden_size, floor=found, file=path)
    firing = found.metadata.get("firing_fraction")
    if isinstance(firing, int | float) and firing < MIN_FIRING:
        log.warning(
            "%s: this floor fires on %.1f %% of drift token-layer slots: the cap hardly acts", path, 100 * firing
        )
    elif not isinstance(firing, int | float):
        log.info("%s: how often this floor fires was never measured; trimtab floor RECIPE floor.path=... does", path)
