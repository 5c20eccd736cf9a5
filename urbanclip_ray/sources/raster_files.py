"""GeoTIFFs (cloud-optimised ones too) on a local disk or in object storage, read window by window.

rasterio asks for ranges of bytes, and the filesystem of the run's `stores` brings them: the same endpoints, keys and retries
as for everything else. GDAL's own S3 access would need them all again.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pyarrow.fs as pafs

from urbanclip_ray import storage
from urbanclip_ray.filesystems import is_object_storage
from urbanclip_ray.sources.base import SourceError

RASTER_EXTENSIONS = (".tif", ".tiff")
DRIVER = "GTiff"  # nothing else is opened: other formats name further files, on disks and servers, that would be read
GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no listing of the folder, no search for side files
    "GDAL_NUM_THREADS": "1",  # the workers are the parallelism
}
PAGE_BYTES = 1 << 16  # the least that is asked of object storage: GDAL reads headers in pieces of some bytes
MAX_BLOCK_BYTES = 256 << 20  # of what GDAL decodes at once: a file of kilobytes may claim two gigabytes
MAX_PAGES = 512  # 32 MiB of a process: headers of many scenes, and what neighbouring windows share


@contextmanager
def open_raster(uri: str) -> Iterator[Any]:
    """A rasterio dataset; what it reads of headers in object storage is kept for the next one to open the same
    file in this process.

    It must be closed in the thread that opened it: rasterio knows its openers by thread. Raises :class:`SourceError` for
    what is no GeoTIFF, FileNotFoundError, and OSError from storage.
    """
    import rasterio
    from rasterio.errors import RasterioError

    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if not info.is_file:
        raise FileNotFoundError(f"{uri} is not there")

    def open_ranges(name: str, mode: str = "rb", **_: Any) -> PagedFile:
        if name != uri or mode != "rb":  # GDAL asks for files beside it, too
            raise FileNotFoundError(name)
        return PagedFile(filesystem, info)

    with rasterio.Env(**GDAL_OPTIONS):
        try:
            if is_object_storage(uri):
                dataset = rasterio.open(uri, driver=DRIVER, opener=open_ranges)
            else:
                dataset = rasterio.open(path, driver=DRIVER)
        except RasterioError as error:
            reason = " ".join(str(error).split())
            raise SourceError(
                f"{uri} is not a GeoTIFF that can be read ({reason}): repair it, or convert it with gdal_translate -of COG"
            ) from None
        with dataset:
            _refuse_huge_blocks(dataset, uri)
            yield dataset


def _refuse_huge_blocks(dataset: Any, uri: str) -> None:
    rows, columns = max(dataset.block_shapes, key=lambda shape: shape[0] * shape[1])
    num_bytes = rows * columns * sum(np.dtype(kind).itemsize for kind in dataset.dtypes)
    if num_bytes > MAX_BLOCK_BYTES:
        raise SourceError(
            f"{uri} is stored in blocks of {columns} x {rows} px, and a worker would hold {num_bytes >> 20} MiB for one: "
            "convert it with gdal_translate -of COG"
        )


class PagedFile(io.RawIOBase):
    """A file of object storage, read in whole pages that all readers of this process share."""

    _pages: ClassVar[OrderedDict[tuple[str, int, int], bytes]] = OrderedDict()  # (path, modified, page), the stalest first
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, filesystem: pafs.FileSystem, info: pafs.FileInfo) -> None:
        super().__init__()
        self._file = filesystem.open_input_file(info.path)
        self._path, self._size, self._modified = info.path, int(info.size), int(info.mtime_ns)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        count = end - self._place
        if count <= 0:
            return 0
        first = self._place // PAGE_BYTES
        pages = self._read_pages(first, (end - 1) // PAGE_BYTES)
        start = self._place - first * PAGE_BYTES
        buffer[:count] = pages[start : start + count]
        self._place = end
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _read_pages(self, first: int, last: int) -> bytes:
        """The bytes of these pages; those from the first to the last one that is missing come by one request."""
        found: dict[int, bytes] = {}
        with self._lock:
            for page in range(first, last + 1):
                key = (self._path, self._modified, page)
                if key in self._pages:
                    self._pages.move_to_end(key)
                    found[page] = self._pages[key]
        missing = [page for page in range(first, last + 1) if page not in found]
        if missing:
            start = missing[0] * PAGE_BYTES
            end = min((missing[-1] + 1) * PAGE_BYTES, self._size)
            data = bytes(self._file.read_at(end - start, start))
            with self._lock:
                for page in range(missing[0], missing[-1] + 1):
                    part = data[page * PAGE_BYTES - start : (page + 1) * PAGE_BYTES - start]
                    found[page] = self._pages[(self._path, self._modified, page)] = part
                while len(self._pages) > MAX_PAGES:
                    self._pages.popitem(last=False)
        return b"".join(found[page] for page in range(first, last + 1))


def crs_of(dataset: Any, uri: str) -> Any:
    """The dataset's coordinate reference system (pyproj); raises :class:`SourceError` for a file without a place."""
    from pyproj import CRS

    if dataset.crs is None:
        raise SourceError(
            f"{uri} names no coordinate reference system, so nothing is known of where it lies: write the right one into it "
            "(rio edit-info --crs EPSG:32650 FILE)"
        )
    if dataset.transform.is_identity:
        raise SourceError(
            f"{uri} does not say where its pixels lie: give it a geotransform (rio edit-info --transform ... FILE, or gdalwarp "
            "where it has ground control points)"
        )
    if dataset.transform.b or dataset.transform.d:
        raise SourceError(f"{uri} is turned against its coordinate reference system: straighten it with gdalwarp")
    return CRS.from_wkt(dataset.crs.to_wkt())
