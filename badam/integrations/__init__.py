"""What other libraries' loops need to know of block-coordinate training: callbacks and clipping."""
