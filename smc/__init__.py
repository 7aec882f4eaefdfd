"""SMC, the Service Mesh Controller."""
