"""A whole mesh on one machine: what `smc demo` shows, and what the end-to-end tests stand on.

The programs in here run as processes of their own, so importing this package has to stay cheap.
"""
