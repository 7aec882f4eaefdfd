"""Benchmarks, each with its own main; see README.md."""

import os

# Read when gRPC is loaded: that a server ends is no news to a thousand connections.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
