"""The schema: what each column of a token row means, and how many ids it has.

A token is one INT32 row of ``width`` columns. Column 0 is the token type, column 1 the slot; the schema names the
others for each kind of row. Everything numeric is bucketed into ids before it reaches an engine: id 0 is "absent",
id 1 "unknown", and no id is ever out of range.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError
from mtgr.files import read_json, write_json

SCHEMA_FILE = "schema.json"

# Raised whenever the same schema would give other rows, so that old artifacts are refused instead of misread.
ROW_FORMAT = 1

TYPE_COLUMN = 0
SLOT_COLUMN = 1
FIRST_COLUMN = 2

OPERATIONS = ("rank", "retrieve")

ABSENT = 0
UNKNOWN = 1
FIRST_ID = 2


class TokenType(IntEnum):
    """Column 0 of a row."""

    PADDING = 0
    PROFILE = 1
    HISTORY = 2
    REALTIME = 3
    CANDIDATE = 4


# Ids of the bucketed columns, reserved ids included. Log-scale buckets hold [2^k - 1, 2^(k + 1) - 1); rates are
# cut into 20 equal steps, deviations from what was expected into 32.
LOG_SECONDS_SIZE = FIRST_ID + 32
LOG_COUNT_SIZE = FIRST_ID + 24
RATE_SIZE = FIRST_ID + 20
DEVIATION_SIZE = FIRST_ID + 32
HOUR_SIZE = FIRST_ID + 24

# Columns that hold a number of seconds since the epoch rather than an id: they place a token in time and are not
# embedded.
TIME = "time"

EVENT_COLUMNS = ("item", TIME, "action", "gap", "hour")
CANDIDATE_COLUMNS = (
    "item",
    TIME,
    "hour",
    "gap",
    "category_count",
    "category_rate",
    "recency",
    "popularity",
    "item_rate",
    "user_rate",
    "events",
    "since_first",
    "sessions",
    "session_events",
    "user_deviation",
    "user_top_deviation",
    "similar_deviation",
    "similar_top_deviation",
)


@dataclass(frozen=True)
class ProfileField:
    """One scalar profile feature, which becomes one profile token.

    Attributes:
        name: Key in the profile.
        values: Known values of a categorical feature.
        boundaries: Ascending lower bounds of the buckets of a numeric feature; exclusive with ``values``.
    """

    name: str
    values: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that exactly one kind of vocabulary is given.

        Raises:
            ConfigurationError: If both or neither are given, or they are not ascending or distinct.
        """
        if bool(self.values) == bool(self.boundaries):
            raise ConfigurationError(f"profile field {self.name!r}: give either values or boundaries.")
        if len(set(self.values)) != len(self.values) or list(self.boundaries) != sorted(set(self.boundaries)):
            raise ConfigurationError(f"profile field {self.name!r}: values must be distinct, boundaries ascending.")

    @property
    def size(self) -> int:
        """Ids of this field alone: its unknown, and its values or buckets."""
        return 1 + (len(self.values) if self.values else len(self.boundaries) + 1)


@dataclass(frozen=True)
class TaskSpec:
    """Name of a head and the line that defines its label."""

    name: str
    definition: str


