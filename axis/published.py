"""Load the files that the authors of the Assistant Axis published.

Sign trap (PAPER: arXiv 2601.10387 and its released code): capping vectors are stored as role - default and applied as an
UPPER cap, ``h -= relu(<h, v> - cap) * v``. A published cap ``(v, c)`` is therefore our floor ``(-v, -c)``, and the
published "25th percentile" is the 75th on the + axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.directions import Axis, Floor, unit
from trimtab.axis.errors import UserError
from trimtab.axis.files import load_torch


def load_published_axis(path: str | Path) -> Axis:
    """Load ``assistant_axis.pt``: a raw tensor [N, D] or ``{"axis": tensor, "metadata": ...}``; its sign is already +.

    Raises:
        UserError: if the file does not hold that.
    """
    content = load_torch(path)
    tensor = content.get("axis") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise UserError(
            "expected a tensor [layers, hidden] or a dict with 'axis'",
            file=path,
            remedy="give an assistant_axis.pt file",
        )
    return Axis(tensor.float(), metadata={"source": str(path), "sign_in_file": SIGN_AXIS})


SIGN_AXIS = "default - role (+ is Assistant), as stored"
SIGN_CAPS = "role - default as stored; negated on loading"


def load_role_vectors(folder: str | Path) -> tuple[list[str], Tensor]:
    """Load a published ``role_vectors/`` folder: one ``<role>.pt`` a role, a tensor [N, D] or a dict with ``vector``.

    Returns:
        Role names, and their vectors [R, N, D] float32.

    Raises:
        UserError: if the folder is empty or shapes differ.
    """
    paths = sorted(path for path in Path(folder).glob("*.pt") if not path.name.startswith("."))
    if not paths:
        raise UserError("no .pt files in this folder", file=folder, remedy="give a published role_vectors/ folder")
    vectors: list[Tensor] = []
    for path in paths:
        content = load_torch(path)
        tensor = content.get("vector") if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            raise UserError("expected a tensor [layers, hidden]", file=path, remedy="give a published role vector file")
        if vectors and tensor.shape != vectors[0].shape:
            raise UserError(
                f"shape {tuple(tensor.shape)} differs from {tuple(vectors[0].shape)} of {paths[0].name}",
                file=path,
                remedy="keep the vectors of one model in one folder",
            )
        vectors.append(tensor.float())
    return [path.stem for path in paths], torch.stack(vectors)


def load_capping_config(path: str | Path, experiment: str, *, sigma: Tensor | None = None) -> Floor:
    """Load one experiment of a published ``capping_config.pt`` as a floor, with the sign turned to + = Assistant.

    The published ``h - relu(<h, v> - c) * v`` equals our ``h + relu(tau - <h, u>) * u`` with ``u = -v, tau = -c``:
    ``relu(<h, v> - c) = relu(-c - <h, -v>)``.

    Args:
        path: the ``capping_config.pt``.
        experiment: the experiment's id, such as ``layers_46:54-p0.25`` (the slice excludes its end).
        sigma: standard deviations [L]; the published file has none, so it defaults to 1 (z in units of the stream).

    Raises:
        UserError: if the file or the experiment is not as published.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or not {"vectors", "experiments"} <= content.keys():
        raise UserError(
            "expected the keys 'vectors' and 'experiments'", file=path, remedy="give a capping_config.pt file"
        )
    known = [entry["id"] for entry in content["experiments"]]
    if experiment not in known:
        raise UserError(
            f"no experiment {experiment!r}; the file has {len(known)}, such as {', '.join(map(repr, known[:4]))}",
            file=path,
            key="floor.experiment",
            remedy="choose one of the ids in the file",
        )
    chosen = next(entry for entry in content["experiments"] if entry["id"] == experiment)
    by_layer: dict[int, tuple[Tensor, float]] = {}
    for step in chosen["interventions"]:
        if "cap" not in step:
            continue
        stored: dict[str, Any] = content["vectors"].get(step["vector"], {})
        if not {"vector", "layer"} <= stored.keys():
            raise UserError(
                f"experiment {experiment!r} caps along {step['vector']!r}, which the file does not hold with vector and layer",
                file=path,
                remedy="fetch the file again, or choose another experiment",
            )
        layer = int(stored["layer"])
        if layer in by_layer:
            raise UserError(
                f"experiment {experiment!r} caps layer {layer} twice", file=path, remedy="choose one cap a layer"
            )
        # The published code normalises v before it projects, so c is in units of <h, v / |v|>.
        by_layer[layer] = (-unit(stored["vector"]), -float(step["cap"]))
    if not by_layer:
        raise UserError(f"experiment {experiment!r} caps nothing", file=path, remedy="choose a capping experiment")
    layers = tuple(sorted(by_layer))
    return Floor(
        layers,
        torch.stack([by_layer[layer][0] for layer in layers]),
        torch.tensor([by_layer[layer][1] for layer in layers]),
        torch.ones(len(layers)) if sigma is None else sigma.float(),
        {"source": str(path), "experiment": experiment, "sign_in_file": SIGN_CAPS},
    )
