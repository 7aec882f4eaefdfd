from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Error(_message.Message):
    __slots__ = ("kind", "message", "hint", "findings", "more", "id")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    hint: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    more: int
    id: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., more: _Optional[int] = ..., id: _Optional[str] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("line", "column", "field", "message", "hint", "file")
    LINE_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    line: int
    column: int
    field: str
    message: str
    hint: str
    file: str
    def __init__(self, line: _Optional[int] = ..., column: _Optional[int] = ..., field: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., file: _Optional[str] = ...) -> None: ...

class Object(_message.Message):
    __slots__ = ("group", "version", "kind", "namespace", "name", "json", "text", "file", "line", "created", "author", "resource_version", "problems", "nacks", "address")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    group: str
    version: str
    kind: str
    namespace: str
    name: str
    json: str
    text: str
    file: str
    line: int
    created: float
    author: str
    resource_version: int
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    nacks: _containers.RepeatedCompositeFieldContainer[Nack]
    address: str
    def __init__(self, group: _Optional[str] = ..., version: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., json: _Optional[str] = ..., text: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., created: _Optional[float] = ..., author: _Optional[str] = ..., resource_version: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ..., nacks: _Optional[_Iterable[_Union[Nack, _Mapping]]] = ..., address: _Optional[str] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("reason", "message", "field", "severity")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    field: str
    severity: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., severity: _Optional[str] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("proxy", "type_url", "resource", "text", "resource_version")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    TYPE_URL_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    type_url: str
    resource: str
    text: str
    resource_version: int
    def __init__(self, proxy: _Optional[str] = ..., type_url: _Optional[str] = ..., resource: _Optional[str] = ..., text: _Optional[str] = ..., resource_version: _Optional[int] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("document", "file", "line", "resource_version", "dry_run", "namespace")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    file: str
    line: int
    resource_version: int
    dry_run: bool
    namespace: str
    def __init__(self, document: _Optional[bytes] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., resource_version: _Optional[int] = ..., dry_run: _Optional[bool] = ..., namespace: _Optional[str] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("object", "outcome")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[ApplyResponse.Outcome]
        CREATED: _ClassVar[ApplyResponse.Outcome]
        CONFIGURED: _ClassVar[ApplyResponse.Outcome]
        UNCHANGED: _ClassVar[ApplyResponse.Outcome]
    OUTCOME_UNSPECIFIED: ApplyResponse.Outcome
    CREATED: ApplyResponse.Outcome
    CONFIGURED: ApplyResponse.Outcome
    UNCHANGED: ApplyResponse.Outcome
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    object: Object
    outcome: ApplyResponse.Outcome
    def __init__(self, object: _Optional[_Union[Object, _Mapping]] = ..., outcome: _Optional[_Union[ApplyResponse.Outcome, str]] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("group", "kind", "namespace", "name")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    group: str
    kind: str
    namespace: str
    name: str
    def __init__(self, group: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("group", "kind", "namespace")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    group: str
    kind: str
    namespace: str
    def __init__(self, group: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("objects", "resource_version")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[Object]
    resource_version: int
    def __init__(self, objects: _Optional[_Iterable[_Union[Object, _Mapping]]] = ..., resource_version: _Optional[int] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("group", "kind", "namespace", "name", "resource_version")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    group: str
    kind: str
    namespace: str
    name: str
    resource_version: int
    def __init__(self, group: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., resource_version: _Optional[int] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("resource_version",)
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    resource_version: int
    def __init__(self, resource_version: _Optional[int] = ...) -> None: ...

class ProxiesRequest(_message.Message):
    __slots__ = ("local",)
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    local: bool
    def __init__(self, local: _Optional[bool] = ...) -> None: ...

class ProxiesResponse(_message.Message):
    __slots__ = ("proxies", "replicas", "unreachable")
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    proxies: _containers.RepeatedCompositeFieldContainer[Proxy]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    unreachable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, proxies: _Optional[_Iterable[_Union[Proxy, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., unreachable: _Optional[_Iterable[str]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("name", "leader", "ready", "revision", "streams", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    leader: bool
    ready: bool
    revision: int
    streams: int
    version: str
    def __init__(self, name: _Optional[str] = ..., leader: _Optional[bool] = ..., ready: _Optional[bool] = ..., revision: _Optional[int] = ..., streams: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Proxy(_message.Message):
    __slots__ = ("name", "replica", "identity", "connected", "revision", "acked", "state", "versions", "nacks")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NACKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    replica: str
    identity: str
    connected: float
    revision: int
    acked: int
    state: str
    versions: _containers.ScalarMap[str, str]
    nacks: _containers.RepeatedCompositeFieldContainer[Nack]
    def __init__(self, name: _Optional[str] = ..., replica: _Optional[str] = ..., identity: _Optional[str] = ..., connected: _Optional[float] = ..., revision: _Optional[int] = ..., acked: _Optional[int] = ..., state: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., nacks: _Optional[_Iterable[_Union[Nack, _Mapping]]] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("resource_versions", "seconds", "lagging")
    RESOURCE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAGGING_FIELD_NUMBER: _ClassVar[int]
    resource_versions: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    lagging: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, resource_versions: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., lagging: _Optional[_Iterable[str]] = ...) -> None: ...

class WaitResponse(_message.Message):
    __slots__ = ("done", "proxies", "acked", "laggards", "disconnected", "absent")
    DONE_FIELD_NUMBER: _ClassVar[int]
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    LAGGARDS_FIELD_NUMBER: _ClassVar[int]
    DISCONNECTED_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    done: bool
    proxies: int
    acked: int
    laggards: _containers.RepeatedCompositeFieldContainer[Laggard]
    disconnected: _containers.RepeatedScalarFieldContainer[str]
    absent: int
    def __init__(self, done: _Optional[bool] = ..., proxies: _Optional[int] = ..., acked: _Optional[int] = ..., laggards: _Optional[_Iterable[_Union[Laggard, _Mapping]]] = ..., disconnected: _Optional[_Iterable[str]] = ..., absent: _Optional[int] = ...) -> None: ...

class Laggard(_message.Message):
    __slots__ = ("proxy", "replica", "state", "text")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    replica: str
    state: str
    text: str
    def __init__(self, proxy: _Optional[str] = ..., replica: _Optional[str] = ..., state: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class AcksRequest(_message.Message):
    __slots__ = ("resource_versions",)
    RESOURCE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    resource_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, resource_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class AcksResponse(_message.Message):
    __slots__ = ("revision", "proxies", "laggards")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    LAGGARDS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    proxies: _containers.RepeatedScalarFieldContainer[str]
    laggards: _containers.RepeatedCompositeFieldContainer[Laggard]
    def __init__(self, revision: _Optional[int] = ..., proxies: _Optional[_Iterable[str]] = ..., laggards: _Optional[_Iterable[_Union[Laggard, _Mapping]]] = ...) -> None: ...

class DenialsRequest(_message.Message):
    __slots__ = ("local", "namespace")
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    local: bool
    namespace: str
    def __init__(self, local: _Optional[bool] = ..., namespace: _Optional[str] = ...) -> None: ...

class DenialsResponse(_message.Message):
    __slots__ = ("denials", "unreachable")
    DENIALS_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    denials: _containers.RepeatedCompositeFieldContainer[Denial]
    unreachable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, denials: _Optional[_Iterable[_Union[Denial, _Mapping]]] = ..., unreachable: _Optional[_Iterable[str]] = ...) -> None: ...

class Denial(_message.Message):
    __slots__ = ("workload", "port", "mode", "denied", "would_be_denied", "since", "last")
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    WOULD_BE_DENIED_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    workload: str
    port: str
    mode: str
    denied: int
    would_be_denied: int
    since: float
    last: float
    def __init__(self, workload: _Optional[str] = ..., port: _Optional[str] = ..., mode: _Optional[str] = ..., denied: _Optional[int] = ..., would_be_denied: _Optional[int] = ..., since: _Optional[float] = ..., last: _Optional[float] = ...) -> None: ...

class ReportDenialsRequest(_message.Message):
    __slots__ = ("since", "ports")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    since: float
    ports: _containers.RepeatedCompositeFieldContainer[CountedPort]
    def __init__(self, since: _Optional[float] = ..., ports: _Optional[_Iterable[_Union[CountedPort, _Mapping]]] = ...) -> None: ...

class CountedPort(_message.Message):
    __slots__ = ("port", "denied", "would_be_denied", "last")
    PORT_FIELD_NUMBER: _ClassVar[int]
    DENIED_FIELD_NUMBER: _ClassVar[int]
    WOULD_BE_DENIED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    port: str
    denied: int
    would_be_denied: int
    last: float
    def __init__(self, port: _Optional[str] = ..., denied: _Optional[int] = ..., would_be_denied: _Optional[int] = ..., last: _Optional[float] = ...) -> None: ...

class ReportDenialsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("caller", "service", "port", "method", "path", "headers")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    caller: str
    service: str
    port: int
    method: str
    path: str
    headers: _containers.RepeatedCompositeFieldContainer[Header]
    def __init__(self, caller: _Optional[str] = ..., service: _Optional[str] = ..., port: _Optional[int] = ..., method: _Optional[str] = ..., path: _Optional[str] = ..., headers: _Optional[_Iterable[_Union[Header, _Mapping]]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("verdict", "reason", "caller", "identity", "service", "port", "protocol", "method", "path", "headers", "branch", "split_by", "ways", "effects", "unanswered")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    SPLIT_BY_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    verdict: str
    reason: str
    caller: str
    identity: str
    service: str
    port: int
    protocol: str
    method: str
    path: str
    headers: _containers.RepeatedCompositeFieldContainer[Header]
    branch: _containers.RepeatedScalarFieldContainer[str]
    split_by: _containers.RepeatedCompositeFieldContainer[Rule]
    ways: _containers.RepeatedCompositeFieldContainer[Way]
    effects: _containers.RepeatedCompositeFieldContainer[Effect]
    unanswered: str
    def __init__(self, verdict: _Optional[str] = ..., reason: _Optional[str] = ..., caller: _Optional[str] = ..., identity: _Optional[str] = ..., service: _Optional[str] = ..., port: _Optional[int] = ..., protocol: _Optional[str] = ..., method: _Optional[str] = ..., path: _Optional[str] = ..., headers: _Optional[_Iterable[_Union[Header, _Mapping]]] = ..., branch: _Optional[_Iterable[str]] = ..., split_by: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., ways: _Optional[_Iterable[_Union[Way, _Mapping]]] = ..., effects: _Optional[_Iterable[_Union[Effect, _Mapping]]] = ..., unanswered: _Optional[str] = ...) -> None: ...

class Rule(_message.Message):
    __slots__ = ("manifest", "file", "line", "resource_version")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    file: str
    line: int
    resource_version: int
    def __init__(self, manifest: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., resource_version: _Optional[int] = ...) -> None: ...

class Effect(_message.Message):
    __slots__ = ("rule", "kind", "share", "what")
    RULE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    rule: Rule
    kind: str
    share: float
    what: str
    def __init__(self, rule: _Optional[_Union[Rule, _Mapping]] = ..., kind: _Optional[str] = ..., share: _Optional[float] = ..., what: _Optional[str] = ...) -> None: ...

class Way(_message.Message):
    __slots__ = ("service", "port", "share", "servers", "more", "effects")
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    service: str
    port: int
    share: float
    servers: _containers.RepeatedCompositeFieldContainer[Server]
    more: int
    effects: _containers.RepeatedCompositeFieldContainer[Effect]
    def __init__(self, service: _Optional[str] = ..., port: _Optional[int] = ..., share: _Optional[float] = ..., servers: _Optional[_Iterable[_Union[Server, _Mapping]]] = ..., more: _Optional[int] = ..., effects: _Optional[_Iterable[_Union[Effect, _Mapping]]] = ...) -> None: ...

class Server(_message.Message):
    __slots__ = ("workload", "identity", "app_port", "ready", "allowed", "passes", "mode", "by", "misses", "left_out", "refused", "effects")
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    APP_PORT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    workload: str
    identity: str
    app_port: int
    ready: bool
    allowed: bool
    passes: bool
    mode: str
    by: _containers.RepeatedCompositeFieldContainer[Rule]
    misses: _containers.RepeatedCompositeFieldContainer[Miss]
    left_out: _containers.RepeatedScalarFieldContainer[str]
    refused: str
    effects: _containers.RepeatedCompositeFieldContainer[Effect]
    def __init__(self, workload: _Optional[str] = ..., identity: _Optional[str] = ..., app_port: _Optional[int] = ..., ready: _Optional[bool] = ..., allowed: _Optional[bool] = ..., passes: _Optional[bool] = ..., mode: _Optional[str] = ..., by: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., misses: _Optional[_Iterable[_Union[Miss, _Mapping]]] = ..., left_out: _Optional[_Iterable[str]] = ..., refused: _Optional[str] = ..., effects: _Optional[_Iterable[_Union[Effect, _Mapping]]] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("rule", "why")
    RULE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    rule: Rule
    why: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rule: _Optional[_Union[Rule, _Mapping]] = ..., why: _Optional[_Iterable[str]] = ...) -> None: ...

class DiffRequest(_message.Message):
    __slots__ = ("documents", "namespace", "delete")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    namespace: str
    delete: bool
    def __init__(self, documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ..., namespace: _Optional[str] = ..., delete: _Optional[bool] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("text", "file", "line")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    file: str
    line: int
    def __init__(self, text: _Optional[bytes] = ..., file: _Optional[str] = ..., line: _Optional[int] = ...) -> None: ...

class DiffResponse(_message.Message):
    __slots__ = ("revision", "changes", "proxies", "differences", "come", "go", "more")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    COME_FIELD_NUMBER: _ClassVar[int]
    GO_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    revision: int
    changes: _containers.RepeatedCompositeFieldContainer[ManifestChange]
    proxies: int
    differences: _containers.RepeatedCompositeFieldContainer[Difference]
    come: _containers.RepeatedCompositeFieldContainer[ToldProblem]
    go: _containers.RepeatedCompositeFieldContainer[ToldProblem]
    more: int
    def __init__(self, revision: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[ManifestChange, _Mapping]]] = ..., proxies: _Optional[int] = ..., differences: _Optional[_Iterable[_Union[Difference, _Mapping]]] = ..., come: _Optional[_Iterable[_Union[ToldProblem, _Mapping]]] = ..., go: _Optional[_Iterable[_Union[ToldProblem, _Mapping]]] = ..., more: _Optional[int] = ...) -> None: ...

class ManifestChange(_message.Message):
    __slots__ = ("manifest", "change")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    change: str
    def __init__(self, manifest: _Optional[str] = ..., change: _Optional[str] = ...) -> None: ...

class Difference(_message.Message):
    __slots__ = ("proxies", "more", "resources")
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    proxies: _containers.RepeatedScalarFieldContainer[str]
    more: int
    resources: _containers.RepeatedCompositeFieldContainer[ChangedResource]
    def __init__(self, proxies: _Optional[_Iterable[str]] = ..., more: _Optional[int] = ..., resources: _Optional[_Iterable[_Union[ChangedResource, _Mapping]]] = ...) -> None: ...

class ChangedResource(_message.Message):
    __slots__ = ("type", "name", "change", "before", "after", "sources")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    type: str
    name: str
    change: str
    before: str
    after: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, type: _Optional[str] = ..., name: _Optional[str] = ..., change: _Optional[str] = ..., before: _Optional[str] = ..., after: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ...) -> None: ...

class ToldProblem(_message.Message):
    __slots__ = ("manifest", "problem")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    problem: Problem
    def __init__(self, manifest: _Optional[str] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class ConfigRequest(_message.Message):
    __slots__ = ("proxy", "type", "name")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    type: str
    name: str
    def __init__(self, proxy: _Optional[str] = ..., type: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ConfigResponse(_message.Message):
    __slots__ = ("proxy", "revision", "replica", "types", "resources")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    revision: int
    replica: str
    types: _containers.RepeatedCompositeFieldContainer[ConfiguredType]
    resources: _containers.RepeatedCompositeFieldContainer[ConfiguredResource]
    def __init__(self, proxy: _Optional[str] = ..., revision: _Optional[int] = ..., replica: _Optional[str] = ..., types: _Optional[_Iterable[_Union[ConfiguredType, _Mapping]]] = ..., resources: _Optional[_Iterable[_Union[ConfiguredResource, _Mapping]]] = ...) -> None: ...

class ConfiguredType(_message.Message):
    __slots__ = ("type", "version", "acked")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    type: str
    version: str
    acked: str
    def __init__(self, type: _Optional[str] = ..., version: _Optional[str] = ..., acked: _Optional[str] = ...) -> None: ...

class ConfiguredResource(_message.Message):
    __slots__ = ("type", "name", "version", "json", "sources", "refused")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    type: str
    name: str
    version: str
    json: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    refused: str
    def __init__(self, type: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., json: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., refused: _Optional[str] = ...) -> None: ...

class ReachResponse(_message.Message):
    __slots__ = ("proxies", "acked", "reached")
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    proxies: int
    acked: int
    reached: _containers.RepeatedCompositeFieldContainer[ReachedProxy]
    def __init__(self, proxies: _Optional[int] = ..., acked: _Optional[int] = ..., reached: _Optional[_Iterable[_Union[ReachedProxy, _Mapping]]] = ...) -> None: ...

class ReachedProxy(_message.Message):
    __slots__ = ("proxy", "state")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    state: str
    def __init__(self, proxy: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("credential", "ttl_seconds")
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    credential: str
    ttl_seconds: int
    def __init__(self, credential: _Optional[str] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "expires")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires: float
    def __init__(self, token: _Optional[str] = ..., expires: _Optional[float] = ...) -> None: ...

class CertificatesRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    def __init__(self, namespace: _Optional[str] = ...) -> None: ...

class CertificatesResponse(_message.Message):
    __slots__ = ("certificates", "revocations", "crl", "crl_number")
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    CRL_FIELD_NUMBER: _ClassVar[int]
    CRL_NUMBER_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    revocations: _containers.RepeatedCompositeFieldContainer[Revocation]
    crl: int
    crl_number: int
    def __init__(self, certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ..., revocations: _Optional[_Iterable[_Union[Revocation, _Mapping]]] = ..., crl: _Optional[int] = ..., crl_number: _Optional[int] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("identity", "serial", "not_before", "not_after", "issuer", "state")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    identity: str
    serial: str
    not_before: float
    not_after: float
    issuer: int
    state: str
    def __init__(self, identity: _Optional[str] = ..., serial: _Optional[str] = ..., not_before: _Optional[float] = ..., not_after: _Optional[float] = ..., issuer: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class Revocation(_message.Message):
    __slots__ = ("proxy", "identity", "reason", "author", "time", "resource_version", "admitted", "outstanding", "credential")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    identity: str
    reason: str
    author: str
    time: float
    resource_version: int
    admitted: bool
    outstanding: _containers.RepeatedScalarFieldContainer[str]
    credential: str
    def __init__(self, proxy: _Optional[str] = ..., identity: _Optional[str] = ..., reason: _Optional[str] = ..., author: _Optional[str] = ..., time: _Optional[float] = ..., resource_version: _Optional[int] = ..., admitted: _Optional[bool] = ..., outstanding: _Optional[_Iterable[str]] = ..., credential: _Optional[str] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("proxy", "identity", "credential", "reason", "undo")
    PROXY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    proxy: str
    identity: str
    credential: str
    reason: str
    undo: bool
    def __init__(self, proxy: _Optional[str] = ..., identity: _Optional[str] = ..., credential: _Optional[str] = ..., reason: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class RevokeResponse(_message.Message):
    __slots__ = ("resource_version", "revocation", "proxies", "others")
    RESOURCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    REVOCATION_FIELD_NUMBER: _ClassVar[int]
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    resource_version: int
    revocation: Revocation
    proxies: _containers.RepeatedScalarFieldContainer[str]
    others: int
    def __init__(self, resource_version: _Optional[int] = ..., revocation: _Optional[_Union[Revocation, _Mapping]] = ..., proxies: _Optional[_Iterable[str]] = ..., others: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("token", "csr")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr: bytes
    def __init__(self, token: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

class TrustRequest(_message.Message):
    __slots__ = ("roots", "issuer")
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    roots: _containers.RepeatedScalarFieldContainer[str]
    issuer: str
    def __init__(self, roots: _Optional[_Iterable[str]] = ..., issuer: _Optional[str] = ...) -> None: ...

class TrustResponse(_message.Message):
    __slots__ = ("roots", "renew")
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    roots: _containers.RepeatedScalarFieldContainer[str]
    renew: bool
    def __init__(self, roots: _Optional[_Iterable[str]] = ..., renew: _Optional[bool] = ...) -> None: ...

class RotateRequest(_message.Message):
    __slots__ = ("of", "force")
    OF_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    of: str
    force: bool
    def __init__(self, of: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class RotationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RotationResponse(_message.Message):
    __slots__ = ("id", "of", "phase", "done", "requester", "since", "forced", "proxies", "missing", "lacking", "left_behind")
    ID_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    REQUESTER_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    PROXIES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    LACKING_FIELD_NUMBER: _ClassVar[int]
    LEFT_BEHIND_FIELD_NUMBER: _ClassVar[int]
    id: str
    of: str
    phase: str
    done: bool
    requester: str
    since: float
    forced: bool
    proxies: int
    missing: _containers.RepeatedCompositeFieldContainer[Missing]
    lacking: int
    left_behind: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., of: _Optional[str] = ..., phase: _Optional[str] = ..., done: _Optional[bool] = ..., requester: _Optional[str] = ..., since: _Optional[float] = ..., forced: _Optional[bool] = ..., proxies: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[Missing, _Mapping]]] = ..., lacking: _Optional[int] = ..., left_behind: _Optional[_Iterable[str]] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("kind", "who", "why")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    who: str
    why: str
    def __init__(self, kind: _Optional[str] = ..., who: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class Credential(_message.Message):
    __slots__ = ("chain", "roots", "trust_domain", "mesh", "mesh_domain", "xds_addresses", "api_addresses", "address", "app_address")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    MESH_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    XDS_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    API_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    APP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    chain: str
    roots: _containers.RepeatedScalarFieldContainer[str]
    trust_domain: str
    mesh: str
    mesh_domain: str
    xds_addresses: _containers.RepeatedScalarFieldContainer[str]
    api_addresses: _containers.RepeatedScalarFieldContainer[str]
    address: str
    app_address: str
    def __init__(self, chain: _Optional[str] = ..., roots: _Optional[_Iterable[str]] = ..., trust_domain: _Optional[str] = ..., mesh: _Optional[str] = ..., mesh_domain: _Optional[str] = ..., xds_addresses: _Optional[_Iterable[str]] = ..., api_addresses: _Optional[_Iterable[str]] = ..., address: _Optional[str] = ..., app_address: _Optional[str] = ...) -> None: ...
