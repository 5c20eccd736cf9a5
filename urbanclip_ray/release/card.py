"""The card of an export: README.md with the header that Hugging Face reads, and how the pairs came to be."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import yaml

from urbanclip_ray.config import ConfigError
from urbanclip_ray.release.plan import EXTENSIONS, ExportPlan, Format
from urbanclip_ray.sources.sample_names import DATA_FOLDER
from urbanclip_ray.storage import Dataset

CUSTOM_LICENCE = "LicenseRef-"  # SPDX's prefix of licences that it has no id for
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))
MAX_REGIONS = 20  # named in the card
COLUMNS = {
    "image": "the tile as it came from its source, byte for byte",
    "texts": "accepted sentences, in order",
    "tile_id": "its id",
    "region": "the city or folder that it belongs to",
    "lon, lat, west, south, east, north": "centre and edges in WGS84 degrees, where they are known",
    "scheme, group": "the grid of tiles, and a group such as a zipcode",
    "width, height": "in pixels",
    "sha256": "of the image's bytes",
    "part": "train, val, test, or buffer (too near to a test tile), where the tiles were split",
}


class Release(NamedTuple):
    """What a card speaks of."""

    name: str
    kind: Format
    licence: str
    attribution: str
    pixels: bool
    source: dict[str, Any]  # content of the source's config
    datasets: dict[str, Dataset]  # tiles, captions, pairs, and splits where there are some


def write_card(release: Release, plan: ExportPlan) -> str:
    """Markdown; what comes from data stands in JSON blocks, whose lines cannot end them."""
    header = _licence(release.licence) | {
        "pretty_name": release.name,
        "task_categories": ["image-to-text"],
        "tags": ["satellite-imagery", *(["webdataset"] if release.kind == "webdataset" else [])],
        "size_categories": [next((name for limit, name in SIZES if plan.num_exported < limit), "n>10M")],
        "configs": [{"config_name": "default", "data_files": _data_files(release.kind, plan)}],
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {release.name}",
        _introduction(release, plan),
        "## Licence\n\n" + _licence_words(release),
        "## Columns\n\n" + _columns(release),
        "## Source\n\n" + _block(release.source) + "\n\n" + _regions(release.datasets["tiles"]),
        "## How the texts were made\n\n" + _captions(release.datasets["captions"]),
        "## Refinement\n\n" + _refinement(release.datasets["pairs"]),
        "## Where this comes from\n\n" + _digests(release),
    ]
    return "\n\n".join(sections) + "\n"


def check_licence(licence: str) -> str:
    """The licence if it is an SPDX id (or LicenseRef-NAME); raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{1,63}", licence):
        raise ConfigError(
            f"--licence {licence!r} is no SPDX id: give one such as CC-BY-4.0 or ODbL-1.0, or {CUSTOM_LICENCE}NAME for one "
            "that SPDX does not list"
        )
    return licence


def _licence(licence: str) -> dict[str, str]:
    if licence.startswith(CUSTOM_LICENCE):
        return {"license": "other", "license_name": licence.removeprefix(CUSTOM_LICENCE).lower()}
    return {"license": licence.lower()}  # as the hub writes SPDX ids


def _data_files(kind: Format, plan: ExportPlan) -> list[dict[str, str]]:
    return [{"split": split, "path": f"{DATA_FOLDER}/{split}-*.{EXTENSIONS[kind]}"} for split in plan.num_by_split]


def _introduction(release: Release, plan: ExportPlan) -> str:
    what = "Satellite tiles with" if release.pixels else "Descriptions of satellite tiles, without pixels:"
    counts = ", ".join(f"{split} {count:,}" for split, count in plan.num_by_split.items())
    left_out = f"{plan.num_without_text:,} tiles without an accepted sentence and {plan.num_unreadable:,} unreadable ones"
    return f"{what} the sentences that describe them, {plan.num_exported:,} tiles ({counts}). Left out: {left_out}."


def _licence_words(release: Release) -> str:
    words = f"{release.licence}, as stated by whoever exported this."
    if not release.pixels:
        words += (
            " It speaks of the texts: the imagery's licence need not allow to share it. Join them to a copy of your own by "
            "`tile_id` or `sha256`."
        )
    return f"{words} {release.attribution}".strip()


def _columns(release: Release) -> str:
    shown = {name: words for name, words in COLUMNS.items() if release.pixels or name != "image"}
    lines = [f"- {name}: {words}" for name, words in shown.items()]
    if release.kind == "webdataset":
        lines.append("\nA sample is KEY.json with these, KEY.txt with one sentence a line, and the image where there is one.")
    return "\n".join(lines)


def _regions(tiles: Dataset) -> str:
    regions: dict[str, int] = tiles.manifest.facts.get("regions", {})
    most = sorted(regions.items(), key=lambda item: (-item[1], item[0]))[:MAX_REGIONS]
    more = f" The {len(most)} with the most tiles:" if len(regions) > len(most) else ""
    return f"{len(regions):,} regions; tiles of each.{more}\n\n{_block(dict(most))}"


def _captions(captions: Dataset) -> str:
    manifest = captions.manifest
    made = {name: manifest.facts[name] for name in ("model", "captions") if name in manifest.facts}
    words = "Prompt, decoding and what else decided the texts; texts of a model may be wrong, and nobody has read them all."
    return f"{words}\n\n{_block(manifest.config | made)}"


def _refinement(pairs: Dataset) -> str:
    manifest = pairs.manifest
    counts = {"in": manifest.rows_in, "accepted": manifest.rows_out, "rejected": manifest.rejects}
    return f"Counts in {manifest.unit}.\n\n{_block(manifest.config | counts)}"


def _digests(release: Release) -> str:
    digests = {name: dataset.sha256 for name, dataset in sorted(release.datasets.items())}
    version = release.datasets["pairs"].manifest.libraries.get("urbanclip_ray", "")
    return f"sha256 of the manifests of what was exported, by urbanclip_ray {version}.\n\n{_block(digests)}"


def _block(value: Any) -> str:
    return f"~~~json\n{json.dumps(value, indent=1, ensure_ascii=False)}\n~~~"
