"""From a few rehearsed layers and sizes to the whole model, exactly. Pure."""
