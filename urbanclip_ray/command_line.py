"""What all jobs share: their options, their help, and errors without a traceback."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from urbanclip_ray.config import RunConfig, Section
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import RECIPES, load_recipe
from urbanclip_ray.remote_errors import explain_error, is_remote


class Look(NamedTuple):
    """What a job does with `flag` instead of making its dataset. `show` takes the run with the parents of that dataset, and
    the number of tiles of --limit (None: its own default); where it looks `at_result`, the dataset must be made.
    """

    flag: str
    help: str
    show: Callable[[Any, int | None], None]
    at_result: bool = False


def run_job(description: str | None, sections: Sequence[str], stages: Sequence[str] | None, looks: Sequence[Look] = ()) -> None:
    """Parse the command line and run `stages` (None: the whole pipeline), or one of the looks at the first of them.

    `sections` are the config keys worth knowing.
    """
    parser = build_parser(description or "", sections, looks)
    arguments = parser.parse_args()
    limited = [look.flag for look in looks if not look.at_result]
    if limited and arguments.limit is not None and arguments.look is None:
        parser.error(f"--limit goes with {' or '.join(limited)}")
    with errors_in_one_line():
        config = _config(arguments)
        if arguments.show_config:
            print(config.model_dump_json(indent=1))
        elif arguments.dry_run:
            from urbanclip_ray.plan import show_plan

            show_plan(config, stages)
        elif arguments.check:
            from urbanclip_ray.check import check_run

            sys.exit(0 if check_run(config, stages) else 1)
        elif looks and arguments.look is not None and stages is not None:
            from urbanclip_ray.pipeline import find_parents

            look: Look = arguments.look
            look.show(find_parents(config, stages[0], look.at_result), getattr(arguments, "limit", None))
        else:
            from urbanclip_ray.pipeline import run_stages  # imports Ray, which --help must not wait for

            run_stages(config, stages)


def run_report(description: str | None) -> None:
    """The report of a recipe's run; with --runs the comparison of two runs, with --tune the page of a search."""
    if not {"--runs", "--tune"} & {argument.partition("=")[0] for argument in sys.argv}:
        run_job(description, sections=["report"], stages=["report"])
        return
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--runs", nargs=2, metavar=("FIRST", "SECOND"), help="two runs: names in --storage, or URIs")
    asked.add_argument("--tune", metavar="RUN", help="a run of jobs/tune.py, or the folder of one search of it: likewise")
    parser.add_argument("--storage", metavar="URI", default=RunConfig().storage, help="where the runs are")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="`stores` of S3, as other jobs take it")
    parser.add_argument("--output", metavar="URI", help="where the page goes (default: beside the datasets that it is made of)")
    arguments = parser.parse_args()
    with errors_in_one_line():
        from urbanclip_ray.evaluate.compare import compare_runs
        from urbanclip_ray.evaluate.search_page import write_search_page
        from urbanclip_ray.filesystems import use_stores
        from urbanclip_ray.storage import absolute, join

        use_stores(apply_overrides(RunConfig(), arguments.set).stores)
        named = arguments.runs or [arguments.tune]
        uris = [absolute(name if "/" in name else join(arguments.storage, name)).rstrip("/") for name in named]
        names = [uri.rsplit("/", 1)[-1] for uri in uris]
        output = absolute(arguments.output) if arguments.output else ""
        if arguments.tune:
            print(f"the search of {names[0]}: {write_search_page(uris[0], output)}")
        else:
            _, page = compare_runs(uris[0], uris[1], output or join(uris[1], f"compare_{names[0]}"))
            print(f"{names[1]} against {names[0]}: {page}")


