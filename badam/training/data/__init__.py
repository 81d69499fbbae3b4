"""From files and rows as people have them to batches of token ids."""