@dataclass(frozen=True)
class Schema:
    """Meaning and sizes of all columns, shared by every live version of a model.

    Attributes:
        name: Name of the data the schema was made for.
        epoch: Unix seconds that the rows' time columns count from.
        profile: Profile fields; each is one token, in this order.
        num_items: Item ids, reserved ones included.
        items_hash: Hash of the item vocabulary (raw ids in order of internal id).
        num_actions: Kinds of action, without reserved ids.
        liked_action: Actions from this one on count as liked in cross features.
        categories: Names of item categories.
        tasks: The heads, in order of the ``task_scores`` columns.
        width: Columns of a row, W.
        event_columns: Columns of history and real-time rows, from column 2.
        candidate_columns: Columns of candidate rows, from column 2.
        max_history: Longest segment S in events; a multiple of ``realtime_step``.
        realtime_step: R_max: S ends at a multiple of it, R holds what remains.
        operations: What the network can do; some of public formats have no output for the next item.
    """

    name: str
    epoch: int
    profile: tuple[ProfileField, ...]
    num_items: int
    items_hash: str
    num_actions: int
    liked_action: int
    categories: tuple[str, ...]
    tasks: tuple[TaskSpec, ...]
    width: int = 8
    event_columns: tuple[str, ...] = EVENT_COLUMNS
    candidate_columns: tuple[str, ...] = ("item", TIME, "gap", "category_rate", "recency", "popularity")
    max_history: int = 1900
    realtime_step: int = 100
    operations: tuple[str, ...] = OPERATIONS

    def __post_init__(self) -> None:
        """Check that columns are known and fit the width.

        Raises:
            ConfigurationError: If a value is out of range or a column is not known.
        """
        for kind, columns, known in (
            ("event_columns", self.event_columns, EVENT_COLUMNS),
            ("candidate_columns", self.candidate_columns, CANDIDATE_COLUMNS),
        ):
            unknown = set(columns) - set(known)
            if unknown or len(set(columns)) != len(columns):
                raise ConfigurationError(f"schema: {kind} must be distinct names out of {', '.join(known)}.")
            # One place for items and times in every row keeps embedding and mask free of cases.
            if columns[:2] != ("item", TIME):
                raise ConfigurationError(f"schema: {kind} must begin with 'item', 'time'.")
            if len(columns) + FIRST_COLUMN > self.width:
                raise ConfigurationError(f"schema: width {self.width} is too small for {len(columns)} {kind}.")
        if self.realtime_step < 1 or self.max_history < 0 or self.max_history % self.realtime_step:
            raise ConfigurationError("schema: max_history must be a multiple of realtime_step.")
        if self.num_items < FIRST_ID or self.num_actions < 1 or not self.tasks or not self.profile:
            raise ConfigurationError("schema: items, actions, tasks and profile fields must not be empty.")
        if self.operations not in (OPERATIONS, OPERATIONS[:1]):
            raise ConfigurationError("schema: operations must be rank, or rank and retrieve.")

    @property
    def max_context(self) -> int:
        """Longest context in tokens."""
        return len(self.profile) + self.max_history + self.realtime_step - 1

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order of the ``task_scores`` columns."""
        return tuple(task.name for task in self.tasks)

    @property
    def item_column(self) -> int:
        """Column of the item id in event and candidate rows."""
        return FIRST_COLUMN

    @property
    def time_column(self) -> int:
        """Column of the time, in seconds since ``epoch``."""
        return FIRST_COLUMN + 1

    @property
    def profile_size(self) -> int:
        """Ids of the profile column: absent and unknown, then those of every field in turn."""
        return FIRST_ID + sum(field.size for field in self.profile)

    def column_size(self, name: str) -> int:
        """Number of ids in the embedded column ``name``."""
        sizes = {
            "item": self.num_items,
            "action": FIRST_ID + self.num_actions,
            "gap": LOG_SECONDS_SIZE,
            "recency": LOG_SECONDS_SIZE,
            "hour": HOUR_SIZE,
            "category_count": LOG_COUNT_SIZE,
            "popularity": LOG_COUNT_SIZE,
            "category_rate": RATE_SIZE,
            "item_rate": RATE_SIZE,
            "user_rate": RATE_SIZE,
            "events": LOG_COUNT_SIZE,
            "since_first": LOG_SECONDS_SIZE,
            "sessions": LOG_COUNT_SIZE,
            "session_events": LOG_COUNT_SIZE,
            "user_deviation": DEVIATION_SIZE,
            "user_top_deviation": DEVIATION_SIZE,
            "similar_deviation": DEVIATION_SIZE,
            "similar_top_deviation": DEVIATION_SIZE,
        }
        return sizes[name]

    def to_dict(self) -> dict[str, Any]:
        """The schema as JSON-ready values."""
        values = dataclasses.asdict(self) | {"row_format": ROW_FORMAT}
        if self.operations == OPERATIONS:  # as before there was a choice, so that hashes stay
            del values["operations"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schema:
        """Build a schema from JSON values.

        Raises:
            ConfigurationError: If it was written for another row format or a value is invalid.
        """
        fields = dict(values)
        row_format = fields.pop("row_format", None)
        if row_format != ROW_FORMAT:
            raise ConfigurationError(
                f"the schema has row format {row_format}, this version of mtgr writes {ROW_FORMAT}; train again."
            )
        try:
            fields["profile"] = tuple(
                ProfileField(field["name"], tuple(field["values"]), tuple(field["boundaries"]))
                for field in fields["profile"]
            )
            fields["tasks"] = tuple(TaskSpec(**task) for task in fields["tasks"])
            for name in ("categories", "event_columns", "candidate_columns"):
                fields[name] = tuple(fields[name])
            fields["operations"] = tuple(fields.get("operations", OPERATIONS))
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"the schema is incomplete or has unknown keys: {error}.") from error

    @property
    def hash(self) -> str:
        """Hex SHA-256 over the canonical JSON: equal for models that may share a door."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the schema as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read a schema written by ``save``.

        Raises:
            ConfigurationError: If the file is missing or invalid.
        """
        return cls.from_dict(read_json(path))
