"""Our own gRPC services: what operators, viewers and proxies may ask a replica for, and how it says no."""
