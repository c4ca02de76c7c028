"""Load the files that the authors of the Assistant Axis published, and what their pipeline writes.

Sign trap (PAPER: arXiv 2601.10387 and its released code): capping vectors are stored as role - default and applied as an
UPPER cap, ``h -= relu(<h, v> - cap) * v``. A published cap ``(v, c)`` is therefore our floor ``(-v, -c)``, and the
published "25th percentile" is the 75th on the + axis.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.directions import NO_SIGMA, Axis, Floor, unit
from trimtab.axis.errors import UserError
from trimtab.axis.files import DEFAULT_NAMES, load_torch, vector_files

log = logging.getLogger("trimtab")

SIGN_AXIS = "default - role (+ is Assistant), as stored"
SIGN_CAPS = "role - default as stored; negated on loading"


def is_capping_config(content: Any) -> bool:
    """Whether the content of a ``.pt`` file is that of a ``capping_config.pt``."""
    return isinstance(content, dict) and "experiments" in content


def load_published_axis(path: str | Path) -> Axis:
    """Load ``assistant_axis.pt``: a raw tensor [N, D] or a dict with ``axis``; its sign is already +.

    Raises:
        UserError: if the file does not hold that, or its sign is not that of the means beside it.
    """
    return axis_of(load_torch(path), path)


def axis_of(content: Any, path: str | Path) -> Axis:
    """The axis in the content of a published ``.pt`` file: see :func:`load_published_axis`."""
    if Path(path).stem in DEFAULT_NAMES:
        raise UserError(
            "this is the default Assistant's mean activation, not an axis",
            file=path,
            remedy="give assistant_axis.pt (axis.pt), or the role_vectors/ folder beside this file",
        )
    if is_capping_config(content):
        raise UserError("this is a capping_config.pt, not an axis", file=path, remedy="give it as a floor")
    tensor = content.get("axis") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise UserError(
            f"expected a tensor [layers, hidden] or a dict with 'axis', found {_what(content)}",
            file=path,
            remedy="give an assistant_axis.pt file",
        )
    metadata: dict[str, Any] = {"source": str(path), "sign_in_file": SIGN_AXIS}
    told = content.get("metadata") if isinstance(content, dict) else None
    if isinstance(told, Mapping) and isinstance(told.get("model"), str):
        metadata["model"] = told["model"]
    with _naming(path):
        axis = Axis(tensor, metadata=metadata)
    default, roles = (
        content.get(f"{name}_mean") if isinstance(content, dict) else None for name in ("default", "role")
    )
    if isinstance(default, Tensor) and isinstance(roles, Tensor) and default.shape == roles.shape == tensor.shape:
        check_sign(axis, default.float() - roles.float(), path)
    return axis


def check_sign(axis: Axis, difference: Tensor, path: str | Path) -> None:
    """Check an axis against the default mean minus the role mean [N, D] that a file holds beside it.

    Raises:
        UserError: if it points the other way.
    """
    cosine = float((axis.directions * unit(difference)).sum(-1).mean())
    if cosine < 0:
        raise UserError(
            f"this axis points away from the Assistant: its cosine with default - role, of this very file, is {cosine:.2f}",
            file=path,
            key="axis",
            remedy="negate it: + must be Assistant",
        )


def load_role_vectors(folder: str | Path) -> tuple[list[str], Tensor, Tensor | None]:
    """Load a published folder of vectors: one ``<role>.pt`` a role, a tensor [N, D] or a dict with ``vector``.

    The default Assistant's own mean is no role. It is told by its name, or by the role or type (``mean``) that the dict tells, as
    in the published code; if it is not among the roles, it is looked for in the folder above.

    Returns:
        Role names, their vectors [R, N, D] float32, and the default mean [N, D], or None where there is none.

    Raises:
        UserError: if the folder holds no role, or shapes differ.
    """
    folder = Path(folder)
    files = vector_files(folder)
    paths = [path for path in files if path.parent == folder]
    if not paths:
        raise UserError("no .pt files in this folder", file=folder, remedy="give a published role_vectors/ folder")
    roles: dict[str, Tensor] = {}
    defaults: list[Tensor] = []
    for path in paths:
        name, vector, default = _vector(path)
        first = next(iter([*roles.values(), *defaults]), vector)
        if vector.shape != first.shape:
            raise UserError(
                f"shape {tuple(vector.shape)} differs from {tuple(first.shape)} of {paths[0].name}",
                file=path,
                remedy="keep the vectors of one model in one folder",
            )
        if default:
            defaults.append(vector)
        else:
            roles[name] = vector
    if not roles:
        raise UserError("no role among these vectors", file=folder, remedy="give a published role_vectors/ folder")
    stacked = torch.stack(list(roles.values()))
    for path in [] if defaults else [path for path in files if path.parent != folder][:1]:
        _, vector, _ = _vector(path)
        if vector.shape != stacked.shape[1:]:
            raise UserError(
                f"shape {tuple(vector.shape)} differs from {tuple(stacked.shape[1:])} of the roles",
                file=path,
                remedy="keep the vectors of one model in one folder",
            )
        defaults.append(vector)
    return list(roles), stacked, torch.stack(defaults).mean(0) if defaults else None


def _vector(path: Path) -> tuple[str, Tensor, bool]:
    """Name and mean activation [N, D] of a vector file, and whether it is the default Assistant's."""
    content = load_torch(path)
    facts = content if isinstance(content, dict) else {}
    tensor = facts.get("vector") if facts else content
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise UserError(
            f"expected a tensor [layers, hidden] or a dict with 'vector', found {_what(content)}",
            file=path,
            remedy="give published role vector files",
        )
    if not torch.isfinite(tensor).all():
        raise UserError("this vector holds NaN or infinity", file=path, remedy="fetch it again, or make it anew")
    default = path.stem in DEFAULT_NAMES or facts.get("role") in DEFAULT_NAMES or facts.get("type") == "mean"
    return path.stem, tensor.float(), default


