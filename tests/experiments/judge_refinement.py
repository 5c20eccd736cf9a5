"""Are the right sentences rejected? Draws kept and rejected ones of UrbanCLIP's released captions, and scores verdicts on them.

    python tests/experiments/judge_refinement.py draw --release FOLDER --output judging
    python tests/experiments/judge_refinement.py score --output judging

`draw` writes sentences.json, the shuffled sentences by number, and key.json, which says what became of them. The judge reads
sentences.json and the rubric in README.md alone, and writes verdicts.json, {"number": "keep" or "reject"}. `score` compares.
Rules were developed on the other half of the tiles, those whose sha256 is even.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np

from urbanclip_ray import load_recipe
from urbanclip_ray.captioners.refine import Standard, refine_sentences
from urbanclip_ray.captioners.rules import Rules, load_rules
from urbanclip_ray.captioners.sentence_checks import Place
from urbanclip_ray.captioners.sentences import split_sentences
from urbanclip_ray.geo.baidu import footprints
from urbanclip_ray.geo.earth import metres_per_degree

CITIES = ("Beijing", "Guangzhou")
NUM_EACH = 100
NUM_TILES = 1000  # that sentences are drawn from
SEED = 2025  # of the second draw: 2024 was the first's, whose mistakes the rules were mended by
TILE_PX = 256


def read_captions(release: str) -> dict[str, list[str]]:
    """The sentences of each tile, with the full stops that the release split them at put back, as the source does."""
    tiles: dict[str, list[str]] = {}
    for city in CITIES:
        for entry in json.loads(Path(release, f"{city}_captions.json").read_text())[0]:
            tiles.setdefault(entry["image"], []).append(entry["caption"].strip())
    return {
        tile: [text if text.endswith((".", "!", "?")) else f"{text}." for text in texts[:-1]] + texts[-1:]
        for tile, texts in tiles.items()
    }


def is_for_development(tile: str) -> bool:
    return int(hashlib.sha256(tile.encode()).hexdigest()[:8], 16) % 2 == 0


def find_place(tile: str) -> Place:
    """A tile's place from its name, CITY/ZOOM_X_Y_s.jpg."""
    city, _, name = tile.partition("/")
    zoom, x, y = (np.array([int(part)]) for part in name.split("_")[:3])
    found = footprints(zoom, x, y)
    metres, _ = metres_per_degree(found.lat)
    side_m = float((found.east - found.west)[0] * metres[0])
    return Place(city, float(found.lon[0]), float(found.lat[0]), side_m / TILE_PX, side_m)


def refine(tiles: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(sentence, reason, or empty where it was kept) of all these tiles."""
    config = load_recipe("urbanclip_beijing").refine
    standard = Standard(Rules(load_rules(config.rules_file), config.rules, config.language))
    found = []
    for tile, texts in sorted(tiles.items()):
        sentences = [sentence for text in texts for sentence in split_sentences(text)]
        kept, rejected = refine_sentences(sentences, config, standard, find_place(tile))
        found += [(sentence, "") for sentence in kept] + rejected
    return found


def draw(release: str, output: Path) -> None:
    tiles = {tile: texts for tile, texts in read_captions(release).items() if not is_for_development(tile)}
    chosen = random.Random(SEED).sample(sorted(tiles), NUM_TILES)
    found = refine({tile: tiles[tile] for tile in chosen})
    print(f"{len(found):,} sentences of {NUM_TILES:,} tiles: {dict(Counter(reason or 'kept' for _, reason in found))}")
    generator = random.Random(SEED)
    kept = generator.sample([item for item in found if not item[1]], NUM_EACH)
    rejected = generator.sample([item for item in found if item[1]], NUM_EACH)
    drawn = kept + rejected
    generator.shuffle(drawn)
    output.mkdir(parents=True, exist_ok=True)
    output.joinpath("sentences.json").write_text(json.dumps({at: text for at, (text, _) in enumerate(drawn)}, indent=1))
    output.joinpath("key.json").write_text(json.dumps({at: reason for at, (_, reason) in enumerate(drawn)}, indent=1))


def score(output: Path) -> None:
    sentences, key, verdicts = (json.loads((output / f"{name}.json").read_text()) for name in ("sentences", "key", "verdicts"))
    if sentences.keys() != verdicts.keys() or set(verdicts.values()) - {"keep", "reject"}:
        raise SystemExit(f"{output}/verdicts.json must say keep or reject for each number of sentences.json")
    for verdict, was_kept in (("keep", True), ("reject", False)):
        own = [at for at, reason in key.items() if (not reason) == was_kept]
        wrong = [at for at in own if verdicts[at] != verdict]
        print(f"{'kept' if was_kept else 'rejected'}: {len(own) - len(wrong)} of {len(own)} right")
        for at in wrong:
            print(f"  {at} [{key[at] or 'kept'}] {sentences[at]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("draw", "score"))
    parser.add_argument("--release", help="the folder of CITY_captions.json, for draw")
    parser.add_argument("--output", default="judging", help="where the three files lie (default: judging)")
    options = parser.parse_args()
    if options.step == "draw":
        draw(options.release or parser.error("draw needs --release"), Path(options.output))
    else:
        score(Path(options.output))


if __name__ == "__main__":
    main()
