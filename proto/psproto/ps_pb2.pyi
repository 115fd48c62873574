from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_APPLIED: _ClassVar[Durability]
    DURABILITY_LOG: _ClassVar[Durability]
    DURABILITY_FSYNC: _ClassVar[Durability]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_TRAIN: _ClassVar[Mode]
    MODE_SERVE: _ClassVar[Mode]

class LaneKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANE_KIND_UNSPECIFIED: _ClassVar[LaneKind]
    LANE_KIND_MEMFD: _ClassVar[LaneKind]
    LANE_KIND_CUDA: _ClassVar[LaneKind]

class Start(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    START_UNSPECIFIED: _ClassVar[Start]
    START_SNAPSHOT: _ClassVar[Start]
    START_EARLIEST: _ClassVar[Start]
    START_LATEST: _ClassVar[Start]

class Content(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTENT_UNSPECIFIED: _ClassVar[Content]
    CONTENT_VALUES: _ClassVar[Content]
    CONTENT_KEYS: _ClassVar[Content]
    CONTENT_VALUES_AND_STATE: _ClassVar[Content]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_KERNELS: _ClassVar[Phase]
    PHASE_GPU: _ClassVar[Phase]
    PHASE_RECOVERY: _ClassVar[Phase]
    PHASE_READY: _ClassVar[Phase]
    PHASE_RESTORING: _ClassVar[Phase]
    PHASE_DRAINING: _ClassVar[Phase]
    PHASE_NOT_A_SHARD: _ClassVar[Phase]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
DURABILITY_UNSPECIFIED: Durability
DURABILITY_APPLIED: Durability
DURABILITY_LOG: Durability
DURABILITY_FSYNC: Durability
MODE_UNSPECIFIED: Mode
MODE_TRAIN: Mode
MODE_SERVE: Mode
LANE_KIND_UNSPECIFIED: LaneKind
LANE_KIND_MEMFD: LaneKind
LANE_KIND_CUDA: LaneKind
START_UNSPECIFIED: Start
START_SNAPSHOT: Start
START_EARLIEST: Start
START_LATEST: Start
CONTENT_UNSPECIFIED: Content
CONTENT_VALUES: Content
CONTENT_KEYS: Content
CONTENT_VALUES_AND_STATE: Content
PHASE_UNSPECIFIED: Phase
PHASE_KERNELS: Phase
PHASE_GPU: Phase
PHASE_RECOVERY: Phase
PHASE_READY: Phase
PHASE_RESTORING: Phase
PHASE_DRAINING: Phase
PHASE_NOT_A_SHARD: Phase

class Rule(_message.Message):
    __slots__ = ("name", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    parameters: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., parameters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TableSchema(_message.Message):
    __slots__ = ("name", "dim", "optimizer", "initializer", "seed", "serving_default", "durability", "admission", "evictions", "max_step_ahead")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    INITIALIZER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SERVING_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_AHEAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    optimizer: Rule
    initializer: Rule
    seed: int
    serving_default: float
    durability: Durability
    admission: Rule
    evictions: _containers.RepeatedCompositeFieldContainer[Rule]
    max_step_ahead: int
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., optimizer: _Optional[_Union[Rule, _Mapping]] = ..., initializer: _Optional[_Union[Rule, _Mapping]] = ..., seed: _Optional[int] = ..., serving_default: _Optional[float] = ..., durability: _Optional[_Union[Durability, str]] = ..., admission: _Optional[_Union[Rule, _Mapping]] = ..., evictions: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., max_step_ahead: _Optional[int] = ...) -> None: ...

class TableStats(_message.Message):
    __slots__ = ("rows", "bytes", "waiting", "counter_bytes", "tiers", "cache", "damaged_blocks", "lost_rows")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    COUNTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    bytes: int
    waiting: int
    counter_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    cache: CacheStats
    damaged_blocks: int
    lost_rows: int
    def __init__(self, rows: _Optional[int] = ..., bytes: _Optional[int] = ..., waiting: _Optional[int] = ..., counter_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., cache: _Optional[_Union[CacheStats, _Mapping]] = ..., damaged_blocks: _Optional[int] = ..., lost_rows: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "rows", "bytes", "hits", "misses", "on_disk")
    TIER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    tier: str
    rows: int
    bytes: int
    hits: int
    misses: int
    on_disk: bool
    def __init__(self, tier: _Optional[str] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., on_disk: bool = ...) -> None: ...

class CacheStats(_message.Message):
    __slots__ = ("promotions", "demotions", "flushed_rows", "reflushed_blocks", "warm_reads", "warm_seconds", "gpu_promotions", "gpu_demotions")
    PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_ROWS_FIELD_NUMBER: _ClassVar[int]
    REFLUSHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WARM_READS_FIELD_NUMBER: _ClassVar[int]
    WARM_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GPU_PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    GPU_DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    promotions: int
    demotions: int
    flushed_rows: int
    reflushed_blocks: int
    warm_reads: int
    warm_seconds: float
    gpu_promotions: int
    gpu_demotions: int
    def __init__(self, promotions: _Optional[int] = ..., demotions: _Optional[int] = ..., flushed_rows: _Optional[int] = ..., reflushed_blocks: _Optional[int] = ..., warm_reads: _Optional[int] = ..., warm_seconds: _Optional[float] = ..., gpu_promotions: _Optional[int] = ..., gpu_demotions: _Optional[int] = ...) -> None: ...

class CreateTableRequest(_message.Message):
    __slots__ = ("schema",)
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ...) -> None: ...

class CreateTableResponse(_message.Message):
    __slots__ = ("schema", "stats")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    stats: TableStats
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ..., stats: _Optional[_Union[TableStats, _Mapping]] = ...) -> None: ...

class DescribeTableRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DescribeTableResponse(_message.Message):
    __slots__ = ("schema", "stats", "version", "epoch")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    stats: TableStats
    version: int
    epoch: int
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ..., stats: _Optional[_Union[TableStats, _Mapping]] = ..., version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("tables",)
    TABLES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[DescribeTableResponse]
    def __init__(self, tables: _Optional[_Iterable[_Union[DescribeTableResponse, _Mapping]]] = ...) -> None: ...

class AlterTableRequest(_message.Message):
    __slots__ = ("schema", "fields")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    fields: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ..., fields: _Optional[_Iterable[str]] = ...) -> None: ...

class AlterTableResponse(_message.Message):
    __slots__ = ("schema", "stats", "version", "dropped_counters", "epoch")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DROPPED_COUNTERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    stats: TableStats
    version: int
    dropped_counters: int
    epoch: int
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ..., stats: _Optional[_Union[TableStats, _Mapping]] = ..., version: _Optional[int] = ..., dropped_counters: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class DropTableRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DropTableResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("table", "dry_run")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    table: str
    dry_run: bool
    def __init__(self, table: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("evicted", "rows", "version")
    class EvictedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    evicted: _containers.ScalarMap[str, int]
    rows: int
    version: int
    def __init__(self, evicted: _Optional[_Mapping[str, int]] = ..., rows: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class PullHeader(_message.Message):
    __slots__ = ("table", "dtype", "mode", "with_metadata", "min_version", "min_epoch", "prefetch")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    WITH_METADATA_FIELD_NUMBER: _ClassVar[int]
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    table: str
    dtype: DType
    mode: Mode
    with_metadata: bool
    min_version: int
    min_epoch: int
    prefetch: bool
    def __init__(self, table: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., mode: _Optional[_Union[Mode, str]] = ..., with_metadata: bool = ..., min_version: _Optional[int] = ..., min_epoch: _Optional[int] = ..., prefetch: bool = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("header", "padding", "keys")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    header: PullHeader
    padding: bytes
    keys: bytes
    def __init__(self, header: _Optional[_Union[PullHeader, _Mapping]] = ..., padding: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class PullResponseHeader(_message.Message):
    __slots__ = ("version", "dim", "dtype")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    version: int
    dim: int
    dtype: DType
    def __init__(self, version: _Optional[int] = ..., dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "padding", "embeddings", "versions", "steps", "frequencies")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    header: PullResponseHeader
    padding: bytes
    embeddings: bytes
    versions: bytes
    steps: bytes
    frequencies: bytes
    def __init__(self, header: _Optional[_Union[PullResponseHeader, _Mapping]] = ..., padding: _Optional[bytes] = ..., embeddings: _Optional[bytes] = ..., versions: _Optional[bytes] = ..., steps: _Optional[bytes] = ..., frequencies: _Optional[bytes] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("table", "dtype", "step", "lr", "client_id", "incarnation", "sequence", "acknowledged", "durability")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    table: str
    dtype: DType
    step: int
    lr: float
    client_id: int
    incarnation: int
    sequence: int
    acknowledged: int
    durability: Durability
    def __init__(self, table: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., step: _Optional[int] = ..., lr: _Optional[float] = ..., client_id: _Optional[int] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., acknowledged: _Optional[int] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "padding", "keys", "counts", "gradients")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    padding: bytes
    keys: bytes
    counts: bytes
    gradients: bytes
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., padding: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., gradients: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("version", "duplicate", "achieved", "durable_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    ACHIEVED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    duplicate: bool
    achieved: Durability
    durable_version: int
    def __init__(self, version: _Optional[int] = ..., duplicate: bool = ..., achieved: _Optional[_Union[Durability, str]] = ..., durable_version: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("header", "padding", "keys")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    padding: bytes
    keys: bytes
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., padding: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("version", "duplicate", "achieved", "durable_version", "deleted")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    ACHIEVED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    version: int
    duplicate: bool
    achieved: Durability
    durable_version: int
    deleted: int
    def __init__(self, version: _Optional[int] = ..., duplicate: bool = ..., achieved: _Optional[_Union[Durability, str]] = ..., durable_version: _Optional[int] = ..., deleted: _Optional[int] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ("pushes", "pulls")
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    pushes: _containers.RepeatedCompositeFieldContainer[PushRequest]
    pulls: _containers.RepeatedCompositeFieldContainer[PullRequest]
    def __init__(self, pushes: _Optional[_Iterable[_Union[PushRequest, _Mapping]]] = ..., pulls: _Optional[_Iterable[_Union[PullRequest, _Mapping]]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("pushes", "pulls")
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    pushes: _containers.RepeatedCompositeFieldContainer[PushResponse]
    pulls: _containers.RepeatedCompositeFieldContainer[PullResponse]
    def __init__(self, pushes: _Optional[_Iterable[_Union[PushResponse, _Mapping]]] = ..., pulls: _Optional[_Iterable[_Union[PullResponse, _Mapping]]] = ...) -> None: ...

class StreamRequestHeader(_message.Message):
    __slots__ = ("id", "timeout_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    timeout_ms: int
    def __init__(self, id: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("header", "exchange")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    header: StreamRequestHeader
    exchange: ExchangeRequest
    def __init__(self, header: _Optional[_Union[StreamRequestHeader, _Mapping]] = ..., exchange: _Optional[_Union[ExchangeRequest, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("id", "exchange", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    exchange: ExchangeResponse
    error: Status
    def __init__(self, id: _Optional[int] = ..., exchange: _Optional[_Union[ExchangeResponse, _Mapping]] = ..., error: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[Detail]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[Detail, _Mapping]]] = ...) -> None: ...

class Detail(_message.Message):
    __slots__ = ("type_url", "value")
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    type_url: str
    value: bytes
    def __init__(self, type_url: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class ErrorInfo(_message.Message):
    __slots__ = ("reason", "domain", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: str
    domain: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[str] = ..., domain: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RetryInfo(_message.Message):
    __slots__ = ("retry_delay",)
    class Delay(_message.Message):
        __slots__ = ("seconds", "nanos")
        SECONDS_FIELD_NUMBER: _ClassVar[int]
        NANOS_FIELD_NUMBER: _ClassVar[int]
        seconds: int
        nanos: int
        def __init__(self, seconds: _Optional[int] = ..., nanos: _Optional[int] = ...) -> None: ...
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    retry_delay: RetryInfo.Delay
    def __init__(self, retry_delay: _Optional[_Union[RetryInfo.Delay, _Mapping]] = ...) -> None: ...

class Lane(_message.Message):
    __slots__ = ("path", "token", "gpu")
    PATH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    path: str
    token: bytes
    gpu: bytes
    def __init__(self, path: _Optional[str] = ..., token: _Optional[bytes] = ..., gpu: _Optional[bytes] = ...) -> None: ...

class LaneRequest(_message.Message):
    __slots__ = ("id", "timeout_ms", "pushes", "pulls", "token", "regions")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    id: int
    timeout_ms: int
    pushes: _containers.RepeatedCompositeFieldContainer[LanePush]
    pulls: _containers.RepeatedCompositeFieldContainer[LanePull]
    token: bytes
    regions: _containers.RepeatedCompositeFieldContainer[LaneRegion]
    def __init__(self, id: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., pushes: _Optional[_Iterable[_Union[LanePush, _Mapping]]] = ..., pulls: _Optional[_Iterable[_Union[LanePull, _Mapping]]] = ..., token: _Optional[bytes] = ..., regions: _Optional[_Iterable[_Union[LaneRegion, _Mapping]]] = ...) -> None: ...

class LaneRegion(_message.Message):
    __slots__ = ("region", "kind", "size", "handle", "gpu")
    REGION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    region: int
    kind: LaneKind
    size: int
    handle: bytes
    gpu: bytes
    def __init__(self, region: _Optional[int] = ..., kind: _Optional[_Union[LaneKind, str]] = ..., size: _Optional[int] = ..., handle: _Optional[bytes] = ..., gpu: _Optional[bytes] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("region", "offset", "size")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset: int
    size: int
    def __init__(self, region: _Optional[int] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class LanePush(_message.Message):
    __slots__ = ("header", "keys", "counts", "gradients")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    keys: Slice
    counts: Slice
    gradients: Slice
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., keys: _Optional[_Union[Slice, _Mapping]] = ..., counts: _Optional[_Union[Slice, _Mapping]] = ..., gradients: _Optional[_Union[Slice, _Mapping]] = ...) -> None: ...

class LanePull(_message.Message):
    __slots__ = ("header", "keys", "room", "rows")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    header: PullHeader
    keys: Slice
    room: Slice
    rows: Slice
    def __init__(self, header: _Optional[_Union[PullHeader, _Mapping]] = ..., keys: _Optional[_Union[Slice, _Mapping]] = ..., room: _Optional[_Union[Slice, _Mapping]] = ..., rows: _Optional[_Union[Slice, _Mapping]] = ...) -> None: ...

class WaitDurableRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class WaitDurableResponse(_message.Message):
    __slots__ = ("durable_version", "epoch")
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    durable_version: int
    epoch: int
    def __init__(self, durable_version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class BarrierRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class BarrierResponse(_message.Message):
    __slots__ = ("version", "epoch")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    version: int
    epoch: int
    def __init__(self, version: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("token", "start", "tables", "content", "dtype", "coalesce_ms", "coalesce_rows", "progress_ms", "chunk_bytes")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COALESCE_MS_FIELD_NUMBER: _ClassVar[int]
    COALESCE_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_MS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    start: Start
    tables: _containers.RepeatedScalarFieldContainer[str]
    content: Content
    dtype: DType
    coalesce_ms: int
    coalesce_rows: int
    progress_ms: int
    chunk_bytes: int
    def __init__(self, token: _Optional[bytes] = ..., start: _Optional[_Union[Start, str]] = ..., tables: _Optional[_Iterable[str]] = ..., content: _Optional[_Union[Content, str]] = ..., dtype: _Optional[_Union[DType, str]] = ..., coalesce_ms: _Optional[int] = ..., coalesce_rows: _Optional[int] = ..., progress_ms: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("epochs", "ends")
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    epochs: _containers.RepeatedScalarFieldContainer[int]
    ends: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epochs: _Optional[_Iterable[int]] = ..., ends: _Optional[_Iterable[int]] = ...) -> None: ...

class DeltaHeader(_message.Message):
    __slots__ = ("kind", "table", "dim", "width", "dtype", "version", "more", "token", "head", "time_us", "barrier", "schema", "cause", "history")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[DeltaHeader.Kind]
        KIND_ROWS: _ClassVar[DeltaHeader.Kind]
        KIND_DELETES: _ClassVar[DeltaHeader.Kind]
        KIND_TABLE_CREATED: _ClassVar[DeltaHeader.Kind]
        KIND_TABLE_DROPPED: _ClassVar[DeltaHeader.Kind]
        KIND_BARRIER: _ClassVar[DeltaHeader.Kind]
        KIND_PROGRESS: _ClassVar[DeltaHeader.Kind]
        KIND_SNAPSHOT: _ClassVar[DeltaHeader.Kind]
        KIND_SNAPSHOT_END: _ClassVar[DeltaHeader.Kind]
        KIND_CATCH_UP: _ClassVar[DeltaHeader.Kind]
        KIND_TABLE_ALTERED: _ClassVar[DeltaHeader.Kind]
    KIND_UNSPECIFIED: DeltaHeader.Kind
    KIND_ROWS: DeltaHeader.Kind
    KIND_DELETES: DeltaHeader.Kind
    KIND_TABLE_CREATED: DeltaHeader.Kind
    KIND_TABLE_DROPPED: DeltaHeader.Kind
    KIND_BARRIER: DeltaHeader.Kind
    KIND_PROGRESS: DeltaHeader.Kind
    KIND_SNAPSHOT: DeltaHeader.Kind
    KIND_SNAPSHOT_END: DeltaHeader.Kind
    KIND_CATCH_UP: DeltaHeader.Kind
    KIND_TABLE_ALTERED: DeltaHeader.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    kind: DeltaHeader.Kind
    table: str
    dim: int
    width: int
    dtype: DType
    version: int
    more: bool
    token: bytes
    head: int
    time_us: int
    barrier: str
    schema: TableSchema
    cause: str
    history: History
    def __init__(self, kind: _Optional[_Union[DeltaHeader.Kind, str]] = ..., table: _Optional[str] = ..., dim: _Optional[int] = ..., width: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., version: _Optional[int] = ..., more: bool = ..., token: _Optional[bytes] = ..., head: _Optional[int] = ..., time_us: _Optional[int] = ..., barrier: _Optional[str] = ..., schema: _Optional[_Union[TableSchema, _Mapping]] = ..., cause: _Optional[str] = ..., history: _Optional[_Union[History, _Mapping]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("header", "padding", "keys", "versions", "rows", "steps", "frequencies")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    header: DeltaHeader
    padding: bytes
    keys: bytes
    versions: bytes
    rows: bytes
    steps: bytes
    frequencies: bytes
    def __init__(self, header: _Optional[_Union[DeltaHeader, _Mapping]] = ..., padding: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., versions: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., steps: _Optional[bytes] = ..., frequencies: _Optional[bytes] = ...) -> None: ...

class WriteCheckpointRequest(_message.Message):
    __slots__ = ("name", "attempt", "parent", "until_barrier", "barrier_timeout_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    UNTIL_BARRIER_FIELD_NUMBER: _ClassVar[int]
    BARRIER_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    attempt: str
    parent: str
    until_barrier: str
    barrier_timeout_ms: int
    def __init__(self, name: _Optional[str] = ..., attempt: _Optional[str] = ..., parent: _Optional[str] = ..., until_barrier: _Optional[str] = ..., barrier_timeout_ms: _Optional[int] = ...) -> None: ...

class CheckpointPart(_message.Message):
    __slots__ = ("path", "bytes", "checksum", "version")
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    path: str
    bytes: int
    checksum: str
    version: int
    def __init__(self, path: _Optional[str] = ..., bytes: _Optional[int] = ..., checksum: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class CheckpointProgress(_message.Message):
    __slots__ = ("bytes", "total", "part", "rows", "stage", "names")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[CheckpointProgress.Stage]
        STAGE_READY: _ClassVar[CheckpointProgress.Stage]
        STAGE_DONE: _ClassVar[CheckpointProgress.Stage]
    STAGE_UNSPECIFIED: CheckpointProgress.Stage
    STAGE_READY: CheckpointProgress.Stage
    STAGE_DONE: CheckpointProgress.Stage
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    total: int
    part: CheckpointPart
    rows: int
    stage: CheckpointProgress.Stage
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bytes: _Optional[int] = ..., total: _Optional[int] = ..., part: _Optional[_Union[CheckpointPart, _Mapping]] = ..., rows: _Optional[int] = ..., stage: _Optional[_Union[CheckpointProgress.Stage, str]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class DeleteCheckpointsRequest(_message.Message):
    __slots__ = ("id", "names", "keep", "dry_run")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    id: str
    names: _containers.RepeatedScalarFieldContainer[str]
    keep: int
    dry_run: bool
    def __init__(self, id: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., keep: _Optional[int] = ..., dry_run: bool = ...) -> None: ...

class ContinueRequest(_message.Message):
    __slots__ = ("id", "step")
    class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STEP_UNSPECIFIED: _ClassVar[ContinueRequest.Step]
        STEP_START: _ClassVar[ContinueRequest.Step]
        STEP_FINISH: _ClassVar[ContinueRequest.Step]
    STEP_UNSPECIFIED: ContinueRequest.Step
    STEP_START: ContinueRequest.Step
    STEP_FINISH: ContinueRequest.Step
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    id: str
    step: ContinueRequest.Step
    def __init__(self, id: _Optional[str] = ..., step: _Optional[_Union[ContinueRequest.Step, str]] = ...) -> None: ...

class ContinueResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CompleteCheckpointRequest(_message.Message):
    __slots__ = ("name", "attempt", "parent", "parts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    attempt: str
    parent: str
    parts: _containers.RepeatedCompositeFieldContainer[CheckpointPart]
    def __init__(self, name: _Optional[str] = ..., attempt: _Optional[str] = ..., parent: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[CheckpointPart, _Mapping]]] = ...) -> None: ...

class CheckpointTable(_message.Message):
    __slots__ = ("name", "rows", "schema")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    schema: TableSchema
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., schema: _Optional[_Union[TableSchema, _Mapping]] = ...) -> None: ...

class CheckpointInfo(_message.Message):
    __slots__ = ("name", "parent", "shards", "versions", "bytes", "time_us", "tables", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    parent: str
    shards: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    time_us: int
    tables: _containers.RepeatedCompositeFieldContainer[CheckpointTable]
    problem: str
    def __init__(self, name: _Optional[str] = ..., parent: _Optional[str] = ..., shards: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ..., time_us: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[CheckpointTable, _Mapping]]] = ..., problem: _Optional[str] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointInfo]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[CheckpointInfo, _Mapping]]] = ...) -> None: ...

class VerifyCheckpointRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PrepareRestoreRequest(_message.Message):
    __slots__ = ("name", "id", "replace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    id: str
    replace: bool
    def __init__(self, name: _Optional[str] = ..., id: _Optional[str] = ..., replace: bool = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("id", "step", "owner")
    class Step(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STEP_UNSPECIFIED: _ClassVar[RestoreRequest.Step]
        STEP_HOLD: _ClassVar[RestoreRequest.Step]
        STEP_COMMIT: _ClassVar[RestoreRequest.Step]
        STEP_RELEASE: _ClassVar[RestoreRequest.Step]
        STEP_ABORT: _ClassVar[RestoreRequest.Step]
    STEP_UNSPECIFIED: RestoreRequest.Step
    STEP_HOLD: RestoreRequest.Step
    STEP_COMMIT: RestoreRequest.Step
    STEP_RELEASE: RestoreRequest.Step
    STEP_ABORT: RestoreRequest.Step
    ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    id: str
    step: RestoreRequest.Step
    owner: str
    def __init__(self, id: _Optional[str] = ..., step: _Optional[_Union[RestoreRequest.Step, str]] = ..., owner: _Optional[str] = ...) -> None: ...

class RestoreStatus(_message.Message):
    __slots__ = ("id", "name", "phase", "why")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[RestoreStatus.Phase]
        PHASE_PREPARED: _ClassVar[RestoreStatus.Phase]
        PHASE_HELD: _ClassVar[RestoreStatus.Phase]
        PHASE_COMMITTED: _ClassVar[RestoreStatus.Phase]
        PHASE_LOADED: _ClassVar[RestoreStatus.Phase]
        PHASE_FAILED: _ClassVar[RestoreStatus.Phase]
        PHASE_ABORTING: _ClassVar[RestoreStatus.Phase]
        PHASE_RELEASED: _ClassVar[RestoreStatus.Phase]
        PHASE_ABORTED: _ClassVar[RestoreStatus.Phase]
    PHASE_UNSPECIFIED: RestoreStatus.Phase
    PHASE_PREPARED: RestoreStatus.Phase
    PHASE_HELD: RestoreStatus.Phase
    PHASE_COMMITTED: RestoreStatus.Phase
    PHASE_LOADED: RestoreStatus.Phase
    PHASE_FAILED: RestoreStatus.Phase
    PHASE_ABORTING: RestoreStatus.Phase
    PHASE_RELEASED: RestoreStatus.Phase
    PHASE_ABORTED: RestoreStatus.Phase
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    phase: RestoreStatus.Phase
    why: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., phase: _Optional[_Union[RestoreStatus.Phase, str]] = ..., why: _Optional[str] = ...) -> None: ...

class LoadTableRequest(_message.Message):
    __slots__ = ("name", "table", "into", "id", "replace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    INTO_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    table: str
    into: str
    id: str
    replace: bool
    def __init__(self, name: _Optional[str] = ..., table: _Optional[str] = ..., into: _Optional[str] = ..., id: _Optional[str] = ..., replace: bool = ...) -> None: ...

class ReadRowsRequest(_message.Message):
    __slots__ = ("table", "checkpoint")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    table: str
    checkpoint: str
    def __init__(self, table: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class WriteRowsRequest(_message.Message):
    __slots__ = ("table", "width", "keys", "rows", "steps", "frequencies")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    table: str
    width: int
    keys: bytes
    rows: bytes
    steps: bytes
    frequencies: bytes
    def __init__(self, table: _Optional[str] = ..., width: _Optional[int] = ..., keys: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., steps: _Optional[bytes] = ..., frequencies: _Optional[bytes] = ...) -> None: ...

class WriteRowsResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ShardMap(_message.Message):
    __slots__ = ("epoch", "shards", "shard_of_bucket")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_OF_BUCKET_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    shards: int
    shard_of_bucket: bytes
    def __init__(self, epoch: _Optional[int] = ..., shards: _Optional[int] = ..., shard_of_bucket: _Optional[bytes] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes", "keys")
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    message_bytes: int
    keys: int
    def __init__(self, message_bytes: _Optional[int] = ..., keys: _Optional[int] = ...) -> None: ...

class DiagnoseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DiagnoseResponse(_message.Message):
    __slots__ = ("findings", "time")
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    time: float
    def __init__(self, findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., time: _Optional[float] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("check", "state", "found", "advice")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Finding.State]
        STATE_OK: _ClassVar[Finding.State]
        STATE_WARNING: _ClassVar[Finding.State]
        STATE_ERROR: _ClassVar[Finding.State]
    STATE_UNSPECIFIED: Finding.State
    STATE_OK: Finding.State
    STATE_WARNING: Finding.State
    STATE_ERROR: Finding.State
    CHECK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    check: str
    state: Finding.State
    found: str
    advice: str
    def __init__(self, check: _Optional[str] = ..., state: _Optional[_Union[Finding.State, str]] = ..., found: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("release", "shard", "shard_map", "limits", "version", "memory_bytes", "memory_budget_bytes", "lineage", "durable_version", "uptime_seconds", "tables", "rows", "log_bytes", "log_first_version", "flush_age_seconds", "damaged_blocks", "cluster", "advertise", "start", "gpu_bytes", "gpu_budget_bytes", "gpu_paused", "lane")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARD_MAP_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_FIRST_VERSION_FIELD_NUMBER: _ClassVar[int]
    FLUSH_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    GPU_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_PAUSED_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    release: str
    shard: int
    shard_map: ShardMap
    limits: Limits
    version: int
    memory_bytes: int
    memory_budget_bytes: int
    lineage: bytes
    durable_version: int
    uptime_seconds: float
    tables: int
    rows: int
    log_bytes: int
    log_first_version: int
    flush_age_seconds: float
    damaged_blocks: int
    cluster: str
    advertise: str
    start: int
    gpu_bytes: int
    gpu_budget_bytes: int
    gpu_paused: bool
    lane: Lane
    def __init__(self, release: _Optional[str] = ..., shard: _Optional[int] = ..., shard_map: _Optional[_Union[ShardMap, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., version: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., memory_budget_bytes: _Optional[int] = ..., lineage: _Optional[bytes] = ..., durable_version: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., tables: _Optional[int] = ..., rows: _Optional[int] = ..., log_bytes: _Optional[int] = ..., log_first_version: _Optional[int] = ..., flush_age_seconds: _Optional[float] = ..., damaged_blocks: _Optional[int] = ..., cluster: _Optional[str] = ..., advertise: _Optional[str] = ..., start: _Optional[int] = ..., gpu_bytes: _Optional[int] = ..., gpu_budget_bytes: _Optional[int] = ..., gpu_paused: bool = ..., lane: _Optional[_Union[Lane, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("count", "seconds", "bounds", "buckets")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    count: int
    seconds: float
    bounds: _containers.RepeatedScalarFieldContainer[float]
    buckets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, count: _Optional[int] = ..., seconds: _Optional[float] = ..., bounds: _Optional[_Iterable[float]] = ..., buckets: _Optional[_Iterable[int]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("release", "shard", "shards", "cluster", "advertise", "start", "time", "uptime_seconds", "phase", "phase_seconds", "version", "rows", "table_count", "tables", "methods", "errors", "recent_errors", "engine", "log", "subscribers", "storage", "budgets", "lanes", "streams", "cpu_seconds", "certificate_expires", "gpu_paused", "damaged_blocks", "requests_waiting", "request_queue")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PHASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TABLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    RECENT_ERRORS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_FIELD_NUMBER: _ClassVar[int]
    GPU_PAUSED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    REQUEST_QUEUE_FIELD_NUMBER: _ClassVar[int]
    release: str
    shard: int
    shards: int
    cluster: str
    advertise: str
    start: int
    time: float
    uptime_seconds: float
    phase: Phase
    phase_seconds: float
    version: int
    rows: int
    table_count: int
    tables: _containers.RepeatedCompositeFieldContainer[TableStatus]
    methods: _containers.RepeatedCompositeFieldContainer[MethodStatus]
    errors: _containers.RepeatedCompositeFieldContainer[ErrorCount]
    recent_errors: _containers.RepeatedCompositeFieldContainer[RecentError]
    engine: EngineStatus
    log: LogStatus
    subscribers: FeedStatus
    storage: StorageStatus
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    lanes: LaneStatus
    streams: int
    cpu_seconds: float
    certificate_expires: float
    gpu_paused: bool
    damaged_blocks: int
    requests_waiting: int
    request_queue: Timing
    def __init__(self, release: _Optional[str] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ..., cluster: _Optional[str] = ..., advertise: _Optional[str] = ..., start: _Optional[int] = ..., time: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., phase: _Optional[_Union[Phase, str]] = ..., phase_seconds: _Optional[float] = ..., version: _Optional[int] = ..., rows: _Optional[int] = ..., table_count: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableStatus, _Mapping]]] = ..., methods: _Optional[_Iterable[_Union[MethodStatus, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ErrorCount, _Mapping]]] = ..., recent_errors: _Optional[_Iterable[_Union[RecentError, _Mapping]]] = ..., engine: _Optional[_Union[EngineStatus, _Mapping]] = ..., log: _Optional[_Union[LogStatus, _Mapping]] = ..., subscribers: _Optional[_Union[FeedStatus, _Mapping]] = ..., storage: _Optional[_Union[StorageStatus, _Mapping]] = ..., budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ..., lanes: _Optional[_Union[LaneStatus, _Mapping]] = ..., streams: _Optional[int] = ..., cpu_seconds: _Optional[float] = ..., certificate_expires: _Optional[float] = ..., gpu_paused: bool = ..., damaged_blocks: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., request_queue: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class TableStatus(_message.Message):
    __slots__ = ("name", "rows", "bytes", "tiers", "requests", "pulled_keys", "pushed_keys", "damaged_blocks", "lost_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PULLED_KEYS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_KEYS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    requests: int
    pulled_keys: int
    pushed_keys: int
    damaged_blocks: int
    lost_rows: int
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., requests: _Optional[int] = ..., pulled_keys: _Optional[int] = ..., pushed_keys: _Optional[int] = ..., damaged_blocks: _Optional[int] = ..., lost_rows: _Optional[int] = ...) -> None: ...

class MethodStatus(_message.Message):
    __slots__ = ("method", "requests", "keys", "bytes", "latency")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    method: str
    requests: int
    keys: int
    bytes: int
    latency: Timing
    def __init__(self, method: _Optional[str] = ..., requests: _Optional[int] = ..., keys: _Optional[int] = ..., bytes: _Optional[int] = ..., latency: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class ErrorCount(_message.Message):
    __slots__ = ("method", "code", "reason", "count")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    method: str
    code: str
    reason: str
    count: int
    def __init__(self, method: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RecentError(_message.Message):
    __slots__ = ("time", "method", "code", "reason", "message", "count")
    TIME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    time: float
    method: str
    code: str
    reason: str
    message: str
    count: int
    def __init__(self, time: _Optional[float] = ..., method: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("busy_seconds", "waiting", "queue_wait", "failures")
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_WAIT_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    busy_seconds: float
    waiting: int
    queue_wait: Timing
    failures: int
    def __init__(self, busy_seconds: _Optional[float] = ..., waiting: _Optional[int] = ..., queue_wait: _Optional[_Union[Timing, _Mapping]] = ..., failures: _Optional[int] = ...) -> None: ...

class LogStatus(_message.Message):
    __slots__ = ("written_version", "durable_version", "first_version", "bytes", "backlog_bytes", "write", "fsync")
    WRITTEN_VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    FSYNC_FIELD_NUMBER: _ClassVar[int]
    written_version: int
    durable_version: int
    first_version: int
    bytes: int
    backlog_bytes: int
    write: Timing
    fsync: Timing
    def __init__(self, written_version: _Optional[int] = ..., durable_version: _Optional[int] = ..., first_version: _Optional[int] = ..., bytes: _Optional[int] = ..., backlog_bytes: _Optional[int] = ..., write: _Optional[_Union[Timing, _Mapping]] = ..., fsync: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class FeedStatus(_message.Message):
    __slots__ = ("subscribers", "lag_versions", "lag_seconds", "bytes", "messages", "freshness")
    SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    LAG_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LAG_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    subscribers: int
    lag_versions: int
    lag_seconds: float
    bytes: int
    messages: int
    freshness: Timing
    def __init__(self, subscribers: _Optional[int] = ..., lag_versions: _Optional[int] = ..., lag_seconds: _Optional[float] = ..., bytes: _Optional[int] = ..., messages: _Optional[int] = ..., freshness: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class StorageStatus(_message.Message):
    __slots__ = ("flush_age_seconds", "flushes", "flush_failure", "flush", "checkpoint_age_seconds", "checkpoint_write", "checkpoint_failures", "work", "restore", "restore_phase")
    FLUSH_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FLUSHES_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FAILURE_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_WRITE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FAILURES_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_PHASE_FIELD_NUMBER: _ClassVar[int]
    flush_age_seconds: float
    flushes: int
    flush_failure: str
    flush: Timing
    checkpoint_age_seconds: float
    checkpoint_write: Timing
    checkpoint_failures: int
    work: str
    restore: str
    restore_phase: str
    def __init__(self, flush_age_seconds: _Optional[float] = ..., flushes: _Optional[int] = ..., flush_failure: _Optional[str] = ..., flush: _Optional[_Union[Timing, _Mapping]] = ..., checkpoint_age_seconds: _Optional[float] = ..., checkpoint_write: _Optional[_Union[Timing, _Mapping]] = ..., checkpoint_failures: _Optional[int] = ..., work: _Optional[str] = ..., restore: _Optional[str] = ..., restore_phase: _Optional[str] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("name", "used", "limit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    used: int
    limit: int
    def __init__(self, name: _Optional[str] = ..., used: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class LaneStatus(_message.Message):
    __slots__ = ("clients", "bytes")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    clients: int
    bytes: int
    def __init__(self, clients: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class AnalyzeRequest(_message.Message):
    __slots__ = ("table", "checkpoint", "frequencies", "ages", "norms", "grace", "top", "columns")
    class Columns(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        COLUMNS_UNSPECIFIED: _ClassVar[AnalyzeRequest.Columns]
        COLUMNS_METADATA: _ClassVar[AnalyzeRequest.Columns]
        COLUMNS_EMBEDDING: _ClassVar[AnalyzeRequest.Columns]
    COLUMNS_UNSPECIFIED: AnalyzeRequest.Columns
    COLUMNS_METADATA: AnalyzeRequest.Columns
    COLUMNS_EMBEDDING: AnalyzeRequest.Columns
    TABLE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    AGES_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    table: str
    checkpoint: str
    frequencies: _containers.RepeatedScalarFieldContainer[int]
    ages: _containers.RepeatedScalarFieldContainer[int]
    norms: _containers.RepeatedScalarFieldContainer[float]
    grace: int
    top: int
    columns: AnalyzeRequest.Columns
    def __init__(self, table: _Optional[str] = ..., checkpoint: _Optional[str] = ..., frequencies: _Optional[_Iterable[int]] = ..., ages: _Optional[_Iterable[int]] = ..., norms: _Optional[_Iterable[float]] = ..., grace: _Optional[int] = ..., top: _Optional[int] = ..., columns: _Optional[_Union[AnalyzeRequest.Columns, str]] = ...) -> None: ...

class AnalyzeResponse(_message.Message):
    __slots__ = ("done", "total", "keys", "versions", "steps", "frequencies", "norms", "tier", "embeddings", "summary")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    keys: bytes
    versions: bytes
    steps: bytes
    frequencies: bytes
    norms: bytes
    tier: str
    embeddings: bytes
    summary: Summary
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., keys: _Optional[bytes] = ..., versions: _Optional[bytes] = ..., steps: _Optional[bytes] = ..., frequencies: _Optional[bytes] = ..., norms: _Optional[bytes] = ..., tier: _Optional[str] = ..., embeddings: _Optional[bytes] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("edges", "counts")
    EDGES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    edges: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, edges: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class RowList(_message.Message):
    __slots__ = ("keys", "versions", "steps", "frequencies", "norms", "tiers")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    frequencies: _containers.RepeatedScalarFieldContainer[int]
    norms: _containers.RepeatedScalarFieldContainer[float]
    tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[int]] = ..., versions: _Optional[_Iterable[int]] = ..., steps: _Optional[_Iterable[int]] = ..., frequencies: _Optional[_Iterable[int]] = ..., norms: _Optional[_Iterable[float]] = ..., tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("schema", "width", "version", "last_version", "step", "rows", "occurrences", "norm_sum", "frequencies", "frequency_sums", "ages", "norms", "idle_norms", "grace", "tiers", "index_bytes", "waiting", "waiting_bytes", "most_frequent", "least_frequent", "largest", "smallest", "reuses", "first_pushes", "pull_reuses")
    class Tier(_message.Message):
        __slots__ = ("name", "rows", "bytes", "on_disk")
        NAME_FIELD_NUMBER: _ClassVar[int]
        ROWS_FIELD_NUMBER: _ClassVar[int]
        BYTES_FIELD_NUMBER: _ClassVar[int]
        ON_DISK_FIELD_NUMBER: _ClassVar[int]
        name: str
        rows: int
        bytes: int
        on_disk: bool
        def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ..., on_disk: bool = ...) -> None: ...
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OCCURRENCES_FIELD_NUMBER: _ClassVar[int]
    NORM_SUM_FIELD_NUMBER: _ClassVar[int]
    FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_SUMS_FIELD_NUMBER: _ClassVar[int]
    AGES_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    IDLE_NORMS_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MOST_FREQUENT_FIELD_NUMBER: _ClassVar[int]
    LEAST_FREQUENT_FIELD_NUMBER: _ClassVar[int]
    LARGEST_FIELD_NUMBER: _ClassVar[int]
    SMALLEST_FIELD_NUMBER: _ClassVar[int]
    REUSES_FIELD_NUMBER: _ClassVar[int]
    FIRST_PUSHES_FIELD_NUMBER: _ClassVar[int]
    PULL_REUSES_FIELD_NUMBER: _ClassVar[int]
    schema: TableSchema
    width: int
    version: int
    last_version: int
    step: int
    rows: int
    occurrences: int
    norm_sum: float
    frequencies: Histogram
    frequency_sums: _containers.RepeatedScalarFieldContainer[int]
    ages: Histogram
    norms: Histogram
    idle_norms: Histogram
    grace: int
    tiers: _containers.RepeatedCompositeFieldContainer[Summary.Tier]
    index_bytes: int
    waiting: int
    waiting_bytes: int
    most_frequent: RowList
    least_frequent: RowList
    largest: RowList
    smallest: RowList
    reuses: Histogram
    first_pushes: int
    pull_reuses: Histogram
    def __init__(self, schema: _Optional[_Union[TableSchema, _Mapping]] = ..., width: _Optional[int] = ..., version: _Optional[int] = ..., last_version: _Optional[int] = ..., step: _Optional[int] = ..., rows: _Optional[int] = ..., occurrences: _Optional[int] = ..., norm_sum: _Optional[float] = ..., frequencies: _Optional[_Union[Histogram, _Mapping]] = ..., frequency_sums: _Optional[_Iterable[int]] = ..., ages: _Optional[_Union[Histogram, _Mapping]] = ..., norms: _Optional[_Union[Histogram, _Mapping]] = ..., idle_norms: _Optional[_Union[Histogram, _Mapping]] = ..., grace: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[Summary.Tier, _Mapping]]] = ..., index_bytes: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_bytes: _Optional[int] = ..., most_frequent: _Optional[_Union[RowList, _Mapping]] = ..., least_frequent: _Optional[_Union[RowList, _Mapping]] = ..., largest: _Optional[_Union[RowList, _Mapping]] = ..., smallest: _Optional[_Union[RowList, _Mapping]] = ..., reuses: _Optional[_Union[Histogram, _Mapping]] = ..., first_pushes: _Optional[int] = ..., pull_reuses: _Optional[_Union[Histogram, _Mapping]] = ...) -> None: ...

class VerifyRowsRequest(_message.Message):
    __slots__ = ("table", "keys")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    table: str
    keys: bool
    def __init__(self, table: _Optional[str] = ..., keys: bool = ...) -> None: ...

class VerifyRowsResponse(_message.Message):
    __slots__ = ("bytes", "total", "damaged")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    total: int
    damaged: DamagedBlock
    def __init__(self, bytes: _Optional[int] = ..., total: _Optional[int] = ..., damaged: _Optional[_Union[DamagedBlock, _Mapping]] = ...) -> None: ...

class DamagedBlock(_message.Message):
    __slots__ = ("number", "rows", "lost_rows", "problem", "keys")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    number: int
    rows: int
    lost_rows: int
    problem: str
    keys: bytes
    def __init__(self, number: _Optional[int] = ..., rows: _Optional[int] = ..., lost_rows: _Optional[int] = ..., problem: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("table", "keys", "embeddings")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    table: str
    keys: bytes
    embeddings: bool
    def __init__(self, table: _Optional[str] = ..., keys: _Optional[bytes] = ..., embeddings: bool = ...) -> None: ...

class KeyFacts(_message.Message):
    __slots__ = ("key", "state", "tier", "version", "step", "frequency", "norm", "embedding", "waiting", "gone", "why")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[KeyFacts.State]
        STATE_ROW: _ClassVar[KeyFacts.State]
        STATE_WAITING: _ClassVar[KeyFacts.State]
        STATE_GONE: _ClassVar[KeyFacts.State]
        STATE_NEW: _ClassVar[KeyFacts.State]
        STATE_UNKNOWN: _ClassVar[KeyFacts.State]
    STATE_UNSPECIFIED: KeyFacts.State
    STATE_ROW: KeyFacts.State
    STATE_WAITING: KeyFacts.State
    STATE_GONE: KeyFacts.State
    STATE_NEW: KeyFacts.State
    STATE_UNKNOWN: KeyFacts.State
    class Gone(_message.Message):
        __slots__ = ("version", "cause", "time_us", "step")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        CAUSE_FIELD_NUMBER: _ClassVar[int]
        TIME_US_FIELD_NUMBER: _ClassVar[int]
        STEP_FIELD_NUMBER: _ClassVar[int]
        version: int
        cause: str
        time_us: int
        step: int
        def __init__(self, version: _Optional[int] = ..., cause: _Optional[str] = ..., time_us: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    key: int
    state: KeyFacts.State
    tier: str
    version: int
    step: int
    frequency: int
    norm: float
    embedding: _containers.RepeatedScalarFieldContainer[float]
    waiting: int
    gone: _containers.RepeatedCompositeFieldContainer[KeyFacts.Gone]
    why: str
    def __init__(self, key: _Optional[int] = ..., state: _Optional[_Union[KeyFacts.State, str]] = ..., tier: _Optional[str] = ..., version: _Optional[int] = ..., step: _Optional[int] = ..., frequency: _Optional[int] = ..., norm: _Optional[float] = ..., embedding: _Optional[_Iterable[float]] = ..., waiting: _Optional[int] = ..., gone: _Optional[_Iterable[_Union[KeyFacts.Gone, _Mapping]]] = ..., why: _Optional[str] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("keys", "version", "created", "tombstone_horizon", "step", "admission")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TOMBSTONE_HORIZON_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[KeyFacts]
    version: int
    created: int
    tombstone_horizon: int
    step: int
    admission: Rule
    def __init__(self, keys: _Optional[_Iterable[_Union[KeyFacts, _Mapping]]] = ..., version: _Optional[int] = ..., created: _Optional[int] = ..., tombstone_horizon: _Optional[int] = ..., step: _Optional[int] = ..., admission: _Optional[_Union[Rule, _Mapping]] = ...) -> None: ...
