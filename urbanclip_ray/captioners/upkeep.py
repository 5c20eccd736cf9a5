"""What `jobs/caption_store.py` does, said line by line."""

from __future__ import annotations

from urbanclip_ray.captioners.compaction import compact, find_leftovers, remove
from urbanclip_ray.captioners.status import holdings
from urbanclip_ray.captioners.store import STORE, PartsFolder
from urbanclip_ray.storage import absolute, join, list_folders

MANY_PARTS = 1_000  # of one origin: from here on compaction is worth a hint


def store_uri(storage: str) -> str:
    return join(absolute(storage), STORE)


def show_store(storage: str) -> None:
    """Print what every origin of the store holds."""
    for holding in holdings(store_uri(storage)):
        hint = "\n  compact would make few files of them" if holding.num_parts >= MANY_PARTS else ""
        print(f"{holding}{hint}")


def compact_store(storage: str) -> None:
    """Compact every origin's files."""
    uri = store_uri(storage)
    for name in list_folders(uri):
        folder = PartsFolder(join(uri, name))
        num_before = len(folder.parts())
        for written in compact(folder):
            print(f"{name}: written {written}", flush=True)
        print(f"{name}: {num_before:,} files before, {len(folder.parts()):,} now")


def clean_store(storage: str, delete: bool) -> None:
    """Name what nobody needs, and delete it where that is asked for; damaged files are only named."""
    num_found = num_damaged = 0
    for leftover in find_leftovers(store_uri(storage)):
        num_found += not leftover.is_damaged
        num_damaged += leftover.is_damaged
        if delete and not leftover.is_damaged:
            remove(leftover)
        print(f"{'deleted' if delete and not leftover.is_damaged else 'found'}: {leftover.uri} ({leftover.reason})")
    said = "deleted" if delete else "could be deleted: add --yes"
    print(f"{num_found:,} {said}" + (f"; {num_damaged:,} damaged, and kept" if num_damaged else ""))
