"""From the rehearsal of one GPU's step to that of one of N ranks. Pure."""
