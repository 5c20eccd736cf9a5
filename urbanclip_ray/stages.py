"""The stages of the walk: what each is made of, and the function that makes it.

Follow one tile by reading `STAGES` from the top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from urbanclip_ray.captioners.coca import identify_weights
from urbanclip_ray.captioners.model_files import ModelReference, resolve_model
from urbanclip_ray.config import NO_WEIGHTS, RunConfig
from urbanclip_ray.filesystems import use_stores
from urbanclip_ray.places import find_shards, find_weights, list_places, weights_folder, with_absolute_paths
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, Publication, join
from urbanclip_ray.terminal import open_console

if TYPE_CHECKING:
    from urbanclip_ray.captioners.caption import CaptionWork
    from urbanclip_ray.captioners.rules import Rules


class Run:
    """A config, its source, and the datasets found or made so far. The config's `stores` become this process's."""

    def __init__(self, config: RunConfig) -> None:
        use_stores(config.stores)
        self.config = with_absolute_paths(config)
        self.datasets: dict[str, Dataset] = {}
        self.baseline_tasks: dict[str, Any] = {}  # baselines whose training has been started, by name

    @cached_property
    def source(self) -> Any:
        return open_source(self.config.source)

    @cached_property
    def has_labels(self) -> bool:
        return not self.config.labels.is_empty or self.source.labels() is not None

    @property
    def pretrains(self) -> bool:
        return not self.config.embed.weights

    @property
    def has_pretrained(self) -> bool:
        return self.config.embed.weights != NO_WEIGHTS

    @property
    def uri(self) -> str:
        return join(self.config.storage, self.config.run)

    @property
    def places(self) -> list[str]:
        """URIs that the run reads from and writes to."""
        return list(list_places(self.config).values())

    @cached_property
    def given_weights(self) -> str:
        return find_weights(self.config.embed.weights)

    @cached_property
    def given_weights_digest(self) -> str:
        from urbanclip_ray.model.weights import load_model

        return load_model(self.given_weights).digest

    @cached_property
    def caption_model(self) -> ModelReference | None:
        caption = self.config.caption
        if caption.captioner == "coca":
            return identify_weights(find_weights(caption.model))
        return resolve_model(caption) if caption.uses_model else None

    @cached_property
    def rules(self) -> Rules | None:
        """The rules of refinement that are switched on; a file of them that cannot be used raises ConfigError here."""
        from urbanclip_ray.captioners.rules import Rules, load_rules

        refine = self.config.refine
        return Rules(load_rules(refine.rules_file), refine.rules, refine.language) if refine.rules else None

    @cached_property
    def consistency_digest(self) -> str:
        """What the weights are by which sentences are scored, wherever they lie."""
        from urbanclip_ray.model.image_text import load_image_text

        return load_image_text(find_weights(self.config.refine.consistency.weights)).digest

    @cached_property
    def borrowed_shards(self) -> list[Dataset]:
        """The shards of other runs that `pack.also` names; ConfigError for what is none."""
        return [find_shards(uri) for uri in self.config.pack.also]

    @cached_property
    def start(self) -> str:
        """What pretraining starts from, by its content; empty for random weights."""
        from urbanclip_ray.model.pretrained import identify_start

        return identify_start(self.config.model)

    def encoder_uri(self, name: str) -> str:
        """What is opened for the representation `name` of `embed.also`."""
        return find_weights(self.config.embed.also[name])

    @cached_property
    def also_digests(self) -> dict[str, str]:
        """What the weights of `embed.also` are, wherever they lie; those that cannot be loaded raise ConfigError here."""
        from urbanclip_ray.evaluate.encoders import load_encoder

        return {name: load_encoder(self.encoder_uri(name)).digest for name in self.config.embed.also}

    def weights_uri(self) -> str:
        return weights_folder(self.datasets["pretrain"]) if self.pretrains else self.given_weights


class Stage(NamedTuple):
    """One box of the walk: its dataset, the job that makes it, what it is made of, and how."""

    name: str
    job: str
    parents: tuple[str, ...]  # those of them that the run has
    content: Callable[[Run], dict[str, Any]]
    make: Callable[[Run, Publication], None]
    wanted: Callable[[Run], bool]


def _tiles(run: Run, publication: Publication) -> None:
    from urbanclip_ray.sources.ingest import ingest_tiles

    ingest_tiles(run.source, run.config.ingest, publication)


def _labels(run: Run, publication: Publication) -> None:
    from urbanclip_ray.sources.labels import publish_labels, raster_table

    publish_labels(run.source.labels(), run.config.labels, run.datasets["tiles"], publication)
    if "rasters" in publication.facts:
        open_console().print(raster_table(publication.facts["rasters"]))


def _labels_content(run: Run) -> dict[str, Any]:
    from urbanclip_ray.sources.label_files import fingerprint_labels

    return fingerprint_labels(run.config.labels)


def caption_work(run: Run) -> CaptionWork:
    """What this run's captions are made from, once its tiles are there."""
    from urbanclip_ray.captioners.caption import CaptionWork
    from urbanclip_ray.captioners.store import STORE

    config = run.config
    given = run.source.captions() if config.caption.captioner == "given" else None
    store_uri = join(config.storage, STORE)  # beside the runs: all of them share it
    tiles, model = run.datasets["tiles"], run.caption_model
    return CaptionWork(tiles, config.caption, config.pixels, given, model, store_uri, run=config.run)


