"""Complete runs by name: functions that return a config, some derived from others."""

from __future__ import annotations

from collections.abc import Callable

from urbanclip_ray.config import (
    AugmentConfig,
    CaptionConfig,
    ConfigError,
    Domain,
    EmbedConfig,
    FolderSource,
    ModelConfig,
    ProbeConfig,
    RefineConfig,
    RsicdSource,
    RunConfig,
    SplitConfig,
    TrainConfig,
    TuneConfig,
    WorldSource,
)


def world_demo() -> RunConfig:
    """NASA Blue Marble land tiles, rule-based captions, population of their cities; what `make demo` runs."""
    return RunConfig(
        run="demo",
        source=WorldSource(tile_px=27, stride_px=27),  # 1.8 degrees, about 200 km
        caption=CaptionConfig(captioner="land_cover"),
        split=SplitConfig(outer="blocks", also=("random",), block_km=1500),
        model=ModelConfig(architecture="coca_tiny_27", vocab_size=600),
        train=TrainConfig(
            epochs=10,
            micro_batch_size=64,
            contrastive_batch_size=128,
            global_batch_size=128,
            lr=3e-4,
            text_mode="paragraph",
            augment=AugmentConfig(min_area_share=0.6, flips=True),
        ),
        embed=EmbedConfig(views=8),
        probe=ProbeConfig(target="log1p"),
    )


def demo_search() -> RunConfig:
    """Eight trials of the demo, of 4 epochs each: loss weights, learning rate, and the views of a tile that are embedded."""
    base = world_demo()
    space = {
        "train.lr": Domain(loguniform=(1e-4, 2e-3)),
        "train.contrastive_weight": Domain(loguniform=(0.25, 4)),
        "train.caption_weight": Domain(loguniform=(0.25, 4)),
        # of the probe's settings the one that moves its score: the penalty is chosen anew for every score anyway
        "embed.views": Domain(choice=(1, 8)),
    }
    return base.model_copy(
        update={
            "run": "demo_search",
            "train": base.train.model_copy(update={"epochs": 4, "validations": 1}),
            "tune": TuneConfig(
                space=space,
                num_trials=8,
                sampler="halton",
                samples_per_report=2304,  # 18 steps of 53: three reports a trial
                grace_samples=2304,
                max_train_tiles=512,  # of 1,712: a report with 8 views takes half a minute on two CPU cores
            ),
        }
    )


def rsicd_small() -> RunConfig:
    """A 9-million-parameter CoCa on RSICD's own captions and test split, for two CPU cores (about half an hour)."""
    return RunConfig(
        run="rsicd_small",
        source=RsicdSource(),
        caption=CaptionConfig(captioner="given"),
        # the benchmark's gallery holds all five captions of every image, repeated ones too
        refine=RefineConfig(min_words=1, max_words=100, repeats="keep"),
        split=SplitConfig(outer="source", val_share=0.05, num_draws=1),
        model=ModelConfig(architecture="coca_tiny_96", vocab_size=2000, patch_dropout=0.5),
        train=TrainConfig(epochs=24, augment=AugmentConfig(min_area_share=0.4, flips=True, brightness=0.2)),
    )


def own_tiles() -> RunConfig:
    """The whole walk on a folder of one's own tiles: rule-based captions, spatial blocks."""
    return RunConfig(
        run="own_tiles",
        source=FolderSource(),
        caption=CaptionConfig(captioner="land_cover"),
        split=SplitConfig(outer="blocks", also=("random",)),
        embed=EmbedConfig(views=8),
    )


def probe_weights() -> RunConfig:
    """Existing weights (`embed.weights`) judged on a folder of one's own tiles and labels; nothing is trained."""
    base = own_tiles()
    return base.model_copy(update={"run": "probe_weights", "split": SplitConfig(outer="group", also=("random",), num_draws=5)})


def tiny_test() -> RunConfig:
    """The whole walk in a minute, on a folder of small tiles; what the tests run."""
    return RunConfig(
        run="tiny_test",
        source=FolderSource(),
        split=SplitConfig(outer="blocks", also=("random",), num_draws=2),
        model=ModelConfig(architecture="coca_test_16", vocab_size=400),
        train=TrainConfig(
            epochs=2,
            micro_batch_size=8,
            contrastive_batch_size=16,
            global_batch_size=16,
            validations=2,
            precision="fp32",
        ),
        probe=ProbeConfig(mlp_max_epochs=5),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (world_demo, demo_search, rsicd_small, own_tiles, probe_weights, tiny_test)
}


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe; raises ConfigError naming the recipes there are."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name!r} is not known; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
