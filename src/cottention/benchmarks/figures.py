"""The figures that the paper is known by, measured here: one attention layer over lengths, widths and numbers of heads.

Time and memory of a layer forward, on one text, causal and bidirectional: cosine attention, softmax that writes its
T x T scores out as the published one does, and softmax in one fused pass. Then one token of a decoder and what it
carries. All goes into one JSON, the published readings beside ours; the pictures are drawn from that file alone.

    with open_journal(settings, directory) as journal:
        data = benchmark_figures(settings, journal)
        write_figures_report(data, directory)
        journal.finish()
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cottention.benchmarks.attention import benchmark_attention
from cottention.benchmarks.decode import benchmark_decode
from cottention.benchmarks.environment import machine_line
from cottention.benchmarks.journal import Journal, write_texts
from cottention.benchmarks.settings import LAYERS, DecodeSettings, FigureSettings
from cottention.benchmarks.units import duration, size
from cottention.errors import SettingsError
from cottention.files import one_line

FORMAT = 1
"""Raised when a reader of the JSON would have to change."""

_COSINE, _MATRIX, _FUSED = LAYERS

TITLES = {_COSINE: "cosine", _MATRIX: "softmax, T × T scores", _FUSED: "softmax, fused"}
"""How tables and pictures call the layers."""

DIRECTIONS = {"causal": "causal (GPT)", "bidirectional": "bidirectional (BERT)"}
"""How they call the directions."""

SIZES = {"length": "length", "width": "width", "heads": "num_heads"}
"""Picture -> which size of a reading grows in it."""

# Read by eye from the paper's plots.
_READINGS = {
    (_MATRIX, "causal"): (0.59, 35e9),
    (_MATRIX, "bidirectional"): (0.37, 35e9),
    (_COSINE, "causal"): (13e-3, 3.5e9),
    (_COSINE, "bidirectional"): (11e-3, 1.2e9),
}
PUBLISHED = {
    "source": "arXiv 2409.18747, one layer forward on one A100, read by eye from the plots over the length",
    "readings": [
        {
            "name": name,
            "direction": direction,
            "length": 16384,
            "num_heads": 16,
            "head_dim": 128,
            "median_s": median_s,
            "peak_bytes": peak_bytes,
        }
        for (name, direction), (median_s, peak_bytes) in _READINGS.items()
    ],
}
"""What the paper shows, in seconds and bytes."""


def benchmark_figures(settings: FigureSettings, journal: Journal | None = None) -> dict[str, Any]:
    """Measure everything that the pictures show; what the journal has already is taken from it.

    Returns:
        The JSON: "published", "layers" (a report of `bench attention`), "decode" (one of `bench decode`).

    Raises:
        WrongResultError: a layer differs from its equations in float64; nothing was measured.
    """
    layers = benchmark_attention(settings, journal)
    H, K = 16, 128  # as the layers of the length sweep
    decode = None
    if not layers.interrupted:
        decode = benchmark_decode(
            DecodeSettings(
                positions=settings.positions,
                num_heads=H,
                head_dim=K,
                repeats=settings.repeats,
                processor_time=settings.processor_time,
            )
        )
    return {
        "benchmark": "figures",
        "format": FORMAT,
        "published": PUBLISHED,
        "layers": layers.to_dict(),
        "decode": None if decode is None else decode.to_dict(),
    }


def read_figures(path: Path) -> dict[str, Any]:
    """The JSON that an earlier run wrote.

    Raises:
        SettingsError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"--from: cannot read {path}: {one_line(error)}") from error
    if not isinstance(data, dict) or (data.get("benchmark"), data.get("format")) != ("figures", FORMAT):
        raise SettingsError(f"--from: {path} is no figures.json of format {FORMAT} from `cottention bench figures`")
    return data


def readings(data: dict[str, Any], picture: str, direction: str) -> dict[str, list[dict[str, Any]]]:
    """Layer -> its results along the size that grows in a picture, smallest first."""
    shapes = {tuple(shape) for shape in data["layers"]["settings"]["sweeps"][picture]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TITLES}
    for result in data["layers"]["results"]:
        shape = (result["length"], result["num_heads"], result["head_dim"])
        if result["direction"] == direction and shape in shapes:
            found[result["name"]].append({**result, "width": result["num_heads"] * result["head_dim"]})
    return {name: sorted(each, key=lambda result: result[SIZES[picture]]) for name, each in found.items()}