def _captions(run: Run, publication: Publication) -> None:
    from urbanclip_ray.captioners.caption import caption_tiles

    caption_tiles(caption_work(run), publication)


def _caption_content(run: Run) -> dict[str, Any]:
    model = run.caption_model
    exact = {} if model is None else {"model": model.name, "revision": model.revision}
    return {"caption": run.config.caption.content() | exact, "pixels": run.config.pixels.content()}


def _pairs(run: Run, publication: Publication) -> None:
    from urbanclip_ray.captioners.refine import RefineWork, refine_captions

    config = run.config
    tiles = run.datasets["tiles"] if config.refine.needs_tiles else None
    weights = find_weights(config.refine.consistency.weights) if config.refine.consistency.weights else ""
    work = RefineWork(tiles, run.rules, weights, config.pixels)
    refine_captions(run.datasets["captions"], config.refine, publication, work)


def _pairs_content(run: Run) -> dict[str, Any]:
    from urbanclip_ray.captioners.sentences import SPLITTER_VERSION

    refine = run.config.refine
    content: dict[str, Any] = {"refine": refine.content(), "sentences": SPLITTER_VERSION}
    if run.rules is not None:
        content["rules"] = run.rules.content()
    if refine.consistency.weights:  # a score is of a model, and of the pixels that it is shown
        content |= {"scored_by": run.consistency_digest, "pixels": run.config.pixels.content()}
    return content


def adapt(stage: Stage, config: RunConfig) -> Stage:
    """A stage with the parents that this config gives it: only what holds sentences against tiles is made of tiles."""
    if stage.name == "pairs" and config.refine.needs_tiles:
        return stage._replace(parents=(*stage.parents, "tiles"))
    return stage


