"""What an Envoy sidecar is configured with: pure functions from the compiled nouns of a mesh to xDS resources."""
