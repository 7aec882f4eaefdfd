"""Who everybody in the mesh is: the authority, what it signs, and how its keys are kept."""
