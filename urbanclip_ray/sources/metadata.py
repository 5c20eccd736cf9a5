"""The CSV that may lie beside a folder of tiles: which column means what, and its cells as numbers and texts."""

from __future__ import annotations

import io
import warnings
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from urbanclip_ray.config import MetadataColumns
from urbanclip_ray.sources.base import SourceError

LON_COLUMNS = ("lon", "lng", "long", "longitude")
LAT_COLUMNS = ("lat", "latitude")
BLANKS = ("", "na", "n/a", "nan", "null", "none")  # in a numeric column: not known
FIRST_ROW = 2  # rows are numbered as a spreadsheet does: the header is row 1


class Columns(NamedTuple):
    """Which column means what; None where the CSV has none for it."""

    file: str
    lon: str | None
    lat: str | None
    group: str | None
    caption: str | None
    indicators: tuple[str, ...]


class MetadataTable:
    """A CSV with commas in UTF-8, one row per file. Everything raises :class:`SourceError` naming row and column."""

    def __init__(self, uri: str, data: bytes, config: MetadataColumns, section: str = "source") -> None:
        self.uri = uri
        self._section = section  # of the config, for errors
        self._config = config
        self._cells = self._parse(data)

    @property
    def rows(self) -> list[int]:
        """The number of each row in the file; blank rows are not rows."""
        return [int(row) for row in self._cells.index]

    @property
    def column_names(self) -> list[str]:
        return [str(name) for name in self._cells.columns]

    @cached_property
    def columns(self) -> Columns:
        config = self._config
        file = self._need(config.file_column, "file_column")
        lon, lat = self.coordinate_columns
        group, caption = self._optional("group_column"), self._optional("caption_column")
        if "tile_id" in config.indicators:
            raise SourceError("source.indicators cannot have 'tile_id', the name of the labels' key: rename the column")
        return Columns(file, lon, lat, group, caption, self.indicators({file, lon, lat, group, caption, "tile_id"}))

    @cached_property
    def coordinate_columns(self) -> tuple[str | None, str | None]:
        """The columns of longitude and latitude; both None where the CSV has neither."""
        lon = self._coordinate_column("lon_column", LON_COLUMNS)
        lat = self._coordinate_column("lat_column", LAT_COLUMNS)
        if (lon is None) != (lat is None):
            raise SourceError(
                f"{self.uri} gives only {lon or lat!r} of longitude and latitude: set {self._section}.lon_column and "
                f"{self._section}.lat_column; its columns are {self._column_list}"
            )
        return lon, lat

    def indicators(self, taken: set[str | None]) -> tuple[str, ...]:
        """The columns that the config names, else all that hold numbers and are not taken."""
        chosen = tuple(self._need(name, "indicators") for name in self._config.indicators)
        return chosen or tuple(name for name in self._cells.columns if name not in taken and self._is_numeric(name))

    def texts(self, column: str) -> list[str]:
        """The cells as written, without spaces around them: codes keep their leading zeros."""
        return [str(text) for text in self._cells[column].str.strip()]

    def numbers(self, column: str) -> np.ndarray:
        """float64 [rows], NaN where the cell is blank; infinite values stay, for ingest to count."""
        known, values = self._known_numbers(column)
        bad = values.isna()
        if bad.any():
            row = values.index[bad][0]
            raise SourceError(
                f"{self.uri}, row {row}, column {column!r}: {known[row]!r} is not a number: correct it or blank it"
            )
        return values.reindex(self._cells.index).to_numpy(np.float64)

    def places(self) -> list[tuple[float | None, float | None]]:
        """Longitude and latitude of every row in WGS84 degrees; both None where they are not known."""
        lon_column, lat_column = self.coordinate_columns
        if lon_column is None or lat_column is None:
            return [(None, None)] * len(self._cells)
        lons, lats = self.numbers(lon_column), self.numbers(lat_column)
        places: list[tuple[float | None, float | None]] = []
        for row, lon, lat in zip(self.rows, lons.tolist(), lats.tolist(), strict=True):
            if np.isnan(lon) and np.isnan(lat):
                places.append((None, None))
            elif abs(lon) <= 180 and abs(lat) <= 90:  # false for NaN
                places.append((lon, lat))
            else:
                swapped = " (they look swapped)" if abs(lon) <= 90 < abs(lat) <= 180 else ""
                raise SourceError(
                    f"{self.uri}, row {row}: longitude {lon} and latitude {lat} are not both within ±180 and ±90 "
                    f"degrees{swapped}: correct them, or set {self._section}.lon_column and {self._section}.lat_column to the "
                    "right columns"
                )
        return places

    def _parse(self, data: bytes) -> pd.DataFrame:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose cells
                cells = pd.read_csv(
                    io.BytesIO(data),
                    dtype=str,  # bad numbers can then be named as they are written
                    keep_default_na=False,
                    index_col=False,
                    skip_blank_lines=False,  # so that rows are numbered as in the file
                    encoding="utf-8-sig",
                )
        except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"{self.uri} is not a CSV with commas in UTF-8 ({reason}): repair it") from None
        cells.index = pd.RangeIndex(FIRST_ROW, FIRST_ROW + len(cells))
        return cells[(cells != "").any(axis=1)]

    @property
    def _column_list(self) -> str:
        return ", ".join(self.column_names)

    def _need(self, column: str, key: str) -> str:
        if column not in self._cells.columns:
            raise SourceError(
                f"{self.uri} has no column {column!r}: correct {self._section}.{key}; its columns are {self._column_list}"
            )
        return column

    def _optional(self, key: str) -> str | None:
        """The column if it is there. A name that the user chose must be there, the default one need not."""
        column: str = getattr(self._config, key)
        if column == MetadataColumns.model_fields[key].default:
            return column if column in self._cells.columns else None
        return self._need(column, key) if column else None

    def _coordinate_column(self, key: str, names: tuple[str, ...]) -> str | None:
        if chosen := getattr(self._config, key):
            return self._need(chosen, key)
        by_lower = {str(column).lower(): str(column) for column in reversed(self._cells.columns)}
        return next((by_lower[name] for name in names if name in by_lower), None)

    def _known_numbers(self, column: str) -> tuple[pd.Series, pd.Series]:
        """Texts of the cells that are not blank, and their numbers, NaN where the text is none."""
        texts = self._cells[column].str.strip()
        known = texts[~texts.str.lower().isin(BLANKS)]
        return known, pd.to_numeric(known, errors="coerce")

    def _is_numeric(self, column: str) -> bool:
        known, values = self._known_numbers(column)
        return len(known) > 0 and bool(values.notna().all())