def run_search(description: str | None) -> None:
    """The tiles of a recipe's run nearest to a text, as a table and a contact sheet."""
    parser = argparse.ArgumentParser(
        description=description, epilog=_epilog(["embed"]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_config_options(parser)
    parser.add_argument("text", help="what a tile should show")
    parser.add_argument("--top", type=_positive, default=12, metavar="N", help="so many tiles (default: 12)")
    arguments = parser.parse_args()
    with errors_in_one_line():
        config = _config(arguments)
        from urbanclip_ray.evaluate.search import search_run
        from urbanclip_ray.pipeline import find_parents

        search_run(find_parents(config, "prompts"), arguments.text, arguments.top)


def run_export(description: str | None) -> None:
    """Write a run's pairs as a folder to share."""
    parser = argparse.ArgumentParser(
        description=description, epilog=_epilog(["source"]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_config_options(parser)
    parser.add_argument("--format", required=True, choices=("webdataset", "huggingface"), help="tar shards, or Parquet files")
    parser.add_argument("--licence", required=True, metavar="SPDX_ID", help="such as CC-BY-4.0; LicenseRef-NAME for others")
    parser.add_argument("--output", required=True, metavar="URI", help="a new folder: a local path or s3://bucket/prefix")
    parser.add_argument("--no-pixels", action="store_true", help="texts and sha256 only, for imagery that may not be shared")
    parser.add_argument("--attribution", default="", metavar="TEXT", help="whom the licence asks to name; goes into the card")
    parser.add_argument("--rows-per-shard", type=_positive, default=4096, metavar="N", help="tiles a file (default: 4096)")
    arguments = parser.parse_args()
    with errors_in_one_line():
        config = _config(arguments)
        from urbanclip_ray.pipeline import find_datasets
        from urbanclip_ray.preflight import refuse_place_of_one_host
        from urbanclip_ray.release.export import ExportOptions, export_pairs
        from urbanclip_ray.storage import absolute

        output = absolute(arguments.output)
        run = find_datasets(config, ["pairs"], if_made=["splits"])
        refuse_place_of_one_host("output", arguments.output, config)
        options = ExportOptions(
            arguments.format,
            arguments.licence,
            output,
            not arguments.no_pixels,
            arguments.attribution,
            arguments.rows_per_shard,
        )
        manifest = export_pairs(run, options)
        size = sum(file.num_bytes for file in manifest.files)
        print(
            f"{manifest.rows_out:,} of {manifest.rows_in:,} tiles in {len(manifest.files) - 1} shards, {size:,} bytes: {output}"
        )


def run_verification(description: str | None) -> None:
    """Run the recipe `verify_gpu`, or `verify_cpu` with --cpu, write its record, and fail where a check of it fails."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the same code with a small model and without a GPU")
    parser.add_argument("--output", metavar="URI", help="where the record goes (default: gpu.json, or cpu.json with --cpu)")
    parser.add_argument("--storage", metavar="URI", help="keep the datasets here (default: a folder that is removed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    arguments = parser.parse_args()
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="urbanclip_ray_verify_") as folder:
        kind = "cpu" if arguments.cpu else "gpu"
        output = arguments.output or f"{kind}.json"
        config = apply_overrides(load_recipe(f"verify_{kind}"), [*arguments.set, f"storage={arguments.storage or folder}"])
        from urbanclip_ray.storage import write_bytes
        from urbanclip_ray.verify import VerificationError, verify

        record = verify(config)
        write_bytes(output, json.dumps(record, indent=1).encode())
        print(f"{record['device']['name']}: {output} is written")
        if failed := [check for check, holds in record["checks"].items() if not holds]:
            raise VerificationError(f"{output} says that these do not hold: {'; '.join(failed)}")


def run_experiment_job(description: str | None) -> None:
    """Pretrain a recipe and its ablations with several seeds, probe them all on another recipe's tiles, and print the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="NAME", help="what is pretrained")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of it; repeatable")
    parser.add_argument(
        "--probe-recipe", metavar="NAME", help="what all weights are probed on (default: the tiles of --recipe)"
    )
    parser.add_argument("--probe-set", action="append", default=[], metavar="KEY=VALUE", help="change one key of that")
    parser.add_argument("--storage", metavar="URI", help="where datasets and results go: a local path or s3://bucket/prefix")
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="pretraining seeds (default: 3)")
    parser.add_argument("--arms", nargs="*", metavar="ARM", help="ablations (default: all that the recipe has)")
    parser.add_argument("--arm-seeds", type=_positive, default=1, metavar="N", help="seeds of the ablations (default: 1)")
    arguments = parser.parse_args()
    with errors_in_one_line():
        place = [f"storage={arguments.storage}"] if arguments.storage else []
        pretraining = apply_overrides(load_recipe(arguments.recipe), [*arguments.set, *place])
        probed = load_recipe(arguments.probe_recipe) if arguments.probe_recipe else pretraining
        probing = apply_overrides(probed, [*arguments.probe_set, *place])
        from urbanclip_ray.experiment import Experiment, list_arms, markdown, run_experiment
        from urbanclip_ray.storage import join

        arms = tuple(list_arms(pretraining) if arguments.arms is None else arguments.arms)
        experiment = Experiment(pretraining, probing, arms, tuple(range(arguments.seeds)), arguments.arm_seeds)
        uri = join(pretraining.storage, f"{pretraining.run}-experiment")
        print(markdown(run_experiment(experiment, uri)))
        print(f"results: {uri}/results.md, results.csv and results.json")


def run_leak_table(description: str | None) -> None:
    """Print the leak table of a source's labels, and write it below `<storage>/<run>/leak_table`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URI", help="where the table goes: a local path or s3://bucket/prefix")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    arguments = parser.parse_args()
    with errors_in_one_line():
        from urbanclip_ray.evaluate.leak_table import leak_config, leakage_table, measure_leakage, write_leakage
        from urbanclip_ray.storage import join
        from urbanclip_ray.terminal import open_console

        overrides = [*arguments.set, *([f"storage={arguments.storage}"] if arguments.storage else [])]
        config = apply_overrides(leak_config(), overrides)
        lines, definition = measure_leakage(config)
        console = open_console()
        console.print(leakage_table(lines))
        console.print(definition, highlight=False, markup=False)
        for uri in write_leakage(lines, definition, join(config.storage, config.run, "leak_table")):
            print(f"written: {uri}")


def run_caption_store(description: str | None) -> None:
    """Show what a caption store holds, compact it, or remove what nobody needs of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action",
        choices=["status", "compact", "clean"],
        help="status: captions, tiles, files and failures of every model and prompt; compact: few files instead of many; "
        "clean: half files of killed writers, files that compaction replaced, failures of tiles that are described by now, "
        "notes of killed jobs; damaged files are named and stay",
    )
    parser.add_argument(
        "--storage", metavar="URI", default=RunConfig().storage, help="whose store, as jobs/caption.py takes it"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="`stores` of S3, as other jobs take it")
    parser.add_argument("--yes", action="store_true", help="with clean: delete, instead of only listing")
    arguments = parser.parse_args()
    if arguments.yes and arguments.action != "clean":
        parser.error("--yes goes with clean")
    with errors_in_one_line():
        config = apply_overrides(RunConfig(), [*arguments.set, f"storage={arguments.storage}"])
        from urbanclip_ray.captioners.upkeep import clean_store, compact_store, show_store
        from urbanclip_ray.filesystems import use_stores

        use_stores(config.stores)
        if arguments.action == "clean":
            clean_store(config.storage, delete=arguments.yes)
        else:
            {"status": show_store, "compact": compact_store}[arguments.action](config.storage)


def run_check_storage(description: str | None) -> None:
    """Hold the files of a storage against their checksums; the process fails where one is damaged."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URI", default=RunConfig().storage, help="a local path or s3://bucket/prefix")
    parser.add_argument("--run", metavar="NAME", default="", help="of this run alone (default: all, and the caption store)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="`stores` of S3, as other jobs take it")
    arguments = parser.parse_args()
    with errors_in_one_line():
        config = apply_overrides(RunConfig(), [*arguments.set, f"storage={arguments.storage}"])
        from urbanclip_ray.filesystems import use_stores
        from urbanclip_ray.integrity import check_storage, findings_table
        from urbanclip_ray.storage import absolute
        from urbanclip_ray.terminal import open_console

        use_stores(config.stores)
        findings = check_storage(absolute(config.storage), arguments.run)
        open_console().print(findings_table(findings))
        for damage in findings.damages:
            print(f"{damage.uri}\n  {damage.what}\n  {damage.fix}")
        sys.exit(1 if findings.damages else 0)


def _config(arguments: argparse.Namespace) -> RunConfig:
    overrides = [*arguments.set, *([f"storage={arguments.storage}"] if arguments.storage else [])]
    return apply_overrides(load_recipe(arguments.recipe), overrides)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that a user can mend end the process with their message alone; others keep their traceback."""
    try:
        yield
    except Exception as error:  # Ray wraps errors of ours in kinds of its own; what is not ours is raised again
        message = explain_error(error)
        if message is None:
            raise
        sys.exit(f"error: {message}{_where_to_read_on() if is_remote(error) else ''}")


def _where_to_read_on() -> str:
    from urbanclip_ray.dataflow import log_folder

    return f"\n(raised in a worker; this node's logs are in {log_folder()})"


def build_parser(description: str, sections: Sequence[str], looks: Sequence[Look] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=_epilog(sections), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_config_options(parser)
    parser.add_argument("--show-config", action="store_true", help="print the whole config as JSON and stop")
    parser.add_argument("--dry-run", action="store_true", help="print what would be kept and made, write nothing, and stop")
    parser.add_argument("--check", action="store_true", help="try storage, versions, resources and an all-reduce, and stop")
    if looks:
        choice = parser.add_mutually_exclusive_group()
        for look in looks:
            choice.add_argument(look.flag, dest="look", action="store_const", const=look, help=look.help)
        if not all(look.at_result for look in looks):
            parser.add_argument("--limit", type=_positive, metavar="N", help="look at so many tiles")
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, metavar="NAME", help="a run to start from: one of those below, or a FILE.yaml"
    )
    parser.add_argument("--storage", metavar="URI", help="where datasets go: a local path or s3://bucket/prefix")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _epilog(sections: Sequence[str]) -> str:
    lines = ["recipes:"]
    for name, recipe in RECIPES.items():
        lines.append(f"  {name:14} {(inspect.getdoc(recipe) or '').splitlines()[0]}")
    lines.append("\nkeys for --set, with their defaults (a recipe changes some; --show-config prints what holds):")
    for section in sections:
        default = RunConfig.model_fields[section].get_default()
        if isinstance(default, Section):
            lines += [f"  {section}.{key}={value}" for key, value in default.model_dump(mode="json").items()]
    lines.append("\nA finished stage is kept; a change of its config or its inputs makes it anew beside the old one.")
    return "\n".join(lines)
