"""Fails when what is generated is not what its source generates now: smc/v1 from the .proto."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTO = "protos/smc/v1/smc.proto"


def main() -> int:
    with tempfile.TemporaryDirectory() as fresh:
        outputs = [f"--{kind}_out={fresh}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *outputs, PROTO], cwd=ROOT, check=True)
        stale = [
            made.name
            for made in sorted(Path(fresh, "smc", "v1").iterdir())
            if not (ROOT / "smc/v1" / made.name).exists()
            or (ROOT / "smc/v1" / made.name).read_bytes() != made.read_bytes()
        ]
    for name in stale:
        sys.stderr.write(f"smc/v1/{name} is not what {PROTO} generates: run make generate\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
