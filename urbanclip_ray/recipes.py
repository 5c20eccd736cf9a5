"""Complete runs by name: functions that return a config, some derived from others."""

from __future__ import annotations

from collections.abc import Callable

from urbanclip_ray.ablations import ablations, change
from urbanclip_ray.config import (
    AugmentConfig,
    BaselinesConfig,
    CaptionConfig,
    ConfigError,
    ConsistencyConfig,
    DecodingConfig,
    Domain,
    EmbedConfig,
    FolderSource,
    ModelConfig,
    PixelsConfig,
    ProbeConfig,
    RefineConfig,
    ResourcesConfig,
    RsicdSource,
    RunConfig,
    SplitConfig,
    TrainConfig,
    TuneConfig,
    UrbanClipSource,
    WorldSource,
)
from urbanclip_ray.recipe_files import is_recipe_file, read_recipe_file

# For captions of language models, which speak of moods, of people and of what a place might be used for: see rules.yaml. A
# sentence that 500 tiles share, a tenth of a city, tells none of them apart. People's captions need none of it, and the
# released ones are taken as the paper took them.
MODEL_CAPTIONS = RefineConfig(rules=("all",), max_tiles_per_sentence=500)


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
    """Twelve trials of the demo, of 2 epochs each: loss weights, learning rate, views of a tile; then its probe."""
    base = world_demo()
    # of the winner alone, and what needs no encoder: minutes that are not spent on what world_demo shows already
    methods = ("pretrained", "pretrained_mlp", "colour", "coordinates", "mean")
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
            "train": base.train.model_copy(update={"epochs": 2, "validations": 1}),
            "embed": base.embed.model_copy(update={"views": 1}),  # with 8, judging takes as long as training
            "probe": base.probe.model_copy(update={"methods": methods}),
            "tune": TuneConfig(
                space=space,
                spaces=("probe",),
                num_trials=12,
                num_probes=6,
                sampler="halton",
                samples_per_report=1152,  # 9 steps of 26: three reports a trial
                grace_samples=1152,
                max_train_tiles=256,  # of 1,712, so that reports are quick beside 2 epochs
            ),
        }
    )


def rsicd_small() -> RunConfig:
    """A 9-million-parameter CoCa on RSICD's own captions and test split, for two CPU cores (eleven minutes in bf16)."""
    return RunConfig(
        run="rsicd_small",
        source=RsicdSource(),
        caption=CaptionConfig(captioner="given"),
        # the benchmark's gallery holds all five captions of every image, repeated ones too
        refine=RefineConfig(min_words=1, max_words=100, repeats="keep"),
        split=SplitConfig(outer="source", val_share=0.05, num_draws=1),
        model=ModelConfig(architecture="coca_tiny_96", vocab_size=2000, patch_dropout=0.75),
        train=TrainConfig(
            epochs=24,
            augment=AugmentConfig(min_area_share=0.4, flips=True, brightness=0.2),
            zero_stage=0,  # so small an optimizer costs more to share out than it saves: stage 1 is a tenth slower
        ),
        embed=EmbedConfig(precision="auto"),
    )


def rsicd_against_none() -> RunConfig:
    """Text against no text on RSICD: a pretraining of minutes, and baselines with as many samples, for jobs/experiment.py."""
    base = rsicd_small()
    return base.model_copy(
        update={
            "run": "rsicd_against_none",
            "refine": RefineConfig(),  # each sentence of a tile once: the benchmark's gallery is not asked for here
            "model": base.model.model_copy(update={"patch_dropout": 0.5}),  # as in the results that are recorded of it
            "train": base.train.model_copy(
                update={"epochs": 3, "contrastive_batch_size": 128, "global_batch_size": 128, "lr": 5e-4, "validations": 1}
            ),
            "baselines": BaselinesConfig(names=("simclr", "image_only", "pca")),
        }
    )


