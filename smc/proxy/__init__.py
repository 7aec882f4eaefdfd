"""`smc proxy run`: what stands beside Envoy on a machine, and all that has to run there."""
