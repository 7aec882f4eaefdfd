"""The xDS transport protocol: what is sent to whom, when, and what came back."""