def kingcounty_probe() -> RunConfig:
    """Weights judged on tiles around sold houses, in zipcodes that the probe never saw; for jobs/experiment.py."""
    base = probe_weights()
    return base.model_copy(
        update={
            "run": "kingcounty_probe",
            "source": FolderSource(
                metadata="labels.csv",
                group_column="zipcode",
                indicators=("price", "price_per_sqft", "mean_price_per_sqft_500m_others", "n_houses_500m", "sqft_lot"),
            ),
            "pixels": PixelsConfig(crop_bottom_px=20),  # an attribution strip, which a model would read
            "split": SplitConfig(outer="group", num_draws=5),
            "embed": EmbedConfig(views=8, features="tokens"),
            "probe": ProbeConfig(target="log", methods=()),
        }
    )


def own_tiles() -> RunConfig:
    """The whole walk on a folder of one's own tiles: rule-based captions, spatial blocks."""
    return RunConfig(
        run="own_tiles",
        source=FolderSource(),
        caption=CaptionConfig(captioner="land_cover"),
        refine=MODEL_CAPTIONS,  # for when a model is named; nothing that land_cover says breaks a rule
        split=SplitConfig(outer="blocks", also=("random",)),
        embed=EmbedConfig(views=8),
    )


def bootstrap() -> RunConfig:
    """Own tiles described by the weights of an earlier run, refined by its score, and learnt beside that run's own pairs."""
    return bootstrap_from(own_tiles(), "runs/rsicd_small").model_copy(update={"run": "bootstrap"})


def bootstrap_from(base: RunConfig, teacher: str) -> RunConfig:
    """`base` with captions drawn from the CoCa of the run `teacher`, of which that same CoCa keeps the better half.

    That is the captioning and filtering of BLIP (Li et al. 2022, arXiv 2201.12086) with one model in both places. What
    it keeps is what it believes, right or wrong; every sentence is scored, so both halves can be looked at.
    """
    drawn = DecodingConfig(temperature=1.0, top_p=0.9, num_samples=4)
    return change(
        base,
        {
            "caption": {"captioner": "coca", "model": teacher, "decoding": drawn},
            "refine": {"consistency": ConsistencyConfig(weights=teacher, top_share=0.5)},
            "pack": {"also": (teacher,)},
        },
    )


def probe_weights() -> RunConfig:
    """Existing weights (`embed.weights`) judged on a folder of one's own tiles and labels; nothing is trained."""
    base = own_tiles()
    return base.model_copy(update={"run": "probe_weights", "split": SplitConfig(outer="group", also=("random",), num_draws=5)})


def urbanclip_beijing() -> RunConfig:
    """The paper's set-up for Beijing: released captions and labels, your own tiles, CoCa ViT-L-14 from its weights, on GPUs.

    As in the released code (arXiv 2310.18340): weights, learning rate, batch of 128, 100 epochs, equal loss weights, AdamW,
    no augmentation, one sentence of a tile at a time, the MLP probe on the natural logarithm, a random split of 64/16/20.
    Otherwise: tiles of yours that have no released caption are described by another model, the sentence is drawn anew every
    epoch, learning rates warm up and decay, gradients are clipped, matrix products are bf16, a zero drops a tile for that
    indicator alone (there for all three), and the outer split holds blocks of about ten by ten tiles out of pretraining,
    because random tiles have neighbours in training; the paper's split is reported beside it as transductive.
    """
    return RunConfig(
        run="urbanclip_beijing",
        source=UrbanClipSource(cities=("Beijing",)),
        caption=CaptionConfig(
            captioner="given",
            model="Qwen/Qwen2.5-VL-7B-Instruct",  # describes the tiles that have no released caption
            revision="cc594898137f460bfe9f0759e9844b3ce807cfb5",
            dtype="bfloat16",
            gpus_per_actor=1,
        ),
        split=SplitConfig(outer="blocks", also=("random",), block_km=8, test_share=0.2, val_share=0.16),
        model=ModelConfig(architecture="coca_ViT-L-14", pretrained="mscoco_finetuned_laion2b_s13b_b90k", tokenizer="open_clip"),
        train=TrainConfig(
            epochs=100,
            micro_batch_size=64,
            contrastive_batch_size=128,
            global_batch_size=128,
            lr=3e-5,
            weight_decay=0.01,
            beta2=0.999,
            eps=1e-8,
            augment=AugmentConfig(min_area_share=1, flips=False),
            checkpoint_every_steps=500,  # 7.7 GB each
        ),
        embed=EmbedConfig(gpus_per_actor=1),
        probe=ProbeConfig(target="log"),
        resources=ResourcesConfig(num_workers=2, use_gpu=True),
    )


