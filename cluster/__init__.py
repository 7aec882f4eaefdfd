"""A replicated store and high availability on top of it; knows nothing of meshes."""
