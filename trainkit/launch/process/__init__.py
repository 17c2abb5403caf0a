"""The processes of a run, the machine that they find, and how they share the model."""
