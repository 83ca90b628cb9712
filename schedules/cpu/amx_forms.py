"""What a layer's lines may be for AMX, and its tiles in every form that is worth a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hawq_tvm.core import ops
from hawq_tvm.core.errors import ScheduleError
from schedules.layer import Layer
from schedules.narrow import opened_at_once
from schedules.spelling.tile_intrinsics import LANES

from . import amx_tiles
from .amx_model import cycles
from .amx_tiles import AmxTile, vectors_of
from .borders import axes_of
from .contract_tiles import TASKS
from .contraction import Shape, shape_of
from .images import Images
from .joined import in_lines, pixels_of

# The share of the least estimate up to which a form is worth a measurement; and that of its own by which images must be
# better than lines: the model knows neither what they leave out of a border nor what of an epilogue is left out.
WORTH, BETTER = 2.0, 0.95


@dataclass(frozen=True)
class Form:
    """A layer in one of FORMS: with what shape its sums are made, by the anchor and from the data of `layer`."""

    name: str
    layer: Layer
    shape: Shape
    images: Images | None = None


def forms_of(layer: Layer) -> list[Form]:
    """Those that a layer has."""
    call = layer.anchor_call
    assert call is not None
    lanes = LANES * vectors_of(call)
    found, pixels = [Form("lines", layer, shape_of(call, lanes))], pixels_of(layer)
    rows = next((n for n in range(LANES, 1, -1) if pixels % (2 * n) == 0), 0)
    if pixels and rows:
        parts = in_lines(layer, 2 * rows)
        assert parts.anchor_call is not None
        found.append(Form("parts", parts, shape_of(parts.anchor_call, lanes)))
    images = Images.of(layer)
    # A task has whole images, and there should be enough of them for several threads.
    if images is not None and ops.shape_of(call)[0] * ops.shape_of(call)[-1] >= TASKS * 2 * lanes:
        found.append(Form("images", layer, images.shape(call, images.pixels), images))
    return found


def form_of(layer: Layer, tile: AmxTile) -> Form:
    """The form that a tile is for.

    Raises ScheduleError when the layer has no such form.
    """
    forms = forms_of(layer)
    for form in forms:
        if form.name == tile.form:
            return form
    raise ScheduleError(
        "its tile does not fit it",
        where=layer.name,
        expected=f"a tile of {' or '.join(f.name for f in forms)}",
        found=str(tile),
        remedy="compile the model again with this version",
    )


def tiles_of(layer: Layer) -> list[AmxTile]:
    """Blocks of tiles and lines per task, the best by the cost model first."""
    call = layer.anchor_call
    assert call is not None
    vectors, width = vectors_of(call), layer.width(call.args[1])
    opens = bool(opened_at_once(width, prod(ops.shape_of(call)[:-1])))
    found = []
    for form in forms_of(layer):
        pairs = ops.op_name(call) == "relax.nn.conv2d" and form.images is None
        late = form.images is not None or axes_of(layer, call)[0] is None
        tiles = amx_tiles.tiles_of(form.shape, vectors, pairs, opens, form.name, late)
        found.append((min(cycles(form.shape, t) for t in tiles) / (BETTER if form.images else 1), tiles))
    found.sort(key=lambda f: f[0])  # of equal ones, lines first
    return [t for estimate, tiles in found for t in tiles if estimate <= WORTH * found[0][0]]