def axis_of_roles(folder: str | Path) -> Axis:
    """The axis of a published ``role_vectors/`` (or ``vectors/``) folder: the default mean minus the mean of the roles.

    Raises:
        UserError: see :func:`load_role_vectors`; and if the default Assistant's mean is nowhere.
    """
    names, roles, default = load_role_vectors(folder)
    if default is None:
        raise UserError(
            f"{len(names)} role vectors, but the default Assistant's mean is not among them nor in the folder above",
            file=folder,
            remedy="put default_vector.pt beside this folder",
        )
    with _naming(folder):
        axis = Axis(default - roles.mean(0), default, roles, metadata={"source": str(folder), "roles": names})
    log.info("axis: %d role vectors against the default Assistant's, of %s", len(names), folder)
    return axis


def load_capping_config(path: str | Path, experiment: str | None, *, sigma: Tensor | None = None) -> Floor:
    """Load one experiment of a published ``capping_config.pt`` as a floor, with the sign turned to + = Assistant.

    The published ``h - relu(<h, v> - c) * v`` equals our ``h + relu(tau - <h, u>) * u`` with ``u = -v, tau = -c``:
    ``relu(<h, v> - c) = relu(-c - <h, -v>)``.

    Args:
        path: the ``capping_config.pt``.
        experiment: the experiment's id, such as ``layers_46:54-p0.25`` (the slice excludes its end).
        sigma: standard deviations [L]; the published file has none, so it defaults to 1, and :attr:`Floor.has_sigma` is False.

    Raises:
        UserError: if the file or the experiment is not as published.
    """
    return floor_of(load_torch(path), path, experiment, sigma=sigma)