def _splits(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.splits import publish_splits

    publish_splits(run.datasets["tiles"], run.config.split, run.source.parts(), publication)


def _shards(run: Run, publication: Publication) -> None:
    from urbanclip_ray.train.pack import pack_shards

    (tiles, pairs, splits), split = (run.datasets[name] for name in ("tiles", "pairs", "splits")), run.config.split
    pack_shards(tiles, pairs, splits, split.outer, run.config.pack, publication, split.transductive, run.borrowed_shards)


def _shards_content(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = {"pack": run.config.pack.content(), "outer": run.config.split.outer}
    return content | ({"also": [shards.sha256 for shards in run.borrowed_shards]} if run.config.pack.also else {})


def _pretrain(run: Run, publication: Publication) -> None:
    from urbanclip_ray.train.launch import pretrain

    pretrain(run.config, run.datasets["shards"], publication)


def _embeddings(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.embed import embed_tiles

    config = run.config
    embed_tiles(run.datasets["tiles"], run.weights_uri(), config.embed, config.pixels, publication)


def _untrained(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.embed import embed_tiles

    config, seed = run.config, run.config.model.seed
    tiles, features = run.datasets["tiles"], run.config.embed.features
    embed_tiles(tiles, run.weights_uri(), config.embed, config.pixels, publication, seed, features)


def _retrieval(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.retrieval import measure_retrieval

    embeddings, pairs, splits = (run.datasets[name] for name in ("embeddings", "pairs", "splits"))
    outer, text_mode, each = run.config.split.outer, run.config.train.text_mode, run.config.embed
    measure_retrieval(embeddings, pairs, splits, run.weights_uri(), outer, text_mode, publication, each)


def _prompts(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.prompts import score_prompts

    score_prompts(run.datasets["embeddings"], run.weights_uri(), run.config.prompts, publication)


def _probe(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.probe import probe

    config, made = run.config, run.datasets
    probe(
        made["labels"],
        made["splits"],
        made["tiles"],
        representations(made),
        config.probe,
        config.pixels,
        publication,
        config.split,
    )


def representations(made: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The embeddings that a run has, by what made them: pretrained, untrained, prompts, baselines, those of embed.also."""
    found = {name: made[name] for name in ("untrained", "prompts") if name in made}
    if "embeddings" in made:
        found["pretrained"] = made.get("pretrained_features", made["embeddings"])
    prefixes = ("baseline_", "also_")
    return found | {
        stage.removeprefix(prefix): dataset
        for stage, dataset in made.items()
        for prefix in prefixes
        if stage.startswith(prefix)
    }


def _pretrain_content(run: Run) -> dict[str, Any]:
    return run.config.pretrain_content() | ({"start": run.start} if run.config.model.pretrained else {})


def embed_content(run: Run, with_features: bool = True) -> dict[str, Any]:
    """How tiles become vectors; texts are compared with the output alone, whatever `embed.features` asks for."""
    embed = run.config.embed.content()
    if not with_features or run.config.embed.features == "embedding":
        del embed["features"]
    return {"embed": embed, "pixels": run.config.pixels.content()}


def pretrained_content(run: Run, with_features: bool = True) -> dict[str, Any]:
    weights = {} if run.pretrains else {"weights_digest": run.given_weights_digest}
    return embed_content(run, with_features) | weights


def _is_needed_for_probe(run: Run) -> bool:
    return run.has_labels


STAGES: tuple[Stage, ...] = (
    Stage(
        "tiles",
        "ingest",
        (),
        lambda run: {
            "source": run.config.source.content(),
            "ingest": run.config.ingest.content(),
            "fingerprint": run.source.fingerprint(),
        },
        _tiles,
        lambda _: True,
    ),
    Stage("labels", "ingest", ("tiles",), _labels_content, _labels, _is_needed_for_probe),
    Stage(
        "captions",
        "caption",
        ("tiles",),
        _caption_content,
        _captions,
        lambda run: run.pretrains,
    ),
    Stage(
        "pairs",
        "refine",
        ("captions",),
        _pairs_content,
        _pairs,
        lambda run: run.pretrains,
    ),
    Stage("splits", "split", ("tiles",), lambda run: {"split": run.config.split.content()}, _splits, lambda _: True),
    Stage(
        "shards",
        "pack",
        ("tiles", "pairs", "splits"),
        _shards_content,
        _shards,
        lambda run: run.pretrains,
    ),
    Stage(
        "pretrain",
        "pretrain",
        ("shards",),
        _pretrain_content,
        _pretrain,
        lambda run: run.pretrains,
    ),
    Stage(
        "embeddings",
        "embed",
        ("tiles", "pretrain"),
        lambda run: pretrained_content(run, with_features=False),
        _embeddings,
        lambda run: run.has_pretrained,
    ),
    Stage(
        "untrained",
        "embed",
        ("tiles", "pretrain"),
        lambda run: pretrained_content(run) | {"untrained_seed": run.config.model.seed},
        _untrained,
        lambda run: run.has_pretrained and run.has_labels and run.config.probe.judges("untrained"),
    ),
    Stage(
        "retrieval",
        "embed",
        ("embeddings", "pairs", "splits"),
        lambda run: {"outer": run.config.split.outer, "text_mode": run.config.train.text_mode},
        _retrieval,
        lambda run: run.pretrains,
    ),
    Stage(
        "prompts",
        "embed",
        ("embeddings",),
        lambda run: {"prompts": run.config.prompts.content()},
        _prompts,
        lambda run: run.has_pretrained,  # which is a CoCa, with a text tower
    ),
    Stage(
        "probe",
        "probe",
        ("labels", "splits", "embeddings", "untrained", "prompts", "tiles"),
        lambda run: {"probe": run.config.probe.content(), "pixels": run.config.pixels.content()},
        _probe,
        _is_needed_for_probe,
    ),
)
