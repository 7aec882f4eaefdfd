from __future__ import annotations

from smc.api.access import OPERATOR, PROXY, REPLICA, ROLES, VIEWER
from smc.v1 import smc_pb2 as pb


def test_the_table_names_every_method_of_the_service() -> None:
    methods = {m.name for m in pb.DESCRIPTOR.services_by_name["Mesh"].methods}
    assert ROLES.keys() == methods


def test_the_table_is_what_the_contract_says() -> None:
    may = {
        role: {method for method, roles in ROLES.items() if role in roles}
        for role in (OPERATOR, VIEWER, PROXY, REPLICA)
    }
    assert may == {
        OPERATOR: ROLES.keys() - {"ReportDenials", "Trust"},
        VIEWER: {
            *("Acks", "Certificates", "Config", "Denials", "Diff", "Explain", "Get", "List", "Proxies", "Reach"),
            *("Renew", "Rotation", "Wait"),
        },
        PROXY: {"Renew", "ReportDenials", "Trust"},
        REPLICA: {"Acks", "Denials", "Proxies"},
    }