def floor_of(content: Any, path: str | Path, experiment: str | None, *, sigma: Tensor | None = None) -> Floor:
    """The floor in the content of a ``capping_config.pt``: see :func:`load_capping_config`."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("vectors"), dict)
        or not isinstance(content.get("experiments"), list)
    ):
        raise UserError(
            f"expected a dict 'vectors' and a list 'experiments', found {_what(content)}",
            file=path,
            remedy="give a capping_config.pt file",
        )
    chosen = _experiment(content["experiments"], path, experiment)
    steps = chosen.get("interventions")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(
            f"experiment {experiment!r} has no list of interventions",
            file=path,
            remedy="fetch the file again, or choose another experiment",
        )
    caps = [step for step in steps if "cap" in step]
    if not caps:
        raise UserError(f"experiment {experiment!r} caps nothing", file=path, remedy="choose a capping experiment")
    if len(caps) < len(steps):
        log.warning(
            "%s: %d of the %d interventions of %s have no cap and are left out, as the published code does",
            path, len(steps) - len(caps), len(steps), experiment,
        )  # fmt: skip
    by_layer: dict[int, tuple[Tensor, float]] = {}
    for step in caps:
        layer, vector, limit = _capped_layer(content["vectors"], step, path, experiment)
        if layer in by_layer:
            raise UserError(
                f"experiment {experiment!r} caps layer {layer} twice", file=path, remedy="choose one cap a layer"
            )
        # The published code normalises v before it projects, so c is in units of <h, v / |v|>.
        by_layer[layer] = (-unit(vector), -limit)
    layers = tuple(sorted(by_layer))
    if len({len(vector) for vector, _ in by_layer.values()}) > 1:
        raise UserError(f"the vectors of {experiment!r} differ in width", file=path, remedy="fetch the file again")
    facts = {"source": str(path), "experiment": experiment, "sign_in_file": SIGN_CAPS}
    with _naming(path):
        return Floor(
            layers,
            torch.stack([by_layer[layer][0] for layer in layers]),
            torch.tensor([by_layer[layer][1] for layer in layers]),
            torch.ones(len(layers)) if sigma is None else sigma,
            facts if sigma is not None else facts | {"sigma": NO_SIGMA},
        )


def _experiment(entries: list[Any], path: str | Path, experiment: str | None) -> dict[str, Any]:
    """The entry of an experiment, by its id."""
    known = {str(entry["id"]): entry for entry in entries if isinstance(entry, dict) and "id" in entry}
    some = f"{len(known)}, such as {', '.join(map(repr, list(known)[:4]))}" if known else "none with an id"
    if experiment is None:
        raise UserError(
            f"a capping_config.pt holds many experiments, and none is named; the file has {some}",
            file=path,
            key="floor.experiment",
            remedy="name one: floor.experiment in a recipe, --experiment on the command line",
        )
    if experiment not in known:
        raise UserError(
            f"no experiment {experiment!r}; the file has {some}",
            file=path,
            key="floor.experiment",
            remedy="choose one of the ids in the file",
        )
    return known[experiment]


def _capped_layer(
    vectors: Mapping[str, Any], step: Mapping[str, Any], path: str | Path, experiment: str | None
) -> tuple[int, Tensor, float]:
    """Layer, vector [D] and limit of one capping intervention."""
    name = step.get("vector")
    stored = vectors.get(name) if isinstance(name, str) else None
    vector = stored.get("vector") if isinstance(stored, dict) else None
    layer = _whole(stored.get("layer")) if isinstance(stored, dict) else None
    limit = _number(step["cap"])
    if isinstance(vector, Tensor) and vector.ndim == 2 and len(vector) == 1:  # a row of a matrix
        vector = vector[0]
    if not isinstance(vector, Tensor) or layer is None:
        fault = f"caps along {name!r}, which the file does not hold with vector and layer"
    elif vector.ndim != 1 or not torch.isfinite(vector).all() or not bool(vector.any()):
        fault = f"caps along {name!r}, which is no vector of finite numbers, but of shape {tuple(vector.shape)}"
    elif limit is None:
        fault = f"has a cap along {name!r} that is no number: {step['cap']!r}"
    else:
        return layer, vector.float(), limit
    raise UserError(
        f"experiment {experiment!r} {fault}",
        file=path,
        remedy="fetch the file again, or choose another experiment",
    )


def _number(value: Any) -> float | None:
    """A finite number, also out of a tensor of one element; None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) and number >= 0 else None


def _what(content: Any) -> str:
    """What a file holds instead, for an error."""
    if isinstance(content, Tensor):
        return f"a tensor of shape {tuple(content.shape)}"
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(repr, list(content)[:6])) or 'nothing in it'}"
    return f"a {type(content).__name__}"


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn what the content of a file breaks into a fault of that file."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error), file=path, remedy="fetch the file again, or make it anew") from error
