"""The models that CrevNet is compared with in table 1, from the equations of their papers."""
