"""The messages and services of the API, generated from protos/smc/v1 by `make generate`; never edited by hand."""
