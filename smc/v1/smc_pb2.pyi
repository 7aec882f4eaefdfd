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
    __slots__ = ("line", "column", "field", "message", "hint")
    LINE_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    line: int
    column: int
    field: str
    message: str
    hint: str
    def __init__(self, line: _Optional[int] = ..., column: _Optional[int] = ..., field: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class Object(_message.Message):
    __slots__ = ("group", "version", "kind", "namespace", "name", "json", "text", "file", "line", "created", "author", "resource_version", "problems", "nacks")
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
    def __init__(self, group: _Optional[str] = ..., version: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., json: _Optional[str] = ..., text: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., created: _Optional[float] = ..., author: _Optional[str] = ..., resource_version: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ..., nacks: _Optional[_Iterable[_Union[Nack, _Mapping]]] = ...) -> None: ...

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

class JoinRequest(_message.Message):
    __slots__ = ("token", "csr")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr: bytes
    def __init__(self, token: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

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
