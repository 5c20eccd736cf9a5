"""The config tree: what is refused, in which words, and what takes part in digests."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from urbanclip_ray.config import (
    CaptionConfig,
    ConfigError,
    ConsistencyConfig,
    EmbedConfig,
    FolderSource,
    IngestConfig,
    ResourcesConfig,
    RsicdSource,
    RunConfig,
    StoreConfig,
    TrainConfig,
    WorldSource,
)
from urbanclip_ray.overrides import apply_overrides, build_config

DEFAULT = RunConfig()
GROUP = {"ray.io/node-group": "caption"}


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(DEFAULT, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400, "the message is for a person, not a dump of the section"
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.lr=1", ["'trian.lr'", "did you mean 'train'?"]),
        ("train.lrr=1", ["'train.lrr'", "train has no 'lrr'", "did you mean 'lr'?"]),
        ("train.epoch=1", ["did you mean 'epochs'?"]),
        ("train.augment.flip=false", ["train.augment has no 'flip'", "did you mean 'flips'?"]),
        ("split.zzz=1", ["it has also, block_km,"]),  # nothing is close: everything there is
        ("train.lr.value=1", ["'train.lr.value'", "train.lr is a value, not a section"]),
        ("source.tile_px=54", ["source has no 'tile_px'"]),  # of another kind of source
        ('model={"vocab": 300}', ["'model.vocab'", "remove it or correct its spelling"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override, parts):
    message = refusal(override)
    assert message.startswith("unknown key")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "key", "got"),
    [
        ("train.lr=fast", "train.lr", "'fast'"),
        ("train.lr=NaN", "train.lr", "nan"),
        ("train.lr=0", "train.lr", "0"),
        ("train.epochs=2.5", "train.epochs", "2.5"),
        ("train.zero_stage=4", "train.zero_stage", "4"),
        ("train.ema_decay=1", "train.ema_decay", "1"),
        ("train.freeze=[tower]", "train.freeze.0", "'tower'"),
        ("train.lr_scales={image: 0}", "train.lr_scales.image", "0"),
        ("train.augment.min_area_share=0", "train.augment.min_area_share", "0"),
        ("caption.captioner=gpt", "caption.captioner", "'gpt'"),
        ("split.also=[blocks, everywhere]", "split.also.1", "'everywhere'"),
        ("source.kind=ftp", "source.kind", "'ftp'"),
        ("source.kind=[a]", "source.kind", "['a']"),
        ("run=../other", "run", "'../other'"),
        ("run=true", "run", "True"),
        ("resources.num_workers=0", "resources.num_workers", "0"),
        ("resources.num_workers=many", "resources.num_workers", "'many'"),
        ("resources.num_workers=[3, 2]", "resources.num_workers", "[3, 2]"),
        ("resources.num_workers=[1, 2, 3]", "resources.num_workers", "[1, 2, 3]"),
        ("caption.tiles_per_batch=0", "caption.tiles_per_batch", "0"),
        ("train.checkpoint_every_steps=0", "train.checkpoint_every_steps", "0"),
        ("embed.gpus_per_actor=-1", "embed.gpus_per_actor", "-1"),
        ("caption.gpus_per_actor=-1", "caption.gpus_per_actor", "-1"),
        ("caption.dtype=int8", "caption.dtype", "'int8'"),
        ("caption.decoding.top_p=0", "caption.decoding.top_p", "0"),
        ("caption.decoding.max_new_tokens=0", "caption.decoding.max_new_tokens", "0"),
    ],
)
def test_a_bad_value_names_its_key_and_itself(override, key, got):
    message = refusal(override)
    assert message.startswith(f"{key}: ")
    assert got in message


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("caption.accelerator_type=L4", "caption", "accelerator_type=L4 without a GPU: set gpus_per_actor too"),
        ("resources.accelerator_type=L4", "resources", "accelerator_type=L4 without a GPU: set resources.use_gpu=true"),
        ("embed.accelerator_type=an L4", "embed.accelerator_type", "one of Ray's names for an accelerator"),
        ("resources.placement=TIGHT", "resources.placement", "STRICT_SPREAD"),
        ("resources.node_labels={a: b c}", "resources.node_labels", "a label of a node and its value"),
    ],
)
def test_what_no_node_could_have_is_refused_with_the_fix(override, key, fix):
    message = refusal(override)
    assert message.startswith(key)
    assert fix in message


def test_engines_of_vllm_are_placed_by_their_gpus_alone():
    message = refusal("caption.captioner=vllm", "caption.model=a", "caption.gpus_per_actor=1", "caption.cpus_per_actor=4")
    assert "leave out cpus_per_actor, memory_per_actor_bytes and node_labels" in message


def test_every_problem_has_its_line():
    with pytest.raises(ConfigError) as caught:
        build_config({"train": {"lr": -1, "epochs": 0}, "nonsense": 1})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["train.epochs", "train.lr", "unknown key 'nonsense'"]


@pytest.mark.parametrize(
    ("overrides", "start", "fix"),
    [
        (["train.global_batch_size=300"], "train.global_batch_size=300 is not a multiple of", "a multiple of it"),
        (["resources.num_workers=3"], "train.contrastive_batch_size=256 cannot be shared out to 3 workers", "=258"),
        (["resources.num_workers=512"], "train.contrastive_batch_size=256 cannot be shared out to 512 workers", "=512"),
        (
            ["train.contrastive_batch_size=254", "train.global_batch_size=254", "train.micro_batch_size=64"],
            "train.contrastive_batch_size=254 is 127 rows for each of 2 workers",
            "set train.micro_batch_size=127",
        ),
        (["resources.num_workers=[5, 7]"], "train.contrastive_batch_size=256 cannot be shared out to 7 workers", "divisor"),
    ],
)
def test_batch_sizes_that_do_not_fit_each_other_are_refused_with_the_fix(overrides, start, fix):
    message = refusal(*overrides)
    assert message.startswith(start)
    assert fix in message


def test_the_fixes_named_for_batch_sizes_are_accepted():
    for overrides in (
        ["resources.num_workers=3", "train.contrastive_batch_size=258", "train.global_batch_size=258"],
        ["train.contrastive_batch_size=254", "train.global_batch_size=254", "train.micro_batch_size=127"],
        ["train.global_batch_size=1024"],  # four contrastive batches a step
    ):
        config = apply_overrides(DEFAULT, overrides)
        cut = config.train.cut_step(config.resources.max_workers)
        assert cut.rows_per_step * config.resources.max_workers == config.train.global_batch_size
        assert cut.rows_per_contrastive * config.resources.max_workers == config.train.contrastive_batch_size


@pytest.mark.parametrize(
    ("micro", "num_ranks", "expected"),
    [
        (128, 2, (128, 1, 2)),  # fits: one forward
        (256, 2, (128, 1, 2)),  # more than a rank has
        (64, 2, (64, 2, 2)),
        (100, 2, (64, 2, 2)),  # no more than asked for, and equally large
        (128, 1, (128, 2, 2)),
        (128, 4, (64, 1, 2)),
        (1, 8, (1, 32, 2)),
    ],
)
def test_a_step_is_cut_into_equal_forwards_of_at_most_a_micro_batch(micro, num_ranks, expected):
    train = TrainConfig(micro_batch_size=micro, contrastive_batch_size=256, global_batch_size=512)
    assert train.cut_step(num_ranks) == expected


def test_only_numbers_of_workers_that_can_share_out_a_step_are_used():
    assert apply_overrides(DEFAULT, ["resources.num_workers=[1, 9]"]).worker_counts() == [1, 2, 4, 8]
    config = apply_overrides(DEFAULT, ["resources.num_workers=[3, 4]"])
    assert config.worker_counts() == [4]
    assert (config.resources.min_workers, config.resources.max_workers) == (3, 4)
    assert DEFAULT.worker_counts() == [2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["caption.captioner=transformers"], "caption.captioner=transformers needs caption.model: a directory"),
        (["caption.decoding.num_samples=2"], "caption.decoding.num_samples=2 with temperature 0 would repeat"),
        (["refine.min_words=61"], "refine.min_words is above refine.max_words"),
        (["split.test_share=0.8"], "split.test_share + split.val_share leave nothing to train on"),
        (["train.contrastive_weight=0", "train.caption_weight=0"], "train.contrastive_weight and train.caption_weight"),
        (["train.freeze=[image, text, decoder, heads]"], "train.freeze leaves no part of the model that a loss"),
        (
            ["train.freeze=[image, text, heads]", "train.caption_weight=0"],
            "train.freeze leaves no part of the model that a loss",
        ),
        (["train.freeze=[text]", "train.lr_scales={text: 0.1}"], "train.lr_scales speaks of text, which train.freeze keeps"),
        (["train.compile=true", "train.zero_stage=3"], "train.compile cannot trace the gathering of zero_stage 3"),
        (["train.offload_optimizer=true", "train.zero_stage=0"], "train.offload_optimizer is a part of ZeRO"),
    ],
)
def test_values_that_contradict_each_other_are_named_without_the_rest_of_the_section(overrides, message):
    assert refusal(*overrides).startswith(message)


def test_overrides_are_read_as_numbers_lists_and_text():
    config = apply_overrides(
        DEFAULT,
        [
            "train.lr=1e-4",
            "train.augment.flips=false",
            "split.also=[random, group]",
            'probe.indicators=["carbon", "gdp"]',
            "probe.ridge_alphas=[1, 2.5]",
            "source.uri=s3://bucket/tiles=2024",  # only the first = divides
            "run=2024",
        ],
    )
    assert config.train.lr == 1e-4
    assert config.train.augment.flips is False
    assert config.split.also == ("random", "group")
    assert config.probe.indicators == ("carbon", "gdp")
    assert config.probe.ridge_alphas == (1.0, 2.5)
    assert isinstance(config.source, FolderSource)
    assert config.source.uri == "s3://bucket/tiles=2024"
    assert config.run == "2024"
    assert config.pack == DEFAULT.pack


def test_the_last_override_of_a_key_holds_and_the_config_given_stays_as_it_was():
    config = apply_overrides(DEFAULT, ["train.lr=1", "train.lr=2"])
    assert config.train.lr == 2
    assert DEFAULT.train.lr == 1e-3


def test_another_kind_of_source_starts_from_its_own_defaults():
    config = apply_overrides(DEFAULT, ["source.uri=old", "source.kind=rsicd", "source.captions_file=c.json"])
    assert config.source == RsicdSource(captions_file="c.json")  # the uri of the folder is not carried over
    assert apply_overrides(config, ["source.kind=world", "source.tile_px=60"]).source == WorldSource(tile_px=60)
    assert "did you mean 'captions_file'" in refusal("source.kind=rsicd", "source.caption_file=c.json")


@pytest.mark.parametrize("item", ["train.lr", "=3", ""])
def test_an_override_without_key_or_value_shows_how_to_write_it(item):
    assert "write it as key=value, for example train.lr=1e-4" in refusal(item)


def test_an_unfinished_list_names_its_key():
    assert refusal("split.also=[random") == "split.also: '[random' is not a list: write [a, b]"


def test_configs_are_frozen_and_unknown_fields_are_refused_on_construction():
    with pytest.raises(ValidationError, match="frozen"):
        DEFAULT.train.lr = 1.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainConfig(learning_rate=1.0)


@pytest.mark.parametrize(
    "section",
    [
        (IngestConfig(), IngestConfig(tiles_per_batch=7)),
        (CaptionConfig(), CaptionConfig(num_actors=9, tiles_per_batch=1)),
        (TrainConfig(), TrainConfig(zero_stage=2, offload_optimizer=True, compile=True, keep_checkpoints=9, max_failures=0)),
        (TrainConfig(), TrainConfig(collective_timeout_s=60)),
        (CaptionConfig(), CaptionConfig(prompt="of another captioner", dtype="float32", decoding={"num_beams": 3})),
        (
            CaptionConfig(captioner="transformers", model="a"),
            CaptionConfig(captioner="transformers", model="b", gpus_per_actor=1, device_map="auto", max_attempts=1),
        ),
        (EmbedConfig(), EmbedConfig(num_actors=5, gpus_per_actor=0.5, tiles_per_batch=1)),
        (StoreConfig(), StoreConfig(root="s3://a", endpoint="http://h", region="r", profile="p")),
        (ResourcesConfig(), ResourcesConfig(num_workers=7, cpus_per_worker=3, use_gpu=True)),
        (
            ResourcesConfig(),
            ResourcesConfig(
                use_gpu=True, accelerator_type="A100", memory_per_worker_bytes=1, placement="SPREAD", node_labels=GROUP
            ),
        ),
        (EmbedConfig(), EmbedConfig(gpus_per_actor=1, accelerator_type="L4", cpus_per_actor=2, memory_per_actor_bytes=1)),
        (EmbedConfig(), EmbedConfig(node_labels=GROUP)),
        (ConsistencyConfig(), ConsistencyConfig(cpus_per_actor=2, node_labels=GROUP)),
        (IngestConfig(), IngestConfig(cpus_per_task=0.5, memory_per_task_bytes=1, node_labels=GROUP)),
        (
            CaptionConfig(captioner="transformers", model="a"),
            CaptionConfig(captioner="transformers", model="a", gpus_per_actor=1, accelerator_type="L4", node_labels=GROUP),
        ),
    ],
    ids=lambda pair: type(pair[0]).__name__,
)
def test_how_the_work_is_done_is_not_part_of_what_is_made(section):
    default, changed = section
    assert default != changed
    assert default.content() == changed.content()


@pytest.mark.parametrize("change", [{"freeze": ["text"]}, {"lr_scales": {"image": 0.1}}, {"ema_decay": 0.99}])
def test_a_field_that_was_added_later_takes_part_only_where_it_is_used(change):
    content = TrainConfig(**change).content()
    assert content == TrainConfig().content() | change


def test_what_is_made_is_part_of_the_content():
    content = TrainConfig().content()
    assert content != TrainConfig(lr=1e-4).content()
    assert content != TrainConfig(augment={"flips": False}).content()
    assert set(TrainConfig.model_fields) - set(content) == {
        "micro_batch_size",
        "zero_stage",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "max_failures",
        "collective_timeout_s",
        *("offload_optimizer", "activation_checkpointing", "compile"),
        *("freeze", "lr_scales", "ema_decay"),  # at their defaults
    }
    assert ResourcesConfig().content() == {}
    vision_language = CaptionConfig(captioner="transformers", model="a")
    for change in ({"prompt": "b"}, {"dtype": "float32"}, {"decoding": {"seed": 1}}):
        assert CaptionConfig(captioner="transformers", model="a", **change).content() != vision_language.content()
    assert json.loads(json.dumps(content)) == content  # JSON-ready: no tuples, no objects