def urbanclip_four_cities() -> RunConfig:
    """As urbanclip_beijing on Beijing, Shanghai, Guangzhou and Shenzhen at once, with whole cities held out beside blocks.

    One model for four cities, and R² over all their tiles: the paper trains and judges every city by itself. Splits by group
    are splits by city; `split.outer=group` keeps the held-out city out of pretraining, too.
    """
    base = urbanclip_beijing()
    return base.model_copy(
        update={
            "run": "urbanclip_four_cities",
            "source": UrbanClipSource(cities=("Beijing", "Shanghai", "Guangzhou", "Shenzhen")),
            "split": base.split.model_copy(update={"also": ("group", "random")}),
        }
    )


def urbanclip_protocol() -> RunConfig:
    """The released code's own protocol for Beijing, to be compared with: it leaks, and every score says transductive.

    Random tiles, 64/16/20 (80/20, and 80/20 again inside), all of them in pretraining; natural logarithm; its MLP alone, with
    the coordinates beside it, which look at no image.
    """
    base = urbanclip_beijing()
    split = SplitConfig(outer="random", test_share=0.2, val_share=0.16, transductive=True, num_draws=5)
    probe = ProbeConfig(target="log", methods=("pretrained_mlp", "coordinates", "mean"))
    return base.model_copy(update={"run": "urbanclip_protocol", "split": split, "probe": probe})


def verify_gpu() -> RunConfig:
    """A CoCa ViT-B-32 through every stage on 200 tiles and one GPU; what `make verify-gpu` runs."""
    return RunConfig(
        run="verify_gpu",
        source=WorldSource(max_tiles=200),
        caption=CaptionConfig(captioner="land_cover"),
        split=SplitConfig(outer="blocks", block_km=1500, num_draws=2),
        model=ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip"),
        train=TrainConfig(epochs=10, micro_batch_size=32, contrastive_batch_size=32, global_batch_size=32, lr=1e-4),
        embed=EmbedConfig(num_actors=1, gpus_per_actor=1, precision="auto"),
        probe=ProbeConfig(mlp_max_epochs=20),
        resources=ResourcesConfig(num_workers=1, use_gpu=True, cpus_per_worker=4),  # threads that decode for the GPU
    )


def verify_cpu() -> RunConfig:
    """As verify_gpu with a small model on a CPU; what `jobs/verify_gpu.py --cpu` runs."""
    base = verify_gpu()
    return base.model_copy(
        update={
            "run": "verify_cpu",
            "model": ModelConfig(architecture="coca_tiny_27", vocab_size=600),
            "train": base.train.model_copy(update={"lr": 3e-4}),
            "embed": EmbedConfig(num_actors=1),
            "resources": ResourcesConfig(num_workers=1),
        }
    )


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
    recipe.__name__: recipe
    for recipe in (
        world_demo,
        demo_search,
        rsicd_small,
        rsicd_against_none,
        kingcounty_probe,
        own_tiles,
        bootstrap,
        probe_weights,
        urbanclip_beijing,
        urbanclip_four_cities,
        urbanclip_protocol,
        verify_gpu,
        verify_cpu,
        tiny_test,
    )
}


def load_recipe(name: str) -> RunConfig:
    """The config of a recipe, of one of its ablations as RECIPE/ARM, or of a file as FILE.yaml (see `recipe_files`).

    Raises ConfigError naming those there are.
    """
    if is_recipe_file(name):
        return read_recipe_file(name, load_recipe)
    base, slash, arm = name.partition("/")
    if base not in RECIPES:
        raise ConfigError(f"--recipe {base!r} is not known; choose one of {', '.join(RECIPES)}, or name a FILE.yaml")
    config = RECIPES[base]()
    if not slash:
        return config
    arms = ablations(config)
    if arm not in arms:
        raise ConfigError(f"--recipe {name!r}: {base} has no ablation {arm!r}; choose one of {', '.join(arms)}")
    return arms[arm]