def published(data: dict[str, Any], picture: str, direction: str) -> list[dict[str, Any]]:
    """Published readings that belong into a picture: those of its shapes, wherever the length ends here."""
    shapes = {tuple(shape[1:]) for shape in data["layers"]["settings"]["sweeps"][picture]}
    return [
        reading
        for reading in data["published"]["readings"]
        if picture == "length"
        and reading["direction"] == direction
        and (reading["num_heads"], reading["head_dim"]) in shapes
    ]


def fixed_sizes(data: dict[str, Any], picture: str) -> str:
    """The sizes that do not change in a picture, as a heading."""
    shapes = data["layers"]["settings"]["sweeps"][picture]
    sizes = {
        "T": {T for T, _, _ in shapes},
        "heads": {H for _, H, _ in shapes},
        "width": {H * K for _, H, K in shapes},
    }
    return ", ".join(f"{name} {values.pop()}" for name, values in sizes.items() if len(values) == 1)


def machine_of(data: dict[str, Any]) -> str:
    """What it was measured on, and whether something else ran there."""
    about = data["layers"]["environment"]
    where = machine_line(about, data["layers"]["settings"])
    load = about["load_at_start"]
    busy = " (a busy machine)" if isinstance(load, float) and load > 0.5 else ""
    return f"{where}, torch {about['packages']['torch']}, load {load}{busy}"


def figures_as_text(data: dict[str, Any]) -> str:
    """The machine, a table for each picture and direction, and the published readings under their own."""
    parts = [machine_of(data)]
    for picture in data["layers"]["settings"]["sweeps"]:
        for direction, title in DIRECTIONS.items():
            parts.append(_table(data, picture, direction, title))
    if data["decode"] is not None:
        parts.append(_decode_table(data["decode"]))
    parts.append(
        "time of one layer forward and the most memory beyond tokens and weights; - is what would not fit the limits.\n"
        f"published: {data['published']['source']}"
    )
    return "\n\n".join(parts)


def _table(data: dict[str, Any], picture: str, direction: str, title: str) -> str:
    found = readings(data, picture, direction)
    lines = [f"{title}, over the {picture} ({fixed_sizes(data, picture)})"]
    lines.append(f"{picture:>10}" + "".join(f"{TITLES[name]:>26}" for name in found))
    lines += [
        f"{row[0][SIZES[picture]]:>10}" + "".join(f"{_cell(result):>26}" for result in row)
        for row in zip(*found.values(), strict=True)
    ]
    by_name = {each["name"]: each for each in published(data, picture, direction)}
    if by_name:
        shown = [by_name.get(name) for name in found]
        cells = [
            "-" if each is None else f"{duration(each['median_s'])} {size(each['peak_bytes']):>9}" for each in shown
        ]
        lines.append(f"{'published':>10}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(result: dict[str, Any]) -> str:
    time, memory = result["time"], result["memory"]
    return f"{duration(time['median_s']) if time else '-'} {size(memory['peak_bytes']) if memory else '-':>9}"


def _decode_table(decode: dict[str, Any]) -> str:
    settings = decode["settings"]
    heading = (
        f"one token, H = {settings['num_heads']}, K = V = {settings['head_dim']}: time of a step, and what is carried"
    )
    names = list(dict.fromkeys(result["name"] for result in decode["results"]))
    lines = [heading, f"{'position':>10}" + "".join(f"{name:>26}" for name in names)]
    by_place = {(result["name"], result["position"]): result for result in decode["results"]}
    for position in dict.fromkeys(result["position"] for result in decode["results"]):
        cells = []
        for name in names:
            result = by_place.get((name, position))
            cells.append("-" if result is None else f"{duration(result['median_s'])} {size(result['state_bytes']):>9}")
        lines.append(f"{position:>10}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def write_figures_report(data: dict[str, Any], directory: Path) -> list[Path]:
    """Write figures.json, figures.txt and the pictures, each as PNG and as SVG; returns the files."""
    from cottention.benchmarks.figures_plot import write_pictures  # matplotlib takes a second

    texts = {"figures.json": json.dumps(data, indent=1), "figures.txt": figures_as_text(data)}
    return [*write_texts(texts, directory), *write_pictures(data, directory)]
